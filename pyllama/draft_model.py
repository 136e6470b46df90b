"""Drafts by a second, smaller model with the same vocabulary.

It reads along: every request has a sequence of its own in the draft model, which follows the tokens that were accepted
and is cut back where a guess was wrong. It samples with the request's own sampler, so that both models meet the same
random number at the same position and often choose the same token at any temperature. What goes wrong here ends the
guessing for a request, never the request. What it has read stays for the next request that begins alike, in a prefix
cache of its own; all that it holds is bounded, and for what finds no room nothing is guessed.

How much is guessed is speculative.py's policy; who feeds the guesses to the model is scheduler.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

from .native import load_native
from .prefix_cache import PrefixCache
from .speculative import FROM_MEMORY, MAX_DRAFT_TOK, Budget, Rate, RowCosts, row_costs

if TYPE_CHECKING:
    from .open import OpenedModel
    from .scheduler import Request

_PRIOR_CHANCE, _PRIOR_WEIGHT = 0.6, 2.0
_SECOND_CHANCE = 0.5  # after a rest, and one try decides
_MEMORY_TOK = 24.0
_FIRST_REST, _LONGEST_REST = 16, 256  # steps without a guess after guesses were not worth their price
_DEVICE_SPEED = 20.0  # a CUDA device reads its memory about so many times as fast as a CPU
MOST_CONTEXTS = 4  # of keys and values, for running requests and finished ones together


@dataclass
class _Follower:
    """The draft model's side of a request. `n_known` tokens of its sequence are the text's, then come `guesses`."""

    sequence: Any
    n_known: int = 0
    guesses: list[int] = field(default_factory=list)
    rate: Rate = field(default_factory=lambda: Rate(_PRIOR_CHANCE, _PRIOR_WEIGHT, _MEMORY_TOK))
    resting: int = 0  # steps to stay silent
    next_rest: int = _FIRST_REST


@dataclass
class _Job:
    """What one request gets in this round: `n` guesses wanted, `draft` made so far."""

    request: Request
    follower: _Follower
    n: int
    draft: list[int] = field(default_factory=list)


def open_drafter(
    draft: OpenedModel,
    target: OpenedModel,
    n_ctx: int,
    threads: int,
    cache_tok: int,
    *,
    device: str = "",
    device_share: float = 0.0,
) -> DraftModel:
    """The draft model, ready to guess for `target` in contexts of `n_ctx` tokens. `cache_tok`: of the prefix cache.

    `device`: where all of it runs, "" for the CPU. `device_share`: of the target's layers on a CUDA device. Raises
    ValueError when the two do not have the same vocabulary.
    """
    _check_vocabulary(draft, target)
    n_ctx = min(n_ctx, int(draft.config["max_seq_len"]))
    model = load_native().Model(draft.native_config(n_ctx), draft.weights, threads=threads, device=device)
    time = _time(draft.step_bytes, 1.0 if device else 0.0) / _time(target.step_bytes, device_share)
    return DraftModel(model, n_ctx, time, row_costs(target.step_bytes, device_share), cache_tok)


def _time(step_bytes: int, device_share: float) -> float:
    """Of a step of one row, in bytes that the CPU reads meanwhile."""
    return step_bytes * (1 - device_share + device_share / _DEVICE_SPEED)


def _check_vocabulary(draft: OpenedModel, target: OpenedModel) -> None:
    """Every token the same bytes. How far a model's matrices go on behind the last token does not matter."""

    def piece(opened: OpenedModel, token: int) -> bytes:
        tokenizer = opened.tokenizer
        return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""

    for token in range(max(draft.tokenizer.vocab_size, target.tokenizer.vocab_size)):
        theirs, ours = (piece(opened, token) for opened in (draft, target))
        if ours != theirs:
            raise ValueError(
                f"draft={str(draft.path)!r}: token {token} is {theirs or 'not used'!r}, "
                f"in the model {ours or 'not used'!r}; a draft model must have the vocabulary of its model"
            )


