"""Operations against formulas in fp64, on random data."""

import numpy as np
import pytest

import blocks

B, T, H, D = 2, 37, 4, 16


def randoms(*shapes, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def error(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(q, k, v, visible, scale=None):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    repeat = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeat, 2), np.repeat(v, repeat, 2)
    scores = np.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    return np.einsum("bhts,bshd->bthd", softmax(np.where(visible, scores, -np.inf)), v)


def ages(queries, keys):
    return np.arange(queries)[:, None] - np.arange(keys)[None, :]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention(kv_heads):
    q, k, v = randoms((B, T, H, D), (B, T, kv_heads, D), (B, T, kv_heads, D))
    expected = attention(q, k, v, ages(T, T) >= 0)
    assert error(blocks.attention(q, k, v, causal=True), expected) < 1e-5


def test_attention_to_all_and_to_a_window():
    q, k, v = randoms((B, T, H, D), (B, 50, H, D), (B, 50, H, D))
    expected = attention(q, k, v, np.full((T, 50), True), 0.3)
    assert error(blocks.attention(q, k, v, causal=False, scale=0.3), expected) < 1e-5
    k, v = k[:, :T], v[:, :T]
    age = ages(T, T)
    expected = attention(q, k, v, (age >= 0) & (age <= 5))
    assert error(blocks.attention(q, k, v, window=5), expected) < 1e-5


def test_gated_attention_of_strided_inputs():
    (mixed,) = randoms((B, H, T, 4 * D))
    q, k, v, gate = (mixed[..., i * D : (i + 1) * D].swapaxes(1, 2) for i in range(4))
    expected = attention(q, k, v, ages(T, T) >= 0) * sigmoid(gate.astype(np.float64))
    assert error(blocks.attention(q, k, v, gate=gate), expected) < 1e-5
    flipped = blocks.attention(q[..., ::-1], k[..., ::-1], v, gate=gate)
    assert error(flipped, expected) < 1e-5


def test_float64_is_computed_in_float64():
    q, k, v = randoms((B, T, H, D), (B, T, H, D), (B, T, H, D), dtype=np.float64)
    out = blocks.attention(q, k, v)
    assert out.dtype == np.float64
    assert error(out, attention(q, k, v, ages(T, T) >= 0)) < 1e-12


def differences(function, inputs, dout, step=1e-5, seed=5):
    """Directional derivatives of sum(dout * function) along random directions, one per input."""
    found = {}
    for name, x in inputs.items():
        (direction,) = randoms(x.shape, seed=seed, dtype=np.float64)
        ends = [function(**{**inputs, name: x + s * step * direction}) for s in (1, -1)]
        found[name] = (direction, np.sum(dout * (ends[0] - ends[1])) / (2 * step))
    return found


def check_gradients(function, inputs, out_shape, tolerance=1e-4):
    """In fp64 against differences, and in fp32 against fp64."""
    (dout,) = randoms(out_shape, seed=9, dtype=np.float64)
    out, gradients = function(**inputs, dout=dout)
    assert set(gradients) == set(inputs)
    for name, (direction, expected) in differences(function, inputs, dout).items():
        assert np.sum(gradients[name] * direction) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    narrow = {name: x.astype(np.float32) for name, x in inputs.items()}
    out32, gradients32 = function(**narrow, dout=dout.astype(np.float32))
    assert error(out32, out) < tolerance
    for name in inputs:
        assert gradients32[name].shape == inputs[name].shape
        assert error(gradients32[name], gradients[name]) < tolerance


def test_gradients_of_attention():
    q, k, v, gate = randoms(
        (B, T, H, D), (B, T, 2, D), (B, T, 2, D), (B, T, H, D), dtype=np.float64
    )
    check_gradients(blocks.attention, dict(q=q, k=k, v=v), q.shape)
    check_gradients(blocks.attention, dict(q=q, k=k, v=v, gate=gate), q.shape)


def test_recurrence():
    x, gate, bias, z, h0 = randoms((B, T, D), (B, T, D), (D,), (B, T, D), (B, D), dtype=np.float64)
    h, expected = h0, []
    for t in range(T):
        g = sigmoid(gate[:, t] + bias)
        h = g * h + (1 - g) * x[:, t]
        expected.append(h * sigmoid(z[:, t]))
    inputs = dict(x=x, gate=gate, gate_bias=bias, z=z, h0=h0)
    narrow = {name: a.astype(np.float32) for name, a in inputs.items()}
    assert error(blocks.recurrence(**narrow), np.stack(expected, 1)) < 1e-5
    check_gradients(blocks.recurrence, inputs, x.shape)


def test_recurrence_with_a_log_decay():
    x, gate = randoms((B, T, D), (B, T, D), dtype=np.float64)
    gate = -np.abs(gate)
    h, expected = 0, []
    for t in range(T):
        h = np.exp(gate[:, t]) * h + x[:, t]
        expected.append(h)
    out = blocks.recurrence(x.astype(np.float32), gate.astype(np.float32), form="log_decay")
    assert error(out, np.stack(expected, 1)) < 1e-5


DK, DV = 16, 24
GLA_STEP = {"batch": B, "n_heads": H, "d_k": DK, "d_v": DV, "decay": "diagonal"}


def matrix_inputs():
    q, k, v, decay, beta, bonus, h0 = randoms(
        (B, T, H, DK),
        (B, T, H, DK),
        (B, T, H, DV),
        (B, T, H, DK),
        (B, T, H),
        (H, DK),
        (B, H, DK, DV),
        dtype=np.float64,
    )
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    diagonal = -0.2 * np.abs(decay)
    return dict(q=q, k=k, v=v, diagonal=diagonal, beta=sigmoid(beta), bonus=bonus, h0=h0)


def matrix_formula(q, k, v, log_decay, rule="plain", beta=None, bonus=None, h0=0):
    """log_decay [B, T, H, d_k]."""
    state = np.zeros((B, H, DK, DV)) + h0
    out = np.empty_like(v)
    for t in range(T):
        old = state
        state = np.exp(log_decay[:, t])[..., None] * state
        value = v[:, t]
        if rule == "delta":
            value = beta[:, t][..., None] * (value - np.einsum("bhk,bhkv->bhv", k[:, t], state))
        update = k[:, t][..., None] * value[..., None, :]
        state = state + update
        read = old + bonus[..., None] * update if rule == "bonus" else state
        out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], read) / np.sqrt(DK)
    return out, state


