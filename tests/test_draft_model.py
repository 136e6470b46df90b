"""A draft model changes nothing but the number of steps, whatever it guesses and whatever goes wrong in it; it follows
the text through wrong guesses, long prompts and Ctrl-C, and its memory goes when the request goes.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np
import pytest

from pyllama import LLM, SamplingParams
from pyllama.draft_model import DraftModel
from pyllama.scheduler import Scheduler
from pyllama.speculative import Budget

from .helpers_llm import FIRST_BYTE, VOCAB, tiny_llm, tiny_model
from .helpers_models import Kind, native_weight, random_packed
from .test_scheduler import FakeModel, continuation, finish, request, tokens_of
from .test_speculative import CHOICES, interrupt_everywhere, told

CHEAP = 0.1  # as if the draft model were a tenth of the model


def guided(draft: Any, price: float = CHEAP, **options: Any) -> LLM:
    """The tiny model with a draft model of any size, taken for a small one."""
    llm = tiny_llm(draft=draft, **options)
    drafter_of(llm)._price = price
    return llm


def drafter_of(llm: LLM) -> DraftModel:
    drafter = llm._scheduler._drafter
    assert isinstance(drafter, DraftModel)
    return drafter


@pytest.mark.parametrize("seed", [5, 6], ids=["a good draft model", "a useless one"])
@pytest.mark.parametrize("name", CHOICES)
def test_outputs_are_those_of_plain_decoding(name: str, seed: int) -> None:
    options = CHOICES[name] | {"max_tokens": 60, "ignore_eos": True}
    with tiny_llm() as plain, guided(tiny_model(seed=seed)) as llm:
        for prompt in ("abcabcabc", "x"):
            out = llm.generate(prompt, **options)
            assert told(out) == told(plain.generate(prompt, **options))
            assert out.timings.draft_n > 0
            if seed == 5:  # the same numbers and the same random numbers: all of it comes true
                assert out.timings.draft_n_accepted == out.timings.draft_n > 45
        model = drafter_of(llm)._model
    assert model.pages_in_use == 0


def test_ends_and_limits() -> None:
    with tiny_llm() as plain, guided(tiny_model()) as llm:
        options: dict[str, Any] = {"temperature": 0.7, "seed": 2, "ignore_eos": True}
        whole = plain.generate("hello", max_tokens=40, **options)
        for n in range(1, 12):
            assert told(llm.generate("hello", max_tokens=n, **options)) == told(
                plain.generate("hello", max_tokens=n, **options)
            )
        for token in whole.token_ids[::5]:
            end = {"stop_token_ids": [token]}
            assert told(llm.generate("hello", **options, **end)) == told(plain.generate("hello", **options, **end))
        for place in range(3, 30, 4):
            end = {"stop": whole.text[place : place + 3]}
            assert list(llm.stream("hello", **options, **end)) == list(plain.stream("hello", **options, **end))
            out = llm.generate("hello", **options, **end)
            assert out.timings.decode_tok == out.usage.completion_tokens - 1, "without what was sampled behind the stop"


def test_many_at_once_and_conversations() -> None:
    prompts = ["abab" * i + "c" for i in range(9)]
    params = [SamplingParams(**(list(CHOICES.values())[i % 5] | {"max_tokens": 20 + i})) for i in range(9)]
    with tiny_llm() as plain, guided(tiny_model(), max_batch_tok=24) as llm:
        expected = [told(out) for out in plain.generate(prompts, params)]
        assert [told(out) for out in llm.generate(prompts, params)] == expected
        for model in (plain, llm):
            session = model.session()
            for text in ("abcabcabc", "abcabcabcdef", "ab"):
                assert list(session.stream(text, temperature=0, max_tokens=20))
                assert session.reply is not None
                told_now = told(session.reply.output())
                assert told_now == told(plain.generate(text, temperature=0, max_tokens=20))
            session.close()
        model = drafter_of(llm)._model
        assert 0 < model.pages_in_use <= 256 // model.PAGE_TOK
    assert model.pages_in_use == 0


def test_guessing_ends_where_the_draft_models_context_does() -> None:
    with tiny_llm() as plain, guided(tiny_model(max_seq_len=64)) as llm:
        out = llm.generate("ab", temperature=0, max_tokens=200, ignore_eos=True)
        assert told(out) == told(plain.generate("ab", temperature=0, max_tokens=200, ignore_eos=True))
        assert 30 < out.timings.draft_n <= 64
        long = "abc" * 30  # beyond it from the start
        out = llm.generate(long, temperature=0, max_tokens=9, ignore_eos=True)
        assert out.timings.draft_n == 0 and told(out) == told(
            plain.generate(long, temperature=0, max_tokens=9, ignore_eos=True)
        )


def test_a_long_prompt_is_read_in_parts() -> None:
    """The draft model takes 5 tokens per step: until it is up to date the model writes without it."""
    guide, model = FakeModel(5), FakeModel(64)
    made = request(list(range(40)), 30)
    finish(Scheduler(model, drafter=DraftModel(guide, 1000, CHEAP)), [made])
    assert tokens_of(made) == continuation(list(range(40)), 30)
    assert [n for [(n, _)] in guide.batches[:9]] == [5] * 9 and made.n_accepted == made.n_drafted > 10


def test_the_next_turn_is_read_from_where_it_is_new() -> None:
    guide, model = FakeModel(64), FakeModel(64)
    scheduler = Scheduler(model, drafter=DraftModel(guide, 1000, CHEAP, cache_tok=400))
    text = list(range(40))
    for turn in range(4):
        before = sum(n for batch in guide.batches for n, _ in batch)
        made = request(text, 12)
        finish(scheduler, [made])
        assert tokens_of(made) == continuation(text, 12) and made.n_accepted > 6
        read = sum(n for batch in guide.batches for n, _ in batch) - before
        assert read <= (20 if turn else len(text) + 20)
        text = [*text, *tokens_of(made), 50, 51, 52]
    assert sum(not sequence.closed for sequence in guide.sequences) == 1
    scheduler.close()


@pytest.mark.parametrize("cache_tok", [0, 1000])
def test_its_memory_is_bounded(cache_tok: int) -> None:
    """Four contexts of 40 tokens, in pages of 4: what is finished goes for what runs, and what finds no room is not
    guessed."""
    guide, model = FakeModel(256), FakeModel(256)
    seen: list[int] = []
    guide.after = lambda n: seen.append(guide.pages_in_use)
    scheduler = Scheduler(model, drafter=DraftModel(guide, 40, 0.001, cache_tok=cache_tok))
    for round_ in range(3):
        made = [request([round_, i, *range(23)], 12) for i in range(8)]
        finish(scheduler, made)
        assert all(tokens_of(r) == continuation(r.prompt.tolist(), 12) for r in made)
        assert 0 < sum(r.n_accepted > 0 for r in made) < 8
        assert guide.pages_in_use <= (10 if cache_tok else 0)
    assert 20 < max(seen) <= 40


def broken_model() -> Any:
    """Its embedding of byte "z" is not a number."""
    opened = tiny_model(kind=Kind("f32"))
    spec = Kind("f32").spec("tok_embeddings", (VOCAB, 32))
    packed = random_packed(spec, np.random.default_rng(0))
    packed.codes[FIRST_BYTE + ord("z")] = np.nan
    return replace(opened, weights=opened.weights | {"tok_embeddings": native_weight(spec, packed)})


def test_a_draft_model_that_breaks_ends_the_guessing_with_one_warning() -> None:
    with tiny_llm() as plain, guided(broken_model()) as llm:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
        prompts = ["abc", "xyz"]
        with pytest.warns(RuntimeWarning, match="stops guessing for a request: logits are not finite") as seen:
            outs = llm.generate(prompts, **options)
            llm.generate("zz", **options)
        assert len(seen) == 1
        assert [told(out) for out in outs] == [told(out) for out in plain.generate(prompts, **options)]
        assert [out.timings.draft_n > 0 for out in outs] == [True, False]
        model = drafter_of(llm)._model
    assert model.pages_in_use == 0


def test_a_warning_that_is_an_error_ends_no_request(capsys: pytest.CaptureFixture[str]) -> None:
    """As under `python -W error`: neither the request that it is about is lost nor the one that drives."""
    with tiny_llm() as plain, guided(broken_model()) as llm, warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts, options = ["abc", "xyz"], {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
        outs = llm.generate(prompts, **options)
        assert [told(out) for out in outs] == [told(out) for out in plain.generate(prompts, **options)]
    assert "RuntimeWarning: the draft model stops guessing for a request: logits are" in capsys.readouterr().err


def test_no_memory_for_the_draft_model() -> None:
    class Poor(FakeModel):
        def sequence(self) -> Any:
            if len(self.sequences) == 1:
                raise MemoryError
            return super().sequence()

    made = [request([1, 2], 9), request([3], 9)]
    with warnings.catch_warnings(record=True):
        finish(Scheduler(FakeModel(64), drafter=DraftModel(Poor(64), 1000, CHEAP)), made)
    assert [tokens_of(r) for r in made] == [continuation([1, 2], 9), continuation([3], 9)]
    assert [r.may_draft for r in made] == [True, False] and made[0].n_accepted == made[0].n_drafted > 3


class Forgetful(FakeModel):
    """A draft model that is wrong after every fourth token."""

    def step(self, items: list[Any], n_more: int = 0) -> list[Any]:
        results = super().step(items, n_more)
        for result, (sequence, *_) in zip(results, items, strict=True):
            if len(sequence.tokens) % 4 == 0 and result.samples:
                result.token = result.samples[0].token = (result.token + 1) % 97
        return results


@pytest.mark.parametrize("kind", [FakeModel, Forgetful])
def test_an_interrupt_at_any_line_loses_and_repeats_nothing(kind: type[FakeModel]) -> None:
    def make() -> Scheduler:
        return Scheduler(FakeModel(max_batch_tok=24), drafter=DraftModel(kind(5), 40, CHEAP))

    interrupt_everywhere(make, [([1, 2] * 4, 9), ([7], 9)], stride=3)


def test_useless_guesses_become_rare() -> None:
    """A draft model that is always wrong costs a few hundredths of the steps, and is asked again later."""

    class Wrong(FakeModel):
        def step(self, items: list[Any], n_more: int = 0) -> list[Any]:
            results = super().step(items, n_more)
            for result in results:
                result.token = (result.token + 1) % 97
            return results

    guide, model, n = Wrong(64), FakeModel(64), 600
    made = request([1], n)
    finish(Scheduler(model, drafter=DraftModel(guide, 10**6, 0.2)), [made])
    assert tokens_of(made) == continuation([1], n) and made.n_accepted == 0
    assert len(model.batches) == n and 4 < made.n_drafted < 25
    assert 0.2 * len(guide.batches) + 0.1 * made.n_drafted < 0.03 * n


def test_a_draft_model_as_dear_as_the_model_is_not_asked() -> None:
    with tiny_llm(draft=tiny_model()) as llm:
        assert drafter_of(llm)._price == 1.0
        assert llm.generate("abc", max_tokens=30).timings.draft_n == 0
    assert Budget(1, 0, 99).take(repeat(0.9), 16, 0.1) > 3 > Budget(1, 0, 99).take(repeat(0.9), 16, 0.6)


@pytest.mark.parametrize("other", ["piece", "more", "fewer"])
def test_another_vocabulary_is_refused(other: str) -> None:
    draft = tiny_model(vocab_size=VOCAB + (other == "more"))
    pieces = draft.tokenizer.table.pieces
    if other == "piece":
        pieces[70] = b"??"
        expected = r"draft='tiny': token 70 is b'\?\?', in the model b'D'; a draft model must have the vocabulary"
    elif other == "more":
        pieces.append(b"new")
        draft.tokenizer.vocab_size = VOCAB + 1
        expected = f"token {VOCAB} is b'new', in the model 'not used'; a draft"
    else:
        pieces.pop()
        draft.tokenizer.vocab_size = VOCAB - 1
        expected = f"token {VOCAB - 1} is 'not used', in the model .*; a draft"
    with pytest.raises(ValueError, match=expected):
        tiny_llm(draft=draft)


@pytest.mark.parametrize("more", [-1, 40])
def test_matrices_may_be_padded_differently(more: int) -> None:
    """As models of one family are. A guess that is no token of the model ends the guessing, as does one that the draft
    model does not know."""
    options: dict[str, Any] = {"temperature": 0.9, "seed": 3, "max_tokens": 60, "ignore_eos": True}
    with tiny_llm() as plain, guided(tiny_model(vocab_size=VOCAB + more)) as llm, warnings.catch_warnings(record=True):
        for prompt in ("abcabc", "x\u00ff"):
            out = llm.generate(prompt, **options)
            assert told(out) == told(plain.generate(prompt, **options)) and out.timings.draft_n > 0


def test_arguments() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        LLM("nowhere", speculative="lookup", draft="elsewhere")
