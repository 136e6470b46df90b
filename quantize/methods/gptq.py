"""Codes chosen so that a product's output stays what it was, not each weight: GPTQ, then coordinate descent.

For inputs with gram matrix H = Σ x·xᵀ the squared error of the outputs of a row w of weights is (w−q)ᵀ H (w−q). Columns
are rounded one after the other, and what a column's rounding did to the outputs is made good, as far as H allows, by
the columns that are still to come (GPTQ, arXiv 2210.17323, equations 2 and 3, over the Cholesky factor of H⁻¹). Groups
come in the order of their energy and columns within a group by theirs; a group's scale is chosen when its turn comes,
by rounding the group under some scales, so the order leaves no trace in what is stored. Then rounds of descent on the
whole of H: each group's scale (and minimum) by least squares, each code to where the error is least, given all others
(as QuantEase, arXiv 2309.01885). A row whose error is larger than by plain rounding under E[x²] starts from that.

Arrays are [columns, rows]: a row of weights is a lane, so every step is one pass over contiguous numbers. Where H comes
from is calibration's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import QuantizeError
from pyllama.common.formats import Packed, TensorSpec

from .. import kernels
from .rtn import Search, check_range, inverse, quantize_rtn, round_f16, round_scale
from .statistics import Statistics

Floats = NDArray[np.float32]

_DAMPING = 0.01  # of H's mean diagonal is added to its diagonal, ten times as much until it can be factored
_MAX_DAMPING = 10.0
_BLOCK = 256  # columns after which the errors are carried to all that follow
_FACTORS = np.array([0.92, 0.96, 1.0, 1.04, 1.08], dtype=np.float32)  # of the scale that fits a group best as it stands
_MIDDLE = np.float32(7.5)  # of the levels of a format with minima
_ROUNDS = 3  # the third takes off a hundredth of the error and 3 % of the divergence (docs/QUANTIZATION.md)


def quantize_gptq(weights: Floats, spec: TensorSpec, statistics: Statistics | None) -> Packed:
    """Quantizes rows of a matrix, [n, K] float32, finite, for inputs with these statistics (`gram` is needed).

    Formats, groups, result and errors as of quantize_rtn; the error (w−q)ᵀ H (w−q) of a row is never above that of
    rounding under E[x²]. Where all inputs are zero, weights are rounded as by rtn. Raises QuantizeError for a gram that
    is not finite.
    """
    if statistics is None or statistics.gram is None:
        raise ValueError("gptq needs the gram matrix of the tensor's input")
    gram = statistics.gram
    if not gram.any():
        return quantize_rtn(weights, spec.format, spec.group, spec.codebook or None, name=spec.name)
    problem = statistics.once(("gptq", spec.group), lambda: _Problem.of(gram, spec.group, spec.name))
    search = Search(spec.format, spec.codebook or None)
    check_range(weights, search.largest, spec.name)
    wanted = np.ascontiguousarray(weights[:, problem.order].T)
    state, error = _pushed_forward(wanted, search, problem)
    plain = _plain(wanted, search, problem)
    state.take(plain, error > problem.error(wanted - plain.values(problem)))
    _descend(wanted, state, search, problem)
    return state.packed(spec, search, problem)


@dataclass(frozen=True)
class _Problem:
    """What the rows of a matrix, and all matrices on the same input, have in common."""

    order: NDArray[np.intp]  # [K] columns in the order in which they are rounded
    groups: list[tuple[slice, int]]  # a group's columns in that order, and its number
    gram: Floats  # [K, K] damped, in that order, its mean diagonal 1
    importance: Floats  # [K] the diagonal, in that order
    factor: Floats  # [K, K] upper: H⁻¹ = factorᵀ·factor

    @classmethod
    def of(cls, gram: Floats, group: int, name: str) -> _Problem:
        diagonal = gram.diagonal().astype(np.float64)
        mean = float(diagonal.mean())
        if not np.isfinite(gram).all():
            raise QuantizeError(f"{name}: its inputs in calibration are not finite, or too large; gptq cannot use them")
        columns = np.arange(len(gram))
        runs = [columns[first : first + group] for first in range(0, len(gram), group)]
        runs.sort(key=lambda run: -float(diagonal[run].mean()))
        runs = [run[np.argsort(-diagonal[run], kind="stable")] for run in runs]
        order = np.concatenate(runs)
        ends = np.cumsum([len(run) for run in runs])
        groups = [
            (slice(int(end) - len(run), int(end)), int(run[0]) // group) for run, end in zip(runs, ends, strict=True)
        ]
        ordered = gram[np.ix_(order, order)].astype(np.float64) / mean
        factor, damping = cls._factor(ordered, name)
        ordered[np.diag_indices_from(ordered)] += damping
        damped = ordered.astype(np.float32)
        return cls(order, groups, damped, damped.diagonal().copy(), factor.astype(np.float32))

    @staticmethod
    def _factor(gram: NDArray[np.float64], name: str) -> tuple[NDArray[np.float64], float]:
        """The upper Cholesky factor of the inverse of gram + damping, and the damping that it took."""
        damping = _DAMPING
        while damping <= _MAX_DAMPING:
            damped = gram.copy()
            damped[np.diag_indices_from(damped)] += damping
            try:
                # With rows and columns turned about, H = L·Lᵀ becomes H = Rᵀ'·R'; the inverse of that is the factor.
                turned = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
                return np.ascontiguousarray(_inverse_of_upper(turned)), damping
            except np.linalg.LinAlgError:
                damping *= 10
        raise QuantizeError(f"{name}: the gram matrix of its inputs cannot be factored; calibrate with other texts")

    def error(self, off: Floats) -> NDArray[np.float64]:
        """(w−q)ᵀ H (w−q) of each row of [K, n]."""
        errors: NDArray[np.float64] = np.einsum("kn,kn->n", off, self.gram @ off, dtype=np.float64)
        return errors


def _inverse_of_upper(matrix: NDArray[Any]) -> NDArray[np.float64]:
    """The inverse of an upper triangular matrix, by halves: most of it is products of matrices."""
    n = len(matrix)
    if n <= 64:
        return np.triu(np.linalg.inv(matrix))
    half = n // 2
    out = np.zeros_like(matrix)
    out[:half, :half] = _inverse_of_upper(matrix[:half, :half])
    out[half:, half:] = _inverse_of_upper(matrix[half:, half:])
    out[:half, half:] = -out[:half, :half] @ matrix[:half, half:] @ out[half:, half:]
    return out


@dataclass
class _State:
    """Levels, scales and minima of some rows, columns in the problem's order."""

    levels: Floats  # [K, n]
    scales: Floats  # [groups, n] f16 numbers
    offsets: Floats  # [groups, n] f16 numbers, zero for symmetric formats

    @classmethod
    def empty(cls, problem: _Problem, n: int) -> _State:
        n_groups = len(problem.groups)
        zeros = [np.zeros((rows, n), np.float32) for rows in (len(problem.order), n_groups, n_groups)]
        return cls(*zeros)

    def values(self, problem: _Problem) -> Floats:
        out = np.empty_like(self.levels)
        for columns, group in problem.groups:
            np.multiply(self.levels[columns], self.scales[group], out=out[columns])
            out[columns] += self.offsets[group]
        return out

    def take(self, other: _State, rows: NDArray[np.bool_]) -> None:
        """The other's numbers for these rows."""
        for mine, its in ((self.levels, other.levels), (self.scales, other.scales), (self.offsets, other.offsets)):
            mine[:, rows] = its[:, rows]

    def packed(self, spec: TensorSpec, search: Search, problem: _Problem) -> Packed:
        found = search.grid.codes(self.levels, np.ones((1, self.levels.shape[1]), np.float32))
        codes = np.empty(found.shape[::-1], dtype=found.dtype)
        codes[:, problem.order] = found.T
        scales = np.ascontiguousarray(self.scales.T).astype(np.float16)
        offsets = np.ascontiguousarray(self.offsets.T).astype(np.float16) if search.has_offset else None
        return Packed(codes, scales, offsets)


