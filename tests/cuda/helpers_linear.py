"""Products on the emulated device for tests, and what they must be: y = x W^T in float64."""

from __future__ import annotations

import numpy as np

from tests.cuda.conftest import Emulated
from tests.cuda.helpers_fragments import Stored, matrix_arguments

RNG = np.random.default_rng
BIAS, RESIDUAL, INPUT_ORDER, SWIGLU, UPLOAD_LAST, FEW = 1, 2, 4, 8, 16, 32


def product(
    emulated: Emulated,
    weights: list[Stored],
    x: np.ndarray,
    *,
    row_map: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    swiglu: bool = False,
    upload_last: bool = False,
    few: bool = False,
    multiprocessors: int = 2,
) -> np.ndarray:
    """float32 [n_tokens, rows]. x's rows are apart by more than their length, and so are y's."""
    rows = sum(w.spec.shape[0] for w in weights)
    order = weights[0].packed.input_order
    out = np.full((len(x), rows + 3), 7.0, np.float32)
    if residual is not None:
        out[:, :rows] = residual
    wide = np.full((len(x), x.shape[1] + 5), np.nan, np.float32)
    wide[:, : x.shape[1]] = x
    extras = BIAS * (bias is not None) + RESIDUAL * (residual is not None) + INPUT_ORDER * (order is not None)
    unused = np.zeros(1, np.int32)
    emulated.call(
        "multiply",
        *matrix_arguments(weights, row_map),
        wide,
        len(x),
        wide.shape[1],
        unused if order is None else order,
        np.zeros(1, np.float32) if bias is None else bias,
        extras + SWIGLU * swiglu + UPLOAD_LAST * upload_last + FEW * few,
        multiprocessors,
        out,
        out.shape[1],
    )
    written = rows // 2 if swiglu else rows
    unwritten = out[:, rows:] if residual is not None or not swiglu else out[:, written:]
    assert (unwritten == 7).all()
    return out[:, :written].copy()


def as_halves(x: np.ndarray) -> np.ndarray:
    """What the tensor cores see of activations: halves after division by a power of two, as float64."""
    out = x.astype(np.float64)
    for token in out:
        finite = np.abs(token[np.isfinite(token) & (token != 0)])
        power = 2.0 ** max(np.floor(np.log2(finite.max())) - 9, -100) if finite.size else 1.0
        token[:] = (token / power).astype(np.float32).astype(np.float16).astype(np.float64) * power
    return out


def check_product(weights: list[Stored], x: np.ndarray, y: np.ndarray) -> None:
    """y against float64. Products of halves are exact in float; what is left are the roundings of sums: of at most
    K / 8 + 64 terms one after another, each at most 2^-24 of the sum of magnitudes; and of q4a's sums to 22 bits."""
    x64 = as_halves(x)
    order = weights[0].packed.input_order
    if order is not None:
        x64 = x64[:, order]
    parts = [w.parts() for w in weights]
    scaled, minimum = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
    expected = x64 @ (scaled + minimum).T
    magnitude = np.abs(x64) @ (np.abs(scaled) + np.abs(minimum)).T
    bound = (x.shape[1] / 8 + 64) * 2.0**-24 * magnitude + 1e-30
    error = np.abs(y - expected)
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


def activations(n_tokens: int, columns: int, seed: int) -> np.ndarray:
    """Tokens of sizes from 1e-6 to 1e5, with a few outliers each, as in real models."""
    rng = RNG(seed)
    x = rng.standard_normal((n_tokens, columns)) * 10.0 ** np.linspace(-6, 3, n_tokens)[:, None]
    x[:, rng.integers(0, columns, 2)] *= 100
    return x.astype(np.float32)
