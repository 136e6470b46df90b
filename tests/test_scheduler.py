"""The scheduler against an engine of a few lines whose next token is a function of all tokens before: every way of
sharing steps must give what that function gives, and Ctrl-C at any place must neither lose nor repeat a token.
Texts and stop strings: test_llm.py, on the real engine.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama.common.errors import PyllamaError
from pyllama.scheduler import Request, Scheduler

from .helpers_threads import in_threads
from .helpers_trace import Tracing

VOCAB = 97


def next_token(tokens: list[int]) -> int:
    """What the fake model writes after these tokens."""
    state = 17
    for token in tokens:
        state = (31 * state + token + 7) % 10007
    return state % VOCAB


def continuation(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeSequence:
    def __init__(self, model: FakeModel, tokens: list[int]) -> None:
        self.tokens = tokens
        self.prompt_len = 0
        self.closed = False
        self._model = model
        model.sequences.append(self)

    @property
    def n_past(self) -> int:
        return len(self.tokens)

    def truncate(self, n: int) -> None:
        assert 0 <= n <= len(self.tokens) and not self.closed
        del self.tokens[n:]

    def fork(self, n: int) -> FakeSequence:
        assert 0 <= n <= len(self.tokens) and not self.closed
        return FakeSequence(self._model, self.tokens[:n])

    def close(self) -> None:
        self.closed = True


class FakeModel:
    """Calls `trouble(n)` before the n-th step, `after(n)` when its effects are there but not returned yet."""

    PAGE_TOK = 4

    def __init__(self, max_batch_tok: int = 8) -> None:
        self.max_batch_tok = max_batch_tok
        self.batches: list[list[tuple[int, str]]] = []
        self.sequences: list[FakeSequence] = []
        self.trouble: Callable[[int], None] = lambda n: None
        self.after: Callable[[int], None] = lambda n: None
        self._busy = threading.Lock()
        self._hurried = False

    def sequence(self) -> FakeSequence:
        return FakeSequence(self, [])

    @property
    def pages_in_use(self) -> int:
        return len(self._pages(self.sequences))

    def pages_of(self, sequences: list[FakeSequence]) -> int:
        return len(self._pages(sequences))

    def _pages(self, sequences: list[FakeSequence]) -> set[tuple[int, ...]]:
        """As if whatever could be shared were: a page is all tokens up to its last."""
        texts = [s.tokens for s in sequences if not s.closed]
        return {tuple(text[: i + self.PAGE_TOK]) for text in texts for i in range(0, len(text), self.PAGE_TOK)}

    def step(self, items: list[Any], n_more: int = 0) -> list[Any]:
        assert self._busy.acquire(blocking=False), "two steps at once"
        try:
            n = len(self.batches)
            self.trouble(n)
            self.batches.append([(len(tokens), wanted) for _, tokens, _, wanted, _ in items])
            assert 0 < sum(n_tok for n_tok, _ in self.batches[-1]) <= self.max_batch_tok
            assert len({id(sequence) for sequence, *_ in items}) == len(items)
            if not all(0 <= token < VOCAB for _, tokens, *_ in items for token in tokens):
                raise ValueError("a token outside the vocabulary")
            results = [self._run(*item) for item in items]
            while n_more and not self._ended(items, results):
                n_more -= 1
                for (sequence, _, sampler, _, _), result in zip(items, results, strict=True):
                    result.samples += self._run(sequence, [result.samples[-1].token], sampler, "none", 0).samples
            self._hurried = False
            self.after(n)
            return results
        finally:
            self._busy.release()

    def _ended(self, items: list[Any], results: list[Any]) -> bool:
        """Whether a call of several steps stops here."""
        assert all(sampler is not None and wanted == "none" for _, _, sampler, wanted, _ in items)
        ends = [getattr(sampler, "end_ids", ()) for _, _, sampler, _, _ in items]
        return self._hurried or any(r.samples[-1].token in end_ids for r, end_ids in zip(results, ends, strict=True))

    def hurry(self) -> None:
        self._hurried = True

    @staticmethod
    def _run(sequence: FakeSequence, tokens: Any, sampler: Any, wanted: str, n_draft: int) -> Any:
        assert len(tokens) > n_draft >= 0 and not sequence.closed
        assert n_draft == 0 or (sampler is not None and wanted == "none")
        rows, samples = [], []
        for i, token in enumerate(tokens):
            if i >= len(tokens) - n_draft and token != samples[-1].token:
                break
            sequence.tokens.append(int(token))
            rows.append(np.full(4, next_token(sequence.tokens), np.float32))
            if sampler is not None and i >= len(tokens) - 1 - n_draft:
                samples.append(SimpleNamespace(token=next_token(sequence.tokens)))
        token = samples[0].token if samples else -1
        return SimpleNamespace(token=token, samples=samples, logits=np.stack(rows) if wanted == "all" else None)


def request(prompt: list[int], limit: int = 5, **options: Any) -> Request:
    return Request(np.array(prompt, np.int32), sampler=options.pop("sampler", object()), limit=limit, **options)


def tokens_of(request: Request) -> list[int]:
    return [result.token for result in request.results]


def finish(scheduler: Scheduler, requests: list[Request]) -> None:
    try:
        scheduler.submit(requests)
        scheduler.advance(lambda: not any(r.wants_step for r in requests))
    finally:
        scheduler.release(requests)


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


@given(st.lists(st.tuples(PROMPTS, st.integers(1, 12)), min_size=1, max_size=9), st.integers(1, 12), st.integers(1, 9))
def test_neighbours_and_chunks_change_nothing(
    work: list[tuple[list[int], int]], max_batch_tok: int, max_sequences: int
) -> None:
    model = FakeModel(max_batch_tok)
    requests = [request(prompt, limit) for prompt, limit in work]
    finish(Scheduler(model, max_sequences), requests)
    for made, (prompt, limit) in zip(requests, work, strict=True):
        assert tokens_of(made) == continuation(prompt, limit)
    assert all(sequence.closed for sequence in model.sequences)
    assert max(len(batch) for batch in model.batches) <= max_sequences


def test_prompts_share_steps_with_decoding() -> None:
    model = FakeModel(max_batch_tok=8)
    requests = [request([1, 2], 6), request(list(range(20)), 2)]
    finish(Scheduler(model), requests)
    sizes = [[n for n, _ in batch] for batch in model.batches]
    assert sizes == [[2, 6], [1, 7], [1, 7], [1, 1], [1], [1]]


def test_an_end_token_stops_and_is_recorded() -> None:
    prompt = [5, 6]
    expected = continuation(prompt, 20)
    made = request(prompt, 20, end_ids={expected[3]})
    finish(Scheduler(FakeModel()), [made])
    assert tokens_of(made) == expected[: expected.index(expected[3]) + 1]


def test_logits_come_for_every_row() -> None:
    prompt = list(range(90))
    made = request(prompt, sampler=None)
    other = request([3], 40)
    finish(Scheduler(FakeModel(max_batch_tok=512)), [made, other])
    rows = np.concatenate([result.logits for result in made.results])
    assert rows[:, 0].tolist() == [next_token(prompt[: i + 1]) for i in range(90)]
    assert tokens_of(other) == continuation([3], 40)


def test_a_kept_sequence_computes_only_what_is_new() -> None:
    model = FakeModel(max_batch_tok=64)
    scheduler = Scheduler(model)
    sequence = model.sequence()
    first = request([1, 2, 3, 4], 3, sequence=sequence, keep_sequence=True)
    finish(scheduler, [first])
    assert not sequence.closed
    text = [1, 2, 3, 4, *tokens_of(first)[:2], 50, 51]
    second = request(text, 3, sequence=sequence, keep_sequence=True)
    finish(scheduler, [second])
    assert tokens_of(second) == continuation(text, 3)
    assert second.n_reused == 6
    again = request(
        text, 1, sequence=sequence, keep_sequence=True
    )  # all of it is in the cache, yet one token must be fed
    finish(scheduler, [again])
    assert again.n_reused == len(text) - 1 and tokens_of(again) == continuation(text, 1)
    other = request([9, 9], 2, sequence=sequence, keep_sequence=True)
    finish(scheduler, [other])
    assert other.n_reused == 0 and tokens_of(other) == continuation([9, 9], 2)


@pytest.mark.parametrize("late", [False, True], ids=["before the step", "after its effects"])
@pytest.mark.parametrize("n", range(8))
def test_an_interrupt_loses_and_repeats_nothing(n: int, late: bool) -> None:
    """The interrupted caller's own requests end; another caller's go on as if nothing had been."""

    def interrupt(at: int) -> None:
        if at == n and not fired:
            fired.append(at)
            raise KeyboardInterrupt

    fired: list[int] = []
    model = FakeModel(max_batch_tok=4)
    setattr(model, "after" if late else "trouble", interrupt)
    scheduler = Scheduler(model)
    other = request(list(range(10)), 9)
    scheduler.submit([other])
    with pytest.raises(KeyboardInterrupt):
        finish(scheduler, [request([1, 2, 3], 30)])
    assert fired
    scheduler.advance(lambda: not other.wants_step)
    scheduler.release([other])
    assert tokens_of(other) == continuation(list(range(10)), 9)
    assert all(sequence.closed for sequence in model.sequences)


@pytest.mark.parametrize("n", range(60))
def test_an_interrupt_between_any_two_settled_requests(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the n-th line executed inside Request.settle, of four requests that belong to another caller."""
    model = FakeModel(max_batch_tok=16)
    scheduler = Scheduler(model)
    others = [request([i, i + 1], 5) for i in range(4)] + [request([8, 9, 10], sampler=None)]
    mine = request([1], 30)
    scheduler.submit(others)
    with pytest.raises(KeyboardInterrupt), interrupted_after(n):
        finish(scheduler, [mine])
    scheduler.advance(lambda: not any(r.wants_step for r in others))
    scheduler.release(others)
    for other in others[:4]:
        assert tokens_of(other) == continuation(other.prompt.tolist(), 5)
    assert sum(len(result.logits) for result in others[4].results) == 3


