"""Codes by GPTQ and coordinate descent: errors in float64, the push forward against its formula."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError, QuantizeError
from pyllama.common.formats import CODEBOOKS, FORMATS, Packed, TensorSpec, dequantize, pack, unpack
from quantize.methods import gptq
from quantize.methods.gptq import quantize_gptq
from quantize.methods.rtn import Search, inverse, quantize_rtn
from quantize.methods.statistics import Statistics

QUANTIZED = [name for name, row in FORMATS.items() if row.quantized]
Floats = NDArray[np.float32]


def spec_of(format: str, shape: tuple[int, int], group: int) -> TensorSpec:
    info = FORMATS[format]
    return TensorSpec(
        "layers.0.wo",
        format,
        shape,
        group=group,
        offset="f16" if info.has_offset else "",
        codebook=CODEBOOKS.get(format, ()),
    )


def inputs(rng: np.random.Generator, n: int, n_columns: int) -> Floats:
    """Rows whose columns go together and differ in size, as activations do."""
    mixing = rng.normal(size=(n_columns, n_columns)) / np.sqrt(n_columns) + np.eye(n_columns)
    sizes = np.exp(rng.normal(size=n_columns))
    return (rng.normal(size=(n, n_columns)) @ mixing * sizes).astype(np.float32)


def statistics_of(x: Floats) -> Statistics:
    return Statistics(len(x), (x.astype(np.float64) ** 2).sum(axis=0), x.T @ x)


def output_errors(weights: Floats, packed: Packed, spec: TensorSpec, x: Floats) -> NDArray[np.float64]:
    """Σ over the inputs of the squared error of each row's product."""
    off = (weights - dequantize(spec, packed)).astype(np.float64)
    return ((off @ x.T.astype(np.float64)) ** 2).sum(axis=1)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("format", QUANTIZED)
def test_products_suffer_less_than_by_rounding(format: str, group: int) -> None:
    rng = np.random.default_rng(1)
    x, weights = inputs(rng, 600, 150), rng.normal(size=(40, 150)).astype(np.float32)
    spec, known = spec_of(format, weights.shape, group), statistics_of(x)
    packed = quantize_gptq(weights, spec, known)
    assert np.array_equal(dequantize(spec, unpack(spec, pack(spec, packed))), dequantize(spec, packed))
    errors = output_errors(weights, packed, spec, x)
    plain = output_errors(weights, quantize_rtn(weights, format, group, spec.codebook or None), spec, x)
    counted = quantize_rtn(
        weights, format, group, spec.codebook or None, importance=known.mean_squares.astype(np.float32)
    )
    assert errors.sum() < 0.5 * plain.sum()
    assert errors.sum() < 0.6 * output_errors(weights, counted, spec, x).sum()
    assert (errors < plain).mean() > 0.95


@pytest.mark.parametrize("format", QUANTIZED)
def test_rows_do_not_depend_on_their_neighbours(format: str) -> None:
    rng = np.random.default_rng(2)
    x, weights = inputs(rng, 300, 96), rng.normal(size=(24, 96)).astype(np.float32)
    spec, known = spec_of(format, weights.shape, 32), statistics_of(x)
    whole = dequantize(spec, quantize_gptq(weights, spec, known))
    some_spec = spec_of(format, (8, 96), 32)
    some = dequantize(some_spec, quantize_gptq(weights[8:16], spec, known))
    # A product of matrices may add in another order for other sides; a rare code then falls beyond a border.
    assert (whole[8:16] == some).mean() > 0.98


@pytest.mark.parametrize("format", ["q8", "q4", "q4nl"])
def test_weights_on_the_grid_stay_as_they_are(format: str) -> None:
    rng = np.random.default_rng(3)
    spec = spec_of(format, (16, 64), 32)
    grid = Search(format, spec.codebook or None).grid
    ones, out = np.ones((16, 1), np.float32), np.empty((16, 64), np.float32)
    levels = grid.levels(rng.uniform(grid.low, grid.high, (16, 64)).astype(np.float32), ones, out)
    levels[:, ::32] = grid.low  # or a smaller scale would do for some groups
    weights = (levels * np.float32(2.0**-9)).astype(np.float32)
    packed = quantize_gptq(weights, spec, statistics_of(inputs(rng, 200, 64)))
    assert np.array_equal(dequantize(spec, packed), weights)


