"""Speculation changes nothing but the number of steps: whatever is drafted, tokens, log-probabilities, texts and caches
are == to plain decoding's, on random models, for every sampler. And what is worth drafting, as a function of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama import _C, LLM, RequestOutput, SamplingParams
from pyllama.scheduler import Request, Scheduler
from pyllama.speculative import (
    FROM_CACHES,
    FROM_MEMORY,
    MAX_DRAFT_TOK,
    Budget,
    Chances,
    Lookup,
    LookupDrafter,
    RowCosts,
    row_costs,
)

from .helpers_llm import VOCAB, tiny_llm
from .helpers_models import Kind, Shape, small_model
from .helpers_trace import Tracing
from .test_scheduler import FakeModel, continuation, finish, request, tokens_of

SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "logprobs": 2},
    {"seed": 3, "logprobs": 0},
    {"seed": 2**64 - 1, "temperature": 2.5, "top_k": 9, "presence_penalty": -0.7},
    {"seed": 4, "top_p": 0.7, "min_p": 0.01, "logit_bias": {3: 2.0}, "repetition_penalty": 0.8},
]


# -------------------------------------------------------------------------------- the engine


def decode(model: Any, prompt: list[int], n: int, sampler: Any, draft: Callable[[list[int]], list[int]]) -> Any:
    """n tokens after a prompt in steps of a token and its draft; the samples, the sequence and the number of steps."""
    sequence = model.sequence()
    sequence.prompt_len = len(prompt)
    samples, feed, n_steps = [], list(prompt), 0
    while len(samples) < n:
        guess = draft([s.token for s in samples])[: n - len(samples) - 1] if samples else []
        (result,) = model.step([(sequence, feed + guess, sampler, "none", len(guess))])
        assert 1 <= len(result.samples) <= len(guess) + 1
        assert result.token == result.samples[0].token
        samples += result.samples
        feed, n_steps = [samples[-1].token], n_steps + 1
    return samples, sequence, n_steps


def facts(samples: list[Any]) -> list[Any]:
    return [(s.token, s.logprob if s.logprob == s.logprob else None, s.top_logprobs) for s in samples]


ENGINE = small_model(Shape(), Kind("q4nl", 64))


@pytest.mark.parametrize("params", SAMPLERS, ids=lambda p: "-".join(p))
@settings(max_examples=12)
@given(st.data())
def test_any_draft_gives_the_tokens_of_plain_decoding(params: dict[str, Any], data: st.DataObject) -> None:
    """Drafts that are right for a while and then wrong, over the border of a page; the cache ends as plain one's."""
    model = ENGINE.model()
    vocab_size = ENGINE.shape.vocab_size
    n_prompt = data.draw(st.sampled_from([1, 7, 60, 63]))
    prompt = [(13 * i + 5) % vocab_size for i in range(n_prompt)]
    sampler, n = _C.Sampler(**params), 24
    plain, of_plain, n_plain = decode(model, prompt, n, sampler, lambda done: [])
    assert n_plain == n
    right = [sample.token for sample in plain]

    def draft(done: list[int]) -> list[int]:
        n_right, n_wrong = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 6))
        guess = right[len(done) : len(done) + n_right]
        return guess + [data.draw(st.integers(0, vocab_size - 1)) for _ in range(n_wrong)]

    samples, sequence, _ = decode(model, prompt, n, sampler, draft)
    assert facts(samples) == facts(plain)
    assert sequence.tokens == of_plain.tokens == prompt + right[:-1]
    assert model.pages_in_use == 2 * ((len(prompt) + n - 1 + 63) // 64)
    rows = [model.step([(s, [right[-1], 2], None, "all")])[0].logits for s in (sequence, of_plain)]
    assert np.array_equal(*rows)


def test_right_drafts_save_steps_and_wrong_ones_none() -> None:
    model, prompt, sampler = ENGINE.model(), [1, 2, 3], _C.Sampler(seed=8)
    plain = [s.token for s in decode(model, prompt, 21, sampler, lambda done: [])[0]]
    assert decode(model, prompt, 21, sampler, lambda done: plain[len(done) :][:4])[2] == 1 + 4
    wrong = [(token + 1) % ENGINE.shape.vocab_size for token in plain]
    samples, _, n_steps = decode(model, prompt, 21, sampler, lambda done: wrong[len(done) :][:4])
    assert n_steps == 21 and [s.token for s in samples] == plain


def test_sequences_with_and_without_drafts_share_a_step() -> None:
    model, sampler = ENGINE.model(max_batch_tok=32), _C.Sampler(seed=8)
    prompts = [[1, 2, 3], [4, 5], [6] * 9]
    plain = [[s.token for s in decode(model, prompt, 6, sampler, lambda done: [])[0]] for prompt in prompts]
    sequences = [model.sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        sequence.prompt_len = len(prompt)
    model.step([(s, p, sampler, "none") for s, p in zip(sequences[:2], prompts[:2], strict=True)])
    results = model.step(
        [
            (sequences[0], plain[0][:3] + [0, 0], sampler, "none", 4),
            (sequences[1], plain[1][:1], sampler, "none", 0),
            (sequences[2], prompts[2], None, "all"),
        ]
    )
    assert [s.token for s in results[0].samples] == plain[0][1:4] or plain[0][3] == 0
    assert [s.token for s in results[1].samples] == plain[1][1:2]
    assert results[2].samples == [] and results[2].token == -1 and results[2].logits.shape[0] == 9


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (([1, 2], "sampler", "none", 2), ValueError, "n_draft is 2, expected 0…1"),
        (([1, 2], "sampler", "none", -1), ValueError, "n_draft is -1"),
        (([1, 2], None, "none", 1), ValueError, "drafts need a sampler"),
        (([1, 2], "sampler", "last", 1), ValueError, "drafts need a sampler, and logits"),
        (([1, 2], "sampler", "none", "1"), TypeError, "n_draft is '1'"),
        (([1, 2], "sampler", "none", 2**40), TypeError, "n_draft is 1099511627776"),
        (([1, 10**6], "sampler", "none", 1), ValueError, "token 1000000, expected"),
        (([1, 2], "sampler", "none", 1, 0), ValueError, "6 fields"),
    ],
)
def test_drafts_that_make_no_sense(item: tuple[Any, ...], error: type[Exception], message: str) -> None:
    model = ENGINE.model()
    sequence = model.sequence()
    tokens, sampler, *rest = item
    with pytest.raises(error, match=message):
        model.step([(sequence, tokens, sampler and _C.Sampler(), *rest)])
    assert sequence.tokens == [] and model.pages_in_use == 0


