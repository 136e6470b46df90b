"""Rotary frequencies against transformers' own functions, for every kind of scaling that both know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyllama.common.rope import inv_freq

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
    },
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048, "attention_factor": 1.25},
]


@pytest.mark.parametrize("n_ctx", [1000, 4096, 4097, 30000])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_contexts_as_transformers(kind: str, n_ctx: int) -> None:
    """For a text of n_ctx tokens; transformers takes max_position_embeddings for dynamic's original context."""
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 4096}
    if kind == "longrope":
        scaling |= {"short_factor": [1 + i / 40 for i in range(40)], "long_factor": [1.5 + i for i in range(40)]}
    config = transformers.LlamaConfig(
        hidden_size=320,
        num_attention_heads=4,
        head_dim=80,
        max_position_embeddings=4096 if kind == "dynamic" else 32768,
        rope_parameters={**scaling, "rope_theta": 10000.0},
    )
    expected, expected_factor = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=n_ctx)
    canonical = {"head_dim": 80, "rope_theta": 10000.0, "rope_scaling": scaling, "max_seq_len": 32768}
    values, factor = inv_freq(canonical, n_ctx)
    np.testing.assert_allclose(values, expected.numpy(), rtol=2e-6)
    assert factor == pytest.approx(float(expected_factor), rel=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0), (80, 100000.0)])
def test_as_transformers(scaling: dict[str, Any], head_dim: int, theta: float) -> None:
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=32768,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    expected, expected_factor = rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, device="cpu")
    canonical = {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling, "max_seq_len": 32768}
    values, factor = inv_freq(canonical)
    # transformers computes in float32: a power, a division and a product, some ulp of 2^-24 each.
    np.testing.assert_allclose(values, expected.numpy(), rtol=2e-6)
    assert factor == pytest.approx(float(expected_factor), rel=1e-6)
