"""Drafts: guesses of the tokens to come, which a step verifies all at once (csrc/model/forward.h).

A draft never changes a result, only how many tokens a step yields: the step samples after each row as plain decoding
would, with the same random number for the same position, and stops where the guess was wrong. What is decided here is
what to guess, and how much of it is worth its cost: rows of a step are cheap, not free. The policy is a function of
tokens alone, no clock is in it.

Knows no steps and no text; scheduler.py asks for drafts and feeds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from .scheduler import Request

MAX_DRAFT_TOK = 15  # sixteen rows with the token before them: what a tile unit takes at once
_NGRAMS = (4, 2)  # lengths of the endings that are looked up, the longest first; 3 beside them gains nothing

_CACHED_MODEL_BYTES = 256_000_000  # weights below this come from the caches rather than from memory

# Shares of guesses that come true, before anything is known, by the length of what matched (0…3, 4…7, 8…15, 16…).
_PRIOR_CHANCES = (0.05, 0.25, 0.5, 0.6, 0.75, 0.9, 0.95)
_PRIOR_WEIGHT = 6.0  # tries that the prior counts for
_MEMORY_TOK = 48.0  # tries that are remembered


class RowCosts(NamedTuple):
    """The price of one more row in steps of one row: up to 4 rows, up to 8, beyond (docs/KERNELS.md has the figures).

    The lengths that follow change little when it is wrong by half.
    """

    few: float
    some: float
    many: float

    def of(self, row: int) -> float:
        """What the row with this number (0 is the first) adds to a step."""
        return self.few if row < 4 else self.some if row < 8 else self.many


FROM_MEMORY = RowCosts(0.06, 0.08, 0.1)  # while weights arrive, there is time to compute
FROM_CACHES = RowCosts(0.11, 0.16, 0.18)
# The same on a CUDA device, where 8 rows are one operand of the tensor cores. Longer steps take other kernels, which
# round otherwise, and are not recorded: guesses never make one. The small prices are reckoned, not measured.
_NEVER = 1e9
ON_DEVICE = RowCosts(0.02, 0.02, _NEVER)


def row_costs(step_bytes: int, device_share: float = 0.0) -> RowCosts:
    """The prices for a model that reads so many bytes in a step; `device_share`: of its layers on a CUDA device."""
    if device_share == 1:
        return ON_DEVICE
    costs = FROM_CACHES if step_bytes < _CACHED_MODEL_BYTES else FROM_MEMORY
    return costs._replace(many=_NEVER) if device_share else costs


class Budget:
    """Hands out the rows of one step to drafts, so that the step yields the most tokens for what it costs.

    `n_sure`: requests that get a token in any case, a row each. `n_other`: rows of prompts in the same step. `room`:
    rows that drafts may take at most.
    """

    def __init__(self, n_sure: int, n_other: int, room: int, costs: RowCosts = FROM_MEMORY) -> None:
        self._costs = costs
        self._gain = float(n_sure)
        self._cost = 1.0 + sum(costs.of(row) for row in range(1, n_sure))
        self._row = n_sure + n_other
        self._room = room

    def take(self, chances: Iterable[float], most: int, extra: float = 0.0) -> int:
        """How many tokens to draft for one request, `most` at most.

        `chances`: the chance of each drafted token, given that those before it are right. `extra`: what drafting it
        costs beside its row, in steps of one row. A token is worth its price when the chance that it counts, by its
        price, is above what the step gives for its cost so far.
        """
        n, reached = 0, 1.0
        for chance in chances:
            reached *= chance
            price = self._costs.of(self._row) + extra
            if n >= most or not self._room or reached * self._cost <= price * self._gain:
                break
            self._gain += reached
            self._cost += price
            self._row += 1
            self._room -= 1
            n += 1
        return n


class Rate:
    """How often guesses came true, of late: a mean that begins as `value`, as if seen in `tries` tries."""

    def __init__(self, value: float, tries: float, memory: float) -> None:
        self.value = value
        self._tries = tries
        self._memory = memory  # tries that count; older ones fade

    def learn(self, hit: bool) -> None:
        """One more try."""
        self._tries = min(self._tries + 1.0, self._memory)
        self.value += (hit - self.value) / self._tries


class Chances:
    """How often guesses came true, by the length of what they rest on; learned from all guesses, fed or not."""

    def __init__(self) -> None:
        self._rates = [Rate(chance, _PRIOR_WEIGHT, _MEMORY_TOK) for chance in _PRIOR_CHANCES]

    @staticmethod
    def _place(length: int) -> int:
        return length if length < 4 else min(length.bit_length() + 1, 6)

    def learn(self, length: int, hit: bool) -> None:
        """A guess that rested on `length` matching tokens was right, or not."""
        self._rates[self._place(length)].learn(hit)

    def following(self, length: int) -> Iterator[float]:
        """The chances of the first guess after `length` matching tokens, of the next, and so on."""
        for n in range(length, length + MAX_DRAFT_TOK):
            yield self._rates[self._place(n)].value


class Lookup:
    """Guesses that a text goes on as it did after the most recent earlier place that reads the same.

    While the text follows such a place, the place moves along; where it departs, the ending is looked up anew. Every
    token costs a few dictionary operations, whatever the length of the text.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._after: list[dict[tuple[int, ...], int]] = []  # per length of ending: ending -> place of what follows it
        for n in _NGRAMS:
            endings = zip(*(self._tokens[i:] for i in range(n)), strict=False)
            table = dict(zip(endings, range(n, len(self._tokens)), strict=False))  # the latest place stays
            self._after.append(table)
        self._chances = Chances()
        self._next, self._length = self._find()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def knows(self) -> bool:
        """True when there is something to guess from."""
        return self._next > 0

    def push(self, token: int) -> None:
        """The text goes on with this token."""
        tokens, place, end = self._tokens, self._next, len(self._tokens)
        hit = place > 0 and tokens[place] == token
        if place:
            self._chances.learn(self._length, hit)
        for n, table in zip(_NGRAMS, self._after, strict=True):
            if end >= n:
                table[tuple(tokens[-n:])] = end
        tokens.append(token)
        if hit:
            self._next, self._length = place + 1, self._length + 1
        else:
            self._next, self._length = self._find(place, self._length)

    def _find(self, departed: int = 0, length: int = 0) -> tuple[int, int]:
        """Place of the next guess and the length of what matches before it; place 0 for none.

        Where nothing is found, the text goes on as if the token at `departed` had been exchanged for another: after a
        match of some `length` that counts as 1, after an exchange as 0.
        """
        for n, table in zip(_NGRAMS, self._after, strict=True):
            place = table.get(tuple(self._tokens[-n:]), 0)
            if place:
                return place, n
        return (departed + 1, min(length // 2, 1)) if departed else (0, 0)

    def draft(self, budget: Budget, most: int) -> list[int]:
        """At most `most` tokens that are worth guessing in the step that `budget` is of."""
        if not self._next:
            return []
        n = budget.take(self._chances.following(self._length), most)
        draft = self._tokens[self._next : self._next + n]
        while len(draft) < n:  # what is copied reaches into the copy
            draft += draft[: n - len(draft)]
        return draft


class Drafter(Protocol):
    """What the scheduler asks for drafts. Results never depend on it."""

    def draft(self, requests: Sequence[Request], n_other: int, room: int) -> list[list[int]]:
        """A guess for each of these decoding requests, perhaps empty; at most `room` tokens in all.

        `n_other`: rows of prompts in the same step.
        """

    def forget(self, request: Request) -> None:
        """The request leaves: what is kept of it is freed. Called between steps."""


class LookupDrafter:
    """Prompt lookup for every request by itself; costs no memory but an index of each text."""

    def __init__(self, costs: RowCosts = FROM_MEMORY) -> None:
        self._costs = costs

    def draft(self, requests: Sequence[Request], n_other: int, room: int) -> list[list[int]]:
        """As Drafter says."""
        lookups = [self._of(request) for request in requests]
        if not any(lookup.knows for lookup in lookups):
            return [[] for _ in requests]
        budget = Budget(len(requests), n_other, room, self._costs)
        drafts = zip(requests, lookups, strict=True)
        return [lookup.draft(budget, request.room_for_draft) for request, lookup in drafts]

    @staticmethod
    def _of(request: Request) -> Lookup:
        if request.drafting is None:
            request.drafting = Lookup(request.prompt.tolist())
        lookup: Lookup = request.drafting
        for token in request.tokens(len(lookup), request.n_tok):
            lookup.push(token)
        return lookup

    def forget(self, request: Request) -> None:
        """The request leaves."""
        request.drafting = None
