"""Rounding to nearest by the error that a product makes of it: a column counts as much as its input is large.

The expected squared error of a row's product with inputs whose columns are uncorrelated is Σ E[x²]·(w − q)². The search
is rtn's under these weights; what correlations would add is other methods' affair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import Packed

from .rtn import quantize_rtn
from .statistics import Statistics

# A column that the texts left nearly silent still counts this share of the mean: other texts may not.
_LEAST_SHARE = 1e-3


def quantize_imatrix(
    weights: NDArray[np.float32],
    format: str,
    group: int,
    codebook: tuple[int, ...] | None,
    statistics: Statistics,
    *,
    name: str = "weights",
) -> Packed:
    """Quantizes a matrix float32 [N, K] under the mean squares of its input [K]; else as `quantize_rtn`.

    Raises QuantizeError, beside that, for mean squares that are not finite: no scale would be better than another.
    """
    return quantize_rtn(weights, format, group, codebook, importance=importance(statistics, name), name=name)


def importance(statistics: Statistics, name: str = "weights") -> NDArray[np.float32]:
    """float32 [K] of mean 1 (all 1 where every input is zero)."""
    statistics.check(name)
    squares = statistics.mean_squares
    mean = squares.mean()
    if not mean > 0:
        return np.ones(len(squares), np.float32)
    shares: NDArray[np.float32] = ((squares / mean + _LEAST_SHARE) / (1 + _LEAST_SHARE)).astype(np.float32)
    return shares
