"""`LLM` on the real engine: text, streams, stop strings, seeds, batches, threads, logprobs, limits and errors.

Most tests use a tiny random model over bytes, whose text is full of broken characters; the demo model shows sense.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama import LLM, ContextLengthError, DeviceError, Piece, PyllamaError, RequestOutput, SamplingParams
from pyllama.reply import StopMatcher

from .helpers_llm import FIRST_BYTE, VOCAB, tiny_llm
from .helpers_threads import in_threads

HOT = SamplingParams(temperature=1.5, max_tokens=40, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with tiny_llm() as llm:
        yield llm


@pytest.fixture(scope="module")
def demo(demo_model: Any) -> Iterator[LLM]:
    with LLM(demo_model) as llm:
        yield llm


# -------------------------------------------------------------------------------- stop strings


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_matcher_stops_at_the_first_string_and_loses_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    matcher = StopMatcher(stops)
    out = ""
    for start, end in pairwise(borders):
        out += matcher.push(text[start:end])
        assert text.startswith(out)
        known = text[:end]
        places = [known.find(stop) for stop in stops if stop in known]
        assert matcher.matched == bool(places)
        if places:
            assert out == text[: min(places)]
            assert matcher.push("more") == "" and matcher.flush() == ""
            return
        held = known[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops), "held back for nothing"
    assert out + matcher.flush() == text


# -------------------------------------------------------------------------------- text


def test_generate_is_the_models_own_continuation(tiny: LLM) -> None:
    """Greedy text, token by token from the logits."""
    prompt = tiny.tokenizer.encode("ab")
    out = tiny.generate("ab", temperature=0, max_tokens=12, ignore_eos=True)
    tokens = list(prompt)
    for token in out.token_ids:
        assert token == int(np.argmax(tiny.logits(tokens)[-1]))
        tokens.append(token)
    assert out.prompt_token_ids == prompt
    assert out.text == tiny.tokenizer.decode(out.token_ids)
    assert out.finish_reason == "length"
    assert (out.usage.prompt_tokens, out.usage.completion_tokens, out.usage.total_tokens) == (3, 12, 15)
    assert out.timings.prompt_tok == 3 and out.timings.decode_tok == 11
    assert out.timings.prompt_s > 0 and out.timings.decode_tok_per_s > 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stop", [None, ["e"], ["\ufffd\ufffd", "zz"]], ids=str)
def test_a_streams_pieces_joined_are_the_text(tiny: LLM, seed: int, stop: list[str] | None) -> None:
    params = SamplingParams(temperature=1.5, seed=seed, max_tokens=60, stop=stop, logprobs=2)
    whole = tiny.generate("Hello", params)
    pieces = list(tiny.stream("Hello", params))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.token_id for piece in pieces] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [whole.finish_reason]
    assert [piece.logprobs for piece in pieces] == whole.logprobs
    for text in stop or ():
        assert text not in whole.text


def stop_after(llm: LLM, n: int) -> tuple[str, RequestOutput]:
    """A string of printable text that the model writes, across at least two tokens, and the reply that has it."""
    for seed in range(50):
        out = llm.generate("x", HOT, seed=seed)
        for at in range(n, len(out.text) - 3):
            wanted = out.text[at : at + 3]
            if "\ufffd" not in wanted and out.text.find(wanted) == at:
                return wanted, out
    raise AssertionError("no such text in 50 replies")


def test_a_stop_string_across_tokens_ends_the_text_before_it(tiny: LLM) -> None:
    wanted, free = stop_after(tiny, 2)
    stopped = tiny.generate("x", HOT, seed=free.seed, stop=wanted)
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.find(wanted)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert wanted in tiny.tokenizer.decode(stopped.token_ids)
    assert wanted not in tiny.tokenizer.decode(stopped.token_ids[:-1])


def test_the_beginning_of_a_stop_string_is_held_back_and_comes_after_all(tiny: LLM) -> None:
    wanted, free = stop_after(tiny, 2)
    almost = wanted[:2] + "\x00never"
    pieces = list(tiny.stream("x", HOT, seed=free.seed, stop=almost))
    assert "".join(piece.text for piece in pieces) == free.text
    text = ""
    for piece in pieces[:-1]:
        text += piece.text
        assert not text.endswith(wanted[:2])


def test_end_tokens(tiny: LLM) -> None:
    free = tiny.generate("q", HOT)
    wanted = free.token_ids[7]
    at = free.token_ids.index(wanted)
    stopped = tiny.generate("q", HOT, stop_token_ids=[wanted])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: at + 1]  # the token is there, its text is not
    assert stopped.text == tiny.tokenizer.decode(free.token_ids[:at])
    assert stopped.usage.completion_tokens == at + 1


def test_the_models_end_of_text_stops_unless_ignored(tiny: LLM) -> None:
    wanted = tiny.generate("q", HOT).token_ids[5]
    with tiny_llm(eos=[wanted]) as llm:
        free = llm.generate("q", HOT)
        assert len(free.token_ids) == 40 and wanted in free.token_ids
        stopped = llm.generate("q", HOT, ignore_eos=False)
        assert stopped.finish_reason == "stop" and stopped.token_ids[-1] == wanted
        assert wanted not in stopped.token_ids[:-1]


def test_generation_config_gives_defaults(tiny: LLM) -> None:
    greedy = tiny.generate("a", max_tokens=5, temperature=0)
    with tiny_llm(generation_config={"temperature": 0.0}) as llm:
        assert llm.generate("a", max_tokens=5).token_ids == greedy.token_ids


# -------------------------------------------------------------------------------- seeds and batches


def test_same_seed_same_text_and_the_seed_is_told(tiny: LLM) -> None:
    free = tiny.generate("abc", temperature=2.0, max_tokens=30)
    again = tiny.generate("abc", temperature=2.0, max_tokens=30, seed=free.seed)
    other = tiny.generate("abc", temperature=2.0, max_tokens=30, seed=free.seed ^ 1)
    assert again.token_ids == free.token_ids
    assert other.token_ids != free.token_ids


def test_a_batch_gives_what_each_gives_alone(tiny: LLM) -> None:
    prompts: list[Any] = ["one", [5, 6, 7], "a much longer prompt, " * 9, np.array([9, 9]), "x"]
    params = [SamplingParams(temperature=1.3, seed=i, max_tokens=5 + 9 * i, stop="e") for i in range(5)]
    together = tiny.generate(prompts, params)
    alone = [tiny.generate(prompt, choice) for prompt, choice in zip(prompts, params, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert (a.text, a.token_ids, a.finish_reason, a.seed) == (b.text, b.token_ids, b.finish_reason, b.seed)
    assert tiny.generate([]) == []
    assert [out.prompt_token_ids for out in tiny.generate([[5], [6]], max_tokens=1)] == [[5], [6]]


@pytest.mark.parametrize("max_batch_tok", [1, 7, 64])
def test_chunks_of_the_prompt_change_nothing(tiny: LLM, max_batch_tok: int) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 3
    with tiny_llm(max_batch_tok=max_batch_tok) as llm:
        assert llm.generate(prompt, HOT).token_ids == tiny.generate(prompt, HOT).token_ids
        tokens = tiny.tokenizer.encode(prompt)
        np.testing.assert_array_equal(llm.logits(tokens), tiny.logits(tokens))


def test_many_threads_share_one_llm(tiny: LLM) -> None:
    expected = {i: tiny.generate(f"thread {i}", HOT, seed=i).token_ids for i in range(8)}
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        for _ in range(2):
            if tiny.generate(f"thread {i}", HOT, seed=i).token_ids != expected[i]:
                wrong.append(("generate", i))
            if [piece.token_id for piece in tiny.stream(f"thread {i}", HOT, seed=i)] != expected[i]:
                wrong.append(("stream", i))
            next(tiny.stream(f"thread {i}", HOT, seed=i))  # left after its first piece

    in_threads(8, work)
    assert not wrong


# -------------------------------------------------------------------------------- numbers


def test_logits_of_a_text_are_those_of_its_beginnings(tiny: LLM) -> None:
    tokens = list(range(3, 120))
    rows = tiny.logits(tokens)
    assert rows.dtype == np.float32 and rows.shape == (len(tokens), VOCAB)
    for n in (1, 2, 63, 64, 65, 100):
        np.testing.assert_array_equal(rows[n - 1], tiny.logits(tokens[:n])[-1])


def test_logprobs_are_the_models(tiny: LLM) -> None:
    out = tiny.generate("ab", temperature=0.7, top_k=3, seed=1, max_tokens=6, logprobs=4, ignore_eos=True)
    assert out.logprobs is not None and len(out.logprobs) == 6
    tokens = list(out.prompt_token_ids)
    for token, entry in zip(out.token_ids, out.logprobs, strict=True):
        logits = tiny.logits(tokens)[-1].astype(np.float64)
        expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(expected[token], abs=1e-5)
        best = np.lexsort((np.arange(VOCAB), -expected))[:4]
        assert [top.token_id for top in entry.top] == best.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
        assert entry.token == tiny.tokenizer.decode([token], skip_special=False)
        tokens.append(token)
    assert tiny.generate("ab", max_tokens=2).logprobs is None
    chosen_only = tiny.generate("ab", max_tokens=2, logprobs=0).logprobs
    assert chosen_only is not None and chosen_only[0].top == ()


# -------------------------------------------------------------------------------- limits and errors


def test_too_long_a_prompt_says_the_numbers() -> None:
    with tiny_llm(n_ctx=20) as llm:
        with pytest.raises(ContextLengthError, match=r"20 tokens, but the context holds 20.*raise n_ctx \(up to 256\)"):
            llm.generate([5] * 20)
        with pytest.raises(ContextLengthError, match="21 tokens, but the context holds 20"):
            llm.logits([5] * 21)
        assert llm.logits([5] * 20).shape == (20, VOCAB)
        full = llm.generate([5] * 12, temperature=0, ignore_eos=True)
        assert full.usage.total_tokens == 20 and full.finish_reason == "length"
        assert len(llm.generate([5] * 19, ignore_eos=True).token_ids) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([VOCAB], f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ([-1], "-1 is not a token id"),
        ([1.5, 2], "found|is not a token id|expected"),
        ([True, 2], "True is not a token id"),
        ([2**40], "is not a token id"),
        (b"bytes", "expected text, token ids, or a list of those, found bytes"),
        (5, "found int"),
        ([[]], "the prompt is empty"),
        ([["a"]], "'a' is not a token id"),
        (np.array([1.0, 2.0]), "expected one row of integers"),
        (np.array(5), "expected text, token ids, or a list of those, found ndarray"),
    ],
    ids=str,
)
def test_bad_prompts(tiny: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.generate(prompt)


def test_bad_options(tiny: LLM) -> None:
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        tiny.generate("a", temperatur=1)
    with pytest.raises(ValueError, match="2 prompts but 1 sampling parameters"):
        tiny.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(ValueError, match="needs a list of prompts"):
        tiny.generate("a", [SamplingParams()])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="logit_bias: token id 99999"):
        tiny.generate("a", logit_bias={99999: 1.0})
    with pytest.raises(ValueError, match="top_p=0"):
        tiny.stream("a", top_p=0)  # at once, not with the first piece
    with pytest.raises(PyllamaError, match="no chat template"):
        tiny.chat([{"role": "user", "content": "Hi"}])
    for messages in ("Hi", [], [{"role": "user"}], ["Hi"], {"role": "user", "content": "Hi"}):
        with pytest.raises(ValueError, match="messages"):
            tiny.chat(messages)  # type: ignore[arg-type]


def test_bad_arguments_of_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", "/nowhere/none.so")
    with pytest.raises(DeviceError, match=r'device="cuda": .*no such file.*; use device="cpu" or "auto"'):
        LLM("demo", device="cuda")
    for options in (
        {"device": "tpu"},
        {"n_ctx": 0},
        {"threads": -1},
        {"threads": True},
        {"format": "q3"},
        {"kv_dtype": "q4"},
        {"gpu_layers": "most"},
        {"gpu_layers": -1},
        {"gpu_layers": 3, "device": "cpu"},
        {"device": "cuda:"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            LLM("demo", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 256"):
        tiny_llm(n_ctx=257)


def test_logit_bias_forces_and_bans(tiny: LLM) -> None:
    out = tiny.generate("a", temperature=1.0, max_tokens=5, logit_bias={FIRST_BYTE + 65: 100.0})
    assert out.text == "AAAAA"


def test_closed(tiny: LLM) -> None:
    llm = tiny_llm()
    stream = llm.stream("a", HOT)
    next(stream)
    session = llm.session()
    llm.close()
    llm.close()
    with pytest.raises(PyllamaError, match="closed while this request was running"):
        list(stream)
    for call in (lambda: llm.generate("a"), lambda: llm.logits([1]), lambda: llm.session()):
        with pytest.raises(ValueError, match="closed"):
            call()
    session.close()
    assert "closed" in repr(llm)
    assert "n_ctx=256" in repr(tiny)


def test_an_abandoned_stream_gives_its_pages_back(tiny: LLM) -> None:
    stream = tiny.stream("abc", HOT)
    next(stream)
    assert tiny._scheduler._requests
    del stream
    gc.collect()
    assert not tiny._scheduler._requests


@pytest.mark.usefixtures("uncollected")
def test_ctrl_c_ends_generate_and_nothing_else(tiny: LLM) -> None:
    """A real signal, sent by another thread as soon as the first tokens are there."""
    with tiny_llm(max_seq_len=200_000) as llm:
        expected = llm.generate("x", HOT).token_ids

        def press() -> None:
            while not any(request.results for request in llm._scheduler._requests):
                pass
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate("x", temperature=0, ignore_eos=True)
        thread.join()
        assert not llm._scheduler._requests
        assert llm.generate("x", HOT).token_ids == expected


# -------------------------------------------------------------------------------- sessions


def test_a_session_computes_only_what_is_new_and_writes_the_same(tiny: LLM) -> None:
    session = tiny.session()
    text = tiny.tokenizer.encode("once upon a time")
    for round_ in range(3):
        pieces = list(session.stream(text, HOT, seed=round_))
        assert [piece.token_id for piece in pieces] == tiny.generate(text, HOT, seed=round_).token_ids
        assert session.reply is not None
        if round_:
            assert session.reply.output().timings.prompt_tok == 4
        text = [*text, *(piece.token_id for piece in pieces), 40, 41, 42]
    assert isinstance(next(session.stream(text, HOT)), Piece)  # left in the middle
    assert [p.token_id for p in session.stream("new", HOT)] == tiny.generate("new", HOT).token_ids
    session.close()
    with pytest.raises(ValueError, match="this session is closed"):
        session.stream("a")


@pytest.mark.parametrize("begun", [False, True], ids=["before the first piece", "after the first piece"])
@pytest.mark.parametrize("older_first", [False, True], ids=["newer read first", "older read first"])
def test_a_newer_stream_of_a_session_replaces_the_older(tiny: LLM, begun: bool, older_first: bool) -> None:
    session = tiny.session()
    older = session.stream("once upon", HOT)
    first = [next(older)] if begun else []
    newer = session.stream("once more", HOT)
    pieces = [next(newer)] if begun else []
    if not older_first:
        pieces += newer
    with pytest.raises(PyllamaError, match="this stream was replaced by a newer one of the same session"):
        list(older)
    pieces += newer
    assert [piece.token_id for piece in pieces] == tiny.generate("once more", HOT).token_ids
    assert [piece.token_id for piece in first] == tiny.generate("once upon", HOT).token_ids[: len(first)]
    session.close()
    assert not tiny._scheduler._requests


def test_a_refused_prompt_leaves_the_running_stream_alone(tiny: LLM) -> None:
    session = tiny.session()
    stream = session.stream("once", HOT)
    pieces = [next(stream)]
    with pytest.raises(ContextLengthError):
        session.stream("x" * 999, HOT)
    pieces += stream
    assert [piece.token_id for piece in pieces] == tiny.generate("once", HOT).token_ids
    session.close()


@pytest.mark.parametrize("options", [{}, {"cache_tok": 0}, {"speculative": "lookup"}], ids=str)
def test_closing_lets_go_of_the_model(options: dict[str, Any]) -> None:
    """Weights are gone when the model is: nothing of a closed LLM may hold it, though the LLM itself lives on."""
    llm = tiny_llm(**options)
    model = llm._model
    llm.generate("a", HOT)
    llm.close()
    holders = [type(holder).__name__ for holder in gc.get_referrers(model)]
    assert holders == []


def test_closing_a_session_ends_its_stream_and_no_other(tiny: LLM) -> None:
    session = tiny.session()
    stream = session.stream("once", HOT)
    other = tiny.stream("upon", HOT)
    pieces = [next(stream), next(other)][1:]
    session.close()
    with pytest.raises(PyllamaError, match="the session of this stream was closed"):
        list(stream)
    pieces += other
    assert [piece.token_id for piece in pieces] == tiny.generate("upon", HOT).token_ids


# -------------------------------------------------------------------------------- the demo model


def test_the_demo_knows_its_capitals(demo: LLM) -> None:
    assert demo.generate("The capital of France is", temperature=0, max_tokens=4).text.startswith(" Paris")
    messages = [{"role": "user", "content": "What is the capital of Germany?"}]
    out = demo.chat(messages, temperature=0, max_tokens=32)
    assert "Berlin" in out.text
    assert out.finish_reason == "stop"
    assert out.token_ids[-1] in demo._end_ids
    assert "".join(piece.text for piece in demo.stream_chat(messages, temperature=0, max_tokens=32)) == out.text
    assert demo.encode_chat(messages) == out.prompt_token_ids
    assert demo.render_chat(messages).endswith("<|im_start|>assistant\n")


def test_the_demo_in_a_batch_and_in_memory(demo: LLM, demo_model: Any) -> None:
    prompts = ["The sky is", "Two and two are", "Once upon a time"]
    together = demo.generate(prompts, temperature=0, max_tokens=8)
    with LLM(demo_model, mmap=False, threads=1, n_ctx=64) as llm:
        for prompt, out in zip(prompts, together, strict=True):
            assert llm.generate(prompt, temperature=0, max_tokens=8).token_ids == out.token_ids
        assert llm.n_ctx == 64 and llm.threads == 1
