"""Who computes the cases, and how each is called.

A provider has a builder for each kind of case that it takes. A builder gets the problem and hands
back a function that launches the work once and returns what it gave, by name: "out", or a gradient
by "d" and its tensor; of a layer "y", "dx", and the gradients of parameters by our names. Layouts
and types that a library wants are made by its builder, outside of what is timed.
"""

import collections
import functools
import importlib.metadata
import importlib.util

import blocks
import torch
import torch.nn.functional as F
from blocks._library import INPUT

import recipe
from cases import FAMILIES, matches


def differentiated(forward, tensors, dout):
    """A launch of the backward alone: the gradients of forward(**tensors), recorded once."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    with torch.enable_grad():
        out = forward(**leaves)

    def launch():
        found = torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)
        return {"d" + name: x for name, x in zip(leaves, found)}

    return launch


def applied(problem, forward, tensors):
    """The launch of a forward, or of a backward, of forward(**tensors)."""
    if problem.dout is not None:
        return differentiated(forward, tensors, problem.dout)
    return lambda: {"out": forward(**tensors)}


# ---- ours, and what our C programs open besides ----


@functools.lru_cache(maxsize=None)
def _device(backend, provider=""):
    """A device of libblocks that prefers a provider's kernels for the operations of attention."""
    if not provider:
        return blocks.device(backend, 0 if backend == "cuda" else None)
    return blocks.Device(backend, 0, provider=f"attention={provider},attention_backward={provider}")


def _poison(operation):
    """What an operation is going to write is no number before."""
    for x in operation.results.values():
        x.fill_(float("nan"))


def _operation(problem, name, settings, tensors, provider=""):
    """Launches one of our operations, or its backward.

    What a backward reads of the forward is made by our own kernels, whoever's the backward is.
    """
    device = _device(problem.device, provider)
    if problem.dout is None:
        forward = blocks.Operation(name, device=device, **settings, **tensors)
        _poison(forward)
        return _launcher(forward)
    operands = blocks.operands(name + "_backward", device=device, **settings)
    read = [n for n, operand in operands.items() if operand.role == INPUT]
    ours = _device(problem.device)
    forward = blocks.Operation(name, device=ours, want=read, **settings, **tensors)
    forward.run()
    given = {n: x for n, x in forward.results.items() if n in read}
    backward = blocks.Operation(
        name + "_backward", device=device, dout=problem.dout, **settings, **tensors, **given
    )
    forward.close()
    _poison(backward)
    return _launcher(backward)


def _launcher(operation):
    def launch():
        operation.run()
        return operation.results

    return launch


def _our_attention(provider):
    def build(problem):
        c = problem.case
        settings = {"batch": c.batch, "seq_len": c.seq_len, "n_heads": c.n_heads}
        settings.update(kv_heads=c.kv_heads, d_head=c.d_k, mask="causal")
        return _operation(problem, "attention", settings, problem.inputs, provider)

    return build


def _our_recurrence(problem):
    c = problem.case
    settings = {"batch": c.batch, "seq_len": c.seq_len, "width": c.n_heads * c.d_k}
    settings["form"] = "log_decay"
    launch = _operation(problem, "recurrence", settings, problem.inputs)
    shape = (c.batch, c.seq_len, -1)
    return lambda: {name: x.reshape(shape) for name, x in launch().items()}


def _our_matrix(problem):
    c = problem.case
    decay, rule = FAMILIES[c.family]
    settings = {"batch": c.batch, "seq_len": c.seq_len, "n_heads": c.n_heads}
    settings.update(d_k=c.d_k, d_v=c.d_v, decay=decay, rule=rule)
    return _operation(problem, "matrix_recurrence", settings, problem.inputs)


