"""Quantization methods: each turns float32 weights into codes and scales, and knows no files. One file per method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import Packed, TensorSpec

from .gptq import quantize_gptq
from .imatrix import quantize_imatrix
from .rtn import quantize_rtn
from .statistics import Statistics

Quantize = Callable[[NDArray[np.float32], TensorSpec, Statistics | None], Packed]


@dataclass(frozen=True)
class Method:
    """How codes are chosen.

    quantize: called on blocks of whole rows of a tensor, from several threads; rows are independent. The spec describes
    the whole tensor. Statistics are those of the tensor's input, and None for a method that needs none.
    needs: of an input's statistics: "" nothing, "squares" the sums of its squares, "gram" those of its products too,
    and how far the quantized layers before it have moved it.
    Embeddings, whose input is no vector of numbers, are quantized by rtn where a method needs something.
    """

    quantize: Quantize
    needs: str = ""


def _rtn(weights: NDArray[np.float32], spec: TensorSpec, statistics: Statistics | None) -> Packed:
    return quantize_rtn(weights, spec.format, spec.group, spec.codebook or None, name=spec.name)


def _imatrix(weights: NDArray[np.float32], spec: TensorSpec, statistics: Statistics | None) -> Packed:
    assert statistics is not None
    return quantize_imatrix(weights, spec.format, spec.group, spec.codebook or None, statistics, name=spec.name)


METHODS: dict[str, Method] = {
    "rtn": Method(_rtn),
    "imatrix": Method(_imatrix, "squares"),
    "gptq": Method(quantize_gptq, "gram"),
}

__all__ = ["METHODS", "Method", "Statistics", "quantize_gptq", "quantize_imatrix", "quantize_rtn"]