class interrupted_after(Tracing):  # noqa: N801  # reads as a word
    """Raises KeyboardInterrupt once, at the n-th line executed in Request.settle or check_done."""

    def __init__(self, n: int) -> None:
        self.left = n

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        if frame.f_code.co_name not in ("settle", "check_done"):
            return self.trace if frame.f_code.co_name in ("_step", "_take_turn") else None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self.trace


def test_a_failing_step_fails_its_requests_and_no_later_one() -> None:
    def fail(n: int) -> None:
        if n == 2:
            raise ValueError("boom")

    model = FakeModel()
    model.trouble = fail
    scheduler = Scheduler(model)
    broken = request([1], 9)
    finish(scheduler, [broken])
    assert isinstance(broken.error, ValueError)
    model.trouble = lambda n: None
    fine = request([1], 9)
    finish(scheduler, [fine])
    assert tokens_of(fine) == continuation([1], 9)
    assert all(sequence.closed for sequence in model.sequences)


@pytest.mark.parametrize("poisons", [(50,), (50, 51), (1, 50, 51, 80)], ids=str)
def test_a_failure_is_its_own_requests_alone(poisons: tuple[int, ...]) -> None:
    """A prompt with a poisonous token makes every step fail that holds it; its neighbours must not notice."""

    class Poisoned(FakeModel):
        def step(self, items: list[Any], n_more: int = 0) -> list[Any]:
            prompts = [tokens for sequence, tokens, *_ in items if sequence.n_past < sequence.prompt_len]
            found = [int(token) for tokens in prompts for token in tokens if token in poisons]
            if found:
                raise ValueError(f"poison {found[0]}")
            return super().step(items, n_more)

    prompts = [[1, 2, 3], [50, 4], [7, 8], [51, 5, 6], [9] * 20, [*range(60, 90)]]
    requests = [request(prompt, 6) for prompt in prompts] + [request([80, 2, 3], sampler=None), request([3], 6)]
    model = Poisoned(max_batch_tok=32)
    scheduler = Scheduler(model)
    finish(scheduler, requests)
    for made in requests:
        prompt = made.prompt.tolist()
        blame = [token for token in prompt if token in poisons]
        if blame:
            assert isinstance(made.error, ValueError) and str(made.error) == f"poison {blame[0]}"
            continue
        assert made.error is None
        if made.sampler is None:
            rows = np.concatenate([result.logits for result in made.results])
            assert rows[:, 0].tolist() == [next_token(prompt[: i + 1]) for i in range(3)]
        else:
            alone = request(prompt, 6)
            finish(Scheduler(FakeModel()), [alone])
            assert tokens_of(made) == tokens_of(alone) == continuation(prompt, 6)
    assert sum(made.error is None for made in requests) == len(requests) - sum(
        bool(set(poisons) & set(made.prompt.tolist())) for made in requests
    )
    assert all(sequence.closed for sequence in model.sequences) and not scheduler._requests


