"""csrc/cuda/activations.cu on the emulated device: layout and rounding to the bit, norms against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.cuda.conftest import Emulated
from tests.cuda.helpers_linear import as_halves

RNG = np.random.default_rng


@dataclass
class Made:
    """What lies in memory, taken apart: one line for each token."""

    values: np.ndarray  # float16 [tokens, columns and what fills the last chunk]
    sums: np.ndarray  # float16 [tokens, chunks, high and low and two zeros, side]
    scales: np.ndarray  # float32 [tokens]

    def floats(self) -> np.ndarray:
        return self.values.astype(np.float64) * self.scales[:, None]

    def tokens(self, which: slice) -> bytes:
        return self.values[which].tobytes() + self.sums[which].tobytes() + self.scales[which].tobytes()


def make(
    emulated: Emulated,
    x: np.ndarray,
    *,
    columns: int,
    rows: np.ndarray | None = None,
    order: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    eps: float = 1e-5,
) -> Made:
    """Normed where there is a weight."""
    n = len(x if rows is None else rows)
    panels, chunks = -(-n // 8), -(-columns // 64)
    values = np.zeros((panels, 2 * chunks, 8, 32), np.float16)
    sums = np.zeros((panels, chunks, 8, 4, 2), np.float16)
    scales = np.zeros(8 * panels, np.float32)
    given = [a is not None for a in (rows, order, weight)]
    none = np.zeros(1, np.int32)
    emulated.call(
        "make_activations",
        np.array([n, columns, *x.shape, *given], np.int32),
        x,
        none if rows is None else rows.astype(np.int32),
        none if order is None else order.astype(np.int32),
        none if weight is None else weight,
        eps,
        panels,
        values,
        sums,
        scales,
    )
    return Made(
        np.ascontiguousarray(values.transpose(0, 2, 1, 3)).reshape(8 * panels, -1)[:n],
        np.ascontiguousarray(sums.transpose(0, 2, 1, 3, 4)).reshape(8 * panels, chunks, 4, 2)[:n],
        scales[:n],
    )


def wide(n_tok: int, columns: int, *, beside: int = 7, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random rows; the numbers behind each belong to nobody."""
    x = (RNG(seed).standard_normal((n_tok, columns + beside)) * scale).astype(np.float32)
    x[:, columns:] = np.nan
    return x


def check_sums(made: Made) -> None:
    """Of 32 numbers each: to two halves, the rest is less than a half of the rest."""
    exact = made.values.astype(np.float64).reshape(len(made.values), -1, 2, 32).sum(-1)
    high, low, *zeros = made.sums.astype(np.float64).transpose(2, 0, 1, 3)
    assert (np.abs(high - exact) <= 2.0**-11 * np.abs(exact) + 2.0**-14).all()
    magnitude = np.abs(made.values.astype(np.float64)).reshape(exact.shape + (32,)).sum(-1)
    assert (np.abs(high + low - exact) <= 2.0**-21 * magnitude + 2.0**-24).all()
    assert not np.any(zeros)


@pytest.mark.parametrize(("n_tok", "columns"), [(1, 1), (3, 100), (8, 64), (9, 129), (17, 576), (2, 8192 + 70)])
def test_rounding(emulated: Emulated, n_tok: int, columns: int) -> None:
    x = wide(n_tok, columns, seed=columns)
    x[:, :columns] *= 10.0 ** np.linspace(-6, 5, n_tok)[:, None]
    made = make(emulated, x, columns=columns)
    largest = np.abs(made.values).max(1)
    assert ((largest >= 512) & (largest <= 1024)).all()
    assert (made.floats()[:, :columns] == as_halves(x[:, :columns])).all()
    assert (made.values[:, columns:] == 0).all()
    check_sums(made)


