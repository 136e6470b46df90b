"""Several steps in one call of the engine give what as many calls give (==): tokens, log-probabilities, caches, whoever
shares them, and they end for whatever somebody wants to know before the next. Drafts: test_speculative.py.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama import _C, LLM, ContextLengthError, SamplingParams
from pyllama.scheduler import Scheduler

from .helpers_llm import tiny_llm
from .helpers_models import Kind, Shape, small_model
from .test_scheduler import FakeModel, continuation, finish, request, tokens_of
from .test_speculative import ENGINE, SAMPLERS, decode, facts, interrupt_everywhere, told

VOCAB_SIZE = ENGINE.shape.vocab_size


def started(model: Any, prompt: list[int]) -> Any:
    sequence = model.sequence()
    sequence.prompt_len = len(prompt)
    return sequence


def plain(prompt: list[int], n: int, params: dict[str, Any]) -> list[Any]:
    """Samples of n calls of one step."""
    samples: list[Any] = decode(ENGINE.model(), prompt, n, _C.Sampler(**params), lambda done: [])[0]
    return samples


# -------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("params", SAMPLERS, ids=lambda p: "-".join(p))
@settings(max_examples=8)
@given(st.lists(st.sampled_from([1, 7, 60, 63]), min_size=1, max_size=3), st.lists(st.integers(0, 9), max_size=4))
def test_many_steps_are_many_calls(params: dict[str, Any], lengths: list[int], calls: list[int]) -> None:
    """From the prompt's step on, over the border of a page; then the caches go on alike."""
    model, sampler = ENGINE.model(), _C.Sampler(**params)
    prompts = [[(13 * i + 5 + n) % VOCAB_SIZE for i in range(n)] for n in lengths]
    sequences = [started(model, prompt) for prompt in prompts]
    feeds: list[list[int]] = prompts
    found: list[list[Any]] = [[] for _ in prompts]
    for n_more in [5, *calls]:
        items = [(sequence, feed, sampler, "none") for sequence, feed in zip(sequences, feeds, strict=True)]
        for samples, result in zip(found, model.step(items, n_more), strict=True):
            assert len(result.samples) == 1 + n_more and result.token == result.samples[0].token
            samples += result.samples
        feeds = [[samples[-1].token] for samples in found]
    for prompt, sequence, samples in zip(prompts, sequences, found, strict=True):
        assert facts(samples) == facts(plain(prompt, len(samples), params))
        assert sequence.tokens == prompt + [s.token for s in samples[:-1]]
        text = [*sequence.tokens, 2]
        rows = [model.step([(s, t, None, "last")])[0].logits for s, t in ((sequence, [2]), (model.sequence(), text))]
        assert np.array_equal(*rows)


def test_drafts_may_come_first() -> None:
    expected = [s.token for s in plain([1, 2, 3], 10, {"seed": 8})]
    wrong = (expected[2] + 1) % VOCAB_SIZE
    model, sampler = ENGINE.model(), _C.Sampler(seed=8)
    sequence = started(model, [1, 2, 3])
    (result,) = model.step([(sequence, [1, 2, 3, *expected[:2], wrong], sampler, "none", 3)], 7)
    assert [s.token for s in result.samples] == expected
    assert sequence.tokens == [1, 2, 3, *expected[:-1]]


def test_an_end_token_of_any_ends_the_call() -> None:
    prompts = [[1, 2, 3], [4, 5]]
    texts = [[s.token for s in plain(prompt, 20, {"seed": 8})] for prompt in prompts]
    end = next(token for i, token in enumerate(texts[1]) if i > 5 and token not in texts[1][:i])
    n = texts[1].index(end) + 1
    model = ENGINE.model()
    samplers = [_C.Sampler(seed=8), _C.Sampler(seed=8, end_ids=[VOCAB_SIZE + 7, end, 2**31 - 1])]
    items = [(started(model, p), p, sampler, "none") for p, sampler in zip(prompts, samplers, strict=True)]
    results = model.step(items, 19)
    assert [[s.token for s in result.samples] for result in results] == [text[:n] for text in texts]


def test_the_contexts_end_is_told_by_the_next_call() -> None:
    model = ENGINE.model()
    room = ENGINE.shape.max_seq_len
    sequence = started(model, [1] * (room - 3))
    (result,) = model.step([(sequence, [1] * (room - 3), _C.Sampler(seed=1), "none")], 50)
    assert len(result.samples) == 4 and sequence.n_past == room
    with pytest.raises(ContextLengthError):
        model.step([(sequence, [result.samples[-1].token], _C.Sampler(seed=1), "none")], 50)
    assert sequence.n_past == room


