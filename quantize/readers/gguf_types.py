"""The tensor types of GGUF that this version reads: how their blocks lie in the file, and what they mean.

A block is a run of consecutive weights of one row with its scales; the "K" types have blocks of 256 whose scales are
small integers times a number of the block. Decoding is exact: the same float32 operations in the same order as the
format's definition. Types whose grid is one of ours also hand over their codes untouched, with scales as they are or,
where integer times number has more digits than f16, rounded to it (`Grid.exact` is False).
To add a type: its layout as a numpy record, a decode function, a row in GGUF_TYPES. Nothing here reads files.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import Packed

from .source import DENSE_TYPES, Grid, StoredType

Array = NDArray[Any]
Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]

Q4_0 = np.dtype([("d", "<f2"), ("codes", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)])
Q5_0 = np.dtype([("d", "<f2"), ("high", "u1", 4), ("low", "u1", 16)])
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "u1", 4), ("low", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("codes", "i1", 32)])
IQ4_NL = Q4_0
Q2_K = np.dtype([("scales", "u1", 16), ("codes", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2")])
Q3_K = np.dtype([("high", "u1", 32), ("low", "u1", (2, 32)), ("scales", "u1", 12), ("d", "<f2")])
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (3, 4)), ("codes", "u1", (4, 32))])
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (3, 4)), ("high", "u1", 32), ("low", "u1", (4, 32))])
Q6_K = np.dtype([("low", "u1", (2, 2, 32)), ("high", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])
Q8_K = np.dtype([("d", "<f4"), ("codes", "i1", 256), ("sums", "<i2", 16)])  # sums: of 16 codes each, for products
IQ4_XS = np.dtype([("d", "<f2"), ("scales_high", "<u2"), ("scales_low", "u1", 4), ("codes", "u1", (8, 16))])

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
EVEN_LEVELS = tuple(range(-16, 16))  # Q5_0's


# ---- what several types share ----------------------------------------------------------------------------------------


def _nibbles(packed: Array) -> Codes:
    """Bytes [n, …, width] -> codes [n, K]: low nibbles of a run of `width` bytes are weights before its high ones."""
    codes = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0, :])
    np.right_shift(packed, 4, out=codes[..., 1, :])
    return _flat(codes)


def _quarters(packed: Array) -> Codes:
    """Bytes [n, blocks, 2, 32] -> codes [n, blocks, 2, 4, 32]: bits 0 and 1 are a half's first 32 weights."""
    codes = np.empty((*packed.shape[:3], 4, 32), np.uint8)
    for run in range(4):
        np.right_shift(packed, 2 * run, out=codes[:, :, :, run])
    codes &= 3
    return codes


