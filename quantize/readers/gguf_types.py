"""The tensor types of GGUF that this version reads: how their blocks lie in the file, and what they mean.

A block is a run of consecutive weights of one row with its scale. Decoding is exact: the same float32 operations in the
same order as the format's definition. Types whose grid is one of ours also hand over their codes untouched.
To add a type: its layout as a numpy record, a decode function, a row in GGUF_TYPES. Nothing here reads files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import Packed

from .source import DENSE_TYPES, Grid, StoredType

Array = NDArray[Any]

Q4_0 = np.dtype([("d", "<f2"), ("codes", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("codes", "i1", 32)])
Q6_K = np.dtype([("low", "u1", (2, 2, 32)), ("high", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])


def _nibbles(packed: Array) -> NDArray[np.uint8]:
    """Bytes [n, blocks, 16] -> codes [n, blocks * 32]: the low nibbles are a block's first half."""
    n, blocks = packed.shape[:2]
    codes = np.empty((n, blocks, 2, 16), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return codes.reshape(n, blocks * 32)


def _times(scales: Array, codes: Array) -> NDArray[np.float32]:
    """float32 scales [n, groups] times float32 codes [n, K], group by group, in place of the codes."""
    n, groups = scales.shape
    values: NDArray[np.float32] = codes.reshape(n, groups, codes.shape[1] // groups)
    values *= scales[:, :, None]
    return values.reshape(codes.shape)


def _repack_q4_0(rows: Array) -> Packed:
    blocks = rows.view(Q4_0)
    return Packed(_nibbles(blocks["codes"]), blocks["d"].copy())


def _decode_q4_0(rows: Array) -> NDArray[np.float32]:
    blocks = rows.view(Q4_0)
    codes = _nibbles(blocks["codes"]).astype(np.float32)
    codes -= 8
    return _times(blocks["d"].astype(np.float32), codes)


def _repack_q4_1(rows: Array) -> Packed:
    blocks = rows.view(Q4_1)
    return Packed(_nibbles(blocks["codes"]), blocks["d"].copy(), blocks["m"].copy())


def _decode_q4_1(rows: Array) -> NDArray[np.float32]:
    blocks = rows.view(Q4_1)
    n, groups = blocks.shape
    values = _times(blocks["d"].astype(np.float32), _nibbles(blocks["codes"]).astype(np.float32)).reshape(n, groups, 32)
    values += blocks["m"].astype(np.float32)[:, :, None]
    return values.reshape(n, groups * 32)


def _repack_q8_0(rows: Array) -> Packed:
    blocks = rows.view(Q8_0)
    return Packed(blocks["codes"].reshape(len(blocks), blocks.shape[1] * 32), blocks["d"].copy())


def _decode_q8_0(rows: Array) -> NDArray[np.float32]:
    blocks = rows.view(Q8_0)
    codes = blocks["codes"].astype(np.float32).reshape(len(blocks), blocks.shape[1] * 32)
    return _times(blocks["d"].astype(np.float32), codes)


def _decode_q6_k(rows: Array) -> NDArray[np.float32]:
    """256 weights: two halves of 128, each four runs of 32; a run's codes are 4 bits of `low` and 2 bits of `high`."""
    blocks = rows.view(Q6_K)
    n, count = blocks.shape
    low, high = blocks["low"], blocks["high"]  # [n, blocks, half, 2, 32], [n, blocks, half, 32]
    codes = np.empty((n, count, 2, 4, 32), np.uint8)
    for run in range(4):
        nibble = low[:, :, :, run % 2] & 15 if run < 2 else low[:, :, :, run % 2] >> 4
        codes[:, :, :, run] = nibble | ((high >> (2 * run) & 3) << 4)
    values = codes.astype(np.float32)
    values -= 32
    scales = blocks["d"].astype(np.float32)[:, :, None] * blocks["scales"].astype(np.float32)  # 16 weights share one
    return _times(scales.reshape(n, count * 16), values.reshape(n, count * 256))


GGUF_TYPES: dict[int, StoredType] = {
    0: DENSE_TYPES["F32"],
    1: DENSE_TYPES["F16"],
    2: StoredType("Q4_0", 32, Q4_0.itemsize, _decode_q4_0, Grid("q4", 32), _repack_q4_0),
    3: StoredType("Q4_1", 32, Q4_1.itemsize, _decode_q4_1, Grid("q4a", 32, offset="f16"), _repack_q4_1),
    8: StoredType("Q8_0", 32, Q8_0.itemsize, _decode_q8_0, Grid("q8", 32), _repack_q8_0),
    14: StoredType("Q6_K", 256, Q6_K.itemsize, _decode_q6_k),
    30: DENSE_TYPES["BF16"],
}

# Types that exist but are not read yet, so that the error can call them by name.
OTHER_TYPES: dict[int, str] = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
