"""The key/value caches of finished requests, kept for requests that begin alike.

What is kept are whole sequences, least recently used first to go. A new request gets a fork of the one that has most
in common with its prompt: a fork shares the pages (csrc/model/sequence.h), so a beginning lies in memory once, however
many go on from it. Tokens are compared one by one, there are no hashes: what is found is what was asked for, and bits
are those that computing it again would give.

Only the driver of scheduler.py calls this, between steps. That a request may do better to wait for one that is still
reading the same beginning is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .memory import available_bytes

if TYPE_CHECKING:
    from .scheduler import Request

_GLANCE_TOK = 64  # most texts that differ do so in the first of these


def common_prefix(tokens: Sequence[int] | NDArray[np.int32], prompt: NDArray[np.int32]) -> int:
    """Length of the common beginning of two token lists."""
    n = min(len(tokens), len(prompt))
    for start, end in ((0, min(n, _GLANCE_TOK)), (_GLANCE_TOK, n)):
        different = np.flatnonzero(np.asarray(tokens[start:end], np.int32) != prompt[start:end])
        if len(different):
            return start + int(different[0])
    return n


def default_cache_tok(model: Any, n_ctx: int, rooms: Sequence[tuple[int | None, int]] | None = None) -> int:
    """How much to keep if nobody says: a full context, in at most a quarter of the memory that is free now.

    `rooms`: for each memory that has a part of every page what is free there, and the part's bytes; the CPU's if None.
    """
    n_pages = -(-n_ctx // model.PAGE_TOK)
    for free, page_bytes in [(available_bytes(), model.page_bytes)] if rooms is None else rooms:
        if free is not None:
            n_pages = min(n_pages, free // 4 // page_bytes)
    return int(n_pages * model.PAGE_TOK)


class Kept(NamedTuple):
    """A parked sequence and its tokens."""

    tokens: NDArray[np.int32]
    sequence: Any


class Found(NamedTuple):
    """Where the longest beginning of a prompt is: its first `n` tokens, in `sequence`. `kept`: if that is parked."""

    n: int
    sequence: Any
    kept: Kept | None


class PrefixCache:
    """Keeps sequences of one model, in at most `n_tok` tokens' worth of pages, also those that others hold too."""

    def __init__(self, model: Any, n_tok: int) -> None:
        self._model = model
        self._most_pages = n_tok // model.PAGE_TOK
        self._kept: list[Kept] = []  # least recently used first

    def find(self, prompt: NDArray[np.int32], running: Iterable[Request]) -> Found:
        """The longest beginning of `prompt`, without its last token, that a parked or a running sequence holds."""
        best = Found(0, None, None)
        most = len(prompt) - 1  # the last token must be fed to get logits
        for kept in reversed(self._kept):
            if len(kept.tokens) <= best.n or kept.tokens[best.n] != prompt[best.n]:
                continue  # no longer than what is found: most are told by this one token
            n = min(common_prefix(kept.tokens, prompt), most)
            if n > best.n:
                best = Found(n, kept.sequence, kept)
        for request in running:
            n = min(request.common_prefix(prompt), request.n_held, most)
            if n > best.n:
                best = Found(n, request.sequence, None)
        return best

    def take(self, found: Found) -> Any:
        """A sequence for a request of one's own, with the tokens that were found; None for a find of nothing."""
        if not found.n:
            return None
        kept = found.kept
        if kept is None:
            return found.sequence.fork(found.n)
        # Out first: should Ctrl-C strike between the lines, the sequence is lost, but never in two hands.
        self._remove(kept)
        if found.n == len(kept.tokens):
            return kept.sequence  # nothing of it is left that another could want
        self._kept.append(kept)
        return kept.sequence.fork(found.n)

    def park(self, sequence: Any) -> None:
        """Keeps the sequence of a request that is through; closes it when it is empty or too long for this cache."""
        if not 0 < self._model.pages_of([sequence]) <= self._most_pages:
            sequence.close()
            return
        tokens = np.asarray(sequence.tokens, np.int32)
        for kept in self._kept[:]:
            if common_prefix(kept.tokens, tokens) == len(kept.tokens):
                self._drop(kept)  # a beginning of the new one: never again the longest
        while self._model.pages_of([sequence, *(kept.sequence for kept in self._kept)]) > self._most_pages:
            self._drop(self._kept[0])
        self._kept.append(Kept(tokens, sequence))

    def clear(self) -> bool:
        """Gives all pages back; False when there were none."""
        held = bool(self._kept)
        while self._kept:
            self._drop(self._kept[0])
        return held

    def _drop(self, kept: Kept) -> None:
        self._remove(kept)
        kept.sequence.close()

    def _remove(self, kept: Kept) -> None:
        self._kept[:] = [other for other in self._kept if other is not kept]