def test_pushing_forward_is_the_elimination_of_columns() -> None:
    """Against GPTQ's own formulas: each column leaves the inverse (arXiv 2210.17323, eq. 3)."""
    rng = np.random.default_rng(4)
    x = inputs(rng, 500, 32)
    problem = gptq._Problem.of(x.T @ x, 32, "w")
    search = Search("q4", None)
    block = np.ascontiguousarray(rng.normal(size=(7, 32)).astype(np.float32)[:, problem.order].T)
    scale, offset = np.full(7, 0.35, np.float32), np.zeros(7, np.float32)
    found, errors, chosen = gptq.push(block, scale[None], offset[None], problem.factor, search)
    total = np.square(errors).sum(axis=0)
    assert not chosen.any()

    left, expected = block.astype(np.float64), np.empty_like(block)
    remaining = np.linalg.inv(problem.gram.astype(np.float64))
    for k in range(32):
        expected[k] = np.clip(np.rint(left[k] / scale), -8, 7)
        off = left[k] - expected[k] * scale
        left[k:] -= np.outer(remaining[k:, k] / remaining[k, k], off)
        remaining -= np.outer(remaining[:, k], remaining[k]) / remaining[k, k]
    assert np.array_equal(found, expected)
    error = (block - expected * scale).astype(np.float64)
    assert total == pytest.approx(np.einsum("kn,kl,ln->n", error, problem.gram, error), rel=1e-3)


def test_the_error_of_pushing_forward() -> None:
    """It is told without a product: (w−q)ᵀ H (w−q) with the damped H."""
    rng = np.random.default_rng(9)
    x, weights = inputs(rng, 600, 160), rng.normal(size=(21, 160)).astype(np.float32)
    problem = gptq._Problem.of(x.T @ x, 64, "w")
    wanted = np.ascontiguousarray(weights[:, problem.order].T)
    for format in QUANTIZED:
        search = Search(format, CODEBOOKS.get(format))
        state, error = gptq._pushed_forward(wanted, search, problem)
        assert error == pytest.approx(problem.error(wanted - state.values(problem)), rel=1e-3)