def _times(scales: Floats, codes: Floats) -> Floats:
    """float32 scales [n, groups] times float32 codes [n, K], group by group, in place of the codes."""
    n, groups = scales.shape
    values = codes.reshape(n, groups, codes.shape[1] // groups)
    values *= scales[:, :, None]
    return values.reshape(codes.shape)


def _affine(scales: Floats, codes: Floats, minima: Floats) -> Floats:
    """scale * code - minimum, group by group, in place of the codes."""
    n, groups = scales.shape
    values = _times(scales, codes).reshape(n, groups, codes.shape[1] // groups)
    values -= minima[:, :, None]
    return values.reshape(codes.shape)


def _flat(values: Array) -> Array:
    """[n, blocks, …] -> [n, everything else]."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _number(blocks: Array, name: str) -> Floats:
    """One number of each block, as float32 [n, blocks, 1]."""
    values: Floats = blocks[name].astype(np.float32)
    return values[:, :, None]


def _half(values: Floats) -> Array:
    """Rounded to f16; what does not fit becomes infinite and is refused by who reads it."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


# ---- one scale per 32 weights ----------------------------------------------------------------------------------------


def _repack_q4_0(rows: Array) -> Packed:
    blocks = rows.view(Q4_0)
    return Packed(_nibbles(blocks["codes"]), blocks["d"].copy())


def _decode_q4_0(rows: Array) -> Floats:
    blocks = rows.view(Q4_0)
    codes = _nibbles(blocks["codes"]).astype(np.float32)
    codes -= 8
    return _times(blocks["d"].astype(np.float32), codes)


def _repack_q4_1(rows: Array) -> Packed:
    blocks = rows.view(Q4_1)
    return Packed(_nibbles(blocks["codes"]), blocks["d"].copy(), blocks["m"].copy())


def _decode_q4_1(rows: Array) -> Floats:
    blocks = rows.view(Q4_1)
    codes = _nibbles(blocks["codes"]).astype(np.float32)
    return _affine(blocks["d"].astype(np.float32), codes, -blocks["m"].astype(np.float32))


def _five_bits(blocks: Array) -> Codes:
    """Codes [n, K] of 0…31: the low four bits as in Q4_0, the fifth of weight i in bit i of `high`."""
    codes = _nibbles(blocks["low"])
    fifth = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    fifth <<= 4
    codes |= _flat(fifth)
    return codes


def _repack_q5_0(rows: Array) -> Packed:
    blocks = rows.view(Q5_0)
    return Packed(_five_bits(blocks), blocks["d"].copy())


def _decode_q5_0(rows: Array) -> Floats:
    blocks = rows.view(Q5_0)
    codes = _five_bits(blocks).astype(np.float32)
    codes -= 16
    return _times(blocks["d"].astype(np.float32), codes)


def _decode_q5_1(rows: Array) -> Floats:
    blocks = rows.view(Q5_1)
    codes = _five_bits(blocks).astype(np.float32)
    return _affine(blocks["d"].astype(np.float32), codes, -blocks["m"].astype(np.float32))


def _repack_q8_0(rows: Array) -> Packed:
    blocks = rows.view(Q8_0)
    return Packed(_flat(blocks["codes"]), blocks["d"].copy())


def _decode_q8_0(rows: Array) -> Floats:
    blocks = rows.view(Q8_0)
    return _times(blocks["d"].astype(np.float32), _flat(blocks["codes"]).astype(np.float32))


def _levels(codes: Codes) -> Floats:
    return np.array(IQ4_LEVELS, np.float32)[codes]


def _decode_iq4_nl(rows: Array) -> Floats:
    blocks = rows.view(IQ4_NL)
    return _times(blocks["d"].astype(np.float32), _levels(_nibbles(blocks["codes"])))


# ---- blocks of 256 with scales of 16 or 32 weights -------------------------------------------------------------------


def _decode_q2_k(rows: Array) -> Floats:
    """A byte of `scales` is the scale (low nibble) and the minimum (high nibble) of 16 weights."""
    blocks = rows.view(Q2_K)
    scales = _number(blocks, "d") * (blocks["scales"] & 15).astype(np.float32)
    minima = _number(blocks, "dmin") * (blocks["scales"] >> 4).astype(np.float32)
    return _affine(_flat(scales), _flat(_quarters(blocks["codes"])).astype(np.float32), _flat(minima))


def _decode_q3_k(rows: Array) -> Floats:
    """Codes of -4…3 in three bits, the third in `high`: bit r of byte c is of weight 32 r + c. Scales of six bits: four
    in nibbles of the first eight bytes, two in the last four."""
    blocks = rows.view(Q3_K)
    low, high = blocks["scales"][:, :, :8], blocks["scales"][:, :, 8:]
    scales = np.concatenate([low & 15, low >> 4], axis=-1)
    scales |= (np.concatenate([high, high >> 2, high >> 4, high >> 6], axis=-1) & 3) << 4
    scale = _number(blocks, "d") * (scales.astype(np.float32) - 32)
    codes = _quarters(blocks["low"]).reshape(*blocks.shape, 8, 32)
    for run in range(8):
        codes[:, :, run] |= (blocks["high"] >> run & 1) << 2
    values = _flat(codes).astype(np.float32)
    values -= 4
    return _times(_flat(scale), values)


def _scales_and_minima(blocks: Array) -> tuple[Floats, Floats]:
    """float32 [n, groups of 32] of Q4_K and Q5_K: six bits each, times `d` and `dmin`.

    Groups 0 to 3 have theirs in the low six bits of the first and second four bytes; groups 4 to 7 have four bits in a
    nibble of the last four bytes, and the two upper ones above the former.
    """
    first, second, third = (blocks["scales"][:, :, i] for i in range(3))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | (second >> 6) << 4], axis=-1)
    return (
        _flat(_number(blocks, "d") * scales.astype(np.float32)),
        _flat(_number(blocks, "dmin") * minima.astype(np.float32)),
    )


def _decode_q4_k(rows: Array) -> Floats:
    blocks = rows.view(Q4_K)
    scales, minima = _scales_and_minima(blocks)
    return _affine(scales, _nibbles(blocks["codes"]).astype(np.float32), minima)


def _repack_q4_k(rows: Array) -> Packed:
    blocks = rows.view(Q4_K)
    scales, minima = _scales_and_minima(blocks)
    return Packed(_nibbles(blocks["codes"]), _half(scales), _half(-minima))


def _decode_q5_k(rows: Array) -> Floats:
    """As Q4_K, with a fifth bit: bit g of byte c of `high` is of weight c in group g."""
    blocks = rows.view(Q5_K)
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks["low"]).reshape(*blocks.shape, 8, 32)
    for group in range(8):
        codes[:, :, group] |= (blocks["high"] >> group & 1) << 4
    return _affine(scales, _flat(codes).astype(np.float32), minima)


