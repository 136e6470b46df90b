"""Beginnings that are computed once: the cache of finished requests, requests that wait for one that reads what they
need. Everything is compared with `==` to what is computed without any of it.

In two parts: scheduling on the fake engine of test_scheduler.py, whole texts on a tiny `LLM`. The engine's shared
pages: test_shared_pages.py.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama import LLM, PyllamaError, SamplingParams, draft_model, prefix_cache, scheduler, speculative
from pyllama.draft_model import DraftModel
from pyllama.prefix_cache import common_prefix, default_cache_tok
from pyllama.scheduler import Scheduler
from pyllama.speculative import LookupDrafter

from .helpers_llm import tiny_llm
from .helpers_models import Kind, Shape, small_model
from .helpers_threads import in_threads
from .helpers_trace import Tracing
from .test_scheduler import FakeModel, FakeSequence, continuation, finish, request, tokens_of

PAGE = 64
ENGINE = small_model(Shape(n_layers=2, max_seq_len=1024), Kind("q4", 32))
MODEL = ENGINE.model(threads=1)


# -------------------------------------------------------------------------------- finding beginnings


@given(st.lists(st.integers(0, 1), max_size=200), st.lists(st.integers(0, 1), max_size=200), st.integers(0, 150))
def test_common_prefix(a: list[int], b: list[int], same: int) -> None:
    a, b = [1] * same + a, [1] * same + b
    n = common_prefix(a, np.array(b, np.int32))
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def n_fed(model: FakeModel) -> int:
    return sum(n for batch in model.batches for n, _ in batch)


def check_cache(scheduler: Scheduler) -> None:
    """What the cache says that it holds is what it holds, and nobody else writes into it."""
    kept = scheduler._cache._kept  # type: ignore[union-attr]
    assert all(entry.tokens.tolist() == entry.sequence.tokens for entry in kept)
    assert not any(entry.sequence.closed for entry in kept)
    in_use = [id(r.sequence) for r in scheduler._requests if r.sequence] + [id(entry.sequence) for entry in kept]
    assert len(in_use) == len(set(in_use))


BEGINNINGS = st.lists(st.integers(0, 1), max_size=40)


@given(
    st.lists(st.lists(st.tuples(BEGINNINGS, st.integers(1, 9)), min_size=1, max_size=6), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 100),
)
def test_any_requests_get_what_they_would_get_alone(
    rounds: list[list[tuple[list[int], int]]], max_batch_tok: int, max_sequences: int, cache_tok: int
) -> None:
    model = FakeModel(max_batch_tok)
    scheduler = Scheduler(model, max_sequences, cache_tok)
    for work in rounds:
        requests = [request([7, *prompt], limit) for prompt, limit in work]
        finish(scheduler, requests)
        for made, (prompt, limit) in zip(requests, work, strict=True):
            assert made.error is None
            assert tokens_of(made) == continuation([7, *prompt], limit)
        check_cache(scheduler)
        assert model.pages_in_use <= cache_tok // model.PAGE_TOK
    scheduler.close()
    assert all(sequence.closed for sequence in model.sequences)


def test_the_next_turn_computes_only_what_is_new() -> None:
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=400)
    text = list(range(20))
    for turn in range(4):
        made = request(text, 6)
        before = n_fed(model)
        finish(scheduler, [made])
        assert tokens_of(made) == continuation(text, 6)
        assert made.n_reused == (len(text) - 4 if turn else 0), "the reply's last token was never fed"
        assert n_fed(model) - before == len(text) - made.n_reused + 5
        text = [*text, *tokens_of(made), 50, 51, 52]
    assert sum(not sequence.closed for sequence in model.sequences) == 1, "a longer text replaces its beginnings"


def test_the_same_prompt_again_feeds_one_token() -> None:
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=400)
    for round_ in range(3):
        made = request(list(range(30)), 1)
        finish(scheduler, [made])
        assert made.n_reused == (29 if round_ else 0)
    assert [sum(n for n, _ in batch) for batch in model.batches] == [30, 1, 1]


@pytest.mark.parametrize("max_batch_tok", [3, 16, 200])
def test_a_batch_computes_a_common_beginning_once(max_batch_tok: int) -> None:
    model = FakeModel(max_batch_tok)
    scheduler = Scheduler(model, cache_tok=4000)
    beginning = list(range(40))
    requests = [request([*beginning, 60 + i, i], 5) for i in range(5)]
    finish(scheduler, requests)
    for i, made in enumerate(requests):
        assert tokens_of(made) == continuation([*beginning, 60 + i, i], 5)
    assert [made.n_reused for made in requests] == [0, 40, 40, 40, 40]
    assert n_fed(model) == 40 + 5 * 2 + 5 * 4


def test_a_request_waits_no_longer_than_for_what_it_needs() -> None:
    model = FakeModel(max_batch_tok=8)
    scheduler = Scheduler(model, cache_tok=4000)
    long, short = request([*range(8), *range(80)], 2), request([*range(8), 90, 91], 2)
    finish(scheduler, [long, short])
    assert short.n_reused == 8
    assert [len(batch) for batch in model.batches[:3]] == [1, 1, 1], "in order of arrival"
    stranger = request([96, 95, 94], 2)
    finish(Scheduler(FakeModel(max_batch_tok=64), cache_tok=4000), [request(list(range(40)), 2), stranger])
    assert stranger.n_reused == 0


def test_a_few_tokens_in_common_are_not_waited_for() -> None:
    model = FakeModel(max_batch_tok=64)
    requests = [request([1, 2, 3, 10 + i], 2) for i in range(3)]
    finish(Scheduler(model, cache_tok=400), requests)
    assert [[n for n, _ in batch] for batch in model.batches] == [[4, 4, 4], [1, 1, 1]]


@pytest.mark.parametrize("ending", ["release", "error", "done"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_whom_a_request_waits_for_may_leave(ending: str, steps: int) -> None:
    model = FakeModel(max_batch_tok=8)
    scheduler = Scheduler(model, cache_tok=4000)
    beginning = list(range(40))
    first, second, third = (request([*beginning, i], 4) for i in (50, 51, 52))
    scheduler.submit([first, second, third])
    for _ in range(steps):
        scheduler._drive(scheduler._step)
    if ending == "release":
        scheduler.release([first])
    elif ending == "error":
        first.error = PyllamaError("gone")
    else:
        first.done = True
    scheduler.advance(lambda: not any(r.wants_step for r in (second, third)))
    scheduler.release([first, second, third])
    for made, last in ((second, 51), (third, 52)):
        assert tokens_of(made) == continuation([*beginning, last], 4)
    assert second.n_reused == (0 if ending == "error" else 8 * steps)
    assert third.n_reused == 40
    check_cache(scheduler)


def test_a_request_forks_from_one_that_is_writing() -> None:
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=4000)
    long = request([5, 6, 7], 60)
    scheduler.submit([long])
    scheduler.advance(lambda: len(long.results) >= 20)
    text = [5, 6, 7, *tokens_of(long)[:19], 80]
    short = request(text, 5)
    finish(scheduler, [short])
    assert short.n_reused == 22 and tokens_of(short) == continuation(text, 5)
    scheduler.advance(lambda: not long.wants_step)
    scheduler.release([long])
    assert tokens_of(long) == continuation([5, 6, 7], 60)


def test_the_longest_unused_goes_first_and_used_ones_stay() -> None:
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=48)  # 12 pages: three texts of 13 tokens have 4 each
    texts = [[i, *range(12)] for i in range(4)]
    for text in [*texts[:3], texts[0], texts[3]]:
        finish(scheduler, [request(text, 1)])
    found = {text[0]: request([*text, 90], 1) for text in texts}
    for i in (0, 2, 3, 1):
        finish(scheduler, [found[i]])
    assert [found[i].n_reused for i in range(4)] == [13, 0, 13, 13]
    assert model.pages_in_use <= 12
    many = [request([i, i, *range(10)], 3) for i in range(60)]
    for made in many:
        finish(scheduler, [made])
        check_cache(scheduler)
        assert model.pages_in_use <= 12
    assert sum(not sequence.closed for sequence in model.sequences) <= 4


def test_what_is_kept_counts_though_others_hold_it_too() -> None:
    """A text of the cache that a running request goes on from takes its room there: when that request fails, and is
    not kept, no more is kept than may be."""
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=24)  # 6 pages
    finish(scheduler, [request(list(range(16)), 1)])
    going_on = request([*range(16), 90, 91], 50)
    scheduler.submit([going_on])
    scheduler.advance(lambda: len(going_on.results) > 2)
    assert going_on.n_reused == 16
    finish(scheduler, [request(list(range(40, 60)), 1)])  # 5 pages: too much beside the 4
    going_on.error = PyllamaError("gone")
    scheduler.release([going_on])
    assert model.pages_in_use == 5


def test_a_text_that_is_too_long_to_keep_leaves_the_others() -> None:
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=24)
    finish(scheduler, [request(list(range(16)), 1)])
    finish(scheduler, [request(list(range(50, 80)), 1)])
    again = request(list(range(20)), 1)
    finish(scheduler, [again])
    assert again.n_reused == 16 and model.pages_in_use == 5


def test_logits_are_all_computed_and_failures_are_not_kept() -> None:
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=4000)
    finish(scheduler, [request(list(range(20)), 2)])
    rows = request(list(range(20)), sampler=None)
    finish(scheduler, [rows])
    assert sum(len(result.logits) for result in rows.results) == 20 and rows.n_reused == 0

    def fail(n: int) -> None:
        raise ValueError("boom")

    model.trouble = fail
    broken = request(list(range(20)), 2)
    finish(scheduler, [broken])
    assert isinstance(broken.error, ValueError) and broken.n_reused == 19
    check_cache(scheduler)
    assert len(scheduler._cache._kept) == 1  # type: ignore[union-attr]


def test_the_cache_is_given_up_before_a_request_fails_for_want_of_memory() -> None:
    """A machine of 10 pages: a step that needs more raises MemoryError, as the engine does."""

    class Small(FakeModel):
        def step(self, items: list[Any], n_more: int = 0) -> list[Any]:
            new = sum(-(-(s.n_past + len(t)) // self.PAGE_TOK) - -(-s.n_past // self.PAGE_TOK) for s, t, *_ in items)
            if self.pages_in_use + new > 10:
                raise MemoryError
            return super().step(items, n_more)

    model = Small(max_batch_tok=64)
    scheduler = Scheduler(model, cache_tok=4000)
    finish(scheduler, [request(list(range(24)), 1)])
    assert model.pages_in_use == 6
    other = request(list(range(50, 70)), 3)
    finish(scheduler, [other])
    assert tokens_of(other) == continuation(list(range(50, 70)), 3)
    too_long = request(list(range(50)), 1)
    finish(scheduler, [too_long])
    assert isinstance(too_long.error, MemoryError)


# -------------------------------------------------------------------------------- Ctrl-C


class at_line(Tracing):  # noqa: N801  # reads as a word
    """KeyboardInterrupt at the n-th line executed of the driver's work (not of the taking of turns); -1: never."""

    FILES = tuple(module.__file__ for module in (scheduler, prefix_cache, speculative, draft_model))
    TURNS = ("_take_turn", "_drive", "_tidy", "_wait", "_wake", "advance", "submit", "release", "run_alone", "close")

    def __init__(self, n: int) -> None:
        self.n = n
        self.lines: list[tuple[str, int]] = []

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line" and frame.f_code.co_name not in self.TURNS:
            self.lines.append((frame.f_code.co_name, frame.f_lineno))
            if len(self.lines) == self.n + 1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def interrupted(n: int, drafter: Any) -> list[tuple[str, int]]:
    """One caller is interrupted at line n while another's share the steps and the cache; the lines until then."""
    model = FakeModel(max_batch_tok=16)
    scheduler = Scheduler(model, cache_tok=60, drafter=drafter and drafter())
    beginning = list(range(12))
    finish(scheduler, [request([*beginning, 40, 41], 3)])
    finish(scheduler, [request([9, 8, 7], 3)])
    others = [request([*beginning, 40, 41, 2], 3), request([*range(20, 34), 3], 4), request([*range(20, 34), 4], 4)]
    conversation = FakeSequence(model, [9, 9, 9])
    others.append(request([*beginning, 40, 5], 3, sequence=conversation, keep_sequence=True))
    mine = request([*beginning, 1], 5)
    scheduler.submit(others)
    at = at_line(n)
    with contextlib.suppress(KeyboardInterrupt), at:
        finish(scheduler, [mine])
    check_cache(scheduler)
    scheduler.advance(lambda: not any(r.wants_step for r in others))
    scheduler.release(others)
    for other in others:
        assert other.error is None and tokens_of(other) == continuation(other.prompt.tolist(), other.limit)
    check_cache(scheduler)
    assert not scheduler._requests
    again = request([*beginning, 40, 41, 2], 9)
    finish(scheduler, [again])
    assert tokens_of(again) == continuation(again.prompt.tolist(), 9)
    scheduler.close()
    mine.sequence = others[-1].sequence = None
    model.sequences = [weakref.ref(sequence) for sequence in model.sequences if not sequence.closed]  # type: ignore
    del conversation
    assert not any(lost() for lost in model.sequences), "a sequence lost between two lines is held by somebody"
    return at.lines


