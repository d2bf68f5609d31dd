"""Layers, and stacks of them, by their patterns."""

import collections.abc
import ctypes

import numpy

from . import _library as lib
from . import _arrays as at

_passes = {
    "train": lib.TRAIN,
    "prefill": lib.PREFILL,
    "generation": lib.GENERATION,
    "description": lib.DESCRIPTION,
}


class Layer(collections.abc.MutableMapping):
    """A pattern, "rat(chunk=16)" or "gla(heads=4),swa(window=64)", for one shape of input.

    As a mapping it holds its parameters under the names of the reference implementations, in their
    layouts: layer["q_proj.weight"] = array. They are random until they are set. `shapes` lists
    them; `synonyms` has further names, by which implementations differ.

    mode "train": forward, then backward; "prefill": forward, and step() after it if `capacity` is
    more than seq_len; "generation": step() alone; "description": `shapes` alone, without memory.
    mixer_only: without the norm before the layer and
    the residual around it. device: a Device, "cpu" or "reference".
    """

    def __init__(
        self,
        pattern,
        d_model,
        batch=1,
        seq_len=1,
        mode="train",
        capacity=0,
        mixer_only=False,
        norm_eps=1e-6,
        seed=0,
        device="cpu",
    ):
        self._handle = None
        self.device = at.device(device) if isinstance(device, str) else device
        self.shape = (batch, seq_len, d_model)
        options = lib.LayerOptions(
            size=ctypes.sizeof(lib.LayerOptions),
            mode=_passes[mode],
            d_model=d_model,
            batch=batch,
            seq_len=seq_len,
            capacity=capacity,
            mixer_only=mixer_only,
            norm_eps=norm_eps,
            seed=seed,
        )
        self._handle = lib.opened(
            "layer_open", self.device._handle, pattern.encode(), ctypes.byref(options)
        )
        self.pattern = lib.get("layer_pattern", self._handle).decode()
        self.shapes, self.synonyms = self._list_parameters()
        self._kept = {}

    def __del__(self):
        if self._handle is not None:
            lib.get("layer_close", self._handle)

    def _list_parameters(self):
        names, shapes, synonyms = [], {}, {}
        parameter = lib.Parameter(size=ctypes.sizeof(lib.Parameter))
        while lib.get("layer_parameter", self._handle, len(names), ctypes.byref(parameter)) == 0:
            name, same_as = parameter.name.decode(), parameter.same_as
            if same_as == len(names):
                shapes[name] = tuple(parameter.shape[: parameter.n_dims])
            else:
                synonyms[name] = names[same_as]
            names.append(name)
        return shapes, synonyms

    # ---- parameters ----

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def __delitem__(self, name):
        raise TypeError("a layer keeps its parameters")

    def _read(self, function, name):
        name = self.synonyms.get(name, name)
        if name not in self.shapes:
            raise KeyError(name)
        values = numpy.empty(self.shapes[name], dtype=numpy.float32)
        lib.run(function, self._handle, name.encode(), at.floats(values), values.size)
        return values

    def __getitem__(self, name):
        return self._read("layer_get", name)

    def __setitem__(self, name, values):
        values = at.to_host(values)
        name = self.synonyms.get(name, name)
        shape = self.shapes.get(name)
        if shape is None:
            raise lib.Invalid(f"{self.pattern} has no parameter '{name}', but {self._described()}")
        if [n for n in values.shape if n != 1] != [n for n in shape if n != 1]:
            raise lib.Invalid(f"{name} is {list(values.shape)}, not {list(shape)}")
        lib.run("layer_set", self._handle, name.encode(), at.floats(values), values.size)

    def _described(self):
        return ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())

    def gradient(self, name):
        """The gradient of a parameter, as a float32 array of numpy."""
        return self._read("layer_gradient", name)

    # ---- runs ----

    def _input(self, x, shape):
        if tuple(x.shape) != shape:
            raise lib.Invalid(f"{self.pattern}: the input is {list(x.shape)}, not {list(shape)}")
        return at.dense(at.converted(x, self.device.activation))

    def _output(self, out, shape):
        if not at.is_dense(out, shape, self.device.activation):
            raise lib.Invalid(f"{self.pattern}: out has to be a dense {list(shape)} of activations")
        return out

    def _run(self, function, x, shape, *before, out=None):
        x = self._input(x, shape)
        self.device.follow(x)
        if out is None:
            y = at.empty(x, shape, self.device.activation)
        else:
            y = self._output(out, shape)
        lib.run(function, self._handle, *before, at.pointer(x), at.pointer(y))
        if self.device.backend == "cuda" and out is None:
            self.device.synchronize()
        # verify() and backward() read what a run has read and written.
        self._kept[function] = (x, y)
        return y

    def forward(self, x, out=None):
        """y from x, [batch, seq_len, d_model]; into `out`, which is not waited for on a GPU."""
        return self._run("layer_forward", x, self.shape, out=out)

    __call__ = forward

    def backward(self, dy, out=None):
        """dx from dy, after forward(); gradient() has those of the parameters. `out` as there."""
        if "layer_forward" not in self._kept:
            raise lib.Invalid("backward() comes after forward()")
        return self._run("layer_backward", dy, self.shape, out=out)

    def step(self, x, position):
        """One token of each sequence, [batch, d_model], at its position."""
        shape = (self.shape[0], self.shape[2])
        return self._run("layer_step", x, shape, position)

    def clear(self):
        """Empties the states."""
        lib.run("layer_clear", self._handle)

    def verify(self):
        """The last run's worst operation, as a share of the error it may have; above 1: wrong."""
        share = ctypes.c_double()
        lib.run("layer_verify", self._handle, ctypes.byref(share))
        return share.value
