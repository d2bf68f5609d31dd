"""Operations by name, and the usual ones as functions.

Arrays are numpy's or PyTorch's; results are of the same kind. float64 arrays are computed by the
fp64 reference, a GPU's tensors by its kernels in bf16, all else in fp32 on the processor.
"""

import ctypes

from . import _library as lib
from . import _arrays as at


class _Call:
    """An operation that is open."""

    def __init__(self, device, name, settings):
        text = ",".join(f"{key}={_text(value)}" for key, value in settings.items())
        self.handle = None
        self.device = device
        self.name = name
        self.kept = {}
        self.handle = lib.opened("operation_open", device._handle, f"{name}({text})".encode())

    def __enter__(self):
        return self

    def __exit__(self, *ignored):
        lib.get("operation_close", self.handle)

    def operands(self):
        found = {}
        operand = lib.Operand(size=ctypes.sizeof(lib.Operand))
        while lib.get("operation_operand", self.handle, len(found), ctypes.byref(operand)) == 0:
            found[operand.name.decode()] = _Operand(operand)
        return found

    def bind(self, name, x, stride=None):
        self.kept[name] = x
        numbers = None if stride is None else (ctypes.c_int64 * lib.DIMS)(*stride)
        lib.run("operation_bind", self.handle, name.encode(), at.pointer(x), numbers)

    def bind_input(self, operand, x, in_place=False):
        """Hands a tensor over as it lies where the operand may lie like that, else a copy.

        A state is copied, unless it is changed in place.
        """
        given = tuple(x.shape)
        own = x
        x = at.converted(x, operand.dtype)
        if _squeezed(given) != _squeezed(operand.shape):
            raise lib.Invalid(
                f"{self.name}: {operand.name} is {list(given)}, not {list(operand.shape)}"
            )
        stride = _strides_as(x, operand.shape) if operand.may_stride() else None
        if operand.role == lib.STATE and in_place:
            dense = stride is not None or at.is_dense(x, given, operand.dtype)
            if at.pointer(x) != at.pointer(own) or not dense:
                raise lib.Invalid(f"{self.name}: {operand.name} cannot be changed where it lies")
        elif operand.role == lib.STATE:
            x, stride = at.copied(at.dense(x)), None
        elif stride is None:
            x = at.dense(x)
        self.bind(operand.name, x, stride)


class _Operand:
    def __init__(self, operand):
        self.name = operand.name.decode()
        self.role = operand.role
        self.dtype = operand.dtype
        self.shape = tuple(operand.shape)
        self.optional = bool(operand.optional)
        self.strided = bool(operand.strided)

    def may_stride(self):
        # Rows of one matrix may have to share their stride with others: they are handed over dense.
        return self.strided and self.shape[:2] != (1, 1)


def _text(value):
    if isinstance(value, bool):
        return int(value)
    return repr(value) if isinstance(value, float) else value


def _squeezed(shape):
    return [n for n in shape if n != 1]


def _strides_as(x, shape):
    """The strides of x seen as `shape`; None where it has to be copied first."""
    own = [(n, s) for n, s in zip(x.shape, at.strides(x)) if n != 1]
    stride = []
    for n in shape:
        stride.append(own.pop(0)[1] if n != 1 else 0)
    # A dimension of 1 may have any stride: that of a dense tensor within the next one.
    for i in reversed(range(lib.DIMS)):
        if shape[i] == 1:
            stride[i] = 1 if i == lib.DIMS - 1 else stride[i + 1] * shape[i + 1]
    return stride if stride[-1] == 1 and all(s > 0 for s in stride) else None


def _split(arguments):
    tensors = {k: v for k, v in arguments.items() if at.is_array(v)}
    settings = {k: v for k, v in arguments.items() if v is not None and k not in tensors}
    return settings, tensors


def _bind_all(call, tensors, in_place=False):
    """Binds tensors by name. Some operands are there only after others are bound."""
    left = dict(tensors)
    while left:
        known = call.operands()
        ready = [name for name in left if name in known]
        if not ready:
            raise lib.Invalid(
                f"{call.name} has no operand '{next(iter(left))}' beside {', '.join(known)}"
            )
        for name in ready:
            call.bind_input(known[name], left.pop(name), in_place)