def test_a_failed_step_with_drafts_changes_nothing() -> None:
    """The second item's bias bans every token, which only its sampler notices, after the first item was sampled."""
    model = ENGINE.model()
    banned = _C.Sampler(logit_bias=dict.fromkeys(range(ENGINE.shape.vocab_size), float("-inf")))
    one, other = model.sequence(), model.sequence()
    model.step([(one, [1] * 60, None, "none"), (other, [2] * 10, None, "none")])
    with pytest.raises(ValueError, match="bans every token"):
        model.step([(one, [3] * 9, _C.Sampler(temperature=0), "none", 8), (other, [3, 4], banned, "none", 1)])
    assert one.tokens == [1] * 60 and other.tokens == [2] * 10 and model.pages_in_use == 2


# -------------------------------------------------------------------------------- the scheduler, any drafter


class Guess:
    """A drafter: `guess(tokens so far, n)` for every request."""

    def __init__(self, guess: Callable[[list[int], int], list[int]]) -> None:
        self.guess = guess
        self.forgotten: list[Request] = []

    def draft(self, requests: Any, n_other: int, room: int) -> list[list[int]]:
        assert room > 0 and all(r.decoding for r in requests)
        return [self.guess(r.prompt.tolist() + tokens_of(r), 5) for r in requests]

    def forget(self, request: Request) -> None:
        self.forgotten.append(request)


