"""The forward pass against the float64 oracle, and the promises of a step: the same bits however a text is cut into
steps, batched, threaded or computed.

Random small models of odd sizes (tests/helpers_models.py). What a step refuses is test_engine_steps.py's; the sampler
and files have tests of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama import _C

from .helpers_models import (
    DENSE,
    QUANTIZED,
    Kind,
    Shape,
    SmallModel,
    all_logits,
    random_tokens,
    small_model,
)

SHAPES = {
    "plain": Shape(),
    "tied-biases": Shape(tied=True, biases=True),
    "heads-wider-than-dim": Shape(dim=96, n_heads=5, n_kv_heads=1, head_dim=32, hidden_dim=80),
    "no-grouping": Shape(dim=160, n_heads=4, n_kv_heads=4, head_dim=20, vocab_size=97),
    "tiny-heads": Shape(dim=33, hidden_dim=31, n_heads=9, n_kv_heads=3, head_dim=2, vocab_size=5, n_layers=1),
    "big-heads": Shape(dim=100, hidden_dim=300, n_heads=2, n_kv_heads=1, head_dim=128, n_layers=1, vocab_size=1000),
}
ORDER_KIND = QUANTIZED[-1]


# ---- values


@pytest.mark.parametrize("kind", DENSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dense_logits(shape: Shape, kind: Kind) -> None:
    """float32 arithmetic: sums of some hundred terms, 2^-24 each; 1e-4 also covers an f16 key rounded the other way."""
    small = small_model(shape, kind)
    tokens = random_tokens(small, 70)
    expected = small.oracle().logits(tokens)
    np.testing.assert_allclose(all_logits(small.model(), tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", QUANTIZED, ids=str)
def test_quantized_logits(kind: Kind) -> None:
    """The oracle rounds activations as the kernels do, so that nearly all short texts agree as closely as dense ones.

    Where a value lies within float32's error of a rounding border, one code differs by one: 1/127 of one group's
    largest activation, which may flip others behind it. Some percent of the largest logit are possible then, in few
    texts. A scale rounded to the other neighbour of 22 bits moves its group by 2^-22, an f16 key by 2^-11 of it.
    """
    small = small_model(Shape(tied=True, biases=True) if kind.group == 64 else Shape(), kind)
    oracle, model = small.oracle(), small.model()
    errors = []
    for seed in range(24):
        tokens = random_tokens(small, 5, seed)
        expected = oracle.logits(tokens)
        errors.append(np.abs(all_logits(model, tokens) - expected).max() / np.abs(expected).max())
    assert np.quantile(errors, 0.6) < 2e-5
    assert max(errors) < 0.05


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", [Kind("q8", 32), Kind("q4", 64), Kind("q4nl", 128), ORDER_KIND], ids=str)
def test_quantized_logits_of_every_shape(shape: Shape, kind: Kind) -> None:
    small = small_model(shape, kind, seed=1)
    oracle, model = small.oracle(), small.model()
    errors = []
    for seed in range(8):
        tokens = random_tokens(small, 3, seed)
        expected = oracle.logits(tokens)
        errors.append(np.abs(all_logits(model, tokens) - expected).max() / np.abs(expected).max())
    assert np.median(errors) < 1e-5
    assert max(errors) < 0.05


def test_a_long_text() -> None:
    """Beyond several pages of keys and one split of the attention."""
    small = small_model(Shape(max_seq_len=1400, n_layers=1, vocab_size=17), Kind("f32"))
    tokens = random_tokens(small, 1300)
    expected = small.oracle().logits(tokens)
    found = all_logits(small.model(), tokens, [512, 512, 276])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_attention_factor_scales_cos_and_sin() -> None:
    small = small_model()
    small.config = small.config | {"rope_attention_factor": 1.2}
    tokens = random_tokens(small, 20)
    expected = small.oracle().logits(tokens)
    np.testing.assert_allclose(all_logits(small.model(), tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    plain = small_model().oracle().logits(tokens)
    assert np.abs(expected - plain).max() > 1e-2 * np.abs(expected).max()


# ---- the same bits

SAME = [Kind("f32"), Kind("f16"), Kind("bf16"), Kind("q8", 32), Kind("q4", 64), Kind("q4nl", 128), *QUANTIZED[-5:]]


@pytest.fixture(scope="module", params=SAME, ids=str)
def same(request: pytest.FixtureRequest) -> tuple[SmallModel, Any, NDArray[np.int32], NDArray[np.float32]]:
    """A model, 150 tokens and their logits in one step: what every other way of computing must repeat exactly."""
    small = small_model(Shape(biases=True), request.param)
    model, tokens = small.model(threads=1), random_tokens(small, 150)
    return small, model, tokens, all_logits(model, tokens)


def test_prefill_equals_step_by_step(same: Any) -> None:
    _, model, tokens, expected = same
    assert np.array_equal(all_logits(model, tokens, [1] * 150), expected)


@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 31, 64, 65, 149])
def test_chunks(same: Any, size: int) -> None:
    _, model, tokens, expected = same
    chunks = [size] * (150 // size) + [150 % size] * (150 % size > 0)
    assert np.array_equal(all_logits(model, tokens, chunks), expected)


def test_chunks_of_few_tokens(same: Any) -> None:
    """Of every count from 3 to 17: the head's input comes in two digits, so that it has twice as many rows."""
    small, _, tokens, expected = same
    for threads in (1, 2):
        assert np.array_equal(all_logits(small.model(threads=threads), tokens, list(range(3, 18))), expected)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads(same: Any, threads: int) -> None:
    small, _, tokens, expected = same
    model = small.model(threads=threads)
    assert model.threads == threads
    assert np.array_equal(all_logits(model, tokens), expected)
    assert np.array_equal(all_logits(model, tokens[:20], [1] * 20), expected[:20])