def _bind_outputs(call, like, want):
    for operand in call.operands().values():
        if operand.role != lib.OUTPUT or (operand.optional and operand.name not in want):
            continue
        call.bind(operand.name, at.empty(like, operand.shape, operand.dtype))


def _results(call):
    """The outputs and states that are bound, by name."""
    written = (lib.OUTPUT, lib.STATE)
    return {
        name: call.kept[name]
        for name, operand in call.operands().items()
        if operand.role in written and name in call.kept
    }


def _run(device, name, settings, tensors, want):
    """Runs an operation; its outputs and states by name."""
    like = next(iter(tensors.values()))
    with _Call(device, name, settings) as call:
        _bind_all(call, tensors)
        _bind_outputs(call, like, want)
        lib.run("operation_run", call.handle)
        results = _results(call)
        if device.backend == "cuda":
            device.synchronize()
    return results


def operands(name, device=None, **settings):
    """What an operation of these sizes takes and gives, a dict by name; see `call`."""
    with _Call(device or at.device("cpu"), name, settings) as call:
        return call.operands()


def call(name, want=(), device=None, **arguments):
    """Any operation: arrays are its operands, everything else its sizes and options.

    Returns its outputs, and its states as they are afterwards, as arrays of four dimensions.
    Optional outputs are left out unless `want` names them.
    """
    settings, tensors = _split(arguments)
    device = device or at.device_of(*tensors.values())
    return _run(device, name, settings, tensors, want)


class Operation:
    """An operation that stays open with its tensors bound, for those who run it again and again.

    Arguments are those of `call`; states are changed where they lie. `results` has its outputs and
    states by name, as arrays of four dimensions that every run() overwrites. On a GPU run() does
    not wait for the work; it goes to PyTorch's current stream of when the operation was opened.
    """

    def __init__(self, name, want=(), device=None, **arguments):
        settings, tensors = _split(arguments)
        like = next(iter(tensors.values()))
        self.device = device or at.device_of(*tensors.values())
        self.device.follow(like)
        self._call = _Call(self.device, name, settings)
        _bind_all(self._call, tensors, in_place=True)
        _bind_outputs(self._call, like, want)
        self.results = _results(self._call)

    def run(self):
        """Submits the operation."""
        lib.run("operation_run", self._call.handle)

    def close(self):
        """Gives back what it holds; its tensors are the caller's."""
        if self._call is not None:
            lib.get("operation_close", self._call.handle)
            self._call = None

    def __del__(self):
        if getattr(self, "_call", None) is not None:
            self.close()


def _backward(device, name, settings, tensors, outputs, dout):
    """The gradients of tensors, by their names."""
    want = ["d" + key for key in tensors]
    given = dict(tensors, dout=dout)
    with _Call(device, name + "_backward", settings) as probe:
        _bind_all(probe, given)
        for key, operand in probe.operands().items():
            if operand.role == lib.INPUT and key in outputs:
                given[key] = outputs[key]
    found = _run(device, name + "_backward", settings, given, want)
    return {key[1:]: found[key] for key in want if key in found}


def _left_for_backward(device, name, settings, tensors):
    """The optional outputs of a forward that its backward reads."""
    with _Call(device, name, settings) as forward:
        _bind_all(forward, tensors)
        outputs = [o.name for o in forward.operands().values() if o.role == lib.OUTPUT]
    with _Call(device, name + "_backward", settings) as backward:
        _bind_all(backward, tensors)
        read = [o.name for o in backward.operands().values() if o.role == lib.INPUT]
    return [key for key in outputs if key in read]


