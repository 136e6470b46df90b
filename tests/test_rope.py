"""Rotary frequencies against the formulas written out element by element.

Comparison with transformers: tests/oracles/test_rope_transformers.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pyllama.common.errors import ModelFormatError
from pyllama.common.rope import inv_freq


def config(head_dim: int = 64, theta: float = 10000.0, scaling: Any = None, max_seq_len: int = 2048) -> dict[str, Any]:
    return {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling, "max_seq_len": max_seq_len}


@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"type": "default"}])
def test_default(head_dim: int, scaling: Any) -> None:
    values, factor = inv_freq(config(head_dim, 500000.0, scaling))
    expected = [1.0 / 500000.0 ** (2 * i / head_dim) for i in range(head_dim // 2)]
    assert values.dtype == np.float32 and values.shape == (head_dim // 2,)
    np.testing.assert_allclose(values, expected, rtol=1e-7)
    assert factor == 1.0


def test_linear() -> None:
    values, factor = inv_freq(config(scaling={"rope_type": "linear", "factor": 4.0}))
    np.testing.assert_allclose(values, inv_freq(config())[0] / 4, rtol=1e-6)
    assert factor == 1.0


def test_llama3_by_wavelength() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    values, factor = inv_freq(config(128, 500000.0, scaling, 131072))
    kinds = set()
    for i, value in enumerate(values):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected, kind = plain, "kept"
        elif wavelength > 8192 / 1:
            expected, kind = plain / 8, "divided"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected, kind = (1 - smooth) * plain / 8 + smooth * plain, "between"
        kinds.add(kind)
        assert value == pytest.approx(expected, rel=1e-6)
    assert kinds == {"kept", "divided", "between"}
    assert factor == 1.0


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    scaling = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    plain = inv_freq(config(128))[0]
    values, factor = inv_freq(config(128, scaling=scaling))
    np.testing.assert_allclose(values[:16], plain[:16], rtol=1e-6)
    np.testing.assert_allclose(values[-16:], plain[-16:] / 16, rtol=1e-6)
    assert np.all(np.diff(values) < 0)
    assert factor == pytest.approx(0.1 * math.log(16) + 1)


@pytest.mark.parametrize("n_ctx", [None, 1000, 4096, 5000, 16384])
def test_dynamic_grows_the_base_with_the_context(n_ctx: int | None) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 4096}
    values, factor = inv_freq(config(scaling=scaling, max_seq_len=16384), n_ctx)
    longest = max(n_ctx or 16384, 4096)
    base = 10000.0 * (4.0 * longest / 4096 - 3.0) ** (64 / 62)
    np.testing.assert_allclose(values, [base ** (-2 * i / 64) for i in range(32)], rtol=1e-6)
    assert factor == 1.0
    if longest == 4096:
        assert np.array_equal(values, inv_freq(config())[0])


@pytest.mark.parametrize("n_ctx", [None, 4096, 4097])
def test_longrope_has_other_factors_beyond_the_original_context(n_ctx: int | None) -> None:
    short, long = [1.0 + i / 9 for i in range(32)], [2.0 + i for i in range(32)]
    scaling = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 4096,
    }
    values, factor = inv_freq(config(scaling=scaling, max_seq_len=131072), n_ctx)
    divisors = short if n_ctx == 4096 else long
    np.testing.assert_allclose(values, [10000.0 ** (-2 * i / 64) / divisors[i] for i in range(32)], rtol=1e-6)
    assert factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert inv_freq(config(scaling=scaling | {"factor": 1.0}))[1] == 1.0
    assert inv_freq(config(scaling=scaling | {"attention_factor": 1.25}))[1] == 1.25


def test_factors_divide_pair_by_pair() -> None:
    factors = [1.0 + i / 7 for i in range(32)]
    values, factor = inv_freq(config(scaling={"rope_type": "factors", "factors": factors}))
    expected = [1.0 / (10000.0 ** (2 * i / 64) * factors[i]) for i in range(32)]
    np.testing.assert_allclose(values, expected, rtol=1e-7)
    assert factor == 1.0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk' is not supported, expected one of default"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor is None"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "head_dim is 2"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is not a list of 32 numbers"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "long_factor": [1.0] * 32,
                    "original_max_position_embeddings": 1,
                }
            },
            "original_max_position_embeddings is 1.0, expected more than 1",
        ),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "not supported"),
        ({"rope_scaling": "llama3"}, "expected an object or null"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0] * 31}}, "factors is not a list of 32 numbers"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0] * 31 + ["2"]}}, "factors is '2'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
            r"factor is 10{70,}\S*, expected a positive number",
        ),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}}, "expected more than 1"),
        ({"head_dim": 63}, "head_dim is 63"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "less than high_freq_factor",
        ),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelFormatError, match=found):
        inv_freq(config() | change)