@pytest.mark.parametrize("isa", _C.isas())
def test_instruction_sets(same: Any, isa: str) -> None:
    small, _, tokens, expected = same
    model = small.model(threads=1, isa=isa)
    assert model.isa == isa
    assert np.array_equal(all_logits(model, tokens), expected)
    assert np.array_equal(all_logits(model, tokens[:20], [1] * 20), expected[:20])


def test_kinds_mixed_in_one_model() -> None:
    """Matrices that share an input want it each in its own form: with or without tiles, sums of groups, an order."""
    kinds = {
        "wq": Kind("q4", 32),
        "wk": Kind("q4a", 32, "f16", "f16"),
        "wv": Kind("q4nl", 64),
        "wo": ORDER_KIND,
        "w_gate": Kind("q4", 64),
        "w_up": Kind("q4a", 128, "f16", "u8"),
        "w_down": ORDER_KIND,
    }
    for up in (kinds["w_up"], ORDER_KIND):
        small = small_model(Shape(n_heads=4, n_kv_heads=2, head_dim=32), Kind("q8", 32), kinds=kinds | {"w_up": up})
        tokens, chunks = random_tokens(small, 50), [7, 8, 12, 23]
        expected = all_logits(small.model(threads=1, isa="scalar"), tokens)
        for isa in _C.isas():
            for threads in (1, 2):
                found = all_logits(small.model(threads=threads, isa=isa), tokens, chunks)
                assert np.array_equal(found, expected), (isa, threads)
        oracle, errors = small.oracle(), []
        for seed in range(8):
            few = random_tokens(small, 3, seed)
            logits = oracle.logits(few)
            errors.append(np.abs(all_logits(small.model(), few) - logits).max() / np.abs(logits).max())
        assert np.median(errors) < 1e-5 and max(errors) < 0.05


def test_a_cache_of_bytes() -> None:
    """kv_dtype="q8": near the f16 cache's logits, in 17/32 of its memory; the same bits however computed."""
    small = small_model(Shape(n_heads=8, n_kv_heads=2, head_dim=32, max_seq_len=700), Kind("f32"))
    tokens = random_tokens(small, 600)
    halves, model = small.model(), small.model(threads=1, kv_dtype="q8")
    assert model.page_bytes * 64 == halves.page_bytes * 34
    expected = all_logits(model, tokens, [300, 300])
    f16 = all_logits(halves, tokens, [300, 300])
    assert 0 < np.abs(expected - f16).max() < 0.02 * np.abs(f16).max()
    assert np.array_equal(all_logits(model, tokens, [7, 64, 1, 1, 450, 77]), expected)
    assert np.array_equal(all_logits(model, tokens[:80], [1] * 80), expected[:80])
    for isa in _C.isas():
        other = small.model(threads=3, isa=isa, kv_dtype="q8")
        assert np.array_equal(all_logits(other, tokens, [512, 88]), expected)
    a, b = model.sequence(), model.sequence()
    both = model.step([(a, tokens[:200], None, "all"), (b, tokens[:90], None, "all")])
    assert np.array_equal(both[0].logits, expected[:200])
    assert np.array_equal(both[1].logits, expected[:90])


def test_several_sequences_in_one_step(same: Any) -> None:
    _, model, tokens, _ = same
    texts = [tokens[:70], tokens[70:71], tokens[71:80], tokens[80:150]]
    alone = [all_logits(model, text) for text in texts]
    sequences = [model.sequence() for _ in texts]
    at = [0] * len(texts)
    for sizes in ([40, 1, 3, 64], [30, 0, 6, 6]):
        items = [
            (sequence, text[start : start + size], None, "all")
            for sequence, text, start, size in zip(sequences, texts, at, sizes, strict=True)
            if size
        ]
        results = iter(model.step(items))
        for i, size in enumerate(sizes):
            if size:
                assert np.array_equal(next(results).logits, alone[i][at[i] : at[i] + size])
                at[i] += size


def test_truncate_and_go_on(same: Any) -> None:
    _, model, tokens, expected = same
    sequence = model.sequence()
    model.step([(sequence, tokens[:100], None, "none")])
    model.step([(sequence, tokens[:30][::-1], None, "none")])
    for keep in (100, 65, 64, 63, 1, 0):
        sequence.truncate(keep)
        assert sequence.n_past == keep and sequence.tokens == tokens[:keep].tolist()
        found = model.step([(sequence, tokens[keep:], None, "all")])[0].logits
        assert np.array_equal(found, expected[keep:])