def small_draft_model() -> DraftModel:
    """Which reads a prompt in parts, keeps what it has read, and finds no room for all."""
    return DraftModel(FakeModel(max_batch_tok=9), 24, 0.01, cache_tok=16)


@pytest.mark.parametrize("drafter", [None, LookupDrafter, small_draft_model], ids=["plain", "guessing", "draft model"])
def test_an_interrupt_at_any_line_leaves_a_sound_cache(drafter: Any) -> None:
    """Every line of the driver's work, the first two times that it is executed."""
    lines = interrupted(-1, drafter)
    seen: Counter[Any] = Counter()
    for n, line in enumerate(lines):
        seen[line] += 1
        if seen[line] <= 2:
            assert len(interrupted(n, drafter)) == n + 1
    assert len(seen) > 100


# -------------------------------------------------------------------------------- whole texts

SYSTEM = "You are a helpful assistant who answers in one short sentence, and never without a joke about penguins. "
HOT = SamplingParams(temperature=1.5, max_tokens=20, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with tiny_llm(max_seq_len=512, cache_tok=0) as llm:
        yield llm


def test_results_are_the_same_bits_and_usage_tells(plain: LLM) -> None:
    with tiny_llm(max_seq_len=512) as llm:
        for params in (HOT, SamplingParams(temperature=0, max_tokens=9, repetition_penalty=1.3, logprobs=3)):
            for text in (SYSTEM, SYSTEM + "a", SYSTEM + "a", SYSTEM[:70], "x", SYSTEM + "b"):
                with_cache, without = llm.generate(text, params), plain.generate(text, params)
                assert with_cache.token_ids == without.token_ids and with_cache.logprobs == without.logprobs
                assert without.usage.cached_tokens == 0
                assert (
                    with_cache.timings.prompt_tok == len(with_cache.prompt_token_ids) - with_cache.usage.cached_tokens
                )
        n = len(llm.tokenizer.encode(SYSTEM))
        cached = [llm.generate(text, HOT).usage.cached_tokens for text in (SYSTEM, SYSTEM + "c", SYSTEM + "c")]
        assert cached == [n - 1, n, n]
        np.testing.assert_array_equal(llm.logits(range(2, 200)), plain.logits(range(2, 200)))


def test_a_batch_with_one_beginning(plain: LLM) -> None:
    texts = [SYSTEM + end for end in ("a", "b", "a", "", "and a longer end")] + ["something else"]
    expected = [plain.generate(text, HOT) for text in texts]
    with tiny_llm(max_seq_len=512, max_batch_tok=48) as llm:
        for round_ in range(2):
            outs = llm.generate(texts, HOT)
            assert [out.token_ids for out in outs] == [out.token_ids for out in expected]
            n = len(llm.tokenizer.encode(SYSTEM))
            if round_ == 0:
                assert [out.usage.cached_tokens for out in outs] == [0, n, n, n - 1, n + 1, 0]
            else:
                assert all(out.usage.cached_tokens >= n - 1 for out in outs[:5])


def test_forks_of_stream_session_and_generate_mix(plain: LLM) -> None:
    """A running stream and a running session are forked from; all go on as if alone."""
    with tiny_llm(max_seq_len=512) as llm:
        session = llm.session()
        streams = [llm.stream(SYSTEM + "one", HOT), session.stream(SYSTEM + "two", HOT)]
        found = [[next(stream).token_id] for stream in streams]
        text = plain.tokenizer.encode(SYSTEM + "two") + found[1]
        out = llm.generate(text + [65], HOT)
        assert out.token_ids == plain.generate(text + [65], HOT).token_ids
        assert out.usage.cached_tokens == len(text) - 1
        for tokens, stream, end in zip(found, streams, ("one", "two"), strict=True):
            tokens += [piece.token_id for piece in stream]
            assert tokens == plain.generate(SYSTEM + end, HOT).token_ids
        session.close()


def test_sessions_find_beginnings_and_leave_them(plain: LLM) -> None:
    with tiny_llm(max_seq_len=512, cache_tok=8 * PAGE) as llm:
        model = llm._model
        n = len(llm.tokenizer.encode(SYSTEM))

        def ask(session: Any, text: str) -> int:
            assert [p.token_id for p in session.stream(text, HOT)] == plain.generate(text, HOT).token_ids
            return int(session.reply.output().usage.cached_tokens)

        llm.generate(SYSTEM, HOT)
        sessions = [llm.session() for _ in range(3)]
        assert [ask(session, SYSTEM + end) for session, end in zip(sessions, "abc", strict=True)] == [n] * 3
        assert ask(sessions[0], SYSTEM + "a") == n, "its own cache, all but the last token"
        assert ask(sessions[0], "a very different text") <= 1
        assert ask(sessions[1], SYSTEM + "a") == n, "what the first session has left"
        idle = llm.session()
        ask(idle, "w" * 400)  # as much as the cache may hold, and not its own
        assert llm.generate(SYSTEM + "b", HOT).usage.cached_tokens >= n
        idle.close()
        idle.close()
        with pytest.raises(ValueError, match="this session is closed"):
            idle.stream("a")
        assert model.pages_in_use > 0
    assert model.pages_in_use == 0, "sessions that idle are closed with the LLM"


def test_threads_share_a_beginning(plain: LLM) -> None:
    expected = {i: plain.generate(f"{SYSTEM}{i}", HOT, seed=i).token_ids for i in range(6)}
    wrong: list[int] = []
    with tiny_llm(max_seq_len=512, max_batch_tok=32, cache_tok=512) as llm:
        model = llm._model

        def work(i: int) -> None:
            for _ in range(4):
                if llm.generate(f"{SYSTEM}{i}", HOT, seed=i).token_ids != expected[i]:
                    wrong.append(i)
                next(llm.stream(f"{SYSTEM}{i}", HOT, seed=i))

        in_threads(6, work)
        assert not wrong
        gc.collect()
        llm.generate("x", max_tokens=1)
        assert 0 < model.pages_in_use <= 8
    assert model.pages_in_use == 0


def test_memory_stays_in_its_bounds(plain: LLM) -> None:
    with tiny_llm(max_seq_len=512, cache_tok=4 * PAGE) as llm:
        model = llm._model
        for i in range(30):
            llm.generate(f"{i}" * (10 + 7 * i), HOT)
            assert model.pages_in_use <= 4
        long = llm.generate("z" * 400, HOT)
        assert model.pages_in_use <= 4 and long.token_ids == plain.generate("z" * 400, HOT).token_ids
    assert model.pages_in_use == 0
    with tiny_llm(cache_tok=0) as llm:
        llm.generate("abc", HOT)
        assert llm._model.pages_in_use == 0


def test_how_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    page = MODEL.page_bytes
    assert page == 2 * 2 * ENGINE.shape.n_kv_heads * ENGINE.shape.head_dim * PAGE * 2
    for free, expected in ((None, 1024), (400 * page, 1024), (40 * page, 640), (43 * page, 640), (3 * page, 0)):
        monkeypatch.setattr("pyllama.prefix_cache.available_bytes", lambda free=free: free)
        assert default_cache_tok(MODEL, 1000) == expected


def test_how_caching_is_turned_off(demo_model: Any) -> None:
    off: list[dict[str, Any]] = [{"prefix_cache_tokens": 0}, {"enable_prefix_caching": False}]
    for options in (*off, off[0] | off[1]):
        with LLM(demo_model, n_ctx=256, **options) as llm:
            assert llm._scheduler._cache is None
    for n in (-1, 2.5, True):
        with pytest.raises(ValueError, match=f"prefix_cache_tokens={n}: expected an integer of at least 0, or None"):
            LLM("demo", prefix_cache_tokens=n)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix_cache_tokens=512 and enable_prefix_caching=False: give one of them"):
        LLM("demo", prefix_cache_tokens=512, enable_prefix_caching=False)


def test_the_demos_second_turn(demo_model: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of Germany? Answer in one sentence."}]
    with LLM(demo_model, n_ctx=512) as llm, LLM(demo_model, n_ctx=512, enable_prefix_caching=False) as without:
        first = llm.chat(messages, temperature=0, max_tokens=32)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And of Italy?"}]
        second = llm.chat(messages, temperature=0, max_tokens=16)
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens == len(first.prompt_token_ids) + len(first.token_ids) - 1
        assert second.token_ids == without.chat(messages, temperature=0, max_tokens=16).token_ids
        assert without._model.pages_in_use == 0
