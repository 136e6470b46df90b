"""Weights for the tests of CUDA products: random ones of every format, how they are handed to the entry points of
linear_entries.cpp, and `reference`, fragment order a second time, in numpy, from the table of the operands of
mma.m16n8k16: register r of lane 4g + t holds rows g + 8(r % 2), columns 2t + 8(r // 2) and the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyllama.common.formats import FORMATS, Packed, TensorSpec, from_float32, pack, to_float32
from tests.cuda.conftest import Emulated

NUMBERS = ("", "f16", "bf16", "u8")  # Number of csrc/formats.h

CASES: list[dict[str, object]] = [
    *({"format": f, "group": g} for f in ("q4", "q4nl", "q8") for g in (32, 64, 128)),
    *({"format": "q4a", "group": g, "offset": o} for g in (32, 64, 128) for o in ("f16", "u8")),
    {"format": "q4a", "group": 32, "scale": "bf16", "offset": "bf16"},
    {"format": "q4a", "group": 64, "scale": "bf16", "offset": "u8"},
    {"format": "q4a", "group": 128, "scale": "f16", "offset": "bf16"},
    *({"format": f} for f in ("f16", "bf16", "f32")),
]
# What the upload makes bytes of: products and their cases are those of q8.
UPLOADED_CASES: list[dict[str, object]] = [{"format": f, "group": g} for f in ("q5nl", "q6") for g in (32, 128)]


BYTES = ("q5nl", "q6", "q8")  # on a device a byte is a weight


def case_name(case: dict[str, object]) -> str:
    return "-".join(str(v) for v in case.values())


@dataclass
class Stored:
    """A weight as it lies in a model's file."""

    spec: TensorSpec
    packed: Packed

    def with_scales(self, scales: np.ndarray, offsets: np.ndarray) -> Stored:
        kept = replace(
            self.packed, scales=from_float32(scales, self.spec.scale), offsets=from_float32(offsets, self.spec.offset)
        )
        return Stored(self.spec, kept)

    def codes_on_device(self) -> np.ndarray:
        codes = self.packed.codes
        if self.spec.format == "q6":
            return codes.astype(np.int8) - np.int8(32)
        return np.array(self.spec.codebook, np.int8)[codes] if self.spec.format == "q5nl" else codes

    def scales_float64(self) -> np.ndarray:
        return to_float32(self.packed.scales, self.spec.scale).astype(np.float64)

    def offsets_float64(self) -> np.ndarray:
        return to_float32(self.packed.offsets, self.spec.offset).astype(np.float64)

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Float64 [N, K] in stored columns: scale * code, and the minimum that is added to it."""
        spec = self.spec
        if not spec.info.quantized:
            values = to_float32(self.packed.codes, spec.format).astype(np.float64)
            return values, np.zeros_like(values)
        codes = self.packed.codes.astype(np.float64) - spec.info.code_bias
        if spec.codebook:
            codes = np.array(spec.codebook, np.float64)[self.packed.codes]
        columns = np.arange(spec.shape[1]) // spec.group
        minimum = np.zeros_like(codes)
        if spec.offset == "u8":
            codes -= self.offsets_float64()[:, columns]
        elif spec.offset:
            minimum = self.offsets_float64()[:, columns]
        return self.scales_float64()[:, columns] * codes, minimum


def random_weight(
    shape: tuple[int, int],
    seed: int,
    *,
    format: str = "",
    values: np.ndarray | None = None,
    spec: TensorSpec | None = None,
    **spec_arguments: Any,
) -> Stored:
    """Codes, scales (some negative, some zero) and offsets of all sizes; dense ones can be given."""
    rng = np.random.default_rng(seed)
    if spec is None:
        if FORMATS[format].has_codebook:
            entries = rng.choice(np.arange(-127, 128), 2 ** FORMATS[format].code_bits, False)
            spec_arguments["codebook"] = tuple(np.sort(entries).tolist())
        if format == "q4a":
            spec_arguments.setdefault("offset", "f16")
        spec = TensorSpec("w", format, shape, **spec_arguments)
    if not spec.info.quantized:
        if values is None:
            values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 3, (shape[0], 1))
        return Stored(spec, Packed(from_float32(values, spec.format)))
    if spec.format == "q8":
        codes = rng.integers(-128, 128, shape).astype(np.int8)
    else:
        codes = rng.integers(0, 2**spec.info.code_bits, shape).astype(np.uint8)
    groups = (shape[0], spec.n_groups)
    scales = rng.standard_normal(groups) * 2.0 ** rng.integers(-10, -2, groups) * (rng.random(groups) > 0.1)
    offsets = None
    if spec.offset == "u8":
        offsets = rng.integers(0, 256, groups).astype(np.uint8)
    elif spec.offset:
        offsets = from_float32(rng.standard_normal(groups) * 0.1, spec.offset)
    order = rng.permutation(shape[1]).astype(np.int32) if spec.input_order else None
    return Stored(spec, Packed(codes, from_float32(scales, spec.scale), offsets, order))


def describe(weights: list[Stored]) -> tuple[np.ndarray, np.ndarray]:
    """What linear_entries.cpp wants: 42 numbers for each weight, and all payloads behind each other."""
    numbers, payloads, start = [], [], 0
    for w in weights:
        spec = w.spec
        payload = pack(spec, w.packed)
        at = {s.name: start + s.start for s in spec.sections}
        scale = NUMBERS.index(spec.scale) if spec.info.quantized else 0
        head = [list(FORMATS).index(spec.format), scale, NUMBERS.index(spec.offset), *spec.shape, spec.group]
        head += [at["codes"], at.get("scales", 0), at.get("offsets", 0), int(spec.input_order)]
        numbers.append([*head, *spec.codebook, *[0] * (32 - len(spec.codebook))])
        payloads.append(payload)
        start += payload.size
    return np.array(numbers, np.int64).ravel(), np.concatenate(payloads)


def matrix_arguments(weights: list[Stored], row_map: np.ndarray | None) -> tuple[np.ndarray | int, ...]:
    """The arguments by which entries that stack weights to one matrix are told about them."""
    numbers, payload = describe(weights)
    rows = np.zeros(1, np.int32) if row_map is None else row_map
    return numbers, len(weights), payload, payload.size, rows, int(row_map is not None)


@dataclass
class Bytes:
    """A matrix on the device: bytes of codes, words of scales as uint32, row_scales float32."""

    codes: np.ndarray
    scales: np.ndarray
    row_scales: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bytes) and all(
            a.tobytes() == b.tobytes() for a, b in zip(vars(self).values(), vars(other).values(), strict=True)
        )


def bytes_on_device(emulated: Emulated, weights: list[Stored], like: Bytes, row_map: np.ndarray | None = None) -> Bytes:
    found = Bytes(*(np.full_like(a, 77) for a in vars(like).values()))
    sizes = np.array([a.nbytes for a in vars(like).values()], np.int64)
    emulated.call(
        "make_fragments",
        *matrix_arguments(weights, row_map),
        sizes,
        found.codes,
        found.scales,
        found.row_scales,
    )
    return found


class Layout:
    """Codes on the device, read back."""

    def __init__(self, codes: np.ndarray, tiles: int, chunks: int) -> None:
        self.codes, self.tiles, self.chunks = codes, tiles, chunks

    def halves(self) -> np.ndarray:
        """f16 or bf16 matrices: float16 [16 * tiles, 64 * chunks]."""
        out = np.zeros((16 * self.tiles, 64 * self.chunks), np.float16)
        rows, columns = operand_places(self.tiles, self.chunks)
        stored = self.codes.view(np.float16).reshape(self.tiles, self.chunks, 4, 32, 4, 2)
        out[rows, columns] = stored.transpose(0, 1, 3, 2, 4, 5)
        return out


def operand_places(tiles: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of [tile, chunk, lane, fragment, register, column of two]. The columns of fragment f that the
    table calls 2t, 2t + 1 and 2t + 8, 2t + 9 are the four at 32(f // 2) + 8t + 4(f % 2)."""
    tile, chunk, lane, f, r, e = np.indices((tiles, chunks, 32, 4, 4, 2), sparse=True)
    g, t = lane // 4, lane % 4
    rows = 16 * tile + g + 8 * (r % 2)
    columns = 64 * chunk + 32 * (f // 2) + 8 * t + 4 * (f % 2) + 2 * (r // 2) + e
    rows, columns = np.broadcast_arrays(rows, columns)
    return rows, columns


def row_power(numbers: np.ndarray) -> float:
    """What a row's numbers are divided by: it brings the largest finite one to 2^14 … 2^15."""
    finite = np.abs(numbers[np.isfinite(numbers) & (numbers != 0)])
    if not finite.size:
        return 1.0
    return float(2.0 ** (max(int(np.floor(np.log2(finite.max()))), -126) - 14))


def reference(weights: list[Stored], row_map: np.ndarray | None = None) -> Bytes:
    """The bytes that to_fragments must write."""
    spec = weights[0].spec
    n_rows = sum(w.spec.shape[0] for w in weights)
    tiles, chunks = -(-n_rows // 16), -(-spec.shape[1] // 64)
    if row_map is None:
        row_map = np.append(np.arange(n_rows), np.full(16 * tiles - n_rows, -1))
    map_ = row_map  # mypy does not keep the narrowing inside a closure

    def moved(arrays: list[np.ndarray], width: int) -> np.ndarray:
        """Rows below each other, in the map's order, zeros where there are none and on the right."""
        stacked = np.concatenate(arrays).astype(np.float64)
        out = np.zeros((16 * tiles, width))
        out[map_ >= 0, : stacked.shape[1]] = stacked[map_[map_ >= 0]]
        return out

    row_scales = np.ones(16 * tiles)
    rows, columns = operand_places(tiles, chunks)
    if not spec.info.quantized:
        values = moved([to_float32(w.packed.codes, spec.format) for w in weights], 64 * chunks)
        if spec.format != "f16":
            row_scales = np.array([row_power(row) for row in values])
            values = values / row_scales[:, None]
        placed = values[rows, columns].transpose(0, 1, 3, 2, 4, 5)
        parts = [placed.astype(np.float16)]
        if spec.format == "f32":
            with np.errstate(invalid="ignore"):
                parts.append((placed - parts[0]).astype(np.float16))
        codes = np.stack(parts, axis=3)
        return Bytes(codes.view(np.uint8).ravel(), np.zeros(0, np.uint32), row_scales.astype(np.float32))

    stored = moved([w.codes_on_device() for w in weights], 64 * chunks).astype(np.int64)
    words = place_codes(stored[rows, columns], spec.format)
    n_groups = {32: 2 * chunks, 64: chunks, 128: -(-chunks // 2)}[spec.group]
    scales = moved([w.scales_float64() for w in weights], n_groups)
    minimum = spec.offset in ("f16", "bf16")
    offsets = moved([w.offsets_float64() for w in weights], n_groups) if spec.offset else np.zeros((16 * tiles, 0))
    if "bf16" in (spec.scale, spec.offset):
        numbers = np.concatenate([scales, offsets], axis=1) if minimum else scales
        row_scales = np.array([row_power(row) for row in numbers])
        scales = scales / row_scales[:, None]
        if minimum:
            offsets = offsets / row_scales[:, None]
    return Bytes(words, place_scales(scales, offsets, spec), row_scales.astype(np.float32))


def place_codes(operands: np.ndarray, format: str) -> np.ndarray:
    """Bytes of codes [tile, chunk, lane, fragment, register, column of two]."""
    if format in BYTES:
        stored = ((operands + 128) % 256 if operands.min() < 0 else operands + 128).astype(np.uint8)
        tiles, chunks = stored.shape[:2]
        return stored.reshape(tiles, chunks, 32, 2, 16).transpose(0, 1, 3, 2, 4).ravel()
    r, e = np.indices((4, 2))
    shifts = 4 * (2 * r + e if format == "q4nl" else r + 4 * e)
    words = (operands << shifts).sum(axis=(4, 5)).astype(np.uint32)
    return words.view(np.uint8).ravel()


def place_scales(scales: np.ndarray, offsets: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Words [tile, scale group, g, word] of two halves: scales of rows g and g + 8, then offsets."""
    n = 2 if spec.group == 32 else 1

    def pairs(values: np.ndarray) -> np.ndarray:  # [tile, scale group, g, n, row g or g + 8]
        split = values.reshape(-1, 2, 8, values.shape[1] // n, n).transpose(0, 3, 2, 4, 1)
        with np.errstate(over="ignore"):
            return split.astype(np.float16)

    parts = [pairs(scales)]
    if spec.offset == "u8":
        top = np.repeat([1024.0, 64.0], 8)
        parts.append(pairs(-(offsets + np.tile(top, len(offsets) // 16)[:, None])))
    elif spec.offset:
        parts.append(pairs(offsets) if n == 1 else pairs(offsets).swapaxes(3, 4))
    return np.ascontiguousarray(np.concatenate(parts, axis=3)).view(np.uint32).ravel()
