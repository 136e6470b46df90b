"""What calibration tells a method about a product's input: how large its columns are, how they go together, and how
far the quantized layers before it have moved it.

Filled by quantize/calibration.py, one for all matrices that share an input (wq wk wv; w_gate w_up), read by the methods
beside this file. Knows no models and no texts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import QuantizeError

T = TypeVar("T")

_CORRECTION_DAMPING = 0.1
_SILENT = 1e-30  # a mean diagonal of gram below which x says nothing: its inverse would leave float32


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the rows x [K] of a product's input, one per token of the calibration's texts.

    gram and drift are there where the method asks for them (`Method.needs`). Nobody writes into the arrays. With x of
    the quantized model, x̂ of the original: what stood in the place of the same token.
    """

    n: int  # rows
    square_sums: NDArray[np.float64]  # [K] Σ x²
    gram: NDArray[np.float32] | None = None  # [K, K] Σ x·xᵀ, symmetric, both triangles filled
    drift: NDArray[np.float32] | None = None  # [K, K] Σ (x̂ − x)·xᵀ
    ahead: NDArray[np.float32] | None = None  # [N, K] Σ (r̂ − r)·xᵀ, r what the product is added to; None: to nothing
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def mean_squares(self) -> NDArray[np.float64]:
        """[K] E[x²]."""
        return self.square_sums / max(self.n, 1)

    def corrected(self, weights: NDArray[np.float32], rows: slice) -> NDArray[np.float32]:
        """Rows of a matrix W [N, K] such that they make good, as far as x can, what quantization did before them.

        Least squares of W'x to Wx̂ + (r̂ − r): W' = W + (W·drift + ahead)·(gram + λ)⁻¹. λ, a tenth of gram's mean
        diagonal, keeps to W where x says little: texts that calibration has not seen would suffer. (The target is that
        of GPTAQ, arXiv 2504.02692; the residual stream's share, ours.)
        """
        if self.drift is None or self.gram is None:
            return weights
        moved = weights @ self.drift
        if self.ahead is not None:
            moved += self.ahead[rows]
        inverse: NDArray[np.float32] = self.once("inverse", self._inverse)
        wanted = weights + moved @ inverse
        return wanted.astype(np.float32, copy=False)

    def _inverse(self) -> NDArray[np.float32]:
        assert self.gram is not None
        damped = self.gram.astype(np.float64)
        mean = float(damped.diagonal().mean())
        if not mean > _SILENT:
            return np.zeros_like(self.gram)
        damped[np.diag_indices_from(damped)] += _CORRECTION_DAMPING * mean
        return np.linalg.inv(damped).astype(np.float32)

    def check(self, name: str) -> None:
        """Raises QuantizeError, naming a tensor, where a sum is not finite: under such sums no method works."""
        for sums in (self.square_sums, self.gram, self.drift, self.ahead):
            if sums is not None and not np.isfinite(sums).all():
                raise QuantizeError(f"{name}: its inputs in calibration are not finite, or too large; use --method rtn")

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), computed by whoever asks first and kept as long as these statistics: what all blocks of rows and all
        matrices on this input share, as a factorization of gram. Others wait for it."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            found: T = self._kept[key]
            return found
