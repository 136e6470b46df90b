"""The sampler against an independent numpy one, stage by stage and draw by draw, and its arithmetic against numpy's.

The reference computes each stage in the plainest way (full sorts, masks); nothing here knows how the C++ side is quick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama import _C
from pyllama.common.errors import ModelFormatError

MASK = 2**32 - 1


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as in the paper's figure 4: two 32x32 multiplications, swap, xor, ten times, keys stepping."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def uniform(seed: int, position: int) -> float:
    low, high, _, _ = philox([position & MASK, position >> 32, 0, 0], [seed & MASK, seed >> 32])
    return ((high << 32 | low) >> 11) / 2**53


def adjusted(logits: NDArray[np.float32], tokens: Sequence[int], prompt_len: int, p: dict[str, Any]) -> NDArray[Any]:
    """Logit bias, then penalties. float32 after each, as logits are."""
    x = logits.copy()
    for token, bias in p.get("logit_bias", {}).items():
        x[token] = np.float32(float(x[token]) + float(np.float32(bias)))
    for token in set(tokens):
        value = float(x[token])
        value = value / p.get("repetition_penalty", 1.0) if value > 0 else value * p.get("repetition_penalty", 1.0)
        count = list(tokens[prompt_len:]).count(token)
        if count:
            value -= p.get("presence_penalty", 0.0) + p.get("frequency_penalty", 0.0) * count
        x[token] = np.float32(value)
    return x


def probabilities(x: NDArray[Any], p: dict[str, Any]) -> NDArray[np.float64]:
    """What temperature, top-k, top-p and min-p leave of the adjusted logits, not normalized; 0 for what they remove."""
    temperature = p.get("temperature", 1.0)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if temperature == 0:
        return np.array([float(i == order[0]) for i in range(len(x))])
    mass = np.exp((x.astype(np.float64) - float(x.max())) / temperature)
    kept = order[: p.get("top_k", 0) or len(x)]
    if p.get("top_p", 1.0) < 1:
        reached = np.cumsum(mass[kept]) >= p["top_p"] * mass[kept].sum()
        kept = kept[: int(np.argmax(reached)) + 1]
    kept = [i for i in kept if mass[i] >= p.get("min_p", 0.0)]
    return np.where(np.isin(np.arange(len(x)), kept), mass, 0.0)


def reference(logits: NDArray[np.float32], tokens: Sequence[int], prompt_len: int, p: dict[str, Any]) -> int:
    mass = probabilities(adjusted(logits, tokens, prompt_len, p), p)
    cumulative = np.cumsum(mass)
    return int(np.searchsorted(cumulative, uniform(p.get("seed", 0), len(tokens)) * cumulative[-1], side="right"))


def sample(logits: Any, tokens: Sequence[int] = (), prompt_len: int = 0, isa: str = "", **params: Any) -> Any:
    return _C.Sampler(**params).sample(np.asarray(logits, dtype=np.float32), list(tokens), prompt_len, isa)


def random_logits(n: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


# ---- arithmetic


def ulps(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(found - expected) / np.spacing(np.abs(expected))))


def test_log_is_within_two_ulp() -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([np.exp(rng.uniform(-700, 700, 200_000)), rng.uniform(1, 1000, 200_000)])
    assert ulps(_C.ops.portable_log(x), np.log(x)) <= 2
    near_one = rng.uniform(0.9, 1.1, 100_000)
    assert np.max(np.abs(_C.ops.portable_log(near_one) - np.log(near_one))) <= 2e-16
    assert _C.ops.portable_log(1.0) == 0.0


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the paper's authors publish with their library
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert _C.ops.philox4x32(counter, key) == expected
    assert philox(counter, key) == expected


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**31))
def test_uniform(seed: int, position: int) -> None:
    assert _C.ops.uniform_bits(seed, position) / 2**53 == uniform(seed, position)


# ---- the two passes over a vocabulary

ISAS = _C.isas()
ONE = 2**44
EDGES = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-38,
    1.0,
    float(np.nextafter(np.float32(1), np.float32(2))),
    -30.5,
    -31.5,
    -3e38,
    3e38,
]


def weighed(logits: NDArray[np.float32], scale: float) -> NDArray[np.float64]:
    """2^(44 + (logits - max)·scale) in float64, before rounding to integers."""
    x = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.exp2(np.maximum((x - x.max()) * scale, -200.0)) * ONE


@st.composite
def logit_arrays(draw: st.DrawFn) -> NDArray[np.float32]:
    """Normal ones of any spread, many equal ones, numbers at the edges of float32, around the size of a block."""
    n = draw(st.sampled_from([1, 2, 15, 63, 64, 65, 127, 128, 300]))
    kind = draw(st.sampled_from(["normal", "coarse", "edges", "equal"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if kind == "edges":
        return rng.choice(np.array(EDGES, dtype=np.float32), n)
    if kind == "equal":
        return np.full(n, draw(st.sampled_from(EDGES)), dtype=np.float32)
    x = rng.standard_normal(n) * draw(st.sampled_from([0.01, 1.0, 4.0, 20.0]))
    return (np.rint(x) if kind == "coarse" else x).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(logits=logit_arrays(), scale=st.sampled_from([1e-310, 0.01, 1.0, 1.4426950408889634, 2.5, 1e30, 1.7e308]))
def test_weights(isa: str, logits: NDArray[np.float32], scale: float) -> None:
    weights, sums = _C.ops.weigh(logits, scale, -math.inf, isa)
    assert weights.size == 64 * sums.size and np.all(weights[logits.size :] == 0)
    assert np.array_equal(weights.reshape(-1, 64).sum(axis=1), sums)
    exact = weighed(logits, scale)
    assert np.all(np.abs(weights[: logits.size].astype(np.float64) - exact) <= 0.5 + 2e-12 * exact)
    assert np.all(weights[: logits.size][logits == logits.max()] == ONE)
    assert np.array_equal(weights, _C.ops.weigh(logits, scale, -math.inf, "scalar")[0])


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_below_a_bound_are_not_weighed(isa: str) -> None:
    logits = random_logits(1000, 4)
    weights, sums = _C.ops.weigh(logits, 1.0, -math.inf, isa)
    maxima = np.maximum.reduceat(logits, np.arange(0, 1000, 64))
    for bound in (maxima.min(), np.median(maxima), maxima.max()):
        skipped, few = _C.ops.weigh(logits, 1.0, float(bound), isa)
        assert np.array_equal(few, np.where(maxima < bound, 0, sums))
        assert np.array_equal(skipped.reshape(-1, 64), np.where(maxima < bound, 0, weights.reshape(-1, 64).T).T)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(logits=logit_arrays(), data=st.data())
def test_largest_logits(isa: str, logits: NDArray[np.float32], data: st.DataObject) -> None:
    value, finite, maxima = _C.ops.largest_logits(logits, isa)
    assert finite and value == logits.max()
    assert np.array_equal(maxima, np.maximum.reduceat(logits, np.arange(0, logits.size, 64)))
    logits[data.draw(st.integers(0, logits.size - 1))] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    assert not _C.ops.largest_logits(logits, isa)[1]


def test_banned_tokens_have_no_weight_and_are_no_maximum() -> None:
    logits = np.full(200, -math.inf, dtype=np.float32)
    logits[150] = -3.0
    for isa in ISAS:
        assert _C.ops.largest_logits(logits, isa)[0] == -3.0
        weights, sums = _C.ops.weigh(logits, 1.0, -math.inf, isa)
        assert weights.sum() == ONE == weights[150] and list(sums) == [0, 0, ONE, 0]


# ---- stages


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    for n in (1, 5, 16, 17, 33, 1000):
        logits = np.full(n, -1.0)
        assert sample(logits, temperature=0).token == 0
        logits[n // 2 :] = 7.0
        assert sample(logits, temperature=0).token == n // 2
    assert sample([-1.0, -0.0, 0.0], temperature=0).token == 1


def test_top_k_takes_the_lowest_ids_of_equals() -> None:
    seen = {sample(np.zeros(2000), temperature=1.0, top_k=3, seed=seed).token for seed in range(100)}
    assert seen == {0, 1, 2}


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.7, 100.0]),
        "top_k": st.integers(0, 60),
        "top_p": st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.1, 3.0]),
        "presence_penalty": st.sampled_from([-1.5, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 0.3]),
        "logit_bias": st.dictionaries(st.integers(0, 39), st.sampled_from([-math.inf, -100.0, -1.0, 2.5]), max_size=5),
        "seed": st.integers(0, 2**64 - 1),
    },
)


@settings(max_examples=400)
@given(
    params=PARAMS,
    logits_seed=st.integers(0, 1000),
    coarse=st.booleans(),
    tokens=st.lists(st.integers(0, 39), max_size=30),
    prompt_share=st.floats(0, 1),
)
def test_every_combination_draws_as_the_reference(
    params: dict[str, Any], logits_seed: int, coarse: bool, tokens: list[int], prompt_share: float
) -> None:
    logits = random_logits(40, logits_seed)
    if coarse:
        logits = np.rint(logits)  # many equal logits
    prompt_len = int(len(tokens) * prompt_share)
    assert sample(logits, tokens, prompt_len, **params).token == reference(logits, tokens, prompt_len, params)


FILTERS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.1, 0.7, 1.0, 3.0])},
    optional={
        "top_k": st.integers(1, 400),
        "top_p": st.sampled_from([1e-6, 0.25, 0.5, 0.9, 0.99, 0.9999999]),
        "min_p": st.sampled_from([1e-12, 1e-3, 0.05, 0.5, 1.0]),
        "logit_bias": st.dictionaries(st.just(0), st.just(-math.inf)),
        "seed": st.integers(0, 2**64 - 1),
    },
)


@settings(max_examples=400)
@given(logits=logit_arrays(), params=FILTERS)
def test_filters_draw_as_the_reference_and_alike_everywhere(
    logits: NDArray[np.float32], params: dict[str, Any]
) -> None:
    if logits.size == 1:
        params.pop("logit_bias", None)
    found = [sample(logits, isa=isa, logprobs=3, **params) for isa in ISAS]
    assert found[0].token == reference(logits, [], 0, {"seed": 0} | params)
    assert all(other.samples == found[0].samples for other in found)


def likely_tokens(logits: NDArray[np.float32], top_p: float) -> int:
    """How many tokens a nucleus has, at temperature 1."""
    mass = np.sort(np.exp(logits.astype(np.float64) - float(logits.max())))[::-1]
    return int(np.searchsorted(np.cumsum(mass), top_p * mass.sum())) + 1


@pytest.mark.parametrize(("spread", "top_p"), [(0.0, 0.3), (0.1, 0.95), (3.0, 0.95), (3.0, 0.999)])
def test_the_largest_vocabulary_alike_everywhere(spread: float, top_p: float) -> None:
    """128,256 tokens: draws at both ends of the nucleus, so that its edge is seen."""
    logits = random_logits(128_256, 9, spread)
    order = np.lexsort((np.arange(logits.size), -logits))
    mass = np.exp(logits.astype(np.float64) - float(logits.max()))
    kept = np.zeros_like(mass)
    nucleus = order[: likely_tokens(logits, top_p)]
    kept[nucleus] = mass[nucleus]
    cumulative = np.cumsum(kept)
    for seed in range(6):
        expected = int(np.searchsorted(cumulative, uniform(seed, 0) * cumulative[-1], side="right"))
        for isa in ISAS:
            assert sample(logits, top_p=top_p, seed=seed, isa=isa).token == expected


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 10.0])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_p": 0.95},
        {"top_p": 0.999999999},
        {"top_p": 0.5, "min_p": 0.01},
        {"top_k": 40},
        {"top_k": 3000, "top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 5.0, "top_p": 0.99},
    ],
    ids=str,
)
def test_large_vocabularies_draw_as_the_reference(spread: float, params: dict[str, Any]) -> None:
    logits = random_logits(20_011, 3, spread)
    for seed in range(5):
        chosen = params | {"seed": seed}
        assert sample(logits, **chosen).token == reference(logits, [], 0, chosen)


def test_a_stage_that_removes_nothing_changes_nothing() -> None:
    logits = random_logits(500)
    for seed in range(200):
        plain = sample(logits, seed=seed).token
        assert sample(logits, seed=seed, top_k=500).token == plain
        assert sample(logits, seed=seed, top_p=1 - 1e-16).token == plain
        assert sample(logits, seed=seed, logit_bias={3: 0.0}).token == plain


def chi_square(counts: NDArray[Any], expected: NDArray[Any]) -> tuple[float, int]:
    """Of the cells that expect at least 5; returns the statistic and its degrees of freedom."""
    big = expected >= 5
    return float(np.sum((counts[big] - expected[big]) ** 2 / expected[big])), int(big.sum()) - 1


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_the_distribution(params: dict[str, Any]) -> None:
    logits = random_logits(50, 7, 1.5)
    n = 20_000
    sampler = [_C.Sampler(seed=seed, **params) for seed in range(n)]
    counts = np.bincount([s.sample(logits, []).token for s in sampler], minlength=50)
    mass = probabilities(logits, params)
    assert np.all(counts[mass == 0] == 0)
    statistic, freedom = chi_square(counts, n * mass / mass.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)  # mean and deviation of a chi-square variable


def test_positions_draw_independently() -> None:
    """One seed along a text, as in generation: the distribution, and no correlation between neighbours."""
    sampler = _C.Sampler(seed=42)
    drawn = np.array([sampler.sample(np.zeros(4, dtype=np.float32), [0] * n).token for n in range(3000)])
    pairs = np.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
    statistic, freedom = chi_square(pairs, np.full(16, 2999 / 16))
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_penalties_count_only_the_reply() -> None:
    logits = np.array([1.5, 2.0, 1.0], dtype=np.float32)
    history = [0, 0, 1]
    assert sample(logits, history, 3, temperature=0, presence_penalty=2.0, frequency_penalty=2.0).token == 1
    assert sample(logits, history, 2, temperature=0, presence_penalty=0.6).token == 0
    assert sample(logits, history, 1, temperature=0, presence_penalty=0.6).token == 1
    assert sample(logits, history, 1, temperature=0, presence_penalty=1.2).token == 2
    assert sample(logits, history, 2, temperature=0, frequency_penalty=0.6).token == 0
    assert sample(logits, history, 0, temperature=0, frequency_penalty=0.4).token == 1
    assert sample(logits, history, 0, temperature=0, presence_penalty=0.9, frequency_penalty=0.2).token == 2
    assert sample(logits, history, 3, temperature=0, repetition_penalty=4.0).token == 2


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.99}], ids=str)
def test_min_p_keeps_what_is_exactly_at_its_bound(filters: dict[str, Any]) -> None:
    logits = [2.0, -1.0, 2.0, 2.0, -1.0]
    assert {sample(logits, min_p=1.0, seed=seed, **filters).token for seed in range(60)} == {0, 2, 3}


@pytest.mark.parametrize(("filters", "n"), [({}, 8), ({"top_k": 4}, 4)], ids=str)
def test_top_p_stops_as_soon_as_it_is_reached(filters: dict[str, Any], n: int) -> None:
    """Equal tokens have exact probabilities: of eight, one half is four, and a hair more than one half is five."""
    for share, kept in ((0.5, n // 2), (0.5 + 1e-12, n // 2 + 1), (1e-300, 1)):
        drawn = {sample(np.zeros(8), top_p=share, seed=seed, **filters).token for seed in range(100)}
        assert drawn == set(range(kept))


# ---- log-probabilities


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(3000, 5)
    exact = logits.astype(np.float64)
    exact = exact - exact.max() - math.log(np.sum(np.exp(exact - exact.max())))
    order = sorted(range(3000), key=lambda i: (-logits[i], i))
    out = sample(logits, [order[0]], temperature=0, logprobs=5, logit_bias={order[1]: -100.0, order[0]: -100.0})
    assert out.token == order[2]
    assert out.logprob == np.float32(exact[order[2]])
    assert [token for token, _ in out.top_logprobs] == order[:5]
    np.testing.assert_allclose([value for _, value in out.top_logprobs], exact[order[:5]], rtol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.5, "min_p": 0.01},
        {"temperature": 1.0, "min_p": 0.5},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.0, "logit_bias": {0: -1.0}},
        {"temperature": 0.3},
    ],
    ids=str,
)
def test_logprobs_do_not_depend_on_how_is_sampled(params: dict[str, Any]) -> None:
    logits = random_logits(700, 8, 4.0)
    plain = sample(logits, temperature=0, logprobs=700).top_logprobs
    for seed in range(5):
        out = sample(logits, seed=seed, logprobs=700, **params)
        assert out.top_logprobs == plain and out.logprob == dict(plain)[out.token]


def test_how_many_logprobs() -> None:
    logits = random_logits(10)
    without = sample(logits)
    assert math.isnan(without.logprob) and without.top_logprobs == []
    zero = sample(logits, logprobs=0)
    assert zero.logprob < 0 and zero.top_logprobs == []
    all_of_them = sample(logits, logprobs=99).top_logprobs
    assert sorted(token for token, _ in all_of_them) == list(range(10))
    assert math.fsum(math.exp(value) for _, value in all_of_them) == pytest.approx(1, abs=1e-6)
    assert without.token == zero.token


# ---- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 16, 36])
def test_logits_that_are_not_finite(bad: float, where: int) -> None:
    logits = random_logits(37)
    logits[where] = bad
    with pytest.raises(ModelFormatError, match="not finite at position 2: the weights hold NaN or overflow"):
        sample(logits, [1, 2, 3])


def test_a_vocabulary_beyond_the_sums() -> None:
    with pytest.raises(ModelFormatError, match="a vocabulary of 1048576 tokens, expected at most 1048575"):
        sample(np.zeros(2**20))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_may_not_ban_everything(temperature: float) -> None:
    with pytest.raises(ValueError, match="bans every token"):
        sample([1.0, 2.0], temperature=temperature, logit_bias={0: -math.inf, 1: -math.inf})


def test_a_bias_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="token 2, the vocabulary has 2"):
        sample([1.0, 2.0], logit_bias={2: 1.0})


def test_huge_numbers_stay_in_order() -> None:
    assert sample([3e38, 1.0], temperature=1.0, logit_bias={0: 3e38}).token == 0
    assert sample([-3e38, 3e38], temperature=1e-300, seed=3).token == 1
    assert sample([1.0, 2.0], [1], temperature=0, repetition_penalty=1e-30).token == 1


def test_the_largest_numbers_that_are_taken() -> None:
    """Logits further apart than a float tells at any temperature with a nucleus; penalties whose sum is beyond one."""
    far = [3.4e38, -3.4e38, 3.4e38, 0.0]
    assert {sample(far, temperature=1e30, top_p=0.9, seed=seed).token for seed in range(40)} == {0, 2}
    flat = {sample([5.0, -5.0, 1e20], temperature=1e30, top_p=0.999, seed=seed).token for seed in range(60)}
    assert flat == {0, 1, 2}
    history = [0, 0, 1, 2, 2]
    for sign in (1.0, -1.0):
        penalties = {"repetition_penalty": 1e30, "presence_penalty": sign * 1e30, "frequency_penalty": -sign * 1e30}
        found = sample([-3e38, 3e38, 1.0, 7.0], history, 0, temperature=1.0, top_p=0.9, logprobs=1, **penalties)
        assert math.isfinite(found.logprob)
    banned = {"logit_bias": {1: -math.inf}, "presence_penalty": -1e30}
    assert sample([1.0, 9.0, 2.0], history, 0, temperature=0, **banned).token == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1.1e30}, "temperature is 1.1e.30, expected a number in 0…1e30"),
        ({"repetition_penalty": 1e31}, "repetition_penalty is 1e.31"),
        ({"repetition_penalty": 1e-31}, "repetition_penalty is 1e-31"),
        ({"presence_penalty": -1e31}, "presence_penalty is -1e.31"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias of token -1"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 is nan"),
        ({"logit_bias": {1: math.inf}}, "logit_bias of token 1 is inf"),
        ({"logprobs": -2}, "logprobs is -2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
    ids=str,
)
def test_parameters_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.Sampler(**params)