def _plain(wanted: Floats, search: Search, problem: _Problem) -> _State:
    """Each weight rounded by itself, scales by E[x²]."""
    state = _State.empty(problem, wanted.shape[1])
    for columns, group in problem.groups:
        block = wanted[columns]
        scale, offset = search.fit(block, problem.importance[columns])
        search.grid.levels(block - offset, inverse(scale), state.levels[columns])
        state.scales[group], state.offsets[group] = scale, offset
    return state


# ---- one column after the other --------------------------------------------------------------------------------------


def _pushed_forward(wanted: Floats, search: Search, problem: _Problem) -> tuple[_State, NDArray[np.float64]]:
    """GPTQ: the rounding of each column is made good by the columns behind it.

    Also gives (w−q)ᵀ H (w−q) of each row [n], which is the sum of the squares of what columns leave over their factors;
    infinite where a group could not be rounded.
    """
    state, error = _State.empty(problem, wanted.shape[1]), np.zeros(wanted.shape[1])
    left = wanted.copy()  # what the columns that are still to come should be
    first = pending = 0  # columns from `first` on have not had the errors of those before `pending`
    errors = np.empty_like(left)
    for columns, group in problem.groups:
        part = slice(first, columns.start)
        left[columns] -= problem.factor[part, columns].T @ errors[part]
        found = _push_group(left[columns], columns, group, errors[columns], state, search, problem)
        error += np.where(found, np.square(errors[columns]).sum(axis=0), np.inf)
        pending = columns.stop
        if pending - first >= _BLOCK:
            left[pending:] -= problem.factor[first:pending, pending:].T @ errors[first:pending]
            first = pending
    return state, error


