"""Sequences that share pages, on the real engine: whatever is forked, written, cut back and closed in which order, the
bits are those of sequences that share nothing (==), and every page comes back. Runs under the sanitizers, too.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .helpers_models import Kind, Shape, small_model
from .helpers_threads import in_threads

PAGE = 64
ENGINE = small_model(Shape(n_layers=2, max_seq_len=1024), Kind("q4", 32))
MODEL = ENGINE.model(threads=1)
TEXT = np.random.default_rng(3).integers(0, ENGINE.shape.vocab_size, 300, dtype=np.int32)


def logits(sequence: Any, tokens: Any) -> NDArray[np.float32]:
    return np.asarray(MODEL.step([(sequence, tokens, None, "all")])[0].logits)


def fed(tokens: Any) -> Any:
    sequence = MODEL.sequence()
    if len(tokens):
        MODEL.step([(sequence, tokens, None, "none")])
    return sequence


@pytest.fixture(autouse=True)
def _all_pages_come_back() -> Iterator[None]:
    yield
    gc.collect()
    assert MODEL.pages_in_use == 0


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 129, 150])
def test_a_fork_goes_on_as_if_it_had_computed_everything(n: int) -> None:
    expected, other = logits(fed([]), TEXT[:200]), np.concatenate([TEXT[:n], TEXT[200:240]])
    source = fed(TEXT[:150])
    pages = MODEL.pages_in_use
    fork = source.fork(n)
    assert (fork.n_past, fork.tokens) == (n, TEXT[:n].tolist()) and MODEL.pages_in_use == pages
    assert np.array_equal(logits(fork, other[n:]), logits(fed([]), other)[n:])
    assert MODEL.pages_in_use == pages + -(-(n + 40) // PAGE) - n // PAGE
    assert np.array_equal(logits(source, TEXT[150:200]), expected[150:])
    assert source.tokens == TEXT[:200].tolist() and fork.tokens == other.tolist()


@pytest.mark.parametrize("order", ["source", "fork", "together"])
def test_whoever_writes_into_a_shared_page_gets_a_copy(order: str) -> None:
    a, b = np.concatenate([TEXT[:100], [1, 2, 3]]), np.concatenate([TEXT[:100], [3, 2, 1]])
    expected = [logits(fed([]), text)[100:] for text in (a, b)]
    source = fed(TEXT[:100])
    fork = source.fork(100)
    items = [(source, a[100:], None, "all"), (fork, b[100:], None, "all")]
    if order == "together":
        found = [result.logits for result in MODEL.step(items)]
    else:
        found = [MODEL.step([item])[0].logits for item in (items if order == "source" else items[::-1])]
        found = found if order == "source" else found[::-1]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert MODEL.pages_in_use == 3
    assert np.array_equal(logits(source.fork(90), TEXT[90:110]), logits(fed(TEXT[:90]), TEXT[90:110]))


def test_a_failed_step_keeps_pages_shared() -> None:
    source, closed = fed(TEXT[:100]), MODEL.sequence()
    closed.close()
    fork = source.fork(80)
    for _ in range(3):
        with pytest.raises(ValueError, match="the sequence is closed"):
            MODEL.step([(s, TEXT[:70], None, "none") for s in (source, fork, closed)])
        assert MODEL.pages_in_use == 2
    source.close()
    pages = MODEL.pages_in_use
    assert np.array_equal(logits(fork, TEXT[80:120]), logits(fed([]), TEXT[:120])[80:])
    assert pages == 2 and MODEL.pages_in_use == 2, "the last holder writes in place"


def test_what_cannot_be_forked() -> None:
    source = fed(TEXT[:10])
    for n in (-1, 11):
        with pytest.raises(ValueError, match=f"cannot fork {n} tokens, the sequence holds 10"):
            source.fork(n)
    source.prompt_len = 7
    assert source.fork(3).prompt_len == 7
    source.close()
    with pytest.raises(ValueError, match="the sequence is closed"):
        source.fork(0)


def test_pages_that_sequences_hold() -> None:
    a, b = fed(TEXT[:130]), fed(TEXT[:10])
    forks = [a.fork(130), a.fork(70)]
    some = ([], [a], [b], [a, b], [a, *forks], forks[1:], [*forks, b])
    assert [MODEL.pages_of(sequences) for sequences in some] == [0, 3, 1, 4, 3, 2, 4]
    a.close()
    assert [MODEL.pages_of(sequences) for sequences in ([a], forks)] == [0, 3]
    for wrong in (None, ENGINE.model(threads=1).sequence()):
        with pytest.raises(ValueError, match="expected sequences of this model"):
            MODEL.pages_of([wrong])


@settings(max_examples=60)
@given(data=st.data())
def test_any_family_of_forks(data: st.DataObject) -> None:
    """Forks, steps, rewinds and deaths in any order: tokens, bits and the number of pages are those of a plain model
    in which a page is an object in lists."""
    pool: dict[str, tuple[Any, list[int], list[object]]] = {"0": (MODEL.sequence(), [], [])}
    for round_ in range(data.draw(st.integers(1, 12))):
        name = data.draw(st.sampled_from(sorted(pool)))
        sequence, text, pages = pool[name]
        match data.draw(st.sampled_from(["step", "step", "fork", "fork", "truncate", "close"])):
            case "step":
                new = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=100))
                before = len(text)
                text += new
                if before % PAGE and any(pages[-1] in other for n, (_, _, other) in pool.items() if n != name):
                    pages[-1] = object()
                pages += [object() for _ in range(-(-len(text) // PAGE) - len(pages))]
                found = logits(sequence, new)
                if len(text) < 1000:
                    assert np.array_equal(found, logits(MODEL.sequence(), text)[before:])
            case "fork":
                n = data.draw(st.integers(0, len(text)))
                pool[f"{name}.{round_}"] = (sequence.fork(n), text[:n], pages[: -(-n // PAGE)])
            case "truncate":
                n = data.draw(st.integers(0, len(text)))
                sequence.truncate(n)
                del text[n:], pages[-(-n // PAGE) :]
            case "close" if len(pool) > 1:
                del pool[name], sequence
        assert all(made.tokens == expected for made, expected, _ in pool.values())
        assert MODEL.pages_in_use == len({id(page) for _, _, pages in pool.values() for page in pages})


def test_forks_of_many_threads_while_steps_run() -> None:
    expected = logits(fed([]), TEXT)
    source = fed(TEXT[:200])
    wrong: list[int] = []

    def work(i: int) -> None:
        for n in range(150 + i, 190, 4):
            fork = source.fork(n)
            if not np.array_equal(logits(fork, TEXT[n : n + 40]), expected[n : n + 40]):
                wrong.append(n)

    in_threads(4, work)
    assert not wrong


def test_no_fork_of_a_sequence_that_is_in_a_step() -> None:
    small = small_model(Shape(n_layers=8, max_seq_len=1024))
    model, tokens = small.model(threads=1), TEXT % small.shape.vocab_size
    expected = np.asarray(model.step([(model.sequence(), tokens, None, "all")])[0].logits)
    sequence, refusals = model.sequence(), []
    model.step([(sequence, tokens[:40], None, "none")])

    def disturb() -> None:
        while not refusals:
            try:
                sequence.fork(sequence.n_past).truncate(0)
            except ValueError as error:
                refusals.append(str(error))

    thread = threading.Thread(target=disturb)
    thread.start()
    while not refusals:
        found = model.step([(sequence, tokens[40:], None, "all")])[0].logits
        assert np.array_equal(found, expected[40:])
        sequence.truncate(40)
    thread.join()
    assert refusals == ["the sequence is in a step that is still running in another thread"]
