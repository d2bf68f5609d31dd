"""What is measured: the cases, their tensors, and what their results ought to be.

A case's `kind` says what a provider is asked for:

    attention   causal softmax attention, forward or backward
    recurrence  h_t = exp(gate_t) h_{t-1} + x_t, forward or backward
    matrix      a recurrence of matrices (FAMILIES), forward or backward
    layer       a layer of ours by its pattern, prefill or training
    rat_step    a layer of RAT, one token of each sequence (generation)

Inputs are random. Those of an operation are compared with fp64 on the first and the last head of
the batch, every token of them (reference.py); the results of a layer with ours, of which libblocks
has verified each operation.
"""

import collections
import dataclasses
import fnmatch
import math

import blocks
import torch
import torch.nn.functional as F

import reference

TOKENS = 262144

# Decay and rule of the matrix recurrences.
FAMILIES = {
    "linear_attention": ("none", "plain"),
    "retention": ("constant", "plain"),
    "scalar_decay": ("scalar", "plain"),
    "gla": ("diagonal", "plain"),
    "delta": ("none", "delta"),
    "gated_delta": ("scalar", "delta"),
    "kda": ("diagonal", "delta"),
}

# ||a - b|| / ||b|| of outputs and gradients; and the rounding that tells a gradient's condition.
Precision = collections.namedtuple("Precision", "output gradient rounding")
PRECISION = {
    torch.float32: Precision(2e-5, 2e-5, 2.0**-20),
    torch.bfloat16: Precision(1.5e-2, 3e-2, 2.0**-9),
}
# A gradient may be off by so many times what rounded inputs change in the reference.
SLACK = 3


