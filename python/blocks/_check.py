"""Compares somebody's module with a layer of this project, and times both."""

import statistics
import time

import numpy

from . import _arrays as at
from ._layer import Layer
from ._library import Error, Invalid


class _Precision:
    """What a type may lose: ||a - b|| / ||b|| of outputs and of gradients, as for golden files.

    Where terms cancel it is more: what the reference itself answers to inputs and parameters that
    are off by `rounding` at random, times SLACK.
    """

    SLACK = 3

    def __init__(self, output, gradient, rounding):
        self.output = output
        self.gradient = gradient
        self.rounding = rounding


_fp32 = _Precision(2e-5, 2e-5, 2.0**-20)
_precisions = {
    "float16": _Precision(2e-3, 4e-3, 2.0**-11),
    "bfloat16": _Precision(1.5e-2, 3e-2, 2.0**-9),
}


class TensorResult:
    """How far a tensor is from the fp64 reference: the module's (`theirs`) and ours (`ours`)."""

    def __init__(self, name, shape, theirs, ours, tolerance, our_tolerance):
        self.name = name
        self.shape = tuple(shape)
        self.theirs = theirs
        self.ours = ours
        self.tolerance = tolerance
        self.agrees = theirs <= tolerance
        self.ours_agrees = ours <= our_tolerance

    def verdict(self):
        words = [] if self.agrees else ["the module DIFFERS"]
        words += [] if self.ours_agrees else ["blocks DIFFERS"]
        return ", ".join(words) or "agrees"


class Report:
    """What check() found; as a text it is a table.

    tensors: TensorResults, y and dx first; differs: the names of those in which the module is not
    the layer, the worst first; agrees: whether there are none; first_token: where y differs first;
    theirs_ms, ours_ms: medians of a forward and backward, None where nothing was timed; ratio: the
    median of the ratios of neighbours in time.
    """

    def __init__(self, pattern, backend, shape, tensors, first_token, times):
        self.pattern = pattern
        self.backend = backend
        self.shape = shape
        self.tensors = tensors
        self.first_token = first_token
        wrong = sorted((t for t in tensors if not t.agrees), key=lambda t: -t.theirs)
        self.differs = [t.name for t in wrong]
        self.agrees = not wrong
        self.ours_agrees = all(t.ours_agrees for t in tensors)
        self.theirs_ms = self.ours_ms = self.ratio = None
        if times:
            self.theirs_ms = statistics.median(t for t, _ in times)
            self.ours_ms = statistics.median(t for _, t in times)
            self.ratio = statistics.median(theirs / ours for theirs, ours in times)

    def __getitem__(self, name):
        return next(t for t in self.tensors if t.name == name)

    def _summary(self):
        if self.agrees:
            return f"the module is {self.pattern}: all {len(self.tensors)} tensors agree"
        where = "" if self.first_token is None else f"y differs from token {self.first_token} on; "
        return (
            f"the module is not {self.pattern}: {where}{len(self.differs)} of {len(self.tensors)} "
            f"tensors differ, most of all {', '.join(self.differs[:3])}"
        )

    def __str__(self):
        batch, seq_len, d_model = self.shape
        lines = [
            f"{self.pattern} on {self.backend}, batch {batch}, {seq_len} tokens, D = {d_model}: "
            "||a - b|| / ||b|| from the fp64 reference",
            f"{'tensor':<36} {'shape':<16} {'module':>8} {'blocks':>8}",
        ]
        for t in self.tensors:
            lines.append(
                f"{t.name:<36} {str(list(t.shape)):<16} {t.theirs:8.1e} {t.ours:8.1e}  "
                + t.verdict()
            )
        lines.append(self._summary())
        if self.ratio is not None:
            lines.append(
                f"forward and backward, median: module {self.theirs_ms:.2f} ms, "
                f"blocks {self.ours_ms:.2f} ms; module : blocks {self.ratio:.2f}"
            )
        return "\n".join(lines)


class _TorchModule:
    """A torch.nn.Module whose output is y, or a tuple that begins with it."""

    def __init__(self, module):
        self.module = module
        self.named = dict(module.named_parameters())
        parameters = list(self.named.values())
        self.dtype = parameters[0].dtype
        self.place = parameters[0].device

    def values(self):
        return {name: p.detach() for name, p in self.named.items()}

    def device(self):
        on_gpu = self.place.type == "cuda"
        return at.device_of(next(iter(self.named.values()))) if on_gpu else at.device("cpu")

    def array(self, x):
        import torch

        return torch.from_numpy(x).to(self.place, self.dtype)

    def run(self, x, dy):
        for p in self.named.values():
            p.grad = None
        x = x.detach().requires_grad_()
        y = self.module(x)
        y = y[0] if isinstance(y, (tuple, list)) else y
        y.backward(dy.to(y.dtype))
        missing = [name for name, p in self.named.items() if p.grad is None]
        if missing:
            raise Invalid(f"the module's output does not depend on {', '.join(missing)}")
        return y.detach(), x.grad, {name: p.grad for name, p in self.named.items()}

    def restoring(self):
        return {name: p.grad for name, p in self.named.items()}

    def restore(self, gradients):
        for name, p in self.named.items():
            p.grad = gradients[name]

    def synchronize(self):
        if self.place.type == "cuda":
            import torch

            torch.cuda.synchronize(self.place)