def test_an_interrupt_while_a_failed_step_is_taken_apart() -> None:
    """Steps 0 (all) and 1 (the first alone) fail and succeed; Ctrl-C strikes the next: nothing is lost or repeated."""
    calls: list[int] = []

    class Broken(FakeModel):
        def step(self, items: list[Any], n_more: int = 0) -> list[Any]:
            calls.append(len(items))
            if len(calls) == 1:
                raise ValueError("boom")
            if len(calls) == 3:
                super().step(items, n_more)
                raise KeyboardInterrupt
            return super().step(items, n_more)

    scheduler = Scheduler(Broken(max_batch_tok=64))
    others = [request([i, i + 1], 5) for i in range(4)]
    scheduler.submit(others)
    with pytest.raises(KeyboardInterrupt):
        finish(scheduler, [request([9], 30)])
    assert calls[:3] == [5, 1, 1]
    scheduler.advance(lambda: not any(r.wants_step for r in others))
    scheduler.release(others)
    for other in others:
        assert tokens_of(other) == continuation(other.prompt.tolist(), 5)


def test_closing_fails_what_runs_and_refuses_what_comes() -> None:
    model = FakeModel()
    scheduler = Scheduler(model)
    running = request([1], 1000)
    scheduler.submit([running])
    scheduler.advance(lambda: len(running.results) >= 3)
    scheduler.close()
    assert isinstance(running.error, PyllamaError)
    assert all(sequence.closed for sequence in model.sequences)
    with pytest.raises(ValueError, match="closed"):
        scheduler.submit([request([1])])