DRAFTERS: dict[str, Callable[[], Any]] = {
    "lookup": LookupDrafter,
    "right": lambda: Guess(continuation),
    "wrong": lambda: Guess(lambda tokens, n: [96 - token for token in continuation(tokens, n)]),
    "half": lambda: Guess(lambda tokens, n: continuation(tokens, len(tokens) % n) + [0] * (n - len(tokens) % n)),
    "outside": lambda: Guess(lambda tokens, n: [*continuation(tokens, 2), -1, 10**9]),
    "endless": lambda: Guess(lambda tokens, n: continuation(tokens, 300)),
}
PROMPTS = st.lists(st.integers(0, 96), min_size=1, max_size=30)


@pytest.mark.parametrize("name", DRAFTERS)
@settings(max_examples=25)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 12)), min_size=1, max_size=6), st.integers(1, 40))
def test_no_drafter_changes_a_result(name: str, work: list[tuple[list[int], int]], max_batch_tok: int) -> None:
    model, drafter = FakeModel(max_batch_tok), DRAFTERS[name]()
    end = continuation(work[0][0], 5)[-1]
    requests = [request(prompt, limit, end_ids={end}) for prompt, limit in work]
    finish(Scheduler(model, drafter=drafter), requests)
    for made, (prompt, limit) in zip(requests, work, strict=True):
        expected = continuation(prompt, limit)
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        assert made.error is None and tokens_of(made) == expected
        assert made.n_accepted <= made.n_drafted and made.drafting is None
    assert all(sequence.closed for sequence in model.sequences)


def test_right_guesses_make_fewer_steps_and_are_counted() -> None:
    model = FakeModel(64)
    made = request([1, 2], 19)
    finish(Scheduler(model, drafter=Guess(continuation)), [made])
    assert [n for [(n, _)] in model.batches] == [2, 6, 6, 6] and (made.n_drafted, made.n_accepted) == (15, 15)


def test_a_guess_takes_no_room_from_a_prompt() -> None:
    model = FakeModel(8)
    made = [request([1, 2], 12), request(list(range(20)), 3)]
    finish(Scheduler(model, drafter=Guess(continuation)), made)
    assert [[n for n, _ in batch] for batch in model.batches][:4] == [[2, 6], [1, 7], [1, 7], [6, 2]]


def test_a_guess_that_fails_a_step_costs_the_guessing_and_nothing_else() -> None:
    drafter = Guess(lambda tokens, n: [10**9] if tokens[0] == 1 else continuation(tokens, n))
    model = FakeModel(64)
    made = [request([1, 2], 9), request([2, 2], 9)]
    finish(Scheduler(model, drafter=drafter), made)
    assert [tokens_of(r) for r in made] == [continuation([1, 2], 9), continuation([2, 2], 9)]
    assert not made[0].may_draft and made[0].n_drafted == 0


class InterruptedAfter(Tracing):
    """Raises KeyboardInterrupt once, at the n-th line that the driver executes anywhere in these functions."""

    STEP = ("_step", "_step_apart", "_plan", "_drafts", "_resync", "_purge", "settle", "check_done")
    DRAFT = ("draft", "_of", "push", "_find", "take", "learn", "forget", "__init__")
    MODEL = (
        "_follower",
        "_wanted",
        "_catch_up",
        "_has_room",
        "_guess",
        "_add",
        "find",
        "park",
        "clear",
        "_drop",
        "_remove",
    )
    FILES = ("scheduler.py", "speculative.py", "draft_model.py", "prefix_cache.py")

    def __init__(self, n: int) -> None:
        self.left = n

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        file = frame.f_code.co_filename
        if not file.endswith(self.FILES) or "test_" in file:
            return None
        if event == "line" and frame.f_code.co_name in self.STEP + self.DRAFT + self.MODEL:
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self.trace