class _ArrayModule:
    """An object with `parameters`, arrays by name, and run(x, dy) -> y, dx, gradients by name."""

    def __init__(self, module):
        self.module = module
        self.dtype = next(iter(module.parameters.values())).dtype

    def values(self):
        return dict(self.module.parameters)

    def device(self):
        return at.device("cpu")

    def array(self, x):
        return x.astype(self.dtype)

    def run(self, x, dy):
        return self.module.run(x, dy)

    def restoring(self):
        return None

    def restore(self, gradients):
        pass

    def synchronize(self):
        pass


def _adapted(module):
    return _TorchModule(module) if hasattr(module, "named_parameters") else _ArrayModule(module)


def _wide(x):
    """A float64 array of numpy."""
    if at.is_tensor(x):
        x = x.detach().double().cpu().numpy()
    return numpy.asarray(x, dtype=numpy.float64)


def _error(actual, expected):
    actual, expected = _wide(actual), _wide(expected)
    difference = numpy.linalg.norm(actual - expected)
    if difference == 0:
        return 0.0
    norm = numpy.linalg.norm(expected)
    error = difference / norm if norm > 0 else numpy.inf
    return float(error) if numpy.isfinite(error) else numpy.inf


def _first_token(actual, expected, tolerance):
    """The first token whose error is ten times what all may be off by; None: there is none."""
    difference = numpy.linalg.norm(_wide(actual) - _wide(expected), axis=(0, 2))
    scale = numpy.linalg.norm(_wide(expected)) / numpy.sqrt(expected.shape[1])
    wrong = numpy.flatnonzero(~(difference <= 10 * tolerance * scale))
    return int(wrong[0]) if wrong.size else None


def _our_name(layer, names, name):
    name = names.get(name, name)
    return layer.synonyms.get(name, name)


def _hand_over(layer, values, names):
    """Sets the layer's parameters from the module's, whose names may be others."""
    ours = {_our_name(layer, names, name): name for name in values}
    missing = [name for name in layer if name not in ours]
    unknown = [theirs for name, theirs in ours.items() if name not in layer.shapes]
    if missing or unknown:
        words = []
        if missing:
            words.append(
                "the module has no "
                + ", ".join(f"'{name}' {list(layer.shapes[name])}" for name in missing)
            )
        if unknown:
            words.append(
                f"{layer.pattern} has no "
                + ", ".join(f"'{name}' {list(values[name].shape)}" for name in unknown)
            )
        raise Invalid("; ".join(words) + " (names={theirs: ours} translates)")
    for name, theirs in ours.items():
        layer[name] = values[theirs]
    return ours


def _run_layer(layer, x, dy):
    y = layer.forward(x)
    dx = layer.backward(dy)
    return y, dx, {name: layer.gradient(name) for name in layer}


def _timed(run, synchronize):
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def _times(theirs, layer, x, dy, rounds):
    """Milliseconds of (module, layer), which take turns; the first round is not counted."""

    def ours():
        layer.forward(x)
        layer.backward(dy)

    times = []
    for _ in range(rounds + 1 if rounds > 0 else 0):
        a = _timed(lambda: theirs.run(x, dy), theirs.synchronize)
        times.append((a, _timed(ours, layer.device.synchronize)))
    return times[1:]


def _matches(pattern, width, values, names):
    """How many of the module's parameters have the shape that they have at this width."""
    try:
        layer = Layer(pattern, width, mode="description")
    except Error:
        return 0
    own = ((_our_name(layer, names, name), value) for name, value in values.items())
    return sum(_squeezed(layer.shapes.get(name, ())) == _squeezed(v.shape) for name, v in own)


def _squeezed(shape):
    return [n for n in shape if n != 1]


def _width(pattern, values, names):
    """The d_model at which the layer's parameters are the module's."""
    sizes = sorted({n for value in values.values() for n in value.shape})
    found = {n: _matches(pattern, n, values, names) for n in sizes}
    best = max(found, key=found.get, default=0)
    if not best or not found[best]:
        raise Invalid(f"no parameter of the module is one of {pattern} at any width; give d_model")
    return best


def _is_mixer(pattern, d_model, values, names):
    """Whether the module has no parameter for the norm that stands before a whole layer."""
    with_norm = Layer(pattern, d_model, mode="description")
    without = Layer(pattern, d_model, mode="description", mixer_only=True)
    own = {_our_name(with_norm, names, name) for name in values}
    return not (set(with_norm) - set(without)) & own


def _input(theirs, given, shape, generator):
    """An input as the module's array, and as the floats that this is."""
    values = generator.standard_normal(shape) if given is None else _wide(given)
    array = theirs.array(numpy.ascontiguousarray(values, dtype=numpy.float32))
    return array, _wide(array)


