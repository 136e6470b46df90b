"""Ctrl-C while requests are released and while an `LLM` closes: at every call and every line, on the real engine.

Nothing may stay behind: no request that runs on in other callers' steps, no page, no LLM that is half closed. Ctrl-C
during steps is test_scheduler.py's and test_prefix_cache.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

import pyllama.llm
import pyllama.prefix_cache
import pyllama.scheduler
from pyllama import LLM

from .helpers_llm import tiny_model
from .helpers_trace import Tracing

FILES = (pyllama.llm.__file__, pyllama.scheduler.__file__, pyllama.prefix_cache.__file__)
OPENED = tiny_model()
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


class interrupt_at(Tracing):  # noqa: N801  # reads as a word
    """KeyboardInterrupt at the n-th call or line below a call of one of `functions`; not at lines of _take_turn, whose
    last ones Python runs without looking for signals."""

    def __init__(self, n: int, functions: tuple[str, ...]) -> None:
        self.left, self.functions, self.inside = n, functions, 0

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in FILES:
            return None
        self.inside += (event == "call") - (event == "return") if code.co_name in self.functions else 0
        if self.inside and (event == "call" or (event == "line" and code.co_name != "_take_turn")):
            self.left -= 1
            if self.left == -1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def everywhere(functions: tuple[str, ...], act: Callable[[LLM], None], check: Callable[[LLM], None]) -> int:
    """`act` on an LLM that has a cache and a session, interrupted at each place in turn; returns how many there are."""
    for n in range(2000):
        llm = LLM._from_opened(OPENED, threads=1, cache_tok=256)
        llm.generate("ab", **OPTIONS)
        session = llm.session()
        next(stream := session.stream("cd", **OPTIONS))
        at = interrupt_at(n, functions)
        interrupted = False
        try:
            with at:
                act(llm)
        except KeyboardInterrupt:
            interrupted = True
        assert interrupted == (at.left < 0)
        check(llm)
        model = llm._model
        llm.close()
        stream.close()
        assert model is None or model.pages_in_use == 0
        if not interrupted:
            return n
    raise AssertionError("no end")


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_request_that_is_let_go_leaves_nothing(way: str) -> None:
    def act(llm: LLM) -> None:
        if way == "generate":
            llm.generate(["xyz", "w"], max_tokens=3, temperature=0)
        else:
            stream = llm.stream("xyz", **OPTIONS)
            next(stream)
            stream.close()

    def check(llm: LLM) -> None:
        assert [request.keep_sequence for request in llm._scheduler._requests] == [True], "the session's alone"

    assert everywhere(("release",), act, check) > 20


def test_close_closes_or_has_not_begun() -> None:
    def act(llm: LLM) -> None:
        models.append(llm._model)
        llm.close()

    def check(llm: LLM) -> None:
        model = models.pop()
        if not llm._closed:
            assert llm.generate("ab", **OPTIONS).token_ids
            return
        assert llm._model is None and model.pages_in_use == 0 and not llm._scheduler._requests
        with pytest.raises(ValueError, match="this LLM is closed"):
            llm.generate("ab")

    models: list[Any] = []
    assert everywhere(("close",), act, check) > 50