def interrupt_everywhere(
    make: Callable[[], Scheduler],
    texts: list[tuple[list[int], int]],
    stride: int,
    ask: Callable[..., Request] = request,
) -> None:
    """Ctrl-C in the caller that drives, at every `stride`-th line: others' requests go on as if nothing had been.

    `texts`: prompts and how many tokens follow; `ask` makes a request of them.
    """
    n_lines = 0
    for n in range(0, 4000, stride):
        scheduler = make()
        others = [ask(prompt, limit) for prompt, limit in texts]
        scheduler.submit(others)
        interrupt = InterruptedAfter(n)
        try:
            with interrupt:
                finish(scheduler, [ask([1], 9)])
        except KeyboardInterrupt:
            n_lines = n
        scheduler.advance(lambda others=others: not any(r.wants_step for r in others))  # type: ignore[misc]
        scheduler.release(others)
        assert [tokens_of(other) for other in others] == [continuation(prompt, limit) for prompt, limit in texts]
        scheduler.close()
        if interrupt.left >= 0:
            break
    assert n_lines > 60 and interrupt.left >= 0, "not all lines were reached"


@pytest.mark.parametrize("name", ["right", "half", "lookup", "outside"])
def test_an_interrupt_at_any_line_loses_and_repeats_nothing(name: str) -> None:
    def make() -> Scheduler:
        return Scheduler(FakeModel(max_batch_tok=24), drafter=DRAFTERS[name]())

    interrupt_everywhere(make, [([1, 2] * 3, 7), ([7, 8, 9], 7)], stride=2)


# -------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LLM, LLM]]:
    """The same model without speculation and with it."""
    with tiny_llm() as plain, tiny_llm(speculative="lookup") as guessing:
        yield plain, guessing


def told(output: RequestOutput) -> tuple[Any, ...]:
    """All of an output but its timings, what it found in a cache, and the seed, which is random for a greedy one."""
    return (output.text, output.token_ids, output.finish_reason, output.usage.total_tokens, output.logprobs)


CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, penalties, logprobs": {"temperature": 0, "repetition_penalty": 1.05, "logprobs": 2},
    "cold": {"temperature": 0.2, "seed": 5},
    "sampled": {"temperature": 1.0, "seed": 5, "top_k": 3, "logprobs": 0},
    "frequency": {"temperature": 0.4, "seed": 6, "frequency_penalty": 0.3, "presence_penalty": 0.1},
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("limit", [1, 2, 3, 17, 90, None])
def test_outputs_are_those_of_plain_decoding(pair: tuple[LLM, LLM], name: str, limit: int | None) -> None:
    plain, guessing = pair
    options = CHOICES[name] | {"max_tokens": limit, "ignore_eos": True}
    for prompt in ("abcabcabcabcabc", "the cat sat on the mat, the cat sat", "x"):
        assert told(guessing.generate(prompt, **options)) == told(plain.generate(prompt, **options))


def test_repetition_is_found_and_saves_steps(pair: tuple[LLM, LLM]) -> None:
    """A greedy random model soon repeats itself."""
    out = pair[1].generate("abcabc", temperature=0, max_tokens=200, ignore_eos=True)
    timings = out.timings
    assert timings.decode_tok == 199 and timings.draft_n >= timings.draft_n_accepted > 40
    assert pair[0].generate("abcabc", temperature=0, max_tokens=200, ignore_eos=True).timings.draft_n == 0


def test_stop_strings_end_tokens_and_streams(pair: tuple[LLM, LLM]) -> None:
    plain, guessing = pair
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 150, "ignore_eos": True}
    whole = plain.generate("abcabc", **options)
    for place in range(0, 150, 7):
        end = {"stop_token_ids": [whole.token_ids[place]]}
        assert told(guessing.generate("abcabc", **options, **end)) == told(plain.generate("abcabc", **options, **end))
    for place in range(1, len(whole.text) - 3, 9):
        stop = {"stop": whole.text[place : place + 3]}
        out = plain.generate("abcabc", **options, **stop)
        assert told(guessing.generate("abcabc", **options, **stop)) == told(out)
        pieces = list(guessing.stream("abcabc", **options, **stop))
        assert pieces == list(plain.stream("abcabc", **options, **stop))


