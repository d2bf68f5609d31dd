"""The C interface (layers/blocks.h) by ctypes."""

import ctypes
import os
import pathlib
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int64
from ctypes import c_size_t, c_uint64, c_void_p

NAME = "libblocks.so.0"
DIMS = 4

F32, BF16, I32, F64 = range(4)
TRAIN, PREFILL, GENERATION, DESCRIPTION = range(4)
INPUT, OUTPUT, STATE, SCRATCH, UNREAD = range(5)


class Error(RuntimeError):
    """What libblocks says of a failure."""


class Invalid(Error, ValueError):
    """An argument is wrong."""


class Unsupported(Error):
    """There is no kernel for these arguments."""


class OutOfMemory(Error, MemoryError):
    """There is not enough memory."""


class Operand(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("name", c_char_p),
        ("role", c_int),
        ("dtype", c_int),
        ("shape", c_int64 * DIMS),
        ("stride", c_int64 * DIMS),
        ("optional", c_int),
        ("strided", c_int),
        ("data", c_void_p),
    ]


class LayerOptions(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("mode", c_int),
        ("d_model", c_int64),
        ("batch", c_int64),
        ("seq_len", c_int64),
        ("capacity", c_int64),
        ("mixer_only", c_int),
        ("norm_eps", c_double),
        ("seed", c_uint64),
    ]


class Parameter(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("name", c_char_p),
        ("n_dims", c_int),
        ("shape", c_int64 * DIMS),
        ("same_as", c_int),
    ]


def _candidates():
    """$BLOCKS_LIBRARY; or beside this file, where the system looks, in the checkout around it."""
    here = pathlib.Path(__file__).resolve().parent
    if os.environ.get("BLOCKS_LIBRARY"):
        return [os.environ["BLOCKS_LIBRARY"]]
    return [str(here / NAME), NAME, str(here.parent.parent / "build" / NAME)]


def _load():
    failures = []
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            failures.append(str(error))
    raise ImportError(
        "libblocks is not here: `make library` in a checkout before `pip install ./python`, "
        "`make install`, or BLOCKS_LIBRARY=its path (" + "; ".join(failures) + ")"
    )


_functions = {
    "version": (c_char_p, []),
    "message": (c_char_p, []),
    "backend": (c_char_p, [c_int]),
    "device_open": (c_int, [c_char_p, c_char_p, POINTER(c_void_p)]),
    "device_close": (None, [c_void_p]),
    "device_activation": (c_int, [c_void_p]),
    "device_wide": (c_int, [c_void_p]),
    "device_set_stream": (c_int, [c_void_p, c_void_p]),
    "device_set_provider": (c_int, [c_void_p, c_char_p]),
    "synchronize": (c_int, [c_void_p]),
    "operation_name": (c_char_p, [c_int]),
    "operation_open": (c_int, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "operation_close": (None, [c_void_p]),
    "operation_operand": (c_int, [c_void_p, c_int, POINTER(Operand)]),
    "operation_bind": (c_int, [c_void_p, c_char_p, c_void_p, POINTER(c_int64)]),
    "operation_run": (c_int, [c_void_p]),
    "layer_name": (c_char_p, [c_int]),
    "layer_open": (c_int, [c_void_p, c_char_p, POINTER(LayerOptions), POINTER(c_void_p)]),
    "layer_close": (None, [c_void_p]),
    "layer_pattern": (c_char_p, [c_void_p]),
    "layer_parameter": (c_int, [c_void_p, c_int, POINTER(Parameter)]),
    "layer_set": (c_int, [c_void_p, c_char_p, POINTER(c_float), c_int64]),
    "layer_get": (c_int, [c_void_p, c_char_p, POINTER(c_float), c_int64]),
    "layer_gradient": (c_int, [c_void_p, c_char_p, POINTER(c_float), c_int64]),
    "layer_forward": (c_int, [c_void_p, c_void_p, c_void_p]),
    "layer_backward": (c_int, [c_void_p, c_void_p, c_void_p]),
    "layer_step": (c_int, [c_void_p, c_int64, c_void_p, c_void_p]),
    "layer_clear": (c_int, [c_void_p]),
    "layer_verify": (c_int, [c_void_p, POINTER(c_double)]),
}

_library = _load()
for _name, (_result, _arguments) in _functions.items():
    _function = getattr(_library, "blocks_" + _name)
    _function.restype = _result
    _function.argtypes = _arguments

_errors = {1: Invalid, 2: Unsupported, 3: OutOfMemory}


def get(name, *arguments):
    """The result of a function that cannot fail."""
    return getattr(_library, "blocks_" + name)(*arguments)


def run(name, *arguments):
    """Calls a function that returns a status; raises what it says."""
    status = get(name, *arguments)
    if status:
        raise _errors.get(status, Error)(get("message").decode())


def opened(name, *arguments):
    """The handle that blocks_NAME() gives through its last argument."""
    handle = c_void_p()
    run(name, *arguments, byref(handle))
    return handle


def listed(name):
    """The names that blocks_NAME(0), blocks_NAME(1), ... return until NULL."""
    names = []
    while True:
        found = get(name, len(names))
        if found is None:
            return names
        names.append(found.decode())


def version():
    """The version of the library."""
    return get("version").decode()