class _OurLayer:
    """One of our layers; `verify` compares each of its operations with fp64."""

    def __init__(self, problem):
        c = problem.case
        self.problem = problem
        self.train = c.what == "train"
        self.layer = blocks.Layer(
            c.pattern,
            c.d_model,
            c.batch,
            c.seq_len,
            mode=c.what,
            mixer_only=c.mixer_only,
            device=_device(problem.device),
        )
        for name, values in problem.parameters.items():
            self.layer[name] = values
        self.y = torch.full_like(problem.inputs["x"], float("nan"))
        self.dx = self.y.clone() if self.train else None

    def __call__(self):
        self.layer.forward(self.problem.inputs["x"], out=self.y)
        if not self.train:
            return {"y": self.y}
        self.layer.backward(self.problem.inputs["dy"], out=self.dx)
        return {"y": self.y, "dx": self.dx}

    def gradients(self):
        """Of the parameters, after the last launch."""
        names = list(self.layer) if self.train else []
        return {n: torch.from_numpy(self.layer.gradient(n)).to(self.y.device) for n in names}

    def verify(self):
        """The worst operation of the last launch, as a share of the error it may have."""
        return self.layer.verify()


def _our_rat_step(problem):
    """Norm and projection, RAT's step on the caches, projection and residual."""
    c, p, inputs = problem.case, problem.parameters, problem.inputs
    d, device = c.d_model // c.n_heads, _device(problem.device)
    width = p["in_proj.weight"].shape[0]
    project = blocks.Operation(
        "norm_linear",
        device=device,
        batch=c.batch,
        d_in=c.d_model,
        d_out=width,
        x=inputs["x"],
        norm_weight=p["input_norm.weight"],
        weight=p["in_proj.weight"],
    )
    columns = project.results["y"].reshape(c.batch, 1, width)
    sizes = [c.d_model] * 3 + [2 * d] * 2
    names = ("z", "v", "gate", "q", "k")
    split = {n: x.unflatten(-1, (-1, d)) for n, x in zip(names, columns.split(sizes, -1))}
    position = torch.tensor([c.seq_len - 1], dtype=torch.int32, device=problem.device)
    step = blocks.Operation(
        "rat_step",
        device=device,
        batch=c.batch,
        seq_len=c.seq_len,
        n_heads=c.n_heads,
        groups=2,
        d_head=d,
        chunk=16,
        position=position,
        gate_bias=p["gate_bias"].float().unflatten(0, (c.n_heads, d)),
        k_state=inputs["k_state"].clone().unflatten(-1, (c.n_heads, d)),
        v_state=inputs["v_state"].clone().unflatten(-1, (c.n_heads, d)),
        k_chunk=inputs["k_cache"].transpose(1, 2),
        v_chunk=inputs["v_cache"].transpose(1, 2),
        **split,
    )
    out = blocks.Operation(
        "linear_residual",
        device=device,
        batch=c.batch,
        d_in=c.d_model,
        d_out=c.d_model,
        x=step.results["out"].reshape(c.batch, c.d_model),
        weight=p["out_proj.weight"],
        residual=inputs["x"],
    )
    for tensor in (project.results["y"], step.results["out"], out.results["y"]):
        tensor.fill_(float("nan"))
    y = out.results["y"].reshape(c.batch, c.d_model)

    def launch():
        project.run()
        step.run()
        out.run()
        return {"y": y}

    return launch


# ---- PyTorch ----


def _sdpa(backend):
    def build(problem):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        grouped = problem.case.kv_heads != problem.case.n_heads

        def forward(q, k, v):
            with sdpa_kernel(chosen):
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return out.transpose(1, 2)

        return applied(problem, forward, problem.inputs)

    return build


def _module_launch(problem, module, call, names):
    """Forward, or forward and backward, of a module; names: our names of its parameters."""
    x = problem.inputs["x"]
    if problem.case.what != "train":

        def launch():
            with torch.no_grad():
                return {"y": call(x)}

        return launch
    leaf = x.detach().requires_grad_()
    parameters = dict(module.named_parameters())

    def launch():
        y = call(leaf)
        found = torch.autograd.grad(y, [leaf, *parameters.values()], problem.inputs["dy"])
        results = {names[name]: g for name, g in zip(parameters, found[1:])}
        return {"y": y.detach(), "dx": found[0], **results}

    return launch


def _load(module, problem, names):
    for name, parameter in module.named_parameters():
        values = problem.parameters[names[name]]
        parameter.data = values.to(parameter.dtype).reshape(parameter.shape).clone()


