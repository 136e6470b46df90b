"""Frequencies of the rotary position embedding, with the scalings by which models stretch their context.

The engine gets the finished numbers: one angle per position and pair of dimensions, and a factor on cos and sin.
Computed in float64 and rounded once. Rotating is the backend's work.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelFormatError
from .reader import shown


def inv_freq(config: Mapping[str, Any], n_ctx: int | None = None) -> tuple[NDArray[np.float32], float]:
    """(radians per token, float32 [head_dim/2]; the factor on cos and sin) of a canonical config.

    `n_ctx`: the longest text, by default the config's max_seq_len; dynamic and longrope scalings depend on it.
    Raises ModelFormatError for a `rope_scaling` that this build does not know or a number that cannot be.
    Source: RoFormer, arXiv 2104.09864, equation 15.
    """
    head_dim = config["head_dim"]
    if head_dim % 2:
        raise ModelFormatError(f"config: head_dim is {head_dim}, expected an even number")
    half = head_dim // 2
    plain = _number(config, "rope_theta", where="config") ** -(np.arange(half, dtype=np.float64) / half)
    scaling = config.get("rope_scaling")
    if scaling is None:
        scaling = {"rope_type": "default"}
    if not isinstance(scaling, Mapping):
        raise ModelFormatError(f"rope_scaling is {shown(scaling)}, expected an object or null")
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ModelFormatError(f"rope_scaling: {shown(kind)} is not supported, expected one of {' '.join(_SCALINGS)}")
    with np.errstate(over="ignore"):  # the engine refuses what is not finite
        scaled, factor = _SCALINGS[kind](plain, scaling, {**config, "n_ctx": n_ctx or config["max_seq_len"]})
        return scaled.astype(np.float32), factor


def _number(
    scaling: Mapping[str, Any], key: str, default: float | None = None, *, where: str = "rope_scaling"
) -> float:
    value = scaling.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ModelFormatError(f"{where}: {key} is {shown(value)}, expected a positive number")
    return float(value)


_Scaled = tuple[NDArray[np.float64], float]


def _default(plain: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    return plain, 1.0


def _linear(plain: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """Positions are squeezed: arXiv 2306.15595, equation 3."""
    return plain / _number(scaling, "factor"), 1.0


def _llama3(plain: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """Slow pairs are squeezed, fast ones left alone, those between blended: Llama 3.1's own scheme."""
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if low >= high:
        raise ModelFormatError(
            f"rope_scaling: low_freq_factor is {low}, expected less than high_freq_factor, which is {high}"
        )
    original = _number(scaling, "original_max_position_embeddings", float(config["max_seq_len"]))
    turns = original * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (keep + (1 - keep) / _number(scaling, "factor")), 1.0


def _yarn(plain: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """YaRN: arXiv 2309.00071, section 3.2, and equation 22 for the attention factor."""
    factor = _number(scaling, "factor")
    original = _number(scaling, "original_max_position_embeddings", float(config["max_seq_len"]))
    theta, half = _number(config, "rope_theta", where="config"), len(plain)
    if theta <= 1:
        raise ModelFormatError(f"config: rope_theta is {theta}, expected more than 1 with rope_scaling of type yarn")

    def pair_with_turns(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first = pair_with_turns(_number(scaling, "beta_fast", 32.0))
    last = pair_with_turns(_number(scaling, "beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    squeeze = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return plain * (1 - squeeze + squeeze / factor), _yarn_attention(scaling, factor)


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(_number(scaling, "mscale")) / scale(_number(scaling, "mscale_all_dim"))
    return scale(1.0)


def _dynamic(plain: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """The base grows with the context, so that the slowest pair is squeezed and the fastest left alone.

    As transformers computes it for a text that fills the context; there it changes while a text grows.
    """
    factor, half = _number(scaling, "factor"), len(plain)
    original = _number(scaling, "original_max_position_embeddings", float(config["max_seq_len"]))
    if half < 2:
        raise ModelFormatError("config: head_dim is 2, expected more with rope_scaling of type dynamic")
    stretch = factor * max(config["n_ctx"], original) / original - (factor - 1)
    return plain * stretch ** -(np.arange(half) / (half - 1)), 1.0


def _longrope(plain: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """A factor for each pair, others for contexts beyond the original one: arXiv 2402.13753, as Phi-3 has it."""
    original = _number(scaling, "original_max_position_embeddings", float(config["max_seq_len"]))
    scaled = plain / _divisors(scaling, "long_factor" if config["n_ctx"] > original else "short_factor", len(plain))
    if scaling.get("attention_factor") is not None:
        return scaled, _number(scaling, "attention_factor")
    factor = _number(scaling, "factor", config["max_seq_len"] / original)
    if factor <= 1:
        return scaled, 1.0
    if original <= 1:
        raise ModelFormatError(
            f"rope_scaling: original_max_position_embeddings is {original}, expected more than 1 with type longrope"
        )
    return scaled, math.sqrt(1 + math.log(factor) / math.log(original))


def _factors(plain: NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> _Scaled:
    """Each frequency is divided by a factor of its own: what GGUF files carry as rope_freqs.weight."""
    return plain / _divisors(scaling, "factors", len(plain)), 1.0


def _divisors(scaling: Mapping[str, Any], key: str, n: int) -> NDArray[np.float64]:
    factors = scaling.get(key)
    if not isinstance(factors, list) or len(factors) != n:
        raise ModelFormatError(f"rope_scaling: {key} is not a list of {n} numbers, one for each pair")
    return np.array([_number({key: factor}, key) for factor in factors], dtype=np.float64)


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "factors": _factors,
}
