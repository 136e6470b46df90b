"""The forward pass against the float64 oracle, and the promises of a step: the same bits however a text is cut into
steps, batched, threaded or computed, and no change at all when a step fails.

Random small models of odd sizes (tests/helpers_models.py); the sampler has its own file, files have theirs.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama import _C
from pyllama.common.errors import ContextLengthError, ModelFormatError
from tests.helpers_models import (
    DENSE,
    QUANTIZED,
    Kind,
    Shape,
    SmallModel,
    aligned,
    native_weight,
    random_packed,
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


def random_tokens(model: SmallModel, n: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, model.shape.vocab_size, n, dtype=np.int32)


def all_logits(model: Any, tokens: Any, chunks: list[int] | None = None) -> NDArray[np.float32]:
    """[n_tok, vocab] of one new sequence, fed in chunks of these sizes."""
    sequence, rows, start = model.sequence(), [], 0
    for size in chunks or [len(tokens)]:
        rows.append(model.step([(sequence, tokens[start : start + size], None, "all")])[0].logits)
        start += size
    assert start == len(tokens) == sequence.n_past
    return np.concatenate(rows)


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


# ---- atomicity and refusals


@pytest.fixture(scope="module")
def plain() -> SmallModel:
    return small_model(Shape(max_seq_len=100), Kind("f32"))


@pytest.mark.parametrize(
    ("tokens", "sampler", "wanted", "error", "message"),
    [
        ([], None, "none", ValueError, "expected at least one"),
        ([131], None, "none", ValueError, r"token 131, expected 0…130"),
        ([-1], None, "none", ValueError, "token -1"),
        ([2**32], None, "none", ValueError, "token 4294967296"),
        ([1.5], None, "none", ValueError, "must be integers, found float64"),
        (["a"], None, "none", ValueError, "must be integers"),
        ([[1]], None, "none", ValueError, "one-dimensional"),
        ([1] * 41, None, "none", ValueError, "the step has 42 tokens, expected at most max_batch_tok = 40"),
        ([1], None, "some", ValueError, '"some", expected none, last or all'),
        ([1], "greedy", "none", TypeError, "found 'greedy', expected a Sampler or None"),
        ([1], _C.Sampler(logit_bias={999: 1.0}), "none", ValueError, "the vocabulary has 131"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_items_change_nothing(
    plain: SmallModel, tokens: Any, sampler: Any, wanted: str, error: type[Exception], message: str
) -> None:
    model = plain.model(max_batch_tok=40)
    good, bad = model.sequence(), model.sequence()
    history = random_tokens(plain, 7)
    model.step([(good, history, None, "none"), (bad, history, None, "none")])
    with pytest.raises(error, match=message):
        model.step([(good, [5], _C.Sampler(), "none"), (bad, tokens, sampler, wanted)])
    assert good.tokens == bad.tokens == history.tolist()
    expected = all_logits(model, [*history, 5])[-1]
    for sequence in (good, bad):
        assert np.array_equal(model.step([(sequence, [5], None, "last")])[0].logits[0], expected)


def test_malformed_batches(plain: SmallModel) -> None:
    model = plain.model()
    sequence = model.sequence()
    with pytest.raises(ValueError, match="the batch is empty"):
        model.step([])
    with pytest.raises(ValueError, match="2 fields"):
        model.step([(sequence, [1])])
    with pytest.raises(TypeError, match="expected a Sequence"):
        model.step([("sequence", [1], None, "none")])
    with pytest.raises(ValueError, match="stands twice"):
        model.step([(sequence, [1], None, "none"), (sequence, [2], None, "none")])
    with pytest.raises(ValueError, match="another model"):
        model.step([(plain.model().sequence(), [1], None, "none")])
    assert sequence.n_past == 0


def test_the_context_is_a_limit(plain: SmallModel) -> None:
    model = plain.model()
    sequence = model.sequence()
    model.step([(sequence, [1] * 99, None, "none")])
    with pytest.raises(ContextLengthError, match="99 tokens and 2 more do not fit the context of 100"):
        model.step([(sequence, [1, 2], None, "none")])
    assert model.step([(sequence, [1], _C.Sampler(), "none")])[0].token >= 0
    with pytest.raises(ContextLengthError):
        model.step([(sequence, [1], None, "none")])
    assert sequence.n_past == 100


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_weights_that_are_not_finite(poison: float) -> None:
    small = small_model(Shape(vocab_size=40), Kind("f32"))
    values = small.values["norm"].copy()
    values[3] = poison
    payload = np.zeros(small.weights["norm"].nbytes, dtype=np.uint8)
    payload[: values.nbytes] = values.view(np.uint8)
    small.weights["norm"] = _C.Weight("norm", "f32", values.shape, aligned(payload))
    model = small.model()
    sequence = model.sequence()
    model.step([(sequence, [1] * 4, None, "none")])
    with pytest.raises(ModelFormatError, match="logits are not finite at position 5: the weights hold NaN or overflow"):
        model.step([(sequence, [1, 2], _C.Sampler(temperature=0), "none")])
    assert sequence.n_past == 4
    assert not np.isfinite(model.step([(sequence, [1], None, "last")])[0].logits).all()


@pytest.mark.parametrize("name", ["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"])
def test_a_scale_that_is_no_number_reaches_the_logits(name: str) -> None:
    """Rounding activations to int8 must not turn NaN into a number, wherever in the model it arises."""
    kind = Kind("q4a", 32, "f16", "f16")
    small = small_model(Shape(vocab_size=40), kind)
    full = f"layers.0.{name}"
    spec = kind.spec(full, small.weights[full].shape)
    packed = random_packed(spec, np.random.default_rng(1))
    assert packed.scales is not None
    packed.scales[3, 0] = np.nan
    small.weights[full] = native_weight(spec, packed)
    model = small.model()
    with pytest.raises(ModelFormatError, match="logits are not finite"):
        model.step([(model.sequence(), [1, 2, 3], _C.Sampler(temperature=0), "none")])


def test_sequence_refusals(plain: SmallModel) -> None:
    model = plain.model()
    sequence = model.sequence()
    model.step([(sequence, [1, 2, 3], None, "none")])
    for n in (-1, 4):
        with pytest.raises(ValueError, match=f"cannot truncate to {n} tokens, the sequence holds 3"):
            sequence.truncate(n)
    with pytest.raises(ValueError, match="prompt_len is -1"):
        sequence.prompt_len = -1
    sequence.close()
    sequence.close()
    assert sequence.n_past == 0
    with pytest.raises(ValueError, match="closed"):
        model.step([(sequence, [1], None, "none")])


def test_a_closed_sequence_in_a_batch_leaves_the_others_alone(plain: SmallModel) -> None:
    model = plain.model()
    before, closed, after = (model.sequence() for _ in range(3))
    for sequence in (before, closed, after):
        model.step([(sequence, [1, 2, 3], None, "none")])
    closed.close()
    for _ in range(3):
        with pytest.raises(ValueError, match="the sequence is closed"):
            model.step([(sequence, [5] * 64, None, "none") for sequence in (before, closed, after)])
    assert before.tokens == after.tokens == [1, 2, 3] and model.pages_in_use == 2
    expected = all_logits(model, [1, 2, 3, 4])[-1]
    for result in model.step([(before, [4], None, "last"), (after, [4], None, "last")]):
        assert np.array_equal(result.logits[0], expected)


def test_a_sequence_cannot_be_changed_while_it_is_in_a_step() -> None:
    """Another thread tries until it has met a running step; the step's result is what it would have been alone."""
    small = small_model(Shape(n_layers=8, max_seq_len=1024))
    model, tokens = small.model(threads=1), random_tokens(small, 512)
    expected = all_logits(model, tokens)
    sequence, refusals = model.sequence(), []

    def disturb() -> None:
        while not refusals:
            try:
                sequence.truncate(sequence.n_past)
            except ValueError as error:
                refusals.append(str(error))

    thread = threading.Thread(target=disturb)
    thread.start()
    while not refusals:
        found = model.step([(sequence, tokens, None, "all")])[0].logits
        assert np.array_equal(found, expected)
        sequence.truncate(0)
    thread.join()
    assert refusals == ["the sequence is in a step that is still running in another thread"]


