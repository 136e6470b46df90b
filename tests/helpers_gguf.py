"""The block types of GGUF by their definitions, one weight at a time in float64: the tests' own oracle.

Products of scales and codes are exact there, so that rounding the result once gives what exact decoding must give.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.make_sources import BLOCKS

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def decode_rows(kind: str, raw: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Stored bytes -> float32, rounded once from float64."""
    size = BLOCKS[kind][1]
    blocks = [decode_block(kind, raw[i : i + size]) for i in range(0, len(raw), size)]
    return np.array(blocks, np.float64).reshape(shape).astype(np.float32)


def decode_block(kind: str, raw: bytes) -> list[float]:
    """The weights of one block, each from its definition."""
    weights, _, places = BLOCKS[kind]
    numbers = [struct.unpack_from("<f" if kind == "Q8_K" else "<e", raw, at)[0] for at in places]
    return [_WEIGHT[kind](raw, i, *numbers) for i in range(weights)]


def _nibble(raw: bytes, at: int, i: int, half: int) -> int:
    """Code i where the low nibbles of `half` bytes are the first `half` weights and the high nibbles the next."""
    byte = raw[at + i // (2 * half) * half + i % half]
    return byte >> 4 if i % (2 * half) >= half else byte & 15


def _bits(raw: bytes, at: int, bit: int, n: int) -> int:
    return int.from_bytes(raw[at + bit // 8 : at + bit // 8 + 1], "little") >> bit % 8 & (1 << n) - 1


def _five(raw: bytes, at: int, i: int) -> int:
    """A code of five bits: 32 high bits first, then nibbles."""
    return _nibble(raw, at + 4, i, 16) | _bits(raw, at, i, 1) << 4


def _k_scale(raw: bytes, at: int, group: int) -> tuple[int, int]:
    """Scale and minimum of a group, six bits each, from the twelve bytes of Q4_K and Q5_K."""
    if group < 4:
        return raw[at + group] & 63, raw[at + 4 + group] & 63
    both = raw[at + 4 + group]
    return both & 15 | raw[at + group - 4] >> 6 << 4, both >> 4 | raw[at + group] >> 6 << 4


def _q2_k(raw: bytes, i: int, d: float, dmin: float) -> float:
    code = raw[16 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    return d * (raw[i // 16] & 15) * code - dmin * (raw[i // 16] >> 4)


def _q3_k(raw: bytes, i: int, d: float) -> float:
    low = raw[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    high = raw[i % 32] >> i // 32 & 1
    group = i // 16
    four = raw[96 + group % 8] >> (4 if group >= 8 else 0) & 15
    two = raw[104 + group % 4] >> 2 * (group // 4) & 3
    return d * ((four | two << 4) - 32) * (low + 4 * high - 4)


def _q4_k(raw: bytes, i: int, d: float, dmin: float) -> float:
    scale, minimum = _k_scale(raw, 4, i // 32)
    return d * scale * _nibble(raw, 16, i, 32) - dmin * minimum


def _q5_k(raw: bytes, i: int, d: float, dmin: float) -> float:
    scale, minimum = _k_scale(raw, 4, i // 32)
    code = _nibble(raw, 48, i, 32) | (raw[16 + i % 32] >> i // 32 & 1) << 4
    return d * scale * code - dmin * minimum


def _q6_k(raw: bytes, i: int, d: float) -> float:
    half, run, column = i // 128, i % 128 // 32, i % 32
    byte = raw[64 * half + 32 * (run % 2) + column]
    code = (byte >> 4 if run >= 2 else byte & 15) | (raw[128 + 32 * half + column] >> 2 * run & 3) << 4
    (scale,) = struct.unpack_from("<b", raw, 192 + i // 16)
    return float(d * scale * (code - 32))


def _iq4_xs(raw: bytes, i: int, d: float) -> float:
    group = i // 32
    low = raw[4 + group // 2] >> 4 * (group % 2) & 15
    high = struct.unpack_from("<H", raw, 2)[0] >> 2 * group & 3
    return float(d * ((low | high << 4) - 32) * LEVELS[_nibble(raw, 8, i, 16)])


def _signed(raw: bytes, at: int) -> int:
    return raw[at] - 256 if raw[at] > 127 else raw[at]


_WEIGHT: dict[str, Any] = {
    "Q4_0": lambda raw, i, d: d * (_nibble(raw, 2, i, 16) - 8),
    "Q4_1": lambda raw, i, d, m: d * _nibble(raw, 4, i, 16) + m,
    "Q5_0": lambda raw, i, d: d * (_five(raw, 2, i) - 16),
    "Q5_1": lambda raw, i, d, m: d * _five(raw, 4, i) + m,
    "Q8_0": lambda raw, i, d: d * _signed(raw, 2 + i),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": lambda raw, i, d: d * _signed(raw, 4 + i),
    "IQ4_NL": lambda raw, i, d: d * LEVELS[_nibble(raw, 2, i, 16)],
    "IQ4_XS": _iq4_xs,
}