@dataclasses.dataclass
class Case:
    block: str
    kind: str
    seq_len: int
    tokens: int = TOKENS
    n_heads: int = 16
    kv_heads: int = 0
    d_k: int = 128
    d_v: int = 128
    d_model: int = 0
    what: str = "kernel"
    pattern: str = ""
    mixer_only: bool = False
    data: str = "normal"
    sequences: int = 0

    @property
    def batch(self):
        return self.sequences or max(1, self.tokens // self.seq_len)

    @property
    def arguments(self):
        """Those of the pattern."""
        return arguments_of(self.pattern)

    @property
    def family(self):
        return self.block.rpartition("_")[0]

    @property
    def backward(self):
        return self.block.endswith("_backward") or self.what == "train"

    def __str__(self):
        name = self.block
        if "chunk" in self.arguments:
            name += f" L={self.arguments['chunk']}"
        if self.kind == "attention" and self.kv_heads != self.n_heads:
            name += f" over {self.kv_heads} heads"
        sizes = f"{self.n_heads}x{self.d_k}" if self.d_k == self.d_v else ""
        sizes = sizes or f"{self.n_heads}x{self.d_k}/{self.d_v}"
        if self.kind in ("layer", "rat_step"):
            sizes = f"D={self.d_model}"
        words = [name, self.what, f"B={self.batch}", f"T={self.seq_len}", sizes]
        return " ".join(w for w in words + [self.data] if w not in ("kernel", "normal"))

    def flops(self):
        """Of attention, those of the visible pairs; of others it is not said here."""
        if self.kind != "attention":
            return None
        pairs = self.batch * self.n_heads * self.seq_len * (self.seq_len + 1) / 2
        return 4 * self.d_k * pairs * (2.5 if self.backward else 1)


def _attention(seq_len, **more):
    more = {"kv_heads": more.get("n_heads", 16), **more}
    return [
        Case(f"attention_{way}", "attention", seq_len, **more) for way in ("forward", "backward")
    ]


def _matrix(family, seq_len, ways=("forward", "backward"), **more):
    return [Case(f"{family}_{way}", "matrix", seq_len, **more) for way in ways]


def arguments_of(pattern):
    """{"chunk": 16} of "rat(chunk=16,position=rope)": the arguments that are numbers."""
    pairs = (a.split("=") for a in pattern.rstrip(")").partition("(")[2].split(",") if a)
    return {key: int(value) for key, value in pairs if value.isdigit()}


def _layer(pattern, seq_len, passes=("prefill", "train"), kind="layer", d_model=2048, **more):
    """A layer of ours; its pattern with all that it leaves unsaid."""
    mixer_only = more.get("mixer_only", False)
    layer = blocks.Layer(pattern, d_model, mode="description", mixer_only=mixer_only)
    block, sizes = pattern.partition("(")[0], {"d_model": d_model, "pattern": layer.pattern, **more}
    sizes["n_heads"] = arguments_of(layer.pattern)["heads"]
    return [Case(block, kind, seq_len, what=w, **sizes) for w in passes]


def _rat_step(pattern, seq_len, sequences=512, **more):
    return _layer(pattern, seq_len, ["generation"], "rat_step", sequences=sequences, **more)


def _full():
    """What matters most comes first: a run may be short of time."""
    cases = []
    for seq_len in (4096, 16384, 131072):
        cases += _attention(seq_len)
    one = {"sequences": 1, "n_heads": 32}
    cases += _matrix("gated_delta", 4096)
    cases += _matrix("gated_delta", 32768, **one)
    cases += _matrix("gated_delta", 32768, data="weak-gates", **one)
    for seq_len in (4096, 32768, 131072):
        cases += _layer("rat(chunk=16)", seq_len) + _rat_step("rat(chunk=16)", seq_len)
    for pattern in ("gla(heads=4)", "retnet(heads=8)", "gated_delta_net(heads=16)"):
        cases += _layer(pattern, 4096, mixer_only=True)
    cases += _matrix("delta", 4096)
    cases += _attention(16384, n_heads=32, d_k=64, d_v=64)
    cases += _attention(16384, kv_heads=2)
    cases += _layer("ratplus(dilation=16,window=256,initial=4)", 4096)
    cases += [Case("recurrence_forward", "recurrence", t) for t in (4096, 131072)]
    cases += [Case("recurrence_backward", "recurrence", 4096)]
    for family in ("linear_attention", "retention", "scalar_decay", "kda"):
        cases += _matrix(family, 4096)
    wide = {"n_heads": 4, "d_k": 256, "d_v": 512}
    cases += _matrix("gla", 4096, **wide)
    cases += _matrix("gla", 131072, ["forward"], **wide)
    cases += _matrix("gla", 4096)
    return cases


def _small():
    """The kernels of the full preset at few tokens, for a look at whether all of them run."""
    cases = {}
    for c in _full():
        sequences = 1 if c.batch == 1 else 32 if c.kind == "rat_step" else 4
        c = dataclasses.replace(c, seq_len=min(c.seq_len, 2048), sequences=sequences)
        cases[str(c)] = c
    return list(cases.values())


def _tiny():
    """All kinds, at sizes that a processor has done in seconds."""
    small = {"tokens": 256, "n_heads": 2, "d_k": 32, "d_v": 32}
    cases = _attention(128, **small) + _attention(128, kv_heads=1, **small)
    for family in FAMILIES:
        cases += _matrix(family, 128, **small)
    cases += [
        Case(f"recurrence_{way}", "recurrence", 128, **small) for way in ("forward", "backward")
    ]
    sizes = {"d_model": 64, "tokens": 256}
    cases += _layer("rat(chunk=16,heads=2)", 128, **sizes)
    cases += _layer("ratplus(heads=2,dilation=16,window=8,initial=4)", 128, **sizes)
    cases += _rat_step("rat(chunk=16,heads=2)", 128, sequences=4, d_model=64)
    for pattern in ("gla(heads=2)", "retnet(heads=2)", "gated_delta_net(heads=2)"):
        cases += _layer(pattern, 128, mixer_only=True, **sizes)
    return cases


PRESETS = {"full": _full, "small": _small, "tiny": _tiny}


def matches(name, globs):
    """Whether a name is one of those of "glob,glob..."."""
    return any(fnmatch.fnmatchcase(name, g) for g in globs.split(","))


def name_of(case):
    """What --pattern is compared with: "attention_forward/4096", "rat.train/4096"."""
    name = case.block if case.what == "kernel" else f"{case.block}.{case.what}"
    return f"{name}/{case.seq_len}"


def wanted(preset, globs):
    """The cases of a preset whose name, with or without the length, is one of the globs'."""
    globs = ",".join(f"{g},{g}/*" for g in globs.split(","))
    return [c for c in PRESETS[preset]() if matches(name_of(c), globs)]


# ---- tensors ----


class Maker:
    """Random tensors of a device, in the type of its activations."""

    def __init__(self, device, seed=1):
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed)

    def wide(self, *shape):
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(*shape, device=self.device, generator=self.generator, dtype=self.dtype)

    def uniform(self, *shape):
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def log_decay(self, *shape, weak=False):
        """As our benchmarks have it, -0.05 a token; weak: a sixty-fourth of that."""
        return (F.logsigmoid(self.wide(*shape)) / (1024 if weak else 16)).to(self.dtype)