def forms():
    i = matrix_inputs()
    scalar = i["diagonal"][..., 0]
    whole = np.broadcast_to(scalar[..., None], i["diagonal"].shape)
    retention = np.log1p(-np.exp2(-5.0 - np.arange(H)))[:, None] + np.zeros((B, T, H, DK))
    none = np.zeros((B, T, H, DK))
    delta, bonus = dict(rule="delta", beta=i["beta"]), dict(rule="bonus", bonus=i["bonus"])
    return {
        "linear_attention": (blocks.linear_attention, {}, none, {}),
        "retention": (blocks.retention, {}, retention, {}),
        "scalar_decay": (blocks.scalar_decay, dict(log_decay=scalar), whole, {}),
        "gla": (blocks.gla, dict(log_decay=i["diagonal"]), i["diagonal"], {}),
        "gla with a state": (
            blocks.gla,
            dict(log_decay=i["diagonal"], h0=i["h0"]),
            i["diagonal"],
            dict(h0=i["h0"]),
        ),
        "rwkv6": (
            blocks.rwkv6,
            dict(log_decay=i["diagonal"], bonus=i["bonus"]),
            i["diagonal"],
            bonus,
        ),
        "delta_rule": (blocks.delta_rule, dict(beta=i["beta"]), none, delta),
        "gated_delta_rule": (
            blocks.delta_rule,
            dict(beta=i["beta"], log_decay=scalar),
            whole,
            delta,
        ),
        "kda": (
            blocks.delta_rule,
            dict(beta=i["beta"], log_decay=i["diagonal"]),
            i["diagonal"],
            delta,
        ),
    }


@pytest.mark.parametrize("name", forms())
def test_matrix_recurrence(name):
    function, more, decay, formula = forms()[name]
    i = matrix_inputs()
    qkv = {key: i[key] for key in "qkv"}
    expected, state = matrix_formula(**qkv, log_decay=decay, **formula)
    inputs = {key: x.astype(np.float32) for key, x in {**qkv, **more}.items()}
    for chunk in (0, 1, 8):
        out, last = function(**inputs, chunk=chunk, final_state=True)
        assert error(out, expected) < 2e-5
        assert error(last.reshape(state.shape), state) < 2e-5
    check_gradients(function, {**qkv, **more}, i["v"].shape)


def rat_formula(z, v, gate, q, k, bias, chunk):
    """Without positions; q, k [B, T, G, d]."""
    heads = np.arange(H) % q.shape[2]
    q, k = q[:, :, heads], k[:, :, heads]
    out = np.empty_like(v)
    keys, values = [], []
    for t in range(T):
        if t % chunk == 0:
            kt = vt = np.zeros_like(v[:, 0])
        g = sigmoid(gate[:, t] + bias)
        kt, vt = g * kt + (1 - g) * k[:, t], g * vt + (1 - g) * v[:, t]
        scores = np.stack([np.sum(q[:, t] * key, -1) for key in keys + [kt]], -1) / np.sqrt(D)
        o = np.einsum("bhs,bhsd->bhd", softmax(scores), np.stack(values + [vt], 2))
        out[:, t] = o * sigmoid(z[:, t])
        if t % chunk == chunk - 1:
            keys.append(kt)
            values.append(vt)
    return out


@pytest.mark.parametrize("groups", [1, 2])
def test_rat(groups):
    full, shared = (B, T, H, D), (B, T, groups, D)
    z, v, gate, q, k, bias = randoms(full, full, full, shared, shared, (H, D), dtype=np.float64)
    expected = rat_formula(z, v, gate, q, k, bias, 8)
    narrow = [x.astype(np.float32) for x in (z, v, gate, q, k, bias)]
    assert error(blocks.rat(*narrow, chunk=8, rope=False), expected) < 1e-5
    assert error(blocks.rat(*narrow, chunk=8, rope=True), expected) > 1e-2