def _apart(run, left):
    """A run's tensors by name, as float64 arrays; y and dx without the residual."""
    y, dx, gradients = run
    tensors = {"y": _wide(y) - left[0], "dx": _wide(dx) - left[1]}
    tensors.update(("gradient of " + name, _wide(g)) for name, g in gradients.items())
    return tensors


def _responses(reference, values, x, dy, expected, left, precision):
    """How far each tensor is off where parameters and x are off by roundings."""
    generator = numpy.random.default_rng(1)

    def rounded(a):
        return a * (1 + precision.rounding * generator.choice([-1.0, 1.0], a.shape))

    for name, value in values.items():
        reference[name] = rounded(value)
    x_rounded = rounded(x)
    shift = (0, 0) if isinstance(left[0], int) else (x_rounded, dy)
    found = _apart(_run_layer(reference, x_rounded, dy), shift)
    for name, value in values.items():
        reference[name] = value
    return {name: _error(found[name], tensor) for name, tensor in expected.items()}


def _limits(expected, whole, responses, precision):
    """By tensor. Of a sum with the residual, the sum was rounded."""
    limits = {}
    for name, response in responses.items():
        least = precision.output if name == "y" else precision.gradient
        limits[name] = max(least, precision.SLACK * response)
    for name, tensor in (("y", whole[0]), ("dx", whole[1])):
        longer = numpy.linalg.norm(tensor) / max(numpy.linalg.norm(expected[name]), 1e-300)
        if longer > 2:
            limits[name] += precision.rounding / 8 * longer
    return limits


def _compared(theirs, ours, expected, limits):
    """A TensorResult for each tensor; limits: those of the module and of ours."""
    results = []
    for name, tensor in expected.items():
        errors = [_error(found[name].reshape(tensor.shape), tensor) for found in (theirs, ours)]
        allowed = [limit[name] for limit in limits]
        results.append(TensorResult(name, tensor.shape, *errors, *allowed))
    return results


def check(
    module,
    pattern,
    d_model=None,
    batch=2,
    seq_len=64,
    x=None,
    dy=None,
    names=None,
    mixer_only=None,
    seed=0,
    rounds=10,
    quiet=False,
):
    """Whether a module computes what a layer of ours does, "gla(heads=4)", and how fast.

    The module's parameters are handed over by name. Names are those of the reference
    implementations (Layer(...).shapes lists them); `names` translates: {theirs: ours}. Then y, dx
    and the gradient of every parameter, of the module and of our layer, are compared with those of
    the fp64 reference. Both are timed in turns, `rounds` times; 0: not at all. What was found is
    printed, unless `quiet`.

    module: a torch.nn.Module, or an object with `parameters`, arrays by name, and run(x, dy) that
    returns y, dx and the gradients by name. d_model: where it is not given, that of the parameters.
    x, dy: [batch, seq_len, d_model]; random where they are not given.
    mixer_only: without the norm before and the residual around the layer; where it is not said, so
    is a module that has no parameter for that norm. Returns a Report.
    """
    theirs, names = _adapted(module), names or {}
    values = theirs.values()
    if x is not None:
        batch, seq_len, d_model = x.shape
    if d_model is None:
        d_model = _width(pattern, values, names)
    if mixer_only is None:
        mixer_only = _is_mixer(pattern, d_model, values, names)
    generator = numpy.random.default_rng(seed)
    shape = (batch, seq_len, d_model)
    (x, x_wide), (dy, dy_wide) = (_input(theirs, t, shape, generator) for t in (x, dy))
    sizes = {"batch": batch, "seq_len": seq_len, "mixer_only": mixer_only}
    reference = Layer(pattern, d_model, device="reference", **sizes)
    ours = Layer(pattern, d_model, device=theirs.device(), **sizes)
    translation = _hand_over(reference, values, names)
    _hand_over(ours, values, names)
    before = theirs.restoring()
    y, dx, gradients = theirs.run(x, dy)
    gradients = {name: gradients[own] for name, own in translation.items()}
    whole = _run_layer(reference, x_wide, dy_wide)
    left = (0, 0) if mixer_only else (x_wide, dy_wide)
    expected = _apart(whole, left)
    on_host = {name: reference[name].astype(numpy.float64) for name in reference}
    limits = []
    for precision in (
        _precisions.get(str(theirs.dtype).split(".")[-1], _fp32),
        _precisions["bfloat16"] if ours.device.backend == "cuda" else _fp32,
    ):
        responses = _responses(reference, on_host, x_wide, dy_wide, expected, left, precision)
        limits.append(_limits(expected, whole, responses, precision))
    found = _apart((y, dx, gradients), left)
    results = _compared(found, _apart(_run_layer(ours, x, dy), left), expected, limits)
    first = None
    if not results[0].agrees:
        first = _first_token(found["y"], expected["y"], results[0].tolerance)
    times = _times(theirs, ours, x, dy, rounds)
    theirs.restore(before)
    report = Report(ours.pattern, ours.device.backend, shape, results, first, times)
    if not quiet:
        print(report)
    return report