def retention_decay(n_heads, device):
    """RetNet's log decays, a constant per head."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(n_heads, device=device, dtype=torch.float64))))


def _attention_tensors(c, make):
    tensors = {"q": make.normal(c.batch, c.seq_len, c.n_heads, c.d_k)}
    for name in ("k", "v"):
        tensors[name] = make.normal(c.batch, c.seq_len, c.kv_heads, c.d_k)
    return tensors


def _recurrence_tensors(c, make):
    shape = (c.batch, c.seq_len, c.n_heads * c.d_k)
    return {"x": make.normal(*shape), "gate": make.log_decay(*shape)}


def _matrix_tensors(c, make):
    decay, rule = FAMILIES[c.family]
    shape = (c.batch, c.seq_len, c.n_heads)
    weak = c.data == "weak-gates"
    tensors = {"q": make.normal(*shape, c.d_k), "k": make.normal(*shape, c.d_k)}
    tensors["v"] = make.normal(*shape, c.d_v)
    if rule == "delta":
        tensors["k"] = F.normalize(tensors["k"].float(), dim=-1).to(make.dtype)
        tensors["beta"] = torch.sigmoid(make.wide(*shape)).to(make.dtype)
    if decay == "scalar":
        tensors["log_decay"] = make.log_decay(*shape, weak=weak)
    elif decay == "diagonal":
        tensors["log_decay"] = make.log_decay(*shape, c.d_k, weak=weak)
    return tensors


def _parameter(make, name, shape, chunk):
    """Initial values as the reference implementations have them, rounded to activations."""
    last = name.rpartition(".")[2]
    if "norm" in name and last == "weight":
        values = torch.ones(shape, device=make.device)
    elif name == "A_log":
        values = (1 + 15 * make.uniform(*shape)).log()
    elif name == "dt_bias":
        dt = (math.log(1e-3) + make.uniform(*shape) * math.log(100)).exp()
        values = dt + torch.log(-torch.expm1(-dt))
    elif name == "gate_bias":
        values = (1 + make.uniform(*shape) * (max(chunk - 1, 1) - 1)).log()
    elif "conv1d" in name:
        values = make.uniform(*shape) - 0.5
    elif last == "bias":
        values = torch.zeros(shape, device=make.device)
    else:
        values = 0.02 * make.wide(*shape)
    return values.to(make.dtype)


def _parameters(c, make):
    layer = blocks.Layer(c.pattern, c.d_model, mode="description", mixer_only=c.mixer_only)
    return {name: _parameter(make, name, shape, 16) for name, shape in layer.shapes.items()}


# What is added to a residual is a few hundredths: of a larger x the sum would hide it by rounding.
X_SCALE = 0.02


def _layer_tensors(c, make):
    shape = (c.batch, c.seq_len, c.d_model)
    x = make.normal(*shape)
    tensors = {"x": x if c.mixer_only else x.mul_(X_SCALE)}
    if c.what == "train":
        tensors["dy"] = make.normal(*shape)
    return tensors


def _rat_step_tensors(c, make):
    shape = (c.batch, c.n_heads, c.seq_len // 16, c.d_model // c.n_heads)
    tensors = {"x": make.normal(c.batch, c.d_model).mul_(X_SCALE)}
    tensors.update({name: make.wide(c.batch, c.d_model) for name in ("k_state", "v_state")})
    tensors.update({name: make.normal(*shape) for name in ("k_cache", "v_cache")})
    return tensors


_TENSORS = {
    "attention": _attention_tensors,
    "recurrence": _recurrence_tensors,
    "matrix": _matrix_tensors,
    "layer": _layer_tensors,
    "rat_step": _rat_step_tensors,
}


class Problem:
    """A case's tensors: `inputs` by name, `dout` of a backward, `parameters` of a layer."""

    def __init__(self, case, device, seed=1):
        make = Maker(device, seed)
        self.case, self.device, self.dtype = case, device, make.dtype
        self.inputs = _TENSORS[case.kind](case, make)
        self.parameters = _parameters(case, make) if case.kind in ("layer", "rat_step") else {}
        self.dout = None
        if case.backward and case.kind != "layer":
            like = self.inputs.get("v" if case.kind == "matrix" else "q", self.inputs.get("x"))
            self.dout = make.normal(*like.shape)