@pytest.mark.parametrize(
    ("sampler", "wanted", "n_more", "message"),
    [(None, "none", 1, "n_more needs a sampler"), (1, "last", 1, 'logits "none"'), (1, "none", -1, "n_more is -1")],
)
def test_calls_that_make_no_sense(sampler: Any, wanted: str, n_more: int, message: str) -> None:
    model = ENGINE.model()
    sequence = model.sequence()
    with pytest.raises(ValueError, match=message):
        model.step([(sequence, [1], sampler and _C.Sampler(), wanted)], n_more)
    assert sequence.n_past == 0 and model.pages_in_use == 0


def test_who_is_in_a_hurry_waits_for_one_step() -> None:
    model, sampler = ENGINE.model(), _C.Sampler(seed=8)
    sequence = started(model, [1])
    model.hurry()
    assert len(model.step([(sequence, [1], sampler, "none")], 9)[0].samples) == 1
    assert len(model.step([(sequence, [1], sampler, "none")], 9)[0].samples) == 10


@pytest.mark.usefixtures("uncollected")
def test_ctrl_c_takes_all_steps_of_the_call_back() -> None:
    small = small_model(Shape(max_seq_len=200_000), Kind("q8", 32))
    model, sampler = small.model(), _C.Sampler(seed=8)
    text = [1] * 70
    sequence = model.sequence()
    model.step([(sequence, text, None, "none")])
    fork = sequence.fork(70)  # so that the last page is another's, too
    about_to_step = threading.Event()

    def interrupt() -> None:
        about_to_step.wait()
        while model.pages_in_use < 5:  # the call is at its 140th step or so
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        about_to_step.set()
        model.step([(sequence, [2], sampler, "none")], 190_000)
    thread.join()
    assert sequence.tokens == text and model.pages_in_use <= 3
    (one,), (other,) = (model.step([(s, [2], sampler, "last")]) for s in (sequence, fork))
    assert np.array_equal(one.logits, other.logits) and one.token == other.token


def test_ctrl_c_is_not_lost_in_a_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage is collected at every chance, and a callback in Python would swallow the exception."""
    model, sampler = ENGINE.model(), _C.Sampler(seed=8)
    sequence = model.sequence()
    swallowed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    def callback(phase: str, facts: dict[str, int]) -> None:
        assert phase

    def press_and_look() -> None:
        stepping.wait()
        os.kill(os.getpid(), signal.SIGINT)

    before = gc.get_threshold()
    gc.callbacks.append(callback)
    try:
        for _ in range(10):
            stepping = threading.Event()
            thread = threading.Thread(target=press_and_look)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                gc.set_threshold(1)
                stepping.set()
                for _ in range(1000):
                    model.step([(sequence, [1], sampler, "none")], 15)
                    sequence.truncate(0)
            gc.set_threshold(*before)
            thread.join()
            sequence.truncate(0)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(callback)
    assert not swallowed


# -------------------------------------------------------------------------------- the scheduler


def unwatched(prompt: list[int], limit: int, **options: Any) -> Any:
    made = request(prompt, limit, **options)
    made.watched = False
    return made


class Sampler:
    def __init__(self, *end_ids: int) -> None:
        self.end_ids = end_ids


class CountingModel(FakeModel):
    """Keeps how many further steps each call was asked for."""

    def __init__(self, max_batch_tok: int = 8) -> None:
        super().__init__(max_batch_tok)
        self.asked: list[int] = []

    def step(self, items: list[Any], n_more: int = 0) -> list[Any]:
        self.asked.append(n_more)
        return super().step(items, n_more)


def test_few_calls_where_nobody_looks_and_one_per_token_where_somebody_does() -> None:
    model = CountingModel()
    made = unwatched([1, 2], 40)
    finish(Scheduler(model), [made])
    assert tokens_of(made) == continuation([1, 2], 40) and model.asked == [0, 15, 15, 6]
    model.asked.clear()
    both = [unwatched([1, 2], 9), request([3], 6)]
    finish(Scheduler(model), both)
    assert [tokens_of(r) for r in both] == [continuation([1, 2], 9), continuation([3], 6)]
    assert model.asked == [0] * 6 + [2]


class GuessesAt:
    """Guesses right when a text is so long, and not otherwise."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def draft(self, requests: Any, n_other: int, room: int) -> list[list[int]]:
        return [continuation(r.prompt.tolist(), r.n_tok)[-2:] if r.n_tok in self.lengths else [] for r in requests]

    def forget(self, request: Any) -> None:
        pass


