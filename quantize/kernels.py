"""The extension's loops for conversion, where it is built; numpy does the same work elsewhere, bit for bit.

What a loop computes is defined by its numpy twin: quantize/methods/rtn.py
for the searches, pyllama/common/formats.py for tiles. Nothing here decides anything.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import NUMPY_TILES, Tiles


@cache
def extension() -> Any:
    """pyllama._C.convert, or None where it is not built; loaded when it is first needed."""
    try:
        from pyllama import _C
    except ImportError:
        return None
    return getattr(_C, "convert", None)


def fits_loops(values: NDArray[Any]) -> bool:
    """Whether the loops take an array where it lies: without gaps, and not a view of bytes that begins anywhere."""
    return values.flags.c_contiguous and values.flags.aligned


def widen_f16(halves: NDArray[Any]) -> NDArray[np.float32]:
    """float16 numbers as float32, exactly (of a NaN only that it is one)."""
    if extension() is None or not fits_loops(halves):
        return halves.astype(np.float32)
    widened: NDArray[np.float32] = extension().from_f16(halves.view(np.uint16))
    return widened


def _put_codes(tiled: NDArray[Any], codes: NDArray[Any], bits: int) -> None:
    extension().put_codes(np.ascontiguousarray(codes).view(np.uint8), tiled.view(np.uint8), bits)


def _put_columns(tiled: NDArray[Any], values: NDArray[Any]) -> None:
    extension().put_columns(np.require(values, requirements=["C", "A"]), tiled)


def tiles() -> Tiles:
    """How numbers are put into tiles: the fastest way that is here."""
    return NUMPY_TILES if extension() is None else Tiles(_put_codes, _put_columns)