@pytest.mark.parametrize("columns", [1, 33, 512, 8192, 9001])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e15])
def test_norm(emulated: Emulated, columns: int, scale: float) -> None:
    x = wide(3, columns, seed=columns, scale=scale)
    weight = RNG(1).standard_normal(columns).astype(np.float32)
    made = make(emulated, x, columns=columns, weight=weight)
    exact = x[:, :columns].astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight
    # A thread adds up to 18 squares and the tree as many again; half of that is left by the root. Then five roundings,
    # and the one to a half.
    bound = (2.0**-11 + 26 * 2.0**-24) * np.abs(exact) + 2.0**-25 * made.scales[:, None]
    assert (np.abs(made.floats()[:, :columns] - exact) <= bound).all()
    largest = np.abs(made.values).max(1)
    assert ((largest >= 512) & (largest <= 1024)).all()
    assert (made.values[:, columns:] == 0).all()
    check_sums(made)


def test_orders_of_threads(emulated: Emulated) -> None:
    x, weight = wide(3, 1100, seed=5), RNG(1).standard_normal(1100).astype(np.float32)

    def run() -> np.ndarray:
        return np.frombuffer(make(emulated, x, columns=1100, weight=weight).tokens(slice(None)), np.uint8)

    emulated.in_all_orders(run)


@pytest.mark.parametrize("columns", [700, 8300])
def test_norm_and_rounding_are_one_after_the_other(emulated: Emulated, columns: int) -> None:
    """Rounding y = x · 1 / root to halves in one kernel is rounding y: here for x of which the root is exactly 1."""
    x = np.sign(wide(2, columns, seed=3))
    weight = RNG(2).standard_normal(columns).astype(np.float32) * 100
    plain = np.ascontiguousarray(x[:, :columns] * weight)
    normed = make(emulated, x, columns=columns, weight=weight, eps=0.0)
    assert normed.tokens(slice(None)) == make(emulated, plain, columns=columns).tokens(slice(None))


@pytest.mark.parametrize("columns", [130, 8300])
@pytest.mark.parametrize("normed", [False, True])
def test_input_order_and_rows(emulated: Emulated, columns: int, normed: bool) -> None:
    x = wide(6, columns, seed=4)
    weight = RNG(1).standard_normal(columns).astype(np.float32) if normed else None
    order, rows = RNG(2).permutation(columns), np.array([5, 0, 5, 3, 1, 1, 2, 0, 4], np.int32)
    plain = make(emulated, x, columns=columns, weight=weight)
    made = make(emulated, x, columns=columns, weight=weight, order=order, rows=rows)
    assert made.scales.tobytes() == plain.scales[rows].tobytes()
    assert made.values[:, :columns].tobytes() == plain.values[rows][:, order].tobytes()
    check_sums(made)


@pytest.mark.parametrize("normed", [False, True])
def test_a_token_alone_has_the_same_bits(emulated: Emulated, normed: bool) -> None:
    x = wide(11, 700, seed=2)
    x[3, 4], x[5, 6] = np.nan, np.inf
    weight = RNG(1).standard_normal(700).astype(np.float32) if normed else None
    together = make(emulated, x, columns=700, weight=weight)
    for t in range(11):
        alone = make(emulated, x[t : t + 1], columns=700, weight=weight)
        assert alone.tokens(slice(None)) == together.tokens(slice(t, t + 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_norm_of_what_has_no_norm_is_nan(emulated: Emulated, bad: float) -> None:
    """1e20 has a square that no float holds."""
    x = wide(2, 600, seed=3)
    x[1, 599] = bad
    made = make(emulated, x, columns=600, weight=np.ones(600, np.float32))
    assert np.isfinite(made.values[0]).all() and np.isnan(made.values[1, :600]).all()


def test_what_is_no_number_stays_and_the_rest_too(emulated: Emulated) -> None:
    x = wide(1, 100, seed=6)
    x[0, 7], x[0, 70] = np.inf, np.nan
    made = make(emulated, x, columns=100)
    kept = np.delete(np.arange(100), [7, 70])
    assert made.values[0, 7] == np.inf and np.isnan(made.values[0, 70])
    assert (made.floats()[0, kept] == as_halves(x[:, kept])[0]).all()