# ---- what results ought to be ----


def _heads(c, kv=False):
    """Indices of the first and the last sequence's first and last head."""
    last = (c.kv_heads if kv else c.n_heads) - 1
    return sorted({(0, 0), (c.batch - 1, last)})


def _expect_attention(problem, taken):
    c, share = problem.case, problem.case.n_heads // problem.case.kv_heads
    inputs, found = problem.inputs, collections.defaultdict(list)
    for b, h in _heads(c, kv=True):
        queries = slice(h * share, (h + 1) * share)
        q, k, v = inputs["q"][b, :, queries], inputs["k"][b, :, h], inputs["v"][b, :, h]
        dout = problem.dout
        if dout is not None:
            dout = dout[b, :, queries].double().transpose(0, 1)
        one = reference.attention(taken(q).transpose(0, 1), taken(k), taken(v), dout)
        for name, x in one.items():
            found[name].append(x.transpose(0, 1) if x.dim() == 3 else x)

    def chosen(name, x, i):
        b, h = _heads(c, kv=True)[i]
        return x[b, :, h * share : (h + 1) * share] if name in ("out", "dq") else x[b, :, h]

    return found, chosen


def _expect_recurrence(problem, taken):
    c = problem.case
    at = [(0, slice(0, 64)), (c.batch - 1, slice(-64, None))]
    found = collections.defaultdict(list)
    for b, channels in at:
        x, gate = (taken(problem.inputs[n][b : b + 1, :, channels]) for n in ("x", "gate"))
        dout = problem.dout
        dout = None if dout is None else dout[b : b + 1, :, channels].double()
        for name, y in reference.recurrence(x, gate, dout).items():
            found[name].append(y[0])
    return found, lambda name, x, i: x[at[i][0], :, at[i][1]]


def _expect_matrix(problem, taken):
    c, heads = problem.case, _heads(problem.case)

    def stacked(x):
        return torch.stack([x[b, :, h] for b, h in heads])

    tensors = {name: taken(stacked(x)) for name, x in problem.inputs.items()}
    if "log_decay" in tensors:
        tensors["log_decay"] = tensors["log_decay"].reshape(*tensors["q"].shape[:2], -1)
    constant = FAMILIES[c.family][0] == "constant"
    if constant:
        decay = retention_decay(c.n_heads, problem.device)[[h for _, h in heads]]
        tensors["log_decay"] = decay[:, None, None].expand(-1, c.seq_len, 1)
    if problem.dout is None:
        found = {"out": reference.matrix_recurrence(**tensors)}
    else:
        found = reference.matrix_gradients(tensors, stacked(problem.dout).double())
        if constant:
            del found["dlog_decay"]
    return found, lambda name, x, i: x[heads[i][0], :, heads[i][1]]