def _push_group(
    block: Floats, columns: slice, group: int, errors: Floats, state: _State, search: Search, problem: _Problem
) -> NDArray[np.bool_]:
    """Rounds a group under some scales and keeps, row by row, what gave the least error. False where none was found."""
    factor = np.ascontiguousarray(problem.factor[columns, columns])
    scale, offset = search.fit(block, np.float32(1) / factor.diagonal() ** 2)
    scales = round_scale(scale * _FACTORS[:, None])
    offsets = round_f16(offset + (scale - scales) * _MIDDLE) if search.has_offset else np.zeros_like(scales)
    levels, errs, chosen = push(block, scales, offsets, factor, search)
    state.levels[columns], errors[:] = levels, errs
    found, lane = chosen >= 0, np.arange(len(chosen))
    state.scales[group] = np.where(found, scales[chosen, lane], 0)
    state.offsets[group] = np.where(found, offsets[chosen, lane], 0)
    return found


def push(
    block: Floats, scales: Floats, offsets: Floats, factor: Floats, search: Search
) -> tuple[Floats, Floats, NDArray[np.int8]]:
    """A group [width, n] column after column, under each of some scales and minima [trials, n].

    Returns, of the first trial with the least sum of squares, levels [width, n] and each column's error over its factor
    [width, n], and which trial it is [n]; -1, and zeros, where none gives a number.
    """
    extension = kernels.extension()
    if extension is not None:
        found: tuple[Floats, Floats, NDArray[np.int8]] = extension.push_group(
            np.ascontiguousarray(block), scales, offsets, factor, *search.levels_and_tables()
        )
        return found
    best_levels, best_errors = np.zeros_like(block), np.zeros_like(block)
    least, chosen = np.full(block.shape[1], np.inf, dtype=np.float32), np.full(block.shape[1], -1, dtype=np.int8)
    for trial, (scale, offset) in enumerate(zip(scales, offsets, strict=True)):
        left, factors = block.copy(), inverse(scale)
        levels, errors = np.empty_like(block), np.empty_like(block)
        total = np.zeros_like(least)
        for k in range(len(block)):
            level = search.grid.levels(left[k] - offset, factors, levels[k])
            np.subtract(left[k], level * scale + offset, out=errors[k])
            errors[k] *= np.float32(1) / factor[k, k]
            total += errors[k] * errors[k]
            left[k + 1 :] -= factor[k, k + 1 :, None] * errors[k]
        better = total < least
        least[better], chosen[better] = total[better], trial
        best_levels[:, better], best_errors[:, better] = levels[:, better], errors[:, better]
    return best_levels, best_errors, chosen