class DraftModel:
    """A Drafter. `price`: what a token of the draft model costs, in steps of the model that is drafted for.

    `cache_tok`: tokens of finished requests that stay in memory for others that begin alike, at most `n_ctx`.
    """

    def __init__(self, model: Any, n_ctx: int, price: float, costs: RowCosts = FROM_MEMORY, cache_tok: int = 0) -> None:
        self._model = model
        self._n_ctx = n_ctx
        self._cache = PrefixCache(model, min(cache_tok, n_ctx))
        self._most_pages = MOST_CONTEXTS * -(-n_ctx // model.PAGE_TOK)
        self._price = price
        self._costs = costs
        self._warned = False

    def draft(self, requests: Sequence[Request], n_other: int, room: int) -> list[list[int]]:
        """As Drafter says. Makes as many steps of the draft model as the longest guess has tokens."""
        budget = Budget(len(requests), n_other, room, self._costs)
        jobs = []
        for request in requests:
            try:
                jobs.append(_Job(request, self._follower(request), 0))
            except Exception as error:  # no memory, say
                self._give_up(request, error)
        for job in jobs:
            job.n = self._wanted(job, budget)
        going = self._catch_up([job for job in jobs if job.n])
        while going:
            going = self._guess(going)
        drafts = {job.request: job.draft for job in jobs}
        return [drafts.get(request, []) for request in requests]

    def forget(self, request: Request) -> None:
        """The request leaves: what was read of it goes to the cache."""
        follower, request.drafting = request.drafting, None
        if follower is not None:
            self._cache.park(follower.sequence)

    # -------------------------------------------------------------------------------- one request

    def _follower(self, request: Request) -> _Follower:
        """The request's, cut back to what it has in common with the text; learns how the last guesses went."""
        if request.drafting is None:
            found = self._cache.find(request.prompt, ())
            sequence = self._cache.take(found) or self._model.sequence()
            sequence.prompt_len = len(request.prompt)
            request.drafting = _Follower(sequence, found.n)
        follower: _Follower = request.drafting
        guesses, follower.guesses = follower.guesses, []
        n = follower.n_known
        for guess, token in zip(guesses, request.tokens(n, n + len(guesses)), strict=False):
            follower.rate.learn(guess == token)
            if guess != token:
                break
            n += 1
        n_past: int = follower.sequence.n_past
        n = min(n, n_past, request.n_tok - 1)  # the last guess was not fed; the text's last token must be
        if n < n_past:
            follower.sequence.truncate(n)
        follower.n_known = n
        return follower

    def _wanted(self, job: _Job, budget: Budget) -> int:
        """How many tokens to guess: what is worth it; after a rest that is seen anew."""
        request, follower = job.request, job.follower
        most = min(request.room_for_draft, self._n_ctx - request.n_tok, MAX_DRAFT_TOK)
        if follower.resting:
            follower.resting -= 1
            if follower.resting:
                return 0
            follower.rate = Rate(_SECOND_CHANCE, 1.0, _MEMORY_TOK)
        n = budget.take(repeat(follower.rate.value), most, self._price)
        if n > 1:
            follower.next_rest = _FIRST_REST
        elif not n and most > 0:
            follower.resting = follower.next_rest
            follower.next_rest = min(2 * follower.next_rest, _LONGEST_REST)
        return n

    def _give_up(self, request: Request, error: Exception) -> None:
        request.may_draft = False
        if not self._warned:
            self._warned = True
            try:
                warnings.warn(f"the draft model stops guessing for a request: {error}", RuntimeWarning, stacklevel=2)
            except RuntimeWarning as warning:  # python -W error: it would end a request, and perhaps somebody else's
                print(f"RuntimeWarning: {warning}", file=sys.stderr)

    # -------------------------------------------------------------------------------- steps of the draft model

    def _catch_up(self, jobs: list[_Job]) -> list[_Job]:
        """Feeds what the text has got since, in one step, and takes the first guess of those that are then up to date.

        Of a long prompt that is a part; the others wait for the next time, so that nobody waits long for this.
        """
        room: int = self._model.max_batch_tok
        chosen, items = [], []
        n_pages = 0  # that these may need, also a copy of a half full one
        for job in jobs:
            n, n_text = job.follower.n_known, job.request.n_tok
            end = min(n_text, n + room)
            more = -(-(end + MAX_DRAFT_TOK) // self._model.PAGE_TOK) - n // self._model.PAGE_TOK
            if n < end and self._has_room(n_pages + more):
                n_pages += more
                room -= end - n
                chosen.append((job, end))
                tokens = job.request.tokens(n, end)
                items.append((job.follower.sequence, tokens, job.request.sampler if end == n_text else None, "none", 0))
        going = []
        results = self._step([job for job, _ in chosen], items)
        for (job, end), result in zip(chosen, results, strict=True):
            if result is not None:
                job.follower.n_known = end
                if result.samples and self._add(job, result.token):
                    going.append(job)
        return going

    def _has_room(self, n_pages: int) -> bool:
        """Whether so many more pages are within the bound; finished requests make room for running ones."""
        most = self._most_pages - n_pages
        return self._model.pages_in_use <= most or (self._cache.clear() and self._model.pages_in_use <= most)

    def _guess(self, jobs: list[_Job]) -> list[_Job]:
        """One more guess for each; those that want yet another."""
        items = [(job.follower.sequence, job.draft[-1:], job.request.sampler, "none", 0) for job in jobs]
        results = self._step(jobs, items)
        return [
            job
            for job, result in zip(jobs, results, strict=True)
            if result is not None and self._add(job, result.token)
        ]

    @staticmethod
    def _add(job: _Job, token: int) -> bool:
        """Takes a guess; True when the next one is wanted. What comes after an end is of no use."""
        if token in job.request.end_ids:
            return False
        job.follower.guesses.append(token)
        job.draft.append(token)
        return len(job.draft) < job.n

    def _step(self, jobs: list[_Job], items: list[Any]) -> list[Any]:
        """The results; None for those whose part of the step fails, which guess no more."""
        if not items:
            return []
        try:
            return list(self._model.step(items))
        except Exception as error:  # nothing has changed; a part gives alone what it gives among others
            if len(items) == 1:
                self._give_up(jobs[0].request, error)
                return [None]
            return [self._step([job], [item])[0] for job, item in zip(jobs, items, strict=True)]
