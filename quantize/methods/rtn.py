"""Round to nearest with a search for each group's scale: needs the weights alone, or how much each column counts.

A group's error as a function of its scale has many local minima. Some two dozen trial scales are tried around the one
that just covers the largest weight; for each, the best scale for the codes it gives is known in closed form (least
squares), so trials are ranked without rounding. The winner is refitted a few times, its scale rounded to f16 before
the codes are chosen again, and is kept only where it beats plain rounding. Works on arrays of [width, groups]: groups
run along the contiguous axis, so every step is one pass of vector instructions. This is the definition; where the
extension is built its loops (csrc/convert) do the same, bit for bit. Does not know files or other methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import CODEBOOKS, FORMATS, GROUPS, Packed

from .. import kernels

Floats = NDArray[np.float32]

_BLOCK_WEIGHTS = 1 << 15  # a block and its scratch arrays stay in the second-level cache
_F32_TINY = np.finfo(np.float32).tiny
_F16_MAX = 65504.0
_F16_TINY = np.float32(2.0**-24)  # the smallest positive f16
_REFITS = 3

# Trial scales put the largest weight at level * factor: below 1 it stays inside the grid, above 1 it is clipped.
_FACTORS = np.linspace(0.84, 1.39, 12)
_FACTORS6 = np.linspace(0.94, 1.1, 12)
_FACTORS8 = np.linspace(0.96, 1.01, 8)
# Trial ranges of an affine group: each end moved inwards by this share of the range. Rows (start, step), in ranges.
_SHRINK = (-0.03, 0.0, 0.035, 0.075, 0.12)
_AFFINE_TRIALS = np.array([(low, (1 - low - high) / 15) for low in _SHRINK for high in _SHRINK], dtype=np.float32)


def quantize_rtn(
    weights: Floats,
    format: str,
    group: int,
    codebook: tuple[int, ...] | None = None,
    *,
    importance: Floats | None = None,
    name: str = "weights",
) -> Packed:
    """Quantizes a matrix by rounding to nearest, each group with the best scale found.

    weights: float32 [N, K], finite. format: `q8 q6 q5nl q4 q4a q4nl`. group: 32, 64 or 128 columns, the last may be
        short.
    codebook: integers of −127…127, some negative and some positive: 16 for q4nl, 32 for q5nl (default: CODEBOOKS).
    importance: float32 [K], positive: by what the squared error of each column counts; None: alike.
    Returns codes [N, K] and f16 scales (and, for q4a, f16 minimums) [N, G]. The squared error of a group is never above
    that of rounding with the scale that just covers its largest weight. Raises ModelFormatError naming `name` when a
    weight is not finite or so large that its scale would not fit f16, ValueError for what this method does not make.
    """
    info = FORMATS.get(format)
    if info is None or not info.quantized or group not in GROUPS:
        raise ValueError(
            f"rtn makes q8, q6, q5nl, q4, q4a and q4nl in groups of 32, 64 or 128; asked for {format} in {group}"
        )
    if weights.ndim != 2 or weights.dtype != np.float32:
        raise ValueError(f"weights {weights.dtype} {list(weights.shape)}, expected float32 [N, K]")
    if importance is not None and (importance.shape != weights.shape[1:] or importance.dtype != np.float32):
        raise ValueError(f"importance {importance.dtype} {list(importance.shape)}, expected float32 [K]")
    method = Search(format, codebook)
    extension = kernels.extension() if weights.size and kernels.fits_loops(weights) else None
    if extension is not None and extension.largest(weights) <= method.largest:  # else the way below says what is wrong
        return method.by_extension(weights, group, importance)
    n_rows, n_columns = weights.shape
    n_groups = -(-n_columns // group)
    codes = np.empty((n_rows, n_columns), dtype=np.int8 if format == "q8" else np.uint8)
    scales = np.empty((n_rows, n_groups), dtype=np.float16)
    offsets = np.empty((n_rows, n_groups), dtype=np.float16) if info.has_offset else None
    full = n_columns // group * group
    step = max(1, _BLOCK_WEIGHTS // n_columns)
    for row in range(0, n_rows, step):
        rows = slice(row, min(row + step, n_rows))
        for columns, width in ((slice(0, full), group), (slice(full, n_columns), n_columns - full)):
            if columns.start == columns.stop:
                continue
            block = np.ascontiguousarray(weights[rows, columns].reshape(-1, width).T)
            check_range(block, method.largest, name)
            counts = None if importance is None else _repeated(importance[columns], width, block.shape[1])
            found = method.search(block, counts)
            groups = slice(columns.start // group, -(-columns.stop // group))
            codes[rows, columns] = found.codes.T.reshape(rows.stop - rows.start, -1)
            scales[rows, groups] = found.scales.reshape(rows.stop - rows.start, -1)
            if offsets is not None:
                offsets[rows, groups] = found.offsets.reshape(rows.stop - rows.start, -1)
    return Packed(codes, scales, offsets)


def _repeated(importance: Floats, width: int, n_groups: int) -> Floats:
    """That of a row's columns, for the groups of a block: [width, groups]."""
    of_row = importance.reshape(-1, width).T
    return np.ascontiguousarray(np.tile(of_row, n_groups // of_row.shape[1]))  # or sums would not go row by row


class Search:
    """The search of a format, and the largest weight that it can hold with an f16 scale."""

    def __init__(self, format: str, codebook: tuple[int, ...] | None) -> None:
        self.format = format
        self.has_offset = FORMATS[format].has_offset
        if format == "q4a":
            self.largest = _F16_MAX
            self.grid: _Grid = _Uniform(0, 15, 0, np.uint8)
            return
        if format == "q8":  # symmetric, so the sign does not matter; clipping costs more than it gains
            self.grid = _Uniform(-127, 127, 0, np.int8)
            self.places = (127 * _FACTORS8).astype(np.float32)
        else:
            info = FORMATS[format]
            if info.has_codebook:
                self.grid = _Codebook(codebook or CODEBOOKS[format], 2**info.code_bits)
            else:
                self.grid = _Uniform(-info.code_bias, info.code_bias - 1, info.code_bias, np.uint8)
            factors = _FACTORS6 if format == "q6" else _FACTORS
            places = np.concatenate([self.grid.low * factors, self.grid.high * factors])
            self.places = places.astype(np.float32)
        self.largest = _F16_MAX * max(-self.grid.low, self.grid.high)

    def search(self, block: Floats, counts: Floats | None) -> _Found:
        """The best encoding of weights [width, groups], whose errors count as much as `counts` says, or alike."""
        if self.format == "q4a":
            return _search_affine(block, counts)
        return _search_scale(block, self.grid, self.places, counts)

    def fit(self, block: Floats, importance: Floats) -> tuple[Floats, Floats]:
        """The best scale and minimum (0 for symmetric formats) of groups [width, groups]; importance: [width]."""
        extension = kernels.extension()
        if extension is not None and block.size and extension.largest(block) <= self.largest:
            packed = self.by_extension(np.ascontiguousarray(block.T), len(block), importance)
            assert packed.scales is not None
            scales = packed.scales[:, 0].astype(np.float32)
            return scales, np.zeros_like(scales) if packed.offsets is None else packed.offsets[:, 0].astype(np.float32)
        found = self.search(block, np.ascontiguousarray(np.broadcast_to(importance[:, None], block.shape)))
        return found.scales, found.offsets if self.format == "q4a" else np.zeros_like(found.scales)

    def levels_and_tables(self) -> tuple[tuple[int, int], Any, Any]:
        """The grid as the extension's loops take it."""
        grid = self.grid
        tables = (grid.level_of_half, grid.code_of_half) if isinstance(grid, _Codebook) else (None, None)
        return (grid.low, grid.high), *tables

    def by_extension(self, weights: Floats, group: int, importance: Floats | None) -> Packed:
        """The same for a whole matrix [N, K] whose weights are in range."""
        if self.format == "q4a":
            found = kernels.extension().search_affine(weights, group, _AFFINE_TRIALS, importance)
            return Packed(found[0], found[1].view(np.float16), found[2].view(np.float16))
        levels, *tables = self.levels_and_tables()
        bias = getattr(self.grid, "bias", 0)
        codes, scales = kernels.extension().search_scale(weights, group, levels, bias, self.places, *tables, importance)
        return Packed(codes.view(np.int8) if self.format == "q8" else codes, scales.view(np.float16))


@dataclass
class _Found:
    """The best encoding so far of a block of groups."""

    codes: NDArray[Any]  # [width, groups] as stored
    scales: Floats  # [groups], f16 numbers
    offsets: Floats  # [groups], f16 numbers; empty without
    error: Floats  # [groups]


def check_range(block: Floats, largest: float, name: str) -> None:
    if not np.isfinite(block).all():
        raise ModelFormatError(f"{name}: has NaN or infinite values; the checkpoint is damaged")
    found = float(np.abs(block).max())
    if found > largest:
        raise ModelFormatError(
            f"{name}: has a weight of magnitude {found:.6g}, too large for a scale in f16 (at most {largest:.6g}); "
            "keep this tensor in f32 or bf16"
        )


def round_f16(values: Floats) -> Floats:
    """Rounded to f16 numbers; what does not fit becomes infinite and loses every comparison."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def round_scale(scales: Floats) -> Floats:
    """Rounded to f16 numbers, but never to zero, which would lose the group."""
    rounded = round_f16(scales)
    vanished = (rounded == 0) & (scales != 0)
    rounded[vanished] = np.copysign(_F16_TINY, scales[vanished])
    return rounded


def inverse(scales: Floats) -> Floats:
    """1/s, and 0 where s is 0, infinite or so small that 1/s would be."""
    usable = (np.abs(scales) >= _F32_TINY) & np.isfinite(scales)
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)


def _sum(values: Floats) -> Floats:
    """Σ over the width, one after the other, and never -0: [width, groups] → [groups]."""
    # numpy adds row to row here, but a single column pairwise.
    total = np.add.reduce(values, axis=0) if values.shape[1] > 1 else np.add.accumulate(values, axis=0)[-1]
    summed: Floats = total + np.float32(0)
    return summed


def _dot(a: Floats, b: Floats) -> Floats:
    """Σ over the width of products, each rounded: [width, groups] · [width, groups] → [groups]."""
    return _sum(a * b)


def _times(values: Floats, counts: Floats | None) -> Floats:
    """For one side of a sum of products in which columns do not count alike."""
    return values if counts is None else values * counts


# ---- one scale per group: all but q4a --------------------------------------------------------------------------------


class _Uniform:
    """Levels low … high, one apart; the stored code is level + bias."""

    def __init__(self, low: int, high: int, bias: int, dtype: Any) -> None:
        self.low, self.high, self.bias, self.dtype = low, high, bias, dtype

    def levels(self, weights: Floats, inverse: Floats, out: Floats) -> Floats:
        """The level nearest to each weight / scale, as floats."""
        np.multiply(weights, inverse, out=out)
        np.rint(out, out=out)
        return np.clip(out, self.low, self.high, out=out)

    def codes(self, weights: Floats, inverse: Floats) -> NDArray[Any]:
        level = self.levels(weights, inverse, np.empty_like(weights))
        return (level + np.float32(self.bias)).astype(self.dtype)


class _Codebook:
    """Levels in any order. Borders between integers are multiples of 1/2: a table over halves is exact."""

    def __init__(self, codebook: tuple[int, ...], size: int) -> None:
        entries = np.array(codebook, dtype=np.float32)
        if len(codebook) != size or not (entries.min() < 0 < entries.max()) or np.abs(entries).max() > 127:
            raise ValueError(
                f"codebook {list(codebook)}, expected {size} integers of -127 to 127 on both sides of zero"
            )
        self.low, self.high = int(entries.min()), int(entries.max())
        middles = (np.arange(512) - 256 + 0.5) / 2
        self.code_of_half = np.abs(middles[:, None] - entries[None, :]).argmin(axis=1).astype(np.uint8)
        self.level_of_half = entries[self.code_of_half]

    def _halves(self, weights: Floats, inverse: Floats, scratch: Floats) -> NDArray[np.intp]:
        np.multiply(weights, inverse * np.float32(2), out=scratch)
        np.add(scratch, np.float32(256), out=scratch)
        np.clip(scratch, 0, 511, out=scratch)
        return scratch.astype(np.intp)

    def levels(self, weights: Floats, inverse: Floats, out: Floats) -> Floats:
        np.take(self.level_of_half, self._halves(weights, inverse, out), out=out, mode="clip")
        return out

    def codes(self, weights: Floats, inverse: Floats) -> NDArray[Any]:
        codes: NDArray[Any] = self.code_of_half[self._halves(weights, inverse, np.empty_like(weights))]
        return codes


_Grid = _Uniform | _Codebook


def _search_scale(weights: Floats, grid: _Grid, trials: Floats, counts: Floats | None) -> _Found:
    """The best scale of each group; trials are the places on the grid where the largest weight is put."""
    counted = _times(weights, counts)
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=0)[None], axis=0)[0]
    scratch = np.empty_like(weights)
    best_gain = np.full(largest.shape, -1, dtype=np.float32)
    scale = np.zeros_like(largest)
    for place in trials:
        level = grid.levels(weights, inverse(largest / place), scratch)
        wc, cc = _dot(counted, level), _dot(_times(level, counts), level)
        fitted = np.divide(wc, cc, out=np.zeros_like(wc), where=cc > 0)
        gain = fitted * wc  # Σw² − Σ(w − s·c)² for the fitted s
        better = gain > best_gain
        best_gain[better] = gain[better]
        scale[better] = fitted[better]
    best = _Best(weights, grid, counts)
    best.offer(largest / np.float32(grid.low))
    best.offer(largest / np.float32(grid.high))
    for _ in range(_REFITS):
        scale = best.offer(scale)
    return best.found()


class _Best:
    """Keeps, group by group, the rounded scale with the smallest squared error."""

    def __init__(self, weights: Floats, grid: _Grid, counts: Floats | None) -> None:
        self._weights, self._grid, self._counts = weights, grid, counts
        self._counted = _times(weights, counts)
        self._scale = np.zeros(weights.shape[1], dtype=np.float32)
        self._error = _dot(self._counted, weights)  # of scale 0
        self._scratch = np.empty_like(weights)

    def offer(self, scale: Floats) -> Floats:
        """Tries these scales rounded to f16; returns the least-squares scale for the codes they gave."""
        rounded = round_scale(scale)
        level = self._grid.levels(self._weights, inverse(rounded), self._scratch)
        wc, cc = _dot(self._counted, level), _dot(_times(level, self._counts), level)
        refit = np.divide(wc, cc, out=rounded.copy(), where=cc > 0)
        with np.errstate(invalid="ignore"):  # 0 · infinity, where a scale does not fit f16
            level *= rounded
            level -= self._weights
        error = _dot(_times(level, self._counts), level)
        better = error < self._error
        self._error[better] = error[better]
        self._scale[better] = rounded[better]
        return refit

    def found(self) -> _Found:
        codes = self._grid.codes(self._weights, inverse(self._scale))
        return _Found(codes, self._scale, np.empty(0, dtype=np.float32), self._error)


# ---- scale and minimum per group: q4a --------------------------------------------------------------------------------


def _search_affine(weights: Floats, counts: Floats | None) -> _Found:
    """The best scale and minimum of each group; trials move both ends of the range that the 16 levels cover."""
    total = np.float32(weights.shape[0]) if counts is None else _sum(counts)
    mean = _sum(_times(weights, counts)) / total
    centred = weights - mean  # or the sums below would cancel in a group far from zero
    low, high = centred.min(axis=0), centred.max(axis=0)
    spread = high - low
    counted = _times(centred, counts)
    best_gain = np.full(mean.shape, -1, dtype=np.float32)
    scale, mean_code = np.zeros_like(mean), np.zeros_like(mean)
    scratch = np.empty_like(weights)
    for start, step in _AFFINE_TRIALS:
        code = _affine_codes(centred, spread * step, low + start * spread, scratch)
        fitted, mean_of_code, gain = _fit_affine(counted, code, _times(code, counts), total)
        better = gain > best_gain
        best_gain[better] = gain[better]
        scale[better], mean_code[better] = fitted[better], mean_of_code[better]
    best = _BestAffine(weights, mean, counts)
    best.offer(spread / np.float32(15), weights.min(axis=0))
    for _ in range(_REFITS):
        rounded = round_scale(scale)
        code = best.offer(rounded, mean - rounded * mean_code)
        scale, mean_code, _gain = _fit_affine(counted, code, _times(code, counts), total)
    return best.found()


def _affine_codes(weights: Floats, scale: Floats, offset: Floats, out: Floats) -> Floats:
    np.subtract(weights, offset, out=out)
    out *= inverse(scale)
    np.rint(out, out=out)
    return np.clip(out, 0, 15, out=out)


def _fit_affine(
    counted: Floats, code: Floats, counted_code: Floats, total: Floats | np.float32
) -> tuple[Floats, Floats, Floats]:
    """Least squares of s·c + m to weights of mean 0: s, the mean code, and the squared error that they save.

    counted, counted_code: weights and codes times what they count; total: the sum of that.
    """
    mean_code = _sum(counted_code) / total
    variance = _dot(counted_code, code) - mean_code * mean_code * total
    covariance = _dot(counted, code)
    scale = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 0)
    return scale, mean_code, scale * covariance


class _BestAffine:
    """Keeps, group by group, the rounded scale and minimum with the smallest squared error."""

    def __init__(self, weights: Floats, mean: Floats, counts: Floats | None) -> None:
        self._weights, self._counts = weights, counts
        self._scratch = np.empty_like(weights)
        self._scale = np.zeros_like(mean)
        self._offset = round_f16(mean) + np.float32(0)
        difference = weights - self._offset
        self._error = _dot(_times(difference, counts), difference)

    def offer(self, scale: Floats, offset: Floats) -> Floats:
        """Tries scales and minimums rounded to f16; returns the codes that they gave."""
        scale, offset = round_scale(scale), round_f16(offset) + np.float32(0)  # -0 or 0: min() may give either
        with np.errstate(invalid="ignore"):  # infinite, where a minimum does not fit f16
            code = _affine_codes(self._weights, scale, offset, self._scratch)
            difference = code * scale
            difference += offset
            difference -= self._weights
        error = _dot(_times(difference, self._counts), difference)
        better = error < self._error
        self._error[better] = error[better]
        self._scale[better], self._offset[better] = scale[better], offset[better]
        return code

    def found(self) -> _Found:
        codes = _affine_codes(self._weights, self._scale, self._offset, self._scratch).astype(np.uint8)
        return _Found(codes, self._scale, self._offset, self._error)
