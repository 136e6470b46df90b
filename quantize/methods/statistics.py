"""What calibration tells a method about a product's input: how large its columns are, and how they go together.

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

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the rows x [K] of a product's input, one per token of the calibration's texts.

    gram is there where the method asks for it (`Method.needs`). Nobody writes into the arrays.
    """

    n: int  # rows
    square_sums: NDArray[np.float64]  # [K] Σ x²
    gram: NDArray[np.float32] | None = None  # [K, K] Σ x·xᵀ, symmetric, both triangles filled
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def mean_squares(self) -> NDArray[np.float64]:
        """[K] E[x²]."""
        return self.square_sums / max(self.n, 1)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), computed by whoever asks first and kept as long as these statistics: what all blocks of rows and all
        matrices on this input share, as a factorization of gram. Others wait for it."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            found: T = self._kept[key]
            return found