# ---- all columns again -----------------------------------------------------------------------------------------------


def _descend(wanted: Floats, state: _State, search: Search, problem: _Problem) -> None:
    """Coordinate descent, in place: scales, minima and codes, each the best given all others."""
    off = wanted - state.values(problem)
    for _ in range(_ROUNDS):
        for columns, group in problem.groups:
            slope = problem.gram[columns] @ off  # half the error's fall along each weight
            before = state.levels[columns] * state.scales[group] + state.offsets[group]
            gram = np.ascontiguousarray(problem.gram[columns, columns])
            _refit(state, columns, group, slope, gram, search)
            move_codes(state.levels[columns], state.scales[group], slope, gram, search)
            off[columns] += before - (state.levels[columns] * state.scales[group] + state.offsets[group])


def _refit(state: _State, columns: slice, group: int, slope: Floats, gram: Floats, search: Search) -> None:
    """The scale (and minimum) of a group by least squares, where that still is better once rounded."""
    levels, scale, offset = state.levels[columns], state.scales[group], state.offsets[group]
    spread = gram @ levels
    cc, cs = _dot(levels, spread), _dot(levels, slope)
    if not search.has_offset:
        change = np.divide(cs, cc, out=np.zeros_like(cs), where=cc > 0)
        change = round_scale(scale + change) - scale
        shift = np.zeros_like(change)
        gain = 2 * change * cs - change * change * cc
    else:
        ones = gram.sum(axis=1)
        oo, co, os = np.float32(gram.sum()), _dot(levels, ones[:, None]), slope.sum(axis=0)
        determinant = cc * oo - co * co
        solvable = determinant > np.float32(1e-6) * cc * oo
        change = np.divide(cs * oo - os * co, determinant, out=np.zeros_like(cs), where=solvable)
        change = round_scale(scale + change) - scale
        shift = round_f16(offset + (os - change * co) / oo) - offset
        gain = 2 * (change * cs + shift * os) - (change * change * cc + 2 * change * shift * co + shift * shift * oo)
    worse = ~(gain > 0)
    change[worse], shift[worse] = 0, 0
    scale += change
    offset += shift
    slope -= spread * change
    if search.has_offset:
        slope -= gram.sum(axis=1)[:, None] * shift


def move_codes(levels: Floats, scale: Floats, slope: Floats, gram: Floats, search: Search) -> None:
    """Each column's levels [width, n] to where the error is least, the others as they are; also moves the slope."""
    extension = kernels.extension()
    if extension is not None:
        extension.move_codes(levels, slope, scale, gram, *search.levels_and_tables())
        return
    factors = inverse(scale)
    for k in range(len(levels)):
        best = levels[k] * scale + slope[k] * (np.float32(1) / gram[k, k])
        moved = search.grid.levels(best, factors, np.empty_like(best))
        change = (moved - levels[k]) * scale
        levels[k] = moved
        slope -= gram[k, :, None] * change


def _dot(a: Floats, b: Floats) -> Floats:
    summed: Floats = np.einsum("kn,kn->n", a, np.broadcast_to(b, a.shape))
    return summed
