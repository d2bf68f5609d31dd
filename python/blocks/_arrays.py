"""Devices, and what arrays of numpy and tensors of PyTorch have in common."""

import contextlib
import ctypes

import numpy

from . import _library as lib

_numpy_types = {
    lib.F32: numpy.float32,
    lib.I32: numpy.int32,
    lib.F64: numpy.float64,
}


class Device:
    """A place where work runs: backend "cpu", "cuda" or "reference" (fp64 on the processor)."""

    def __init__(self, backend="cpu", which=None, provider=""):
        self.backend = backend
        self._stream = None  # the last that was set
        self._handle = None
        self._handle = lib.opened(
            "device_open", backend.encode(), None if which is None else str(which).encode()
        )
        self.activation = lib.get("device_activation", self._handle)
        self.wide = lib.get("device_wide", self._handle)
        if provider:
            lib.run("device_set_provider", self._handle, provider.encode())

    def set_stream(self, stream):
        """Submits work to this CUDA stream, an integer or an object that has `cuda_stream`."""
        pointer = getattr(stream, "cuda_stream", stream)
        lib.run("device_set_stream", self._handle, pointer)
        self._stream = pointer

    def follow(self, x):
        """Submits work to PyTorch's current stream, if x is a tensor of a GPU."""
        if self.backend != "cuda" or not is_tensor(x) or x.device.type != "cuda":
            return
        import torch

        stream = torch.cuda.current_stream(x.device).cuda_stream
        if self._stream != stream:
            self.set_stream(stream)

    def synchronize(self):
        """Waits for all work."""
        lib.run("synchronize", self._handle)

    def __del__(self):
        if self._handle is not None:
            lib.get("device_close", self._handle)


_devices = {}


def device(backend="cpu", which=None):
    """The device that is shared by all who ask for this one."""
    key = (backend, which)
    if key not in _devices:
        _devices[key] = Device(backend, which)
    return _devices[key]


def is_tensor(x):
    """Whether x is PyTorch's; does not import it."""
    return type(x).__module__.split(".")[0] == "torch" or hasattr(x, "data_ptr")


def is_array(x):
    return isinstance(x, numpy.ndarray) or is_tensor(x)


def device_of(*arrays):
    """The device that arrays call for: a GPU's tensors its own, float64 the reference, else cpu."""
    arrays = [x for x in arrays if is_array(x)]
    for x in arrays:
        if is_tensor(x) and x.device.type == "cuda":
            found = device("cuda", x.device.index)
            found.follow(x)
            return found
    types = {str(x.dtype).split(".")[-1] for x in arrays}
    floats_only = {name for name in types if "float" in name}
    return device("reference" if floats_only == {"float64"} else "cpu")


def _torch_type(dtype):
    import torch

    return {
        lib.F32: torch.float32,
        lib.BF16: torch.bfloat16,
        lib.I32: torch.int32,
        lib.F64: torch.float64,
    }[dtype]


def converted(x, dtype):
    """x as an array of an element type; x itself where it is one."""
    if is_tensor(x):
        return x.detach().to(_torch_type(dtype))
    return numpy.asarray(x, dtype=_numpy_types[dtype])


def empty(like, shape, dtype):
    """A new dense array of the kind of `like`."""
    if is_tensor(like):
        return like.new_empty(shape, dtype=_torch_type(dtype))
    return numpy.empty(shape, dtype=_numpy_types[dtype])


def is_dense(x, shape, dtype):
    """Whether x is a dense array of that shape and element type."""
    if tuple(x.shape) != tuple(shape):
        return False
    if is_tensor(x):
        return x.dtype == _torch_type(dtype) and x.is_contiguous()
    return x.dtype == _numpy_types[dtype] and x.flags.c_contiguous


def dense(x):
    return x.contiguous() if is_tensor(x) else numpy.ascontiguousarray(x)


def copied(x):
    return x.clone() if is_tensor(x) else x.copy()


def pointer(x):
    return x.data_ptr() if is_tensor(x) else x.ctypes.data


def strides(x):
    """In elements."""
    if is_tensor(x):
        return list(x.stride())
    return [s // x.itemsize for s in x.strides]


def to_host(x):
    """A dense float32 array of numpy."""
    if is_tensor(x):
        x = x.detach().float().cpu().numpy()
    return numpy.ascontiguousarray(x, dtype=numpy.float32)


def floats(x):
    """A ctypes pointer to a dense float32 array."""
    return x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@contextlib.contextmanager
def no_gradients():
    """Nothing is recorded for automatic differentiation, where there is such a thing."""
    try:
        import torch
    except ImportError:
        yield
        return
    with torch.no_grad():
        yield
