"""csrc/cuda/vector.cu on the emulated device, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.conftest import Emulated, EmulationError

RNG = np.random.default_rng


def swiglu(emulated: Emulated, x: np.ndarray, *, columns: int) -> np.ndarray:
    y = np.zeros((len(x), columns // 2), np.float32)
    emulated.call("swiglu_rows", np.array([len(x), columns, x.shape[1]], np.int32), x, y)
    return y


def rows(n_tok: int, columns: int, *, beside: int = 0, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random rows; the numbers behind each belong to nobody."""
    x = (RNG(seed).standard_normal((n_tok, columns + beside)) * scale).astype(np.float32)
    x[:, columns:] = np.nan
    return x


@pytest.mark.parametrize("columns", [2, 90, 1024])
def test_swiglu(emulated: Emulated, columns: int) -> None:
    x = rows(3, columns, beside=3, seed=4, scale=20.0)
    y = emulated.in_all_orders(lambda: swiglu(emulated, x, columns=columns))
    gate, up = np.split(x[:, :columns].astype(np.float64), 2, axis=1)
    exact = gate / (1 + np.exp(-gate)) * up
    assert (np.abs(y - exact) <= 8 * 2.0**-24 * np.abs(exact)).all()  # exp to two roundings, and four more


@pytest.mark.many_blocks
def test_swiglu_of_more_tokens_than_a_grid_is_high(emulated: Emulated) -> None:
    x = rows(65_537, 2, seed=5)
    gate, up = x.astype(np.float64).T
    exact = gate / (1 + np.exp(-gate)) * up
    assert (np.abs(swiglu(emulated, x, columns=2)[:, 0] - exact) <= 8 * 2.0**-24 * np.abs(exact)).all()


def test_swiglu_far_out(emulated: Emulated) -> None:
    """Gates beyond exp's range give 0 and the gate itself; what is no number stays none."""
    gate = np.array([-1e4, -200, -90, 0, 90, 200, 1e4, np.nan, np.inf], np.float32)
    x = np.concatenate([gate, np.full(9, 3, np.float32)])[None]
    y = swiglu(emulated, x, columns=18)[0]
    assert (y[:2] == 0).all() and abs(y[2]) < 1e-35 and y[3] == 0
    assert (y[4:7] == 3 * gate[4:7]).all() and np.isnan(y[7]) and np.isinf(y[8])


def test_half_a_gate(emulated: Emulated) -> None:
    with pytest.raises(EmulationError, match="must be even"):
        swiglu(emulated, rows(1, 3), columns=3)
