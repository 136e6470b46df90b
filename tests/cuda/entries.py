"""A library of test entries (tests/cuda/compiling.py) loaded by ctypes: called with numpy arrays, numbers, strings."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np


class EntryError(Exception):
    """What an entry says went wrong: what the emulation found, or the device."""


class Entries:
    """Every failure of an entry is an EntryError with its message."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.pyllama_test_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> None:
        converted = []
        for a in arguments:
            if isinstance(a, np.ndarray):
                assert a.flags.c_contiguous
                converted.append(ctypes.c_void_p(a.ctypes.data))
            elif isinstance(a, str):
                converted.append(ctypes.c_char_p(a.encode()))
            elif isinstance(a, float):
                converted.append(ctypes.c_double(a))
            else:
                converted.append(ctypes.c_int64(a))
        if getattr(self.library, name)(*converted):
            raise EntryError(self.library.pyllama_test_error().decode())