def test_looks_for_guesses_become_rare_while_they_find_nothing() -> None:
    model = CountingModel()
    scheduler = Scheduler(model, drafter=GuessesAt(6))
    made = unwatched([1, 2], 100)
    finish(scheduler, [made])
    assert tokens_of(made) == continuation([1, 2], 100)
    in_vain = [0] * 7 + [1] * 8 + [2] * 8 + [3] * 8
    at = next(i for i, tokens in enumerate(model.batches) if tokens[0][0] == 3)  # a token and two guesses
    assert model.asked[1:at] == in_vain[: at - 1] and model.asked[at : at + 16] == [0] + in_vain[:15]
    model.asked.clear()
    again = unwatched([3], 9)  # a newcomer is looked at
    finish(scheduler, [again])
    assert tokens_of(again) == continuation([3], 9) and model.asked[:8] == [0] * 8


WORK = st.tuples(st.lists(st.integers(0, 96), min_size=1, max_size=20), st.integers(1, 50), st.booleans())


@given(st.lists(WORK, min_size=1, max_size=7), st.integers(1, 12), st.integers(1, 9), st.sampled_from([0, 40]))
def test_whoever_shares_the_calls(
    work: list[tuple[list[int], int, bool]], max_batch_tok: int, max_sequences: int, cache_tok: int
) -> None:
    model = FakeModel(max_batch_tok)
    made = []
    for prompt, limit, watched in work:
        end = continuation(prompt, 50)[len(prompt)]
        made.append(request(prompt, limit, sampler=Sampler(end), end_ids={end}))
        made[-1].watched = watched
    finish(Scheduler(model, max_sequences, cache_tok), made)
    for result, (prompt, limit, _) in zip(made, work, strict=True):
        (end,) = result.end_ids
        expected = continuation(prompt, limit)
        assert tokens_of(result) == expected[: expected.index(end) + 1 if end in expected else limit]


def test_a_request_that_comes_waits_for_one_step() -> None:
    class Busy(CountingModel):
        def _ended(self, items: list[Any], results: list[Any]) -> bool:
            if not late and self.asked[-1] and len(results[0].samples) == 3:
                late.append(request([7], 2))
                scheduler.submit(late)
            return super()._ended(items, results)

    late: list[Any] = []
    model = Busy()
    scheduler = Scheduler(model)
    made = unwatched([1, 2], 30)
    finish(scheduler, [made])
    scheduler.advance(lambda: not late[0].wants_step)
    scheduler.release(late)
    assert tokens_of(made) == continuation([1, 2], 30) and tokens_of(late[0]) == continuation([7], 2)
    assert model.batches[1:4] == [[(1, "none")], [(1, "none")] * 2, [(1, "none")] * 2]
    assert model.asked[:5] == [0, 15, 0, 0, 15]


def test_an_interrupt_at_any_line_loses_and_repeats_nothing() -> None:
    interrupt_everywhere(
        lambda: Scheduler(FakeModel(max_batch_tok=24)), [([1, 2] * 3, 37), ([7, 8, 9], 20)], 2, unwatched
    )


# -------------------------------------------------------------------------------- texts


def streamed(llm: LLM, prompt: str, params: SamplingParams) -> tuple[Any, ...]:
    """What `told` says of an output, from a stream, which takes one step a call."""
    pieces = list(llm.stream(prompt, params))
    logprobs = [piece.logprobs for piece in pieces] if params.logprobs is not None else None
    n_tok = len(llm.tokenizer.encode(prompt)) + len(pieces)
    return "".join(p.text for p in pieces), [p.token_id for p in pieces], pieces[-1].finish_reason, n_tok, logprobs


def test_waiting_gives_what_a_stream_gives() -> None:
    with tiny_llm(eos=[40, 41, 42]) as llm:
        prompts = ["abab" * i + "c" for i in range(10)]
        params = [SamplingParams(**(SAMPLERS[i % 5] | {"max_tokens": 17 * i + 1})) for i in range(9)]
        params.append(SamplingParams(seed=2, ignore_eos=True, stop=["a", "\n"], stop_token_ids=[99]))
        alone = [streamed(llm, prompt, choice) for prompt, choice in zip(prompts, params, strict=True)]
        assert [told(llm.generate(p, c)) for p, c in zip(prompts, params, strict=True)] == alone
        assert [told(out) for out in llm.generate(prompts, params)] == alone
        assert {facts[2] for facts in alone} == {"stop", "length"}


def test_a_stop_string_is_seen_before_the_next_step() -> None:
    with tiny_llm() as llm:
        whole = llm.generate("abcabc", temperature=0, max_tokens=30, ignore_eos=True)
        stop = whole.text[6:8]
        out = llm.generate("abcabc", temperature=0, max_tokens=30, ignore_eos=True, stop=stop)
        assert out.timings.decode_tok == len(out.token_ids) - 1 < 29
