"""What a step refuses, and that it then changes nothing; the life of sequences; other threads and Ctrl-C meanwhile.

What steps compute is test_engine.py's, what memory they take test_engine_memory.py's.
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

from pyllama import _C
from pyllama.common.errors import ContextLengthError, ModelFormatError

from .helpers_models import (
    Kind,
    Shape,
    SmallModel,
    aligned,
    all_logits,
    native_weight,
    random_packed,
    random_tokens,
    small_model,
)
from .helpers_threads import in_threads


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


@pytest.mark.usefixtures("uncollected")
def test_ctrl_c_while_profiling_waits_for_another_threads_steps(plain: SmallModel) -> None:
    model, tokens = plain.model(threads=1), random_tokens(plain, 90)
    expected = all_logits(model, tokens)
    stop, stepping = threading.Event(), threading.Event()
    found = []

    def work() -> None:
        while not stop.is_set():
            found.append(all_logits(model, tokens))
            stepping.set()

    worker = threading.Thread(target=work)
    worker.start()
    stepping.wait()
    killer = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            killer.start()
            while True:
                model.profile(True)
    finally:
        stop.set()
        worker.join()
        killer.join()
    assert all(np.array_equal(logits, expected) for logits in found)
    model.profile(False)  # nobody holds the model


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

    in_threads(4, work)
    assert wrong == []


def test_the_isa_and_the_threads_that_are_not_there(plain: SmallModel) -> None:
    with pytest.raises(ValueError, match="avx2000"):
        plain.model(isa="avx2000")
    with pytest.raises(ValueError, match="kv_dtype='q4': expected f16 or q8"):
        plain.model(kv_dtype="q4")
    with pytest.raises(ValueError, match="threads is -1"):
        plain.model(threads=-1)
    with pytest.raises(ValueError, match=r"threads is 10{30}, expected 0 .automatic. to 1024"):
        plain.model(threads=10**30)
    with pytest.raises(TypeError, match="float"):
        plain.model(threads=1.5)
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