def test_dropping_sequences_while_a_step_runs() -> None:
    """Their pages wait for the step's end and are used again, without touching what the step computes."""
    small = small_model(Shape(n_layers=4, max_seq_len=1024))
    model, tokens = small.model(threads=2), random_tokens(small, 300)
    expected = all_logits(model, tokens)
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            others = [model.sequence() for _ in range(4)]
            model.step([(other, tokens[:5], None, "none") for other in others])
            del others

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(10):
            assert np.array_equal(all_logits(model, tokens, [100, 200]), expected)
    finally:
        done.set()
        thread.join()
    assert model.pages_in_use == 0


def test_pages_are_counted(plain: SmallModel) -> None:
    model = plain.model()
    sequence, other = model.sequence(), model.sequence()
    assert model.pages_in_use == 0
    model.step([(sequence, [1] * 64, None, "none"), (other, [1], None, "none")])
    assert model.pages_in_use == 2
    model.step([(sequence, [1], None, "none")])
    assert model.pages_in_use == 3
    for keep, pages in ((65, 3), (64, 2), (1, 2), (0, 1)):
        sequence.truncate(keep)
        assert model.pages_in_use == pages
    other.close()
    assert model.pages_in_use == 0
    model.step([(sequence, [1] * 65, None, "none")])
    del sequence
    assert model.pages_in_use == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_room_for_many_tokens_costs_no_memory_before_it_is_used() -> None:
    def resident_bytes() -> int:
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    model = small_model(Shape(dim=512, hidden_dim=1024, n_heads=8, n_kv_heads=8, head_dim=64), ORDER_KIND)
    before = resident_bytes()
    roomy = model.model(max_batch_tok=65536, threads=1)  # x, q, k, v, o, gate, up, h of so many tokens: 1.6 GB
    few = all_logits(roomy, random_tokens(model, 3))
    assert resident_bytes() - before < 250e6
    assert np.array_equal(few, all_logits(model.model(max_batch_tok=64, threads=1), random_tokens(model, 3)))


