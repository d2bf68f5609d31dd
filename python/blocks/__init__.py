"""Attention and linear recurrences of libblocks, on numpy arrays and PyTorch tensors.

docs/python.md of the project is the manual.
"""

from ._library import Error, Invalid, OutOfMemory, Unsupported, version
from ._check import Report, check
from ._arrays import Device, device
from ._layer import Layer
from ._operations import (
    Operation,
    attention,
    call,
    delta_rule,
    gla,
    linear_attention,
    matrix_recurrence,
    operands,
    rat,
    rat_scan,
    recurrence,
    retention,
    rwkv6,
    scalar_decay,
    selective_scan,
)

__version__ = version()
__all__ = [
    "Device",
    "Error",
    "Invalid",
    "Layer",
    "Operation",
    "OutOfMemory",
    "Report",
    "Unsupported",
    "attention",
    "call",
    "check",
    "delta_rule",
    "device",
    "gla",
    "linear_attention",
    "matrix_recurrence",
    "operands",
    "rat",
    "rat_scan",
    "recurrence",
    "retention",
    "rwkv6",
    "scalar_decay",
    "selective_scan",
    "version",
]