def test_many_threads_share_one_scheduler() -> None:
    model = FakeModel(max_batch_tok=16)
    scheduler = Scheduler(model, max_sequences=5)
    wrong: list[object] = []
    start = threading.Barrier(12)
    model.trouble = lambda n: meet() if n == 0 else None

    def meet() -> None:
        deadline = time.monotonic() + 20
        while len(scheduler._requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)

    def work(i: int) -> None:
        start.wait()
        for round_ in range(6):
            made = request([i, round_, i], 4 + i)
            if round_ % 3 == 2:  # one that leaves in the middle
                scheduler.submit([made])
                scheduler.advance(lambda made=made: len(made.results) >= 2)  # type: ignore[misc]
                scheduler.release([made])
                expected = continuation([i, round_, i], 4 + i)[: len(made.results)]
            else:
                finish(scheduler, [made])
                expected = continuation([i, round_, i], 4 + i)
            if tokens_of(made)[: len(expected)] != expected:
                wrong.append((i, round_, tokens_of(made), expected))

    in_threads(12, work)
    assert not wrong
    assert all(sequence.closed for sequence in model.sequences)
    assert max(len(batch) for batch in model.batches) > 1, "nobody shared a step"


def test_a_waiting_thread_gets_its_tokens_while_another_drives() -> None:
    """A stream must not wait for its neighbour's end: the driver hands over after every step."""
    model = FakeModel(max_batch_tok=16)
    scheduler = Scheduler(model)
    release_driver = threading.Event()
    progressed = threading.Event()

    def hold(n: int) -> None:
        if n == 50:  # the driver's 50th step waits until the other thread has seen a token
            assert progressed.wait(20)
            release_driver.set()

    model.trouble = hold
    long, short = request([1], 200), request([2], 20)
    scheduler.submit([short])

    def consume() -> None:
        scheduler.advance(lambda: bool(short.results))
        progressed.set()

    thread = threading.Thread(target=consume)
    thread.start()
    finish(scheduler, [long])
    thread.join(20)
    scheduler.release([short])
    assert progressed.is_set() and release_driver.is_set()
    assert tokens_of(short) == continuation([2], 20) and tokens_of(long) == continuation([1], 200)


