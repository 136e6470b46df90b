"""Frequencies of the rotary position embedding, with the scalings by which models stretch their context.

The engine gets the finished numbers: one angle per position and pair of dimensions, and a factor on cos and sin.
Computed in float64 and rounded once. Rotating is the backend's work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .common.errors import ModelFormatError


def rope_frequencies(config: Mapping[str, Any]) -> tuple[NDArray[np.float32], float]:
    """(inv_freq float32 [head_dim/2] in radians per token, attention factor) of a canonical config.

    Raises ModelFormatError for a `rope_scaling` that this build does not know or that lacks a number.
    Source: RoFormer, arXiv 2104.09864, equation 15.
    """
    half = config["head_dim"] // 2
    inv_freq = float(config["rope_theta"]) ** -(np.arange(half, dtype=np.float64) / half)
    scaling = config.get("rope_scaling")
    factor = 1.0
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in _SCALINGS:
            raise ModelFormatError(f"rope_scaling: unknown rope_type {kind!r}, expected one of {' '.join(_SCALINGS)}")
        inv_freq, factor = _SCALINGS[kind](inv_freq, scaling, config)
    return inv_freq.astype(np.float32), factor


def _number(scaling: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelFormatError(f"rope_scaling: {key} is {value!r}, expected a positive number")
    return float(value)


_Scaled = tuple[NDArray[np.float64], float]


def _default(inv_freq: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    return inv_freq, 1.0


def _linear(inv_freq: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """Positions are squeezed: arXiv 2306.15595, equation 3."""
    return inv_freq / _number(scaling, "factor"), 1.0


def _llama3(inv_freq: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """Slow pairs are squeezed, fast ones left alone, those between blended: Llama 3.1's own scheme."""
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if low >= high:
        raise ModelFormatError(f"rope_scaling: low_freq_factor {low} is not below high_freq_factor {high}")
    turns = _number(scaling, "original_max_position_embeddings") * inv_freq / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (keep + (1 - keep) / _number(scaling, "factor")), 1.0


def _yarn(inv_freq: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """YaRN: arXiv 2309.00071, section 3.2, and equation 22 for the attention factor."""
    factor = _number(scaling, "factor")
    original = _number(scaling, "original_max_position_embeddings", float(config["max_seq_len"]))
    half = len(inv_freq)

    def pair_with_turns(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(float(config["rope_theta"]))

    first = pair_with_turns(_number(scaling, "beta_fast", 32.0))
    last = pair_with_turns(_number(scaling, "beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    squeeze = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return inv_freq * (1 - squeeze + squeeze / factor), _yarn_attention(scaling, factor)


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(_number(scaling, "mscale")) / scale(_number(scaling, "mscale_all_dim"))
    return scale(1.0)


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