def test_many_at_once(pair: tuple[LLM, LLM]) -> None:
    plain, guessing = pair
    prompts = ["abab" * i + "c" for i in range(12)]
    params = [SamplingParams(**(list(CHOICES.values())[i % 5] | {"max_tokens": 20 + i})) for i in range(12)]
    alone = [told(plain.generate(prompt, choice)) for prompt, choice in zip(prompts, params, strict=True)]
    assert [told(out) for out in guessing.generate(prompts, params)] == alone


def test_a_conversation() -> None:
    """Turns that end by a limit, by a stop string within a guess, and by a caller who leaves; the cache stays right."""
    told_by = []
    for llm in (tiny_llm(cache_tok=0), tiny_llm(cache_tok=0, speculative="lookup")):
        session, text, turns = llm.session(), "abcabcabc", []
        options: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
        for n in (30, 31, 7, 50):
            turns.append(finished(session, session.stream(text, max_tokens=n, **options)))
            stop = turns[-1].text[4:6]
            turns.append(finished(session, session.stream(text, max_tokens=n, stop=stop, **options)))
            assert turns[-1].finish_reason == "stop" and turns[-1].timings.prompt_tok == 1
            stream = session.stream(text, max_tokens=n, **options)
            text += next(stream).text.strip("\ufffd")
            stream.close()
            text += "cab"
        told_by.append([told(turn) for turn in turns])
        session.close()
        assert llm._model.pages_in_use == 0
    assert told_by[0] == told_by[1]


def finished(session: Any, stream: Any) -> RequestOutput:
    assert list(stream)
    output: RequestOutput = session.reply.output()
    return output


@pytest.mark.parametrize("name", ["right", "wrong", "outside", "end"])
def test_hostile_guesses_on_the_real_engine(pair: tuple[LLM, LLM], name: str) -> None:
    options: dict[str, Any] = {"seed": 9, "temperature": 0.9, "max_tokens": 40, "logprobs": 1}
    expected = pair[0].generate("hello", **options)
    whole = expected.prompt_token_ids + expected.token_ids

    def guess(tokens: list[int], n: int) -> list[int]:
        right = whole[len(tokens) : len(tokens) + n]
        return {
            "right": right,
            "wrong": [(token + 1) % VOCAB for token in right],
            "outside": [*right[:2], VOCAB],
            "end": [*right[:1], 1, 1, 1],
        }[name]

    with tiny_llm(cache_tok=0) as llm:
        llm._scheduler._drafter = Guess(guess)
        assert told(llm.generate("hello", **options)) == told(expected)
        assert llm._model.pages_in_use == 0


def test_frequencies_over_seeds(pair: tuple[LLM, LLM]) -> None:
    """Implied by ==, and said directly: the first tokens after a prompt are distributed alike."""
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "top_k": 4, "ignore_eos": True}
    counts = []
    for llm in pair:
        params = [SamplingParams(seed=seed, **options) for seed in range(150)]
        outs = llm.generate(["ababababab"] * 150, params)
        counts.append(Counter(tuple(out.token_ids) for out in outs))
    assert counts[0] == counts[1] and len(counts[0]) > 20


def test_speculative_is_checked() -> None:
    with pytest.raises(ValueError, match="speculative='loopkup': expected \"lookup\" or None"):
        LLM("nowhere", speculative="loopkup")


# -------------------------------------------------------------------------------- what is worth guessing


def best_length(chances: list[float], n_sure: int, row: int, costs: RowCosts) -> int:
    """By trying all lengths: the most tokens per cost; the shortest of equals."""
    base = 1.0 + sum(costs.of(r) for r in range(1, n_sure))

    def rate(n: int) -> float:
        gain = n_sure + sum(float(np.prod(chances[: i + 1])) for i in range(n))
        return gain / (base + sum(costs.of(row + i) for i in range(n)))

    return max(range(len(chances) + 1), key=lambda n: (rate(n), -n))