class at_a_line(Tracing):  # noqa: N801  # reads as a word
    """Calls `action` at the n-th line that is executed in these functions, as if another thread did."""

    def __init__(self, n: int, functions: tuple[str, ...], action: Callable[[], None]) -> None:
        self.left, self.functions, self.action = n, functions, action

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        if frame.f_code.co_name not in self.functions and frame.f_code.co_name not in ("_take_turn", "_step"):
            return None
        if event == "line" and frame.f_code.co_name in self.functions:
            self.left -= 1
            if self.left == -1:
                sys.settrace(None)
                self.action()
        return self.trace


def test_a_conversation_goes_on_at_any_line_of_a_step() -> None:
    """Its owner ends the last request and submits the next, with the same sequence, while another thread drives."""
    for n in range(1000):
        scheduler = Scheduler(model := FakeModel(max_batch_tok=16))
        last, other = request([1, 2], 30, keep_sequence=True), request([5], 9)
        scheduler.submit([last, other])
        scheduler.advance(lambda last=last: len(last.results) > 2)  # type: ignore[misc]
        new = request([1, 2, next_token([1, 2]), 90], 4, sequence=last.sequence, keep_sequence=True)

        def go_on(last: Request = last, new: Request = new, scheduler: Scheduler = scheduler) -> None:
            last.error = PyllamaError("replaced")
            scheduler.release([last])
            scheduler.submit([new])

        with at_a_line(n, ("_plan", "_choose", "_purge", "_begin", "wants_step", "next_item"), go_on) as at:
            scheduler._drive(scheduler._step)
        if at.left >= 0:
            break
        scheduler.advance(lambda made=(new, other): not any(r.wants_step for r in made))  # type: ignore[misc]
        assert tokens_of(new) == continuation(new.prompt.tolist(), 4) and new.n_reused == 3
        assert tokens_of(other) == continuation([5], 9)
        assert model.sequences.count(new.sequence) == 1
    assert n > 20


def test_a_request_may_leave_at_any_line_of_a_step() -> None:
    for n in range(1000):
        scheduler = Scheduler(model := FakeModel(max_batch_tok=16))
        leaving, gone, other = request([1, 2], 30), request([3], 30), request([5], 9)
        scheduler.submit([leaving, gone, other])
        scheduler.advance(lambda leaving=leaving: len(leaving.results) > 2)  # type: ignore[misc]
        gone.done = True  # has something purged in the step
        functions = ("_plan", "_choose", "_purge", "_begin", "wants_step", "next_item", "settle")
        with at_a_line(n, functions, lambda s=scheduler, r=leaving: s.release([r])) as at:  # type: ignore[misc]
            scheduler._drive(scheduler._step)
        if at.left >= 0:
            break
        scheduler.advance(lambda other=other: not other.wants_step)  # type: ignore[misc]
        scheduler.release([gone, other])
        assert other.error is leaving.error is None and tokens_of(other) == continuation([5], 9)
        assert all(sequence.closed for sequence in model.sequences)
    assert n > 20


def test_what_is_to_be_done_alone_is_done_before_the_next_step() -> None:
    """However fast the driver goes on: who drives does it, and an action that Ctrl-C has cut short is done again."""
    model = FakeModel(max_batch_tok=16)
    scheduler = Scheduler(model)
    calls: list[int] = []

    def action() -> None:
        assert not model._busy.locked()
        calls.append(len(model.batches))
        if len(calls) == 1:
            raise KeyboardInterrupt

    other = threading.Thread(target=lambda: scheduler.run_alone(action))

    def ask(n: int) -> None:
        if n == 20:
            other.start()
            while not scheduler._chores:
                pass

    model.trouble = ask
    made = request([1], 50)
    with pytest.raises(KeyboardInterrupt):
        finish(scheduler, [made])
    other.join(20)
    assert calls == [21, 21] and not scheduler._chores
    scheduler.run_alone(lambda: calls.append(0))
    assert calls == [21, 21, 0]


@pytest.fixture(autouse=True)
def _quick_switches() -> Iterator[None]:
    """Threads change places often, so that races have a chance to show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