def _recipe_module(problem, step=False):
    c, makers = problem.case, {"rat": recipe.Rat, "ratplus": recipe.RatPlus}
    wanted = ("chunk", "groups", "dilation", "window", "initial")
    sizes = {name: value for name, value in c.arguments.items() if name in wanted}
    maker = recipe.RatStep if step else makers[c.block]
    module = maker(c.d_model, c.n_heads, c.seq_len, **sizes).to(problem.device)
    angles = {name: x.clone() for name, x in module.named_buffers()}
    module.to(problem.dtype)
    # These stay fp32, whatever the parameters are.
    for name, x in angles.items():
        setattr(module, name, x)
    names = {name: name for name, _ in module.named_parameters()}
    _load(module, problem, names)
    compiled = module if problem.device == "cpu" else torch.compile(module, dynamic=False)
    return module, compiled, names


def _recipe_layer(problem):
    module, compiled, names = _recipe_module(problem)
    module.prepare(problem.device)
    return _module_launch(problem, module, lambda x: compiled(x, module.mask), names)


def _recipe_rat_step(problem):
    _, compiled, _ = _recipe_module(problem, step=True)
    inputs = dict(problem.inputs, k_state=problem.inputs["k_state"].clone())
    inputs["v_state"] = inputs["v_state"].clone()

    def launch():
        with torch.no_grad():
            return {"y": compiled(**inputs)}

    return launch


# ---- other libraries ----


def _fla_matrix(problem):
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

    calls = {
        "linear_attention": lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False),
        "retention": chunk_retention,
        "scalar_decay": lambda q, k, v, log_decay: chunk_simple_gla(q, k, v, log_decay),
        "gla": lambda q, k, v, log_decay: chunk_gla(q, k, v, log_decay),
        "delta": lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta),
        "gated_delta": lambda q, k, v, log_decay, beta: chunk_gated_delta_rule(
            q, k, v, log_decay, beta
        ),
        "kda": lambda q, k, v, log_decay, beta: chunk_kda(q, k, v, log_decay, beta),
    }
    call = calls[problem.case.family]
    return applied(problem, lambda **tensors: call(**tensors)[0], _wide_gates(problem))


def _wide_gates(problem):
    """Decays a head in fp32, as the layers of these libraries make them."""
    tensors = dict(problem.inputs)
    if FAMILIES[problem.case.family][0] == "scalar":
        tensors["log_decay"] = tensors["log_decay"].float()
    return tensors


def _fla_recurrence(problem):
    from fla.ops.hgrn import chunk_hgrn

    return applied(problem, lambda x, gate: chunk_hgrn(x, gate)[0], problem.inputs)


def _fla_layer(problem):
    import fla.layers

    c, heads = problem.case, problem.case.n_heads
    makers = {
        "gla": lambda: fla.layers.GatedLinearAttention(hidden_size=c.d_model, num_heads=heads),
        "retnet": lambda: fla.layers.MultiScaleRetention(hidden_size=c.d_model, num_heads=heads),
        "gated_delta_net": lambda: fla.layers.GatedDeltaNet(
            hidden_size=c.d_model, num_heads=heads, head_dim=c.d_model // heads, expand_v=2
        ),
    }
    module = makers[c.block]().to(problem.device, problem.dtype)
    module.train(c.what == "train")
    ours = blocks.Layer(c.pattern, c.d_model, mode="description", mixer_only=True)
    names = {n: n.replace("g_norm_swish_gate", "g_norm") for n, _ in module.named_parameters()}
    names = {n: ours.synonyms.get(name, name) for n, name in names.items()}
    _load(module, problem, names)
    return _module_launch(problem, module, lambda x: module(x)[0], names)


def _fa4(problem):
    from flash_attn.cute import flash_attn_func

    def forward(q, k, v):
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return applied(problem, forward, problem.inputs)


def _flash_qla(problem):
    from flash_qla import chunk_gated_delta_rule

    def forward(q, k, v, log_decay, beta):
        return chunk_gated_delta_rule(q, k, v, log_decay, beta)[0]

    tensors = _wide_gates(problem)
    tensors["beta"] = tensors["beta"].float()
    return applied(problem, forward, tensors)