@given(st.lists(st.floats(0, 1), max_size=16), st.integers(1, 12), st.sampled_from([98_000_000, 4_000_000_000]))
def test_the_length_yields_the_most_tokens_for_its_cost(chances: list[float], n_sure: int, step_bytes: int) -> None:
    costs = row_costs(step_bytes)
    found = Budget(n_sure, 0, 100, costs).take(chances, 100)
    best = best_length(chances, n_sure, n_sure, costs)
    assert found == best or abs(found - best) <= 1  # rounding may decide between neighbours


def test_the_length_keeps_its_limits() -> None:
    sure = [1.0] * 16
    assert Budget(1, 0, 100).take(sure, 100) == 16
    assert Budget(1, 0, 3).take(sure, 100) == 3
    assert Budget(1, 0, 100).take(sure, 2) == 2 and Budget(1, 0, 100).take(sure, -1) == 0
    assert Budget(1, 0, 100).take([0.05] * 16, 100) == 0
    budget = Budget(4, 0, 6)
    assert [budget.take(sure, 4), budget.take(sure, 4), budget.take(sure, 4)] == [4, 2, 0]
    alone, among = (Budget(n_sure, 0, 100, FROM_CACHES).take([0.7] * 16, 100) for n_sure in (1, 12))
    assert alone > 0 and among == 0  # where rows are dear only what is nearly certain is worth one


def test_chances_follow_what_happens() -> None:
    chances = Chances()
    before, of_three = list(chances.following(4)), next(chances.following(3))
    assert len(before) == MAX_DRAFT_TOK and before == sorted(before)
    for _ in range(40):
        chances.learn(5, False)
    assert next(chances.following(4)) < 0.1 and next(chances.following(3)) == of_three
    for _ in range(40):
        chances.learn(5, True)
    assert next(chances.following(4)) > 0.5


def naive_place(tokens: list[int]) -> tuple[int, int]:
    """The latest earlier place after the longest ending of 4 or 2 tokens."""
    for n in (4, 2):
        for place in range(len(tokens) - 1, n - 1, -1):
            if tokens[place - n : place] == tokens[-n:] and len(tokens) > n:
                return place, n
    return 0, 0


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_the_index_finds_the_latest_longest_match(tokens: list[int], n_prompt: int) -> None:
    lookup = Lookup(tokens[:n_prompt])
    place, length = naive_place(tokens[:n_prompt])
    assert (lookup._next, lookup._length) == (place, length)
    for i in range(len(tokens[:n_prompt]), len(tokens)):
        hit = place > 0 and tokens[place] == tokens[i]
        lookup.push(tokens[i])
        if hit:
            place, length = place + 1, length + 1
        else:
            found = naive_place(tokens[: i + 1])
            place, length = found if found[0] else (place + 1, int(length >= 2)) if place else (0, 0)
        assert (lookup._next, lookup._length) == (place, length) and len(lookup) == i + 1


def test_a_copy_is_guessed_in_full_and_chance_text_hardly_at_all() -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(0, 1000, 100).tolist()
    lookup = Lookup([*text, *text[:8]])
    for token in text[8:24]:
        lookup.push(token)
    draft = lookup.draft(Budget(1, 0, 100), 100)
    assert 6 <= len(draft) <= MAX_DRAFT_TOK and draft == text[24 : 24 + len(draft)]
    assert lookup.draft(Budget(1, 0, 100), 5) == text[24:29]
    n_guessed = 0
    lookup = Lookup([])
    for token in rng.integers(0, 40, 2000).tolist():  # matches abound and mean nothing
        n_guessed += len(lookup.draft(Budget(1, 0, 100), 100))
        lookup.push(token)
    assert 0 < n_guessed * FROM_MEMORY.few < 0.01 * 2000  # steps spent on guesses


def test_a_loop_is_continued_beyond_its_end() -> None:
    lookup = Lookup([5, 6, 7])
    for _ in range(12):
        for token in (5, 6, 7):
            lookup.push(token)
    assert lookup.draft(Budget(1, 0, 100), 8) == [5, 6, 7, 5, 6, 7, 5, 6]