def _decode_q6_k(rows: Array) -> Floats:
    """256 weights: two halves of 128, each four runs of 32; a run's codes are 4 bits of `low` and 2 bits of `high`."""
    blocks = rows.view(Q6_K)
    n, count = blocks.shape
    low, high = blocks["low"], blocks["high"]  # [n, blocks, half, 2, 32], [n, blocks, half, 32]
    codes = np.empty((n, count, 2, 4, 32), np.uint8)
    for run in range(4):
        nibble = low[:, :, :, run % 2] & 15 if run < 2 else low[:, :, :, run % 2] >> 4
        codes[:, :, :, run] = nibble | ((high >> (2 * run) & 3) << 4)
    values = _flat(codes).astype(np.float32)
    values -= 32
    return _times(_flat(_number(blocks, "d") * blocks["scales"].astype(np.float32)), values)  # 16 weights share one


def _decode_q8_k(rows: Array) -> Floats:
    blocks = rows.view(Q8_K)
    return _times(blocks["d"], _flat(blocks["codes"]).astype(np.float32))


def _repack_q8_k(rows: Array) -> Packed:
    blocks = rows.view(Q8_K)
    return Packed(_flat(blocks["codes"]).copy(), np.repeat(_half(blocks["d"]), 8, axis=1))


def _iq4_xs_scales(blocks: Array) -> Floats:
    """float32 [n, groups of 32]: six bits less 32, four of `scales_low` and two of `scales_high`, times `d`."""
    low = _nibbles(blocks["scales_low"][..., None]).reshape(*blocks.shape, 8)
    high = (blocks["scales_high"][:, :, None] >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & 3
    return _flat(_number(blocks, "d") * ((low | high << 4).astype(np.float32) - 32))


def _decode_iq4_xs(rows: Array) -> Floats:
    blocks = rows.view(IQ4_XS)
    return _times(_iq4_xs_scales(blocks), _levels(_nibbles(blocks["codes"])))


def _repack_iq4_xs(rows: Array) -> Packed:
    blocks = rows.view(IQ4_XS)
    return Packed(_nibbles(blocks["codes"]), _half(_iq4_xs_scales(blocks)))


_Q4NL = Grid("q4nl", 32, codebook=IQ4_LEVELS)
_ROUNDED_Q4NL = Grid("q4nl", 32, codebook=IQ4_LEVELS, exact=False)
_ROUNDED_Q4A = Grid("q4a", 32, offset="f16", exact=False)

GGUF_TYPES: dict[int, StoredType] = {
    0: DENSE_TYPES["F32"],
    1: DENSE_TYPES["F16"],
    2: StoredType("Q4_0", 32, Q4_0.itemsize, _decode_q4_0, Grid("q4", 32), _repack_q4_0),
    3: StoredType("Q4_1", 32, Q4_1.itemsize, _decode_q4_1, Grid("q4a", 32, offset="f16"), _repack_q4_1),
    6: StoredType("Q5_0", 32, Q5_0.itemsize, _decode_q5_0, Grid("q5nl", 32, codebook=EVEN_LEVELS), _repack_q5_0),
    7: StoredType("Q5_1", 32, Q5_1.itemsize, _decode_q5_1),
    8: StoredType("Q8_0", 32, Q8_0.itemsize, _decode_q8_0, Grid("q8", 32), _repack_q8_0),
    10: StoredType("Q2_K", 256, Q2_K.itemsize, _decode_q2_k),
    11: StoredType("Q3_K", 256, Q3_K.itemsize, _decode_q3_k),
    12: StoredType("Q4_K", 256, Q4_K.itemsize, _decode_q4_k, _ROUNDED_Q4A, _repack_q4_k),
    13: StoredType("Q5_K", 256, Q5_K.itemsize, _decode_q5_k),
    14: StoredType("Q6_K", 256, Q6_K.itemsize, _decode_q6_k),
    15: StoredType("Q8_K", 256, Q8_K.itemsize, _decode_q8_k, Grid("q8", 32, exact=False), _repack_q8_k),
    20: StoredType("IQ4_NL", 32, IQ4_NL.itemsize, _decode_iq4_nl, _Q4NL, _repack_q4_0),
    23: StoredType("IQ4_XS", 256, IQ4_XS.itemsize, _decode_iq4_xs, _ROUNDED_Q4NL, _repack_iq4_xs),
    28: DENSE_TYPES["F64"],
    30: DENSE_TYPES["BF16"],
}

# Types that exist but are not read, so that the error can call them by name. Q8_1 is made of activations, never stored.
OTHER_TYPES: dict[int, str] = {
    9: "Q8_1",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