class _Applied:
    """An operation with a backward, on its tensors."""

    def __init__(self, name, arguments, shape, want):
        self.name = name
        self.settings, self.tensors = _split(arguments)
        self.device = at.device_of(*self.tensors.values())
        self.shape = shape
        self.want = list(want)

    def forward(self, for_backward):
        """A tuple of `out` and of what is wanted; and all outputs."""
        left = []
        if for_backward:
            left = _left_for_backward(self.device, self.name, self.settings, self.tensors)
        outputs = _run(self.device, self.name, self.settings, self.tensors, self.want + left)
        return (outputs["out"].reshape(self.shape), *(outputs[k] for k in self.want)), outputs

    def backward(self, outputs, dout):
        """The gradients of the tensors by name."""
        found = _backward(self.device, self.name, self.settings, self.tensors, outputs, dout)
        return {k: g.reshape(tuple(self.tensors[k].shape)) for k, g in found.items()}

    def recorded(self):
        from . import _autograd

        tensors = list(self.tensors.values())
        if not _autograd.wanted(tensors):
            return self.forward(False)[0]

        def gradients(outputs, dout):
            found = self.backward(outputs, dout)
            return [found[name] for name in self.tensors]

        results = _autograd.recorded(lambda: self.forward(True), gradients, tensors)
        return results if isinstance(results, tuple) else (results,)


def _apply(name, arguments, shape, dout, want=()):
    """Output `out` of an operation, then what was wanted, then gradients where there is a dout."""
    applied = _Applied(name, arguments, shape, want)
    if dout is not None:
        results, outputs = applied.forward(True)
        return *results, applied.backward(outputs, dout)
    if any(at.is_tensor(x) for x in applied.tensors.values()):
        results = applied.recorded()
    else:
        results, _ = applied.forward(False)
    return results if len(results) > 1 else results[0]


def attention(q, k, v, causal=True, window=None, scale=None, gate=None, dout=None):
    """Softmax attention of q [B, T, H, d] to k, v [B, S, H_kv, d]; H_kv divides H.

    window: a token sees itself and so many before it. gate: logits, whose sigmoid multiplies the
    output. With dout: (out, gradients of the inputs by name).
    """
    batch, seq_len, heads, d_head = q.shape
    mask = "window" if window is not None else "causal" if causal else "full"
    arguments = {
        "batch": batch,
        "seq_len": seq_len,
        "kv_len": k.shape[1],
        "n_heads": heads,
        "kv_heads": k.shape[2],
        "d_head": d_head,
        "mask": mask,
        "window": window,
        "scale": scale,
    }
    arguments.update(q=q, k=k, v=v, gate=gate)
    return _apply("attention", arguments, tuple(q.shape), dout)


def recurrence(x, gate, form="sigmoid", gate_bias=None, z=None, h0=None, dout=None):
    """h_t = g h_{t-1} + (1-g) x_t, g = sigmoid(gate + gate_bias), channel by channel, [B, T, D].

    form "log_decay": h_t = exp(gate) h_{t-1} + x_t. z: logits, whose sigmoid multiplies the output.
    h0: [B, D]. With dout: (out, gradients of the inputs by name).
    """
    batch, seq_len, width = x.shape
    arguments = {"batch": batch, "seq_len": seq_len, "width": width, "form": form}
    arguments.update(x=x, gate=gate, gate_bias=gate_bias, z=z, h0=h0)
    return _apply("recurrence", arguments, tuple(x.shape), dout)


def matrix_recurrence(
    q,
    k,
    v,
    log_decay=None,
    decay=None,
    rule="plain",
    bonus=None,
    beta=None,
    h0=None,
    scale=None,
    chunk=0,
    final_state=False,
    dout=None,
):
    """S_t = A_t S_{t-1} + k_t^T v_t, o_t = scale q_t S_t; q, k [B, T, H, d_k], v [B, T, H, d_v].

    log_decay: the logarithm of A_t, [B, T, H] or [B, T, H, d_k]; decay "constant": RetNet's, 1 -
    2^(-5-h). rule "bonus": o_t reads S_{t-1} + bonus k_t^T v_t, bonus [H, d_k]. rule "delta": k_t^T
    beta_t (v_t - k_t A_t S_{t-1}) is added, beta [B, T, H]. scale: 1/sqrt(d_k). chunk: that of the
    chunkwise form, 0: the kernel picks. Returns out, then the last state if `final_state`, then
    with dout the gradients of the inputs by name.
    """
    batch, seq_len, heads, d_k = q.shape
    if decay is None and log_decay is not None:
        decay = "diagonal" if tuple(log_decay.shape) == (batch, seq_len, heads, d_k) else "scalar"
    arguments = {
        "batch": batch,
        "seq_len": seq_len,
        "n_heads": heads,
        "d_k": d_k,
        "d_v": v.shape[-1],
        "decay": decay or "none",
        "rule": rule,
        "scale": scale,
        "chunk": chunk,
    }
    arguments.update(q=q, k=k, v=v, log_decay=log_decay, bonus=bonus, beta=beta, h0=h0)
    want = ["final_state"] if final_state else []
    return _apply("matrix_recurrence", arguments, tuple(v.shape), dout, want)


