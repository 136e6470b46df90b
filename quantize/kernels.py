"""The extension's loops for conversion, where it is built; numpy does the same work elsewhere, bit for bit.

`EXTENSION` is pyllama._C.convert or None. What a loop computes is defined by its numpy twin: quantize/methods/rtn.py
for the searches, pyllama/common/formats.py for tiles. Nothing here decides anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import NUMPY_TILES, Tiles

try:
    from pyllama import _C
except ImportError:
    _C = None  # type: ignore[assignment]

EXTENSION: Any = getattr(_C, "convert", None)


def widen_f16(halves: NDArray[Any]) -> NDArray[np.float32]:
    """float16 numbers as float32, exactly (of a NaN only that it is one)."""
    if EXTENSION is None or not halves.flags.c_contiguous:
        return halves.astype(np.float32)
    widened: NDArray[np.float32] = EXTENSION.from_f16(halves.view(np.uint16))
    return widened


def _put_codes(tiled: NDArray[Any], codes: NDArray[Any], bits: int) -> None:
    EXTENSION.put_codes(np.ascontiguousarray(codes).view(np.uint8), tiled.view(np.uint8), bits)


def _put_columns(tiled: NDArray[Any], values: NDArray[Any]) -> None:
    EXTENSION.put_columns(np.ascontiguousarray(values), tiled)


def tiles() -> Tiles:
    """How numbers are put into tiles: the fastest way that is here."""
    return NUMPY_TILES if EXTENSION is None else Tiles(_put_codes, _put_columns)
