"""csrc/cuda/draw.cu on the emulated device: the very tokens of the CPU's sampler, and of the definition in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama import _C
from tests.cuda.conftest import Emulated, EmulationError

RNG = np.random.default_rng
ONE = 1 << 44
PLAIN = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0}


def draw(emulated: Emulated, logits: np.ndarray, filters: list[dict[str, float]], random: list[int]) -> list[int]:
    """The token of each row of logits [n, vocab_size]."""
    tokens = np.full(len(logits), -7, np.int32)
    numbers = np.array([[f[key] for key in PLAIN] for f in filters], np.float64)
    emulated.call(
        "draw_rows",
        np.ascontiguousarray(logits),
        logits.shape[1],
        len(logits),
        numbers,
        np.array(random, np.uint64),
        tokens,
    )
    return tokens.tolist()


def weights_of(logits: np.ndarray, temperature: float) -> list[int]:
    """csrc/vocab.h's integers."""
    scale = min(float.fromhex("0x1.71547652b82fep0") / temperature, np.finfo(np.float64).max)
    t = np.maximum((logits.astype(np.float64) - np.float64(logits.max())) * scale, -64.0)
    whole = np.rint(t)
    r = t - whole
    p = np.full(len(r), float.fromhex("0x1.66348367dfc52p-20"))
    for coefficient in (
        "0x1.00ee06e852cf1p-16", "0x1.4306c11a53d76p-13", "0x1.5d8729761e27cp-10", "0x1.3b2ab7f3b1124p-7",
        "0x1.c6b08defc20b9p-5", "0x1.ebfbdff7c5a8ap-3", "0x1.62e42fef7a78dp-1", "0x1.0p0",
    ):  # fmt: skip
        p = p * r + float.fromhex(coefficient)
    return [int(w) for w in np.rint(np.ldexp(p, whole.astype(int)) * ONE)]


def defined(logits: np.ndarray, f: dict[str, float], random: int) -> int:
    """By sorting, with Python's integers."""
    if f["temperature"] == 0:
        return int(np.argmax(logits))
    weights = weights_of(logits, f["temperature"])
    ranked = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if 0 < f["top_k"] < len(logits):
        ranked = ranked[: int(f["top_k"])]
    if f["top_p"] < 1:
        total = sum(weights[i] for i in ranked)
        enough = min(max(math.ceil(float(total) * f["top_p"]), 1), total)
        kept, reached = [], 0
        for i in ranked:
            if reached >= enough:
                break
            kept.append(i)
            reached += weights[i]
        ranked = kept
    least = int(np.rint(f["min_p"] * ONE))
    kept = sorted(i for i in ranked if weights[i] >= least)
    target = sum(weights[i] for i in kept) * random >> 53
    for i in kept:
        if target < weights[i]:
            return i
        target -= weights[i]
    raise AssertionError


def uniform(seed: int) -> int:
    return int(RNG(seed).integers(0, 1 << 53))


FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"top_k": 40},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_p": 1e-9},
    {"temperature": 1e-3, "top_p": 0.5},
    {"temperature": 100.0, "top_p": 0.5},
    {"temperature": 1e300, "top_k": 700, "top_p": 0.999},
    {"temperature": 1e-300},
    {"top_k": 10**6},
    {"top_p": 0.9999999},
]
KINDS = {
    "usual": lambda n: RNG(1).standard_normal(n) * 3 - 2,
    "equal": np.zeros,
    "few values": lambda n: RNG(2).integers(-2, 3, n),
    "one far above": lambda n: np.where(np.arange(n) == n // 2, 80.0, RNG(3).standard_normal(n)),
    "wide": lambda n: RNG(4).standard_normal(n) * 1e4,
    "close": lambda n: 1 + RNG(5).standard_normal(n) * 1e-6,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 300, 5000])
def test_tokens_are_the_defined_ones(emulated: Emulated, kind: str, vocab_size: int) -> None:
    logits = np.asarray(KINDS[kind](vocab_size), np.float32)
    for first in range(0, len(FILTERS), 7):
        filters = [PLAIN | f for f in FILTERS[first : first + 7]]
        random = [uniform(first + i) for i in range(len(filters))]
        rows = np.repeat(logits[None], len(filters), 0)
        assert draw(emulated, rows, filters, random) == [
            defined(logits, f, u) for f, u in zip(filters, random, strict=True)
        ]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tokens_are_the_cpus(emulated: Emulated, data: st.DataObject) -> None:
    """Of rows side by side, each with its own filters."""
    vocab_size = data.draw(st.integers(1, 2500))
    n = data.draw(st.integers(1, 3))
    scale = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 4.0, 1e3]))
    logits = (RNG(data.draw(st.integers(0, 99))).standard_normal((n, vocab_size)) * scale).astype(np.float32)
    filters, seeds = [], []
    for _ in range(n):
        filters.append(
            {
                "temperature": data.draw(st.sampled_from([0.0, 0.5, 0.8, 1.0, 3.0])),
                "top_p": data.draw(st.sampled_from([1.0, 0.99, 0.9, 0.3])),
                "min_p": data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
                "top_k": data.draw(st.sampled_from([0, 1, 5, 1500])),
            }
        )
        seeds.append(data.draw(st.integers(0, 2**64 - 1)))
    history = [0] * data.draw(st.integers(1, 4))
    expected = [
        _C.Sampler(seed=seed, **f).sample(row, history).token
        for f, seed, row in zip(filters, seeds, logits, strict=True)
    ]
    random = [_C.ops.uniform_bits(seed, len(history)) for seed in seeds]
    assert draw(emulated, logits, filters, random) == expected


@pytest.mark.parametrize("kind", ["usual", "equal"])
def test_no_order_of_threads_matters(emulated: Emulated, kind: str) -> None:
    logits = np.asarray(KINDS[kind](2100), np.float32)[None]
    for f in (FILTERS[0], FILTERS[2], FILTERS[4]):
        emulated.in_all_orders(lambda f=f: np.array(draw(emulated, logits, [PLAIN | f], [uniform(8)])))


@pytest.mark.parametrize("random", [0, (1 << 53) - 1])
def test_first_and_last_token(emulated: Emulated, random: int) -> None:
    logits = np.zeros((1, 3000), np.float32)
    assert draw(emulated, logits, [PLAIN], [random]) == [0 if random == 0 else 2999]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(emulated: Emulated, wrong: float) -> None:
    """Told by their row, and by no other."""
    logits = RNG(6).standard_normal((3, 1100)).astype(np.float32)
    logits[1, 1050] = wrong
    filters = [PLAIN | f for f in ({"temperature": 0.0}, {}, {"top_k": 3})]
    random = [uniform(i) for i in range(3)]
    tokens = draw(emulated, logits, filters, random)
    assert tokens == [defined(logits[0], filters[0], random[0]), -1, defined(logits[2], filters[2], random[2])]
    assert draw(emulated, logits[1:2], filters[:1], random[:1]) == [-1]


def test_limits(emulated: Emulated) -> None:
    with pytest.raises(EmulationError, match="1 to 8 rows"):
        draw(emulated, np.zeros((9, 4), np.float32), [PLAIN] * 9, [0] * 9)