def _expect_rat_step(problem, taken):
    """x + OutProj(sigma(z) o) for the first and the last sequence, from docs/models.md."""
    c, p = problem.case, {name: x.double() for name, x in problem.parameters.items()}
    d, groups, rows = c.d_model // c.n_heads, 2, [0, c.batch - 1]
    inputs = {name: taken(x[rows]) for name, x in problem.inputs.items()}
    x = inputs["x"]
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * p["input_norm.weight"]
    sizes = [c.d_model] * 3 + [groups * d] * 2
    z, v, g, q, k = (normed @ p["in_proj.weight"].T).split(sizes, -1)
    g = torch.sigmoid(g + p["gate_bias"])
    tiles = c.n_heads // groups
    k_own = g * inputs["k_state"] + (1 - g) * k.repeat(1, tiles)
    v_own = g * inputs["v_state"] + (1 - g) * v
    k_own, v_own, q = (y.unflatten(-1, (c.n_heads, d)) for y in (k_own, v_own, q.repeat(1, tiles)))
    chunk = c.seq_len // 16 - 1
    theta = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / d)
    cos, sin = (chunk * theta).cos(), (chunk * theta).sin()
    a, b = q.chunk(2, -1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    keys, values = (inputs[name][:, :, :-1] for name in ("k_cache", "v_cache"))
    scores = torch.cat(
        ((keys @ turned.unsqueeze(-1))[..., 0], (q * k_own).sum(-1, keepdim=True)), -1
    )
    weight = (scores * d**-0.5).softmax(-1).unsqueeze(-1)
    out = (weight[:, :, :-1] * values).sum(2) + weight[:, :, -1] * v_own
    mixed = (torch.sigmoid(z) * out.flatten(1)) @ p["out_proj.weight"].T
    return {"added": list(mixed)}, lambda name, y, i: y[rows[i]]


_EXPECT = {
    "attention": _expect_attention,
    "recurrence": _expect_recurrence,
    "matrix": _expect_matrix,
    "rat_step": _expect_rat_step,
}


def distance(actual, expected):
    """||a - b|| / ||b||; infinite where that is no number."""
    norm = torch.linalg.vector_norm
    off = norm(actual - expected, dtype=torch.float64)
    error = float(off / norm(expected, dtype=torch.float64))
    return error if math.isfinite(error) else math.inf


Verdict = collections.namedtuple("Verdict", "name error bound")


def _nudger(rounding):
    """In fp64, every element off by a rounding at random."""

    def nudged(x):
        generator = torch.Generator(x.device)
        generator.manual_seed(7)
        noise = torch.randn(x.shape, device=x.device, generator=generator, dtype=torch.float64)
        return x.double() * (1 + rounding * noise)

    return nudged


class OperationJudge:
    """Compares results with the fp64 reference."""

    def __init__(self, problem):
        expect = _EXPECT[problem.case.kind]
        precision = PRECISION[problem.dtype]
        self.problem = problem
        self.expected, self.chosen = expect(problem, torch.Tensor.double)
        if problem.dout is None:
            self.bounds = {name: precision.output for name in self.expected}
            return
        answers, _ = expect(problem, _nudger(precision.rounding))
        self.bounds = {}
        for name, parts in self.expected.items():
            moved = max(distance(a, b) for a, b in zip(answers[name], parts))
            self.bounds[name] = max(precision.gradient, SLACK * moved)

    def judge(self, results):
        """The result that is worst of what it may be off by."""
        verdicts = []
        if "y" in results:
            results = parts_of(self.problem, results)
        for name, parts in self.expected.items():
            x = results[name]
            error = 0.0 if bool(torch.isfinite(x).all()) else math.inf
            for i, part in enumerate(parts):
                actual = self.chosen(name, x, i)
                error = max(error, distance(actual.reshape(part.shape).double(), part))
            verdicts.append(Verdict(name, error, self.bounds[name]))
        return max(verdicts, key=lambda v: v.error / v.bound)


def parts_of(problem, results):
    """A layer's results without the residual: "added" is what it adds to x, "dx" has no dy."""
    residual = not problem.case.mixer_only
    found = {name: x for name, x in results.items() if name not in ("y", "dx")}
    y = results["y"].float()
    found["added"] = y - problem.inputs["x"].float() if residual else y
    if "dx" in results:
        dx = results["dx"].float()
        found["dx"] = dx - problem.inputs["dy"].float() if residual else dx
    return found


class LayerJudge:
    """Compares results with those of our layer, every element of them.

    Both are rounded, so that they may differ by what each may be off by.
    """

    def __init__(self, problem, results):
        precision = PRECISION[problem.dtype]
        self.problem = problem
        self.expected = {name: x.clone() for name, x in parts_of(problem, results).items()}
        self.bounds = dict.fromkeys(self.expected, 2 * precision.gradient)
        self.bounds["added"] = 2 * precision.output

    def judge(self, results):
        """As OperationJudge's."""
        verdicts, results = [], parts_of(self.problem, results)
        for name, expected in self.expected.items():
            error = distance(results[name].reshape(expected.shape).float(), expected.float())
            verdicts.append(Verdict(name, error, self.bounds[name]))
        return max(verdicts, key=lambda v: v.error / v.bound)
