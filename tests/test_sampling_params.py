"""SamplingParams: every check, and where defaults come from. What the fields do to logits: test_sampler.py."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama import ModelFormatError, SamplingParams
from pyllama.sampling import MAX_SEED, build_params


def test_nothing_given_resolves_to_no_effect() -> None:
    settled = SamplingParams().resolve({})
    assert settled.native_arguments() == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": -1,
        "seed": settled.seed,
    }
    assert settled.max_tokens is None


def test_the_models_defaults_fill_what_is_not_given() -> None:
    model = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "max_new_tokens": 5}
    settled = SamplingParams(top_k=7, seed=3).resolve(model)
    found = (settled.temperature, settled.top_p, settled.top_k, settled.repetition_penalty, settled.min_p)
    assert found == (0.6, 0.9, 7, 1.1, 0.0)
    assert settled.max_tokens is None


@pytest.mark.parametrize(("params", "temperature"), [(SamplingParams(), 0.0), (SamplingParams(temperature=0.5), 0.5)])
def test_a_model_that_does_not_sample_is_greedy_unless_asked(params: SamplingParams, temperature: float) -> None:
    assert params.resolve({"do_sample": False, "temperature": 0.7}).temperature == temperature


@pytest.mark.parametrize(
    "config", [{"temperature": -1}, {"top_p": "high"}, {"top_k": 1.5}, {"min_p": math.nan}, {"temperature": 10**400}]
)
def test_an_impossible_default_names_the_file(config: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError, match=rf"generation_config.json: {next(iter(config))}="):
        SamplingParams().resolve(config)


BAD: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", 1.0),
    ("max_tokens", True),
    ("max_tokens", 2**31),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "0.5"),
    ("temperature", 10**400),
    ("temperature", np.array([0.5, 1.0])),
    ("temperature", False),
    ("top_k", -2),
    ("top_k", 2.5),
    ("top_k", np.array([1, 2])),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.01),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("logit_bias", [1, 2]),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
    ("logprobs", -1),
    ("logprobs", True),
    ("logprobs", 10**6),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", b"x"),
    ("stop_token_ids", "12"),
    ("stop_token_ids", 5),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [-1]),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 1.0),
    ("ignore_eos", 1),
    ("ignore_eos", None),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={repr(v)[:30]}" for n, v in BAD])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*expected") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, TypeError)


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(
        TypeError, match=r"unknown sampling parameter 'temprature'; did you mean 'temperature'\?.*top_k"
    ):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="'xyzzy' \\(known: max_tokens"):
        build_params(None, {"xyzzy": 1})


@pytest.mark.parametrize("name", ["n", "grammar", "typical_p", "dry_multiplier"])
def test_what_comes_later_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not supported by this version"):
        SamplingParams(**{name: 1})


def test_keywords_are_laid_over_params() -> None:
    base = SamplingParams(temperature=0.7, top_k=5)
    assert build_params(base, {"temperature": 0}) == SamplingParams(temperature=0, top_k=5)
    with pytest.raises(ValueError, match="expected SamplingParams, found dict"):
        build_params({"temperature": 1}, {})  # type: ignore[arg-type]


def test_values_are_normalized() -> None:
    params = SamplingParams(stop="end", top_k=-1, stop_token_ids=np.array([1, 2]), temperature=np.float32(0.5))
    assert params.stop == ("end",)
    assert params.top_k == 0
    assert params.stop_token_ids == (1, 2)
    assert type(params.temperature) is float and params.temperature == 0.5


def test_frozen_copied_and_pickled() -> None:
    params = SamplingParams(stop=["a"], logit_bias={3: 1.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 1  # type: ignore[misc]
    assert copy.deepcopy(params) == params == pickle.loads(pickle.dumps(params))


def test_a_callers_dict_is_copied() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = math.nan
    assert params.logit_bias == {1: 2.0}


def test_random_seeds_differ() -> None:
    seeds = {SamplingParams().resolve().seed for _ in range(8)}
    assert len(seeds) == 8 and all(seed is not None and 0 <= seed <= MAX_SEED for seed in seeds)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 1e6),
            "top_k": st.integers(-1, 2**31 - 1),
            "top_p": st.floats(0, 1, exclude_min=True),
            "min_p": st.floats(0, 1),
            "repetition_penalty": st.floats(0, 1e3, exclude_min=True),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "seed": st.integers(0, MAX_SEED),
        },
    )
)
def test_every_allowed_value_is_taken(values: dict[str, Any]) -> None:
    settled = SamplingParams(**values).resolve({})
    for name, value in values.items():
        assert getattr(settled, name) == (max(0, value) if name == "top_k" else value)
    assert settled.resolve({"temperature": 0.123}) == settled