def linear_attention(q, k, v, **more):
    """matrix_recurrence without a decay."""
    return matrix_recurrence(q, k, v, decay="none", **more)


def retention(q, k, v, **more):
    """matrix_recurrence with RetNet's decays, a constant per head."""
    return matrix_recurrence(q, k, v, decay="constant", **more)


def scalar_decay(q, k, v, log_decay, **more):
    """matrix_recurrence with a decay per head and token (Mamba-2), log_decay [B, T, H]."""
    return matrix_recurrence(q, k, v, log_decay, decay="scalar", **more)


def gla(q, k, v, log_decay, **more):
    """matrix_recurrence with a decay per key channel and token (GLA), log_decay [B, T, H, d_k]."""
    return matrix_recurrence(q, k, v, log_decay, decay="diagonal", **more)


def rwkv6(q, k, v, log_decay, bonus, **more):
    """gla with RWKV-6's bonus [H, d_k] for the token itself."""
    return matrix_recurrence(q, k, v, log_decay, "diagonal", "bonus", bonus=bonus, **more)


def delta_rule(q, k, v, beta, log_decay=None, **more):
    """The delta rule; with log_decay [B, T, H] the gated one, with [B, T, H, d_k] KDA's."""
    return matrix_recurrence(q, k, v, log_decay, rule="delta", beta=beta, **more)


def rat_scan(v, gate, q, k, gate_bias, chunk, rope=True, scale=None):
    """RAT inside chunks: v, gate [B, T, H, d], q, k [B, T, G, d], gate_bias [H, d].

    Returns a dict: v_scan, own_score, q_out, and each chunk's last key and value, k_chunk, v_chunk
    [B, ceil(T/chunk), H, d].
    """
    batch, seq_len, heads, d_head = v.shape
    found = call(
        "rat_scan",
        batch=batch,
        seq_len=seq_len,
        n_heads=heads,
        groups=q.shape[2],
        d_head=d_head,
        chunk=chunk,
        rope=rope,
        scale=scale,
        v=v,
        gate=gate,
        q=q,
        k=k,
        gate_bias=gate_bias,
    )
    found["own_score"] = found["own_score"].reshape((batch, seq_len, heads))
    return found


def rat(z, v, gate, q, k, gate_bias, chunk, rope=True, scale=None):
    """RAT: rat_scan, then attention to the chunks before and to the token's own running pair.

    Its output is multiplied with sigmoid(z); z [B, T, H, d].
    """
    batch, seq_len, heads, d_head = v.shape
    scan = rat_scan(v, gate, q, k, gate_bias, chunk, rope, scale)
    found = call(
        "attention",
        batch=batch,
        seq_len=seq_len,
        n_heads=heads,
        groups=q.shape[2],
        d_head=d_head,
        mask="chunk",
        chunk=chunk,
        scale=scale,
        q=scan["q_out"],
        k=scan["k_chunk"],
        v=scan["v_chunk"],
        own_score=scan["own_score"],
        own_value=scan["v_scan"],
        gate=z,
    )
    return found["out"]


def selective_scan(u, dt, b, c, log_rate, skip=None, z=None, h0=None, dout=None):
    """Mamba's selective scan: u, dt [B, T, D], b, c [B, T, N], log_rate [D, N].

    h_t = exp(-exp(log_rate) dt_t) h_{t-1} + dt_t u_t b_t, out_t = h_t c_t + skip u_t, times silu(z)
    where z is given. With dout: (out, gradients of the inputs by name).
    """
    batch, seq_len, width = u.shape
    arguments = {"batch": batch, "seq_len": seq_len, "width": width, "state": b.shape[-1]}
    arguments.update(u=u, dt=dt, b=b, c=c, log_rate=log_rate, skip=skip, z=z, h0=h0)
    return _apply("selective_scan", arguments, tuple(u.shape), dout)