def _flashinfer(problem):
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    c = problem.case
    q, k, v = (problem.inputs[name].flatten(0, 1) for name in ("q", "k", "v"))
    beta = problem.inputs["beta"].float().flatten(0, 1)
    decay = None
    if "log_decay" in problem.inputs:
        decay = problem.inputs["log_decay"].float().exp().flatten(0, 1)
    ends = torch.arange(c.batch + 1, device=problem.device, dtype=torch.int64) * c.seq_len

    def launch():
        out = chunk_gated_delta_rule(q, k, v, decay, beta, cu_seqlens=ends)
        return {"out": out.unflatten(0, (c.batch, c.seq_len))}

    return launch


def _mamba_ssm(problem):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    c = problem.case
    rate = torch.full((c.n_heads,), -1.0, device=problem.device)

    def forward(q, k, v, log_decay):
        # Its step is the negative logarithm of our decay, and multiplies the values, too.
        dt = -log_decay.float()
        values = (v / dt.unsqueeze(-1)).to(v.dtype)
        return mamba_chunk_scan_combined(values, dt, rate, k, q * c.d_k**-0.5, chunk_size=256)

    return applied(problem, forward, problem.inputs)


# ---- the table ----

FIELDS = "name package module builders device takes"
Provider = collections.namedtuple("Provider", FIELDS, defaults=("", lambda case: True))

# `package` is what pip installs (requirements.txt), `module` what it is imported as; `device`: the
# only one on which it is compared; `takes`: the cases of its builders' kinds that it computes.
PROVIDERS = (
    Provider(
        "blocks",
        "blocks",
        "blocks",
        {
            "attention": _our_attention(""),
            "recurrence": _our_recurrence,
            "matrix": _our_matrix,
            "layer": _OurLayer,
            "rat_step": _our_rat_step,
        },
    ),
    Provider("cudnn", "blocks", "blocks", {"attention": _our_attention("cudnn")}, "cuda"),
    Provider("flash3", "blocks", "blocks", {"attention": _our_attention("flash3")}, "cuda"),
    Provider("fa4", "flash-attn-4", "flash_attn.cute", {"attention": _fa4}, "cuda"),
    Provider("torch-cudnn", "torch", "torch", {"attention": _sdpa("CUDNN_ATTENTION")}, "cuda"),
    Provider("torch-flash", "torch", "torch", {"attention": _sdpa("FLASH_ATTENTION")}),
    Provider("torch-math", "torch", "torch", {"attention": _sdpa("MATH")}, "cpu"),
    Provider(
        "recipe",
        "torch",
        "torch",
        {"layer": _recipe_layer, "rat_step": _recipe_rat_step},
        takes=lambda case: case.block in ("rat", "ratplus"),
    ),
    Provider(
        "fla",
        "flash-linear-attention",
        "fla",
        {"recurrence": _fla_recurrence, "matrix": _fla_matrix, "layer": _fla_layer},
        "cuda",
        lambda case: case.block not in ("rat", "ratplus"),
    ),
    Provider(
        "flashinfer",
        "flashinfer-python",
        "flashinfer",
        {"matrix": _flashinfer},
        "cuda",
        lambda case: case.block in ("delta_forward", "gated_delta_forward"),
    ),
    Provider(
        "flash_qla",
        "flash-qla",
        "flash_qla",
        {"matrix": _flash_qla},
        "cuda",
        lambda case: case.family == "gated_delta",
    ),
    Provider(
        "mamba_ssm",
        "mamba-ssm",
        "mamba_ssm",
        {"matrix": _mamba_ssm},
        "cuda",
        lambda case: case.block == "scalar_decay_forward",
    ),
)


def takers(case, device, globs):
    """The providers that compute a case, ours first; of rivals those that `globs` names."""
    return [
        p
        for p in PROVIDERS
        if case.kind in p.builders
        and p.device in ("", device)
        and p.takes(case)
        and (p.name == "blocks" or matches(p.name, globs))
    ]


def missing(provider):
    """What is said of a provider that is not installed; None if it is."""
    try:
        found = importlib.util.find_spec(provider.module)
    except ModuleNotFoundError:
        found = None
    return None if found else f"{provider.package} is not installed"


def version(provider):
    """ "flash-attn-4 4.0.0" of what is installed."""
    if provider.module == "blocks":
        return f"blocks {blocks.__version__}"
    try:
        return f"{provider.package} {importlib.metadata.version(provider.package)}"
    except importlib.metadata.PackageNotFoundError:
        return provider.package
