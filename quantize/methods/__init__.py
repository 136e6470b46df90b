"""Quantization methods: each turns float32 weights into codes and scales, and knows no files. One file per method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import Packed, TensorSpec

from .rtn import quantize_rtn

Method = Callable[[NDArray[np.float32], TensorSpec], Packed]


def _rtn(weights: NDArray[np.float32], spec: TensorSpec) -> Packed:
    return quantize_rtn(weights, spec.format, spec.group, spec.codebook or None, name=spec.name)


# A method is called on blocks of whole rows of a tensor; `spec` describes the whole tensor.
METHODS: dict[str, Method] = {"rtn": _rtn}

__all__ = ["METHODS", "Method", "quantize_rtn"]