def test_any_order_of_destruction(plain: SmallModel) -> None:
    model = plain.model()
    sequences = [model.sequence() for _ in range(3)]
    model.step([(sequence, [1, 2, 3], None, "none") for sequence in sequences])
    del model, sequences[1]
    gc.collect()
    assert sequences[0].tokens == [1, 2, 3]
    sequences[0].truncate(1)
    del sequences
    gc.collect()


@pytest.mark.usefixtures("uncollected")
def test_ctrl_c_stops_a_step_and_changes_nothing() -> None:
    shape = Shape(dim=128, hidden_dim=384, n_heads=4, n_kv_heads=4, head_dim=32, n_layers=60, max_seq_len=1024)
    small = small_model(shape, Kind("f32"))
    model, tokens = small.model(threads=1), random_tokens(small, 517)
    sequence = model.sequence()
    model.step([(sequence, tokens[:5], None, "none")])
    about_to_step = threading.Event()

    def interrupt() -> None:
        about_to_step.wait()  # and for the GIL, which the step gives up while layers are being computed
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        about_to_step.set()
        # A step that ignored the signal would complete, and leave its tokens in the sequence.
        for _ in range(30):
            model.step([(sequence, tokens[5:], None, "none")])
            sequence.truncate(5)
    thread.join()
    assert sequence.tokens == tokens[:5].tolist()
    found = model.step([(sequence, tokens[5:15], None, "all")])[0].logits
    assert np.array_equal(found, all_logits(model, tokens[:15])[5:])


def test_many_threads_share_a_model() -> None:
    small = small_model(Shape(n_layers=1), Kind("q8", 32))
    model = small.model()
    tokens = random_tokens(small, 40)
    expected = all_logits(model, tokens)
    wrong: list[int] = []

    def work(start: int) -> None:
        for round_ in range(5):
            if not np.array_equal(all_logits(model, tokens[: 20 + start], [7, 13 + start]), expected[: 20 + start]):
                wrong.append(round_)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_isa_and_the_threads_that_are_not_there(plain: SmallModel) -> None:
    with pytest.raises(ValueError, match="avx2000"):
        plain.model(isa="avx2000")
    with pytest.raises(ValueError, match="kv_dtype='q4': expected f16 or q8"):
        plain.model(kv_dtype="q4")
    with pytest.raises(ValueError, match="threads is -1"):
        plain.model(threads=-1)
    with pytest.raises(ValueError, match="max_batch_tok is 0"):
        plain.model(max_batch_tok=0)
    assert plain.model(threads=0).threads == _C.default_threads() >= 1
    assert plain.model().isa in _C.isas()
    assert plain.model(max_batch_tok=33).max_batch_tok == 33


def test_a_first_long_step_after_short_ones(plain: SmallModel) -> None:
    """The buffers of a step grow with the first one of more than 16 tokens; what runs already goes on."""
    model, tokens = plain.model(), random_tokens(plain, 60)
    whole = all_logits(plain.model(), tokens)
    early = model.sequence()
    model.step([(early, tokens[:5], None, "none")])
    assert np.array_equal(all_logits(model, tokens), whole)
    assert np.array_equal(model.step([(early, tokens[5:], None, "all")])[0].logits, whole[5:])


def test_where_the_time_goes(plain: SmallModel) -> None:
    model, tokens = plain.model(), random_tokens(plain, 40)
    expected = all_logits(model, tokens)
    assert not any(model.profile(True).values())  # it was off
    began = time.perf_counter()
    assert np.array_equal(all_logits(model, tokens), expected)
    assert np.array_equal(all_logits(model, tokens[:5], [1] * 5), expected[:5])
    found, seconds = model.profile(False), time.perf_counter() - began
    assert list(found) == ["attention", "head", "products", "rest"] and min(found.values()) > 0
    assert sum(found.values()) <= seconds
    all_logits(model, tokens)
    assert not any(model.profile(False).values())


def test_bandwidth_of_weights_where_they_lie(plain: SmallModel) -> None:
    weights = [w for w in plain.weights.values() if len(w.shape) == 2]
    assert 0 < _C.read_bandwidth(2, 0.001, weights) < 10000
    with pytest.raises(TypeError):
        _C.read_bandwidth(2, 0.001, [None])