def test_selective_scan():
    n = 5
    u, dt, z, b, c, rate, skip = randoms(
        (B, T, D), (B, T, D), (B, T, D), (B, T, n), (B, T, n), (D, n), (D,), dtype=np.float64
    )
    dt = np.abs(dt)
    h, expected = 0, []
    for t in range(T):
        decay = np.exp(-np.exp(rate) * dt[:, t][..., None])
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * b[:, t][:, None]
        y = np.einsum("bdn,bn->bd", h, c[:, t]) + skip * u[:, t]
        expected.append(y * z[:, t] * sigmoid(z[:, t]))
    inputs = dict(u=u, dt=dt, b=b, c=c, log_rate=rate, skip=skip, z=z)
    narrow = {name: x.astype(np.float32) for name, x in inputs.items()}
    assert error(blocks.selective_scan(**narrow), np.stack(expected, 1)) < 1e-5
    check_gradients(blocks.selective_scan, inputs, u.shape)


def test_any_operation_by_its_name():
    x, y = randoms((T, D), (T, D))
    found = blocks.call("gelu_gate", seq_len=T, width=D, gate=y, x=x)["out"].reshape(T, D)
    cubic = np.sqrt(2 / np.pi) * (y + 0.044715 * y.astype(np.float64) ** 3)
    assert error(found, x * y * (1 + np.tanh(cubic)) / 2) < 1e-5
    known = blocks.operands("attention", batch=B, seq_len=T, n_heads=H, d_head=D)
    assert known["lse"].shape == (1, B, H, T) and known["lse"].optional


def test_a_step_leaves_its_state_alone_and_returns_the_next():
    i = {k: x.astype(np.float32) for k, x in matrix_inputs().items()}
    state = np.zeros((B, H, DK, DV), np.float32)
    out = []
    for t in range(T):
        row = {key: i[key][:, t : t + 1] for key in "qkv"}
        before = state.copy()
        found = blocks.call(
            "matrix_recurrence_step",
            **GLA_STEP,
            log_decay=i["diagonal"][:, t : t + 1],
            state=state,
            **row,
        )
        assert np.array_equal(before, state)
        state = found["state"]
        out.append(found["out"])
    expected = blocks.gla(i["q"], i["k"], i["v"], i["diagonal"])
    assert error(np.concatenate(out, 1), expected.astype(np.float64)) < 1e-5


def test_inputs_are_left_alone_whatever_the_order_of_operands():
    x, weight = randoms((T, 32), (48, 32))
    ones = np.ones(32, np.float32)
    given = x.copy()
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) @ weight.T
    for order in (("x", "norm_weight", "weight"), ("weight", "norm_weight", "x")):
        tensors = {"x": given, "norm_weight": ones, "weight": weight}
        tensors = {name: tensors[name] for name in order}
        found = blocks.call("norm_linear", batch=T, d_in=32, d_out=48, **tensors)
        assert np.array_equal(given, x)
        assert error(found["y"].reshape(T, 48), expected) < 1e-5


def test_an_operation_stays_open_and_changes_its_state_in_place():
    i = {k: x.astype(np.float32) for k, x in matrix_inputs().items()}
    state = np.zeros((B, H, DK, DV), np.float32)
    row = {key: i[key][:, :1].copy() for key in "qkv"}
    decay = i["diagonal"][:, :1].copy()
    step = blocks.Operation(
        "matrix_recurrence_step",
        **GLA_STEP,
        log_decay=decay,
        state=state,
        **row,
    )
    out = []
    for t in range(T):
        for key in "qkv":
            row[key][:] = i[key][:, t : t + 1]
        decay[:] = i["diagonal"][:, t : t + 1]
        step.run()
        out.append(step.results["out"].copy())
    assert step.results["state"] is state
    expected = blocks.gla(i["q"], i["k"], i["v"], i["diagonal"])
    assert error(np.concatenate(out, 1), expected.astype(np.float64)) < 1e-5
    step.close()
    with pytest.raises(blocks.Invalid, match="state cannot be changed where it lies"):
        blocks.Operation(
            "matrix_recurrence_step",
            batch=B,
            n_heads=H,
            d_k=DK,
            d_v=DV,
            state=state.astype(np.float64),
            **row,
        )


def test_mistakes_are_named():
    q, k, v = randoms((B, T, H, D), (B, T, 3, D), (B, T, 3, D))
    with pytest.raises(blocks.Invalid, match="kv_heads"):
        blocks.attention(q, k, v)
    with pytest.raises(blocks.Invalid, match="v is"):
        blocks.attention(q, k[:, :, :2], v[:, :, :2, :8])
    with pytest.raises(blocks.Invalid, match="no operand 'colour'"):
        blocks.call("gelu", width=3, x=q[0, 0, 0, :3], colour=q)
    with pytest.raises(blocks.Invalid, match="'gate' is missing"):
        blocks.call("recurrence", seq_len=T, width=D, x=q[0, :, 0])
    with pytest.raises(blocks.Invalid, match="no backend 'abacus'"):
        blocks.Device("abacus")
