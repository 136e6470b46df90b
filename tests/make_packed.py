"""Packs random codes as GPTQ, AWQ and MLX exports do, one code at a time, from the published definitions.

Nothing of ours is used: each function says which bits of which word hold which code. `Packed` keeps codes, scales and
offsets in plain order and gives the values that they mean in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


@dataclass
class Matrix:
    """Codes [N, K], scales and offsets [N, G] as float64, and each column's group."""

    codes: Array
    scales: Array
    offsets: Array
    group_of: Array
    minima: bool = False  # offsets are added, and not subtracted from codes

    def values(self) -> Array:
        """float64 [N, K], exact but for one rounding where minima are added."""
        out = np.empty(self.codes.shape)
        for k, g in enumerate(self.group_of):
            s, o, c = self.scales[:, g], self.offsets[:, g], self.codes[:, k].astype(np.float64)
            out[:, k] = s * c + o if self.minima else s * (c - o)
        return out


def random_matrix(
    shape: tuple[int, int],
    seed: int,
    *,
    bits: int = 4,
    group: int = 32,
    zeros: tuple[int, int] | None = None,
    act_order: bool = False,
    number: str = "F16",
) -> Matrix:
    """zeros: the lowest and highest zero point, None for minima; act_order: columns take their groups at random."""
    rng = np.random.default_rng(seed)
    n, k = shape
    group_of = np.arange(k) // (k if group == -1 else group)
    g = int(group_of[-1]) + 1
    if act_order:
        group_of = rng.permutation(group_of)
    sizes = _rounded(rng.uniform(0.5, 1.5, (n, g)) / 64, number)
    offsets = (
        _rounded(rng.uniform(-0.2, 0.2, (n, g)), number)
        if zeros is None
        else rng.integers(zeros[0], zeros[1] + 1, (n, g)).astype(np.float64)
    )
    return Matrix(rng.integers(0, 1 << bits, (n, k)), sizes, offsets, group_of, zeros is None)


def gptq(
    module: str,
    m: Matrix,
    *,
    bits: int = 4,
    number: str = "F16",
    v2: bool = False,
    g_idx: bool = True,
    overwrites: bool = False,
) -> Tensors:
    """auto-gptq: code (n, k) at bits (k·bits) % 32 of word (k·bits / 32, n); zero points run along n, less 1 in v1.

    A zero point 0 borrows from its neighbours in v1 (gptqmodel), or `overwrites` them, as -1 in 32 bits is all ones.
    """
    per = 32 // bits
    n, k = m.codes.shape
    words = np.zeros((k // per, n), np.uint64)
    for row in range(n):
        for column in range(k):
            words[column // per, row] |= np.uint64(int(m.codes[row, column]) << (column % per * bits))
    zeros = np.zeros((m.scales.shape[1], n // per), np.int64)
    for row in range(n):
        for g in range(len(zeros)):
            stored = int(m.offsets[row, g]) - (0 if v2 else 1)
            if overwrites:
                zeros[g, row // per] |= stored % (1 << 32) << (row % per * bits)
            else:
                zeros[g, row // per] += stored << (row % per * bits)
    tensors = {
        "qweight": _words(words),
        "qzeros": _words((zeros % (1 << 32)).astype(np.uint64)),
        "scales": _numbers(m.scales.T, number),
    }
    if g_idx:
        tensors["g_idx"] = ("I32", (k,), m.group_of.astype("<i4").tobytes())
    return {f"{module}.{part}": tensor for part, tensor in tensors.items()}


def awq(module: str, m: Matrix) -> Tensors:
    """AutoAWQ gemm: words hold columns of the transposed matrix, the i-th nibble that of row 0 2 4 6 1 3 5 7."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(codes: Array) -> Array:
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint64)
        for i in range(codes.shape[0]):
            for j in range(words.shape[1]):
                for nibble in range(8):
                    words[i, j] |= np.uint64(int(codes[i, 8 * j + order[nibble]]) << (4 * nibble))
        return words

    return {
        f"{module}.qweight": _words(packed(m.codes.T)),
        f"{module}.qzeros": _words(packed(m.offsets.T)),
        f"{module}.scales": _numbers(m.scales.T, "F16"),
    }


def awq_gemv(module: str, m: Matrix, words_of_zeros: int) -> Tensors:
    """AutoAWQ gemv: rows as they are, nibbles in order, groups padded to whole words."""
    n, g = m.offsets.shape
    padded_zeros, padded_scales = np.zeros((n, 8 * words_of_zeros)), np.zeros((n, 8 * words_of_zeros))
    padded_zeros[:, :g], padded_scales[:, :g] = m.offsets, m.scales
    return {
        f"{module}.qweight": _words(bit_stream(m.codes, 4)),
        f"{module}.qzeros": _words(bit_stream(padded_zeros, 4)),
        f"{module}.scales": _numbers(padded_scales, "F16"),
    }


def mlx(module: str, m: Matrix, *, bits: int = 4, number: str = "F16") -> Tensors:
    """MLX's affine mode: a row is a stream of bits, the lowest first."""
    _, shape, raw = _words(bit_stream(m.codes, bits))
    return {
        f"{module}.weight": ("U32", shape, raw),
        f"{module}.scales": _numbers(m.scales, number),
        f"{module}.biases": _numbers(m.offsets, number),
    }


def bit_stream(codes: Array, bits: int) -> Array:
    """Rows of codes as words, by a whole number of any length."""
    rows = []
    for row in codes:
        stream = sum(int(code) << (bits * i) for i, code in enumerate(row))
        rows.append([stream >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return np.array(rows, np.uint64)


def _words(words: Array) -> tuple[str, tuple[int, ...], bytes]:
    return "I32", words.shape, words.astype("<u4").tobytes()


def _numbers(values: Array, number: str) -> tuple[str, tuple[int, ...], bytes]:
    values = np.ascontiguousarray(values, np.float32)
    raw = {
        "F32": lambda: values,
        "F16": lambda: values.astype("<f2"),
        "BF16": lambda: (values.view(np.uint32) >> 16).astype("<u2"),
    }[number]()
    return number, values.shape, raw.tobytes()


def _rounded(values: Array, number: str) -> Array:
    """Values that the number holds exactly: bf16 by cutting, which is as good for random ones."""
    kind, _, raw = _numbers(values, number)
    if kind == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(values.shape).astype(float)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[kind]).reshape(values.shape).astype(np.float64)