CHUNKED = small_model(Shape(n_layers=1), Kind("q4", 32))
CHUNKED_MODEL = CHUNKED.model()


@settings(max_examples=30)
@given(data=st.data())
def test_any_schedule(data: st.DataObject) -> None:
    """Sequences of any lengths, fed in any interleaving with rewinds in between, give each text's own logits."""
    texts = [random_tokens(CHUNKED, data.draw(st.integers(1, 90)), i) for i in range(data.draw(st.integers(1, 4)))]
    alone = [all_logits(CHUNKED_MODEL, text) for text in texts]
    sequences = [CHUNKED_MODEL.sequence() for _ in texts]
    for _ in range(6):
        sizes = [data.draw(st.integers(0, len(text) - s.n_past)) for s, text in zip(sequences, texts, strict=True)]
        starts = [s.n_past for s in sequences]
        chosen = [i for i, size in enumerate(sizes) if size]
        items = [(sequences[i], texts[i][starts[i] : starts[i] + sizes[i]], None, "all") for i in chosen]
        if not items:
            break
        for i, result in zip(chosen, CHUNKED_MODEL.step(items), strict=True):
            assert np.array_equal(result.logits, alone[i][starts[i] : starts[i] + sizes[i]])
        victim = data.draw(st.integers(0, len(texts) - 1))
        sequences[victim].truncate(data.draw(st.integers(0, sequences[victim].n_past)))


# ---- sampling within steps


def generate(model: Any, prompt: Any, n: int, sampler: Any, neighbours: int = 0) -> list[int]:
    """n tokens after a prompt, with other sequences being decoded in the same steps."""
    others = [model.sequence() for _ in range(neighbours)]
    sequence, feed, out = model.sequence(), prompt, []
    for _ in range(n):
        items = [(other, [i % 5], _C.Sampler(seed=i), "none") for i, other in enumerate(others)]
        items.insert(neighbours // 2, (sequence, feed, sampler, "none"))
        feed = [model.step(items)[neighbours // 2].token]
        out += feed
    return out


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 5}, {"seed": 2**63 + 9, "top_p": 0.9, "logprobs": 2}])
def test_same_seed_same_tokens(params: dict[str, Any]) -> None:
    small = small_model(Shape(), Kind("q4nl", 64))
    prompt = random_tokens(small, 11)
    expected = generate(small.model(), prompt, 40, _C.Sampler(**params))
    assert generate(small.model(threads=1, isa="scalar"), prompt, 40, _C.Sampler(**params)) == expected
    assert generate(small.model(), prompt, 40, _C.Sampler(**params), neighbours=3) == expected


def test_another_seed_another_text() -> None:
    small = small_model()
    model, prompt = small.model(), random_tokens(small, 5)
    assert len({tuple(generate(model, prompt, 12, _C.Sampler(seed=seed))) for seed in range(8)}) == 8


def test_a_step_samples_what_the_sampler_says() -> None:
    """From the last token's logits, over the whole history, at the position the token will have."""
    small = small_model()
    model, tokens = small.model(), random_tokens(small, 30)
    sampler = _C.Sampler(
        seed=77, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.1, logprobs=3, logit_bias={3: 1.0}
    )
    sequence = model.sequence()
    sequence.prompt_len = 8
    for start, end, wanted, rows in ((0, 10, "all", 10), (10, 11, "none", 0), (11, 29, "last", 1), (29, 30, "all", 1)):
        result = model.step([(sequence, tokens[start:end], sampler, wanted)])[0]
        logits = all_logits(model, tokens[:end])
        direct = sampler.sample(logits[-1], tokens[:end], 8)
        assert (result.token, result.logprob) == (direct.token, direct.logprob)
        assert result.top_logprobs == direct.top_logprobs and len(direct.top_logprobs) == 3
        if rows:
            assert np.array_equal(result.logits, logits[end - rows :])
        else:
            assert result.logits is None


def test_nothing_asked_nothing_given() -> None:
    small = small_model()
    model = small.model()
    result = model.step([(model.sequence(), [1, 2, 3], None, "none")])[0]
    assert result.token == -1 and np.isnan(result.logprob) and result.top_logprobs == [] and result.logits is None


def test_logits_are_copies() -> None:
    small = small_model()
    model, tokens = small.model(), random_tokens(small, 4)
    first = all_logits(model, tokens)
    kept = first.copy()
    all_logits(model, tokens[::-1])
    assert np.array_equal(first, kept) and first.dtype == np.float32 and first.shape == (4, small.shape.vocab_size)
    first[:] = 0
    assert np.array_equal(all_logits(model, tokens), kept)


@pytest.mark.parametrize("as_type", [list, tuple, np.int64, np.uint8, np.int32])
def test_kinds_of_token_ids(as_type: Any) -> None:
    small = small_model()
    model, tokens = small.model(), random_tokens(small, 9)
    given_tokens = as_type(tokens.tolist()) if as_type in (list, tuple) else tokens.astype(as_type)
    assert np.array_equal(all_logits(model, given_tokens), all_logits(model, tokens))