def test_descent_ends_where_no_code_is_better_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_ROUNDS", 40)
    rng = np.random.default_rng(5)
    x, weights = inputs(rng, 400, 64), rng.normal(size=(6, 64)).astype(np.float32)
    spec = spec_of("q4", weights.shape, 32)
    packed = quantize_gptq(weights, spec, statistics_of(x))
    problem = gptq._Problem.of(x.T @ x, 32, "w")
    gram = problem.gram[np.ix_(np.argsort(problem.order), np.argsort(problem.order))].astype(np.float64)
    scales = np.repeat(packed.scales.astype(np.float64), 32, axis=1)  # type: ignore[union-attr]

    def error(codes: NDArray[np.float64]) -> NDArray[np.float64]:
        off = weights - (codes - 8) * scales
        return np.einsum("nk,kl,nl->n", off, gram, off)

    codes = packed.codes.astype(np.float64)
    least = error(codes)
    for column in range(64):
        for step in (-1, 1):
            moved = codes.copy()
            moved[:, column] = np.clip(moved[:, column] + step, 0, 15)
            assert (error(moved) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("format", QUANTIZED)
def test_inputs_of_few_tokens_and_silent_columns(format: str) -> None:
    rng = np.random.default_rng(6)
    x = inputs(rng, 5, 77)  # far fewer tokens than columns
    x[:, 10:20] = 0
    weights = rng.normal(size=(3, 77)).astype(np.float32)
    weights[1] = 0
    spec = spec_of(format, weights.shape, 32)
    packed = quantize_gptq(weights, spec, statistics_of(x))
    values = dequantize(spec, packed)
    assert np.isfinite(values).all()
    assert np.abs(values[1]).max() < 1e-3
    assert np.abs(values - weights).max() < 4


def test_what_cannot_be_used_is_refused() -> None:
    weights, spec = np.ones((2, 32), np.float32), spec_of("q4", (2, 32), 32)
    with pytest.raises(ValueError, match="needs the gram"):
        quantize_gptq(weights, spec, None)
    for bad in (np.nan, np.inf):
        with pytest.raises(QuantizeError, match=r"layers\.0\.wo: its inputs"):
            quantize_gptq(weights, spec, Statistics(4, np.zeros(32), np.full((32, 32), bad, np.float32)))
    weights[1, 3] = np.inf
    with pytest.raises(ModelFormatError, match=r"layers\.0\.wo: has NaN or infinite"):
        quantize_gptq(weights, spec, statistics_of(np.ones((4, 32), np.float32)))


@pytest.mark.parametrize("format", QUANTIZED)
def test_inputs_that_are_all_zero_leave_rounding(format: str) -> None:
    weights = np.random.default_rng(9).normal(size=(4, 50)).astype(np.float32)
    spec = spec_of(format, weights.shape, 32)
    found = quantize_gptq(weights, spec, Statistics(9, np.zeros(50), np.zeros((50, 50), np.float32)))
    plain = quantize_rtn(weights, format, 32, spec.codebook or None)
    assert np.array_equal(dequantize(spec, found), dequantize(spec, plain))


def test_the_factor_is_that_of_the_inverse() -> None:
    x = inputs(np.random.default_rng(7), 900, 200)
    problem = gptq._Problem.of(x.T @ x, 64, "w")
    found = problem.factor.astype(np.float64).T @ problem.factor
    assert np.allclose(found @ problem.gram, np.eye(200), atol=2e-3)
    assert np.array_equal(problem.factor, np.triu(problem.factor))
    assert sorted(problem.order) == list(range(200))
    assert inverse(np.float32([2, 0]))[1] == 0


def test_corrected_weights_are_the_damped_least_squares() -> None:
    """Where the error's gradient in W' vanishes: (W'x − Wx̂ − (r̂ − r))·xᵀ + λ(W' − W) = 0, over all tokens."""
    rng = np.random.default_rng(8)
    x = inputs(rng, 300, 40).astype(np.float64)
    original, ahead = x + 0.1 * rng.normal(size=x.shape), 0.2 * rng.normal(size=(300, 12))
    weights = rng.normal(size=(12, 40)).astype(np.float32)
    gram = x.T @ x
    known = Statistics(
        300, np.diag(gram), *(part.astype(np.float32) for part in (gram, (original - x).T @ x, ahead.T @ x))
    )
    found = np.concatenate([known.corrected(weights[rows], rows) for rows in (slice(0, 5), slice(5, 12))])
    damping = 0.1 * gram.diagonal().mean()
    gradient = (x @ found.T - original @ weights.T.astype(np.float64) - ahead).T @ x + damping * (found - weights)
    assert np.abs(gradient).max() < 1e-3 * np.abs(ahead.T @ x).max()
    assert Statistics(300, np.diag(gram), known.gram).corrected(weights, slice(0, 12)) is weights


def test_inputs_that_say_nothing_correct_nothing() -> None:
    """The inverse of a gram of the smallest numbers would be infinite, and a sound checkpoint called damaged."""
    x = np.random.default_rng(10).normal(size=(90, 40)).astype(np.float32) * np.float32(1e-22)
    known = Statistics(90, np.square(x, dtype=np.float64).sum(axis=0), x.T @ x, x.T @ (x * np.float32(0.1)))
    weights, spec = np.ones((4, 40), np.float32), spec_of("q4", (4, 40), 32)
    assert known.gram is not None and known.gram.any()
    corrected = known.corrected(weights, slice(0, 4))
    assert np.array_equal(corrected, weights)
    assert np.isfinite(dequantize(spec, quantize_gptq(corrected, spec, known))).all()
