"""Runs requests as sequences of the model: who goes into which step, and which thread makes it.

There is no thread of our own. Threads that wait for tokens take turns as the *driver*: the driver makes steps for
everybody's requests, and hands over after each if somebody waits. New requests join at the next step (their prompts in
chunks that share a step with the decoding ones), finished ones leave. Results never depend on neighbours: the engine
promises the same bits for any batch and chunking, and random numbers are keyed by (seed, position).

Ctrl-C may strike wherever Python looks for it (after calls, in loops), so every change of shared state is a single
atomic operation (append, remove, one assignment), and what the engine did in an interrupted step is undone by
truncating to what was recorded.

Beginnings are computed once: a request takes over what a finished or running one has of its prompt
(prefix_cache.py), and waits a few steps where another is just reading the same beginning.

Nothing here knows text: stop strings and decoding are the owner's (llm.py), who reads `Request.results`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .common.errors import PyllamaError
from .prefix_cache import PrefixCache, common_prefix
from .speculative import Drafter

Item = tuple[Any, Any, Any, str, int]  # of a step: sequence, tokens, sampler, logits wanted, n_draft

MAX_SEQUENCES = 64  # requests in one step; the others wait for their turn
_MOST_MORE = 15  # steps that a call adds to the first, where nobody looks before the end
_LOOKS_TO_REST = 8  # so many looks for a guess in vain let a call make one more step without a look
_LOGITS_CHUNK_TOK = 64  # rows of logits per step: 64 rows of a 128k vocabulary are 33 MB
_RECHECK_S = 0.1  # a waiting thread looks again after this, should a wake-up have been lost to Ctrl-C


class Request:
    """One text on its way through the model. The driver writes `n_fed` and `results`; the owner reads them.

    `prompt`: int32 [n], n >= 1. `limit`: tokens to sample at most. With `sampler` None, every chunk's logits are
    recorded instead. `sequence` hands in a cache to go on with, if none is found that has more in common with the
    prompt; with `keep_sequence` the request still has its sequence when it is through. `watched` may be taken back by
    an owner that does not look at the tokens before the last one: several of them may then come at once.
    """

    def __init__(
        self,
        prompt: NDArray[np.int32],
        *,
        sampler: Any = None,
        limit: int = 0,
        end_ids: Collection[int] = (),
        sequence: Any = None,
        keep_sequence: bool = False,
    ) -> None:
        self.prompt = prompt
        self.sampler = sampler
        self.limit = limit
        self.end_ids = end_ids
        self.sequence = sequence
        self.keep_sequence = keep_sequence
        self.watched = True
        self.waits_for: tuple[Request, int] | None = None  # who is about to read how much of a common beginning
        self.started = False
        self.n_reused = 0  # tokens of the prompt that were in a cache already
        self.n_fed = 0  # tokens of the prompt that are in the cache
        self.results: list[Any] = []  # a Sample per sampled token (for logits: a StepResult per chunk)
        self.decoding = False  # the prompt is through, a token was sampled
        self.last_token = -1  # that one
        self.done = False  # nothing more to compute; may be set by the owner (a stop string)
        self.error: BaseException | None = None
        self.start_s = self.first_s = self.last_s = 0.0
        self.drafting: Any = None  # the drafter's, of this request
        self.may_draft = True
        self.n_drafted = self.n_accepted = 0

    @property
    def n_held(self) -> int:
        """Tokens that the sequence holds after the recorded steps."""
        if self.sampler is None:
            return sum(len(result.logits) for result in self.results)
        if not self.results:
            return self.n_fed
        return len(self.prompt) + len(self.results) - 1

    @property
    def wants_step(self) -> bool:
        """True while there is something to compute."""
        return not (self.done or self.error is not None)

    def begin(self, model: Any) -> None:
        """Starts with what the sequence already holds of the prompt, or with a new one."""
        if self.sequence is None:
            self.sequence = model.sequence()
        self.n_fed = self.n_reused = self.n_at_hand
        self.sequence.truncate(self.n_fed)
        self.sequence.prompt_len = len(self.prompt)
        self.start_s = time.perf_counter()
        self.started = True

    @property
    def n_at_hand(self) -> int:
        """Tokens of the prompt that the sequence holds before the start; the last one must be fed to get logits."""
        if self.sequence is None or self.sampler is None:
            return 0
        return min(common_prefix(self.sequence.tokens, self.prompt), len(self.prompt) - 1)

    def common_prefix(self, prompt: NDArray[np.int32]) -> int:
        """Length of the beginning that this text, as far as it is known, has in common with a prompt."""
        n = common_prefix(self.prompt, prompt)
        if n == len(self.prompt) < len(prompt) and self.results:
            return common_prefix(self.sequence.tokens, prompt)
        return n

    @property
    def n_tok(self) -> int:
        """Tokens of prompt and reply."""
        return len(self.prompt) + len(self.results)

    def tokens(self, start: int, end: int) -> list[int]:
        """Those tokens of prompt and reply, as far as they are known."""
        n = len(self.prompt)
        prompt: list[int] = self.prompt[start:end].tolist() if start < n else []
        return prompt + [result.token for result in self.results[max(start - n, 0) : max(end - n, 0)]]

    @property
    def room_for_draft(self) -> int:
        """Tokens that a draft may have: the one sampled after the last of them is within the limit."""
        return self.limit - len(self.results) - 1

    def next_item(self, room: int, draft: Sequence[int] = ()) -> Item:
        """Its part of the next step: the last sampled token and a draft, or at most `room` tokens of the prompt."""
        if self.decoding:
            return self.sequence, [self.last_token, *draft], self.sampler, "none", len(draft)
        start = self.n_held
        if self.sampler is None:
            return self.sequence, self.prompt[start : start + min(room, _LOGITS_CHUNK_TOK)], None, "all", 0
        chunk = self.prompt[start : start + room]
        is_last = start + len(chunk) == len(self.prompt)
        return self.sequence, chunk, self.sampler if is_last else None, "none", 0

    def settle(self, n_tok: int, n_draft: int, result: Any, now: float) -> None:
        """Records a step's outcome by exactly one atomic change of what `n_held` counts."""
        if self.sampler is not None and not self.results:
            if self.n_fed + n_tok < len(self.prompt):
                self.n_fed += n_tok
                return
            self.first_s = now
        self.last_s = now
        if self.sampler is None:
            self.results.append(result)
        else:
            self.results.extend(result.samples)
        if n_draft:
            self.n_drafted += n_draft
            self.n_accepted += len(result.samples) - 1
        self.check_done()

    def check_done(self) -> None:
        """Learns where it stands from what is recorded."""
        if self.sampler is None:
            self.done = self.done or self.n_held == len(self.prompt)
        elif self.results:
            self.last_token = token = self.results[-1].token
            self.decoding = True
            self.done = self.done or len(self.results) >= self.limit or token in self.end_ids


class _Chore:
    """Something to be done between two steps."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.done = False


class Scheduler:
    """Owns the model's steps. All methods may be called from any thread.

    `cache_tok`: tokens whose keys and values stay in memory after their request, for others that begin alike; 0 for
    none, then every request computes all of its prompt. `drafter` guesses tokens; None for plain decoding.
    """

    def __init__(
        self, model: Any, max_sequences: int = MAX_SEQUENCES, cache_tok: int = 0, drafter: Drafter | None = None
    ) -> None:
        self._model = model
        self._cache = PrefixCache(model, cache_tok) if cache_tok else None
        self._drafter = drafter
        self._guessless = 0  # looks for a guess in vain, since the last one that found something or the last newcomer
        self._max_sequences = max_sequences
        self._max_batch_tok: int = model.max_batch_tok
        self._requests: list[Request] = []  # in order of arrival
        self._lock = Lock()  # guards the choice of the driver only
        self._driver: object | None = None
        self._gates: deque[Any] = deque()  # one closed lock per waiting thread
        self._chores: deque[_Chore] = deque()
        self._dirty = False  # a step was begun whose outcome is not all recorded
        self._leftovers = False  # finished requests may still be in the list
        self._closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests. Their owner must `advance` them and finally `release` them."""
        if self._closed:
            raise ValueError("this LLM is closed")
        self._requests.extend(requests)
        self._guessless = 0
        self._hurry()

    def advance(self, has_news: Callable[[], bool]) -> None:
        """Returns as soon as `has_news()`: by driving steps, or by waiting for the thread that does."""

        def steps() -> None:
            self._step()
            while not (self._gates or has_news()):  # nobody waits for the turn: it is kept
                self._step()

        while not has_news():
            if not self._drive(steps):
                self._wait(has_news)

    def release(self, requests: Sequence[Request]) -> None:
        """The owner is through with these (finished or not): their pages are freed as soon as no step uses them."""
        for request in requests:
            request.done = True
        self._leftovers = True
        self._tidy()

    def run_alone(self, action: Callable[[], None]) -> None:
        """Has `action` called while no step is running: here, or by the thread that drives, before its next step.

        It must not raise, and may be called twice should Ctrl-C strike.
        """
        chore = _Chore(action)
        self._chores.append(chore)
        self._hurry()
        while not chore.done:
            if not self._drive(self._do_chores):
                self._wait(lambda: chore.done)

    def _hurry(self) -> None:
        """Something new has come: a call of many steps that is under way shall end with the next."""
        model = self._model
        if model is not None:
            model.hurry()

    def close(self) -> None:
        """Fails what is still running, frees every sequence and lets go of the model."""
        self._closed = True

        def shut() -> None:
            self._fail_all(PyllamaError("the LLM was closed while this request was running"))
            self._purge()
            if self._cache is not None:
                self._cache.clear()
            self._model = self._drafter = self._cache = None

        self.run_alone(shut)

    # -------------------------------------------------------------------------------- whose turn it is

    def _drive(self, action: Callable[[], None]) -> bool:
        """Calls `action` as the driver and returns True, or returns False because there is another driver."""
        if not self._take_turn(action):
            return False
        if self._leftovers:
            self._tidy()
        return True

    def _tidy(self) -> None:
        # Whoever drives meanwhile looks at _leftovers after leaving, so nothing is forgotten when this finds a driver.
        while self._leftovers and self._take_turn(self._purge):
            pass

    def _take_turn(self, action: Callable[[], None]) -> bool:
        me = object()
        try:
            with self._lock:
                if self._driver is None:
                    self._driver = me
            if self._driver is not me:
                return False
            action()
        finally:
            if self._driver is me:
                self._driver = None
                self._wake()
        return True

    def _wait(self, has_news: Callable[[], bool]) -> None:
        gate = Lock()
        gate.acquire()
        self._gates.append(gate)
        if self._driver is not None and not has_news():
            gate.acquire(timeout=_RECHECK_S)

    def _wake(self) -> None:
        while self._gates:
            try:
                self._gates.popleft().release()
            except IndexError:  # another thread took the last one
                return

    # -------------------------------------------------------------------------------- the driver's work

    def _do_chores(self) -> None:
        while self._chores:
            chore = self._chores[0]
            if not chore.done:
                chore.action()
                chore.done = True
            self._chores.popleft()

    def _purge(self) -> None:
        self._leftovers = False
        for request in [r for r in self._requests if not r.wants_step]:
            if self._drafter is not None:
                self._drafter.forget(request)
            if request.sequence is not None and not request.keep_sequence:
                self._retire(request)
            self._requests.remove(request)

    def _retire(self, request: Request) -> None:
        """Frees the pages of a request that is through, or parks them for the next one that begins alike."""
        sequence, request.sequence = request.sequence, None
        if self._cache is None or request.error is not None or request.sampler is None:
            sequence.close()
        else:
            self._cache.park(sequence)

    def _resync(self) -> None:
        """After a step that was cut short: every sequence back to what is recorded of it."""
        for request in self._requests:
            if request.started and request.wants_step:  # the others leave; a kept sequence is cut when it is next used
                request.check_done()
                if request.sequence.n_past > request.n_held:
                    request.sequence.truncate(request.n_held)
        self._dirty = False

    def _choose(self) -> tuple[list[Request], list[Request]]:
        """Who takes part in the next step: those that decode, and those that read their prompts. New ones are begun."""
        if not all(request.wants_step for request in self._requests):
            self._purge()
        # The list is looked at once, and then who ended: an owner who ends a conversation's request and submits the
        # next (Session.stream) never finds both in one step, whenever that is.
        wanting = [request for request in self._requests[:] if request.wants_step]
        decoding: list[Request] = []
        reading: list[Request] = []
        for request in wanting[: self._max_sequences]:
            if not request.started:
                try:
                    self._begin(request)
                except Exception as error:  # no memory for its tokens, say: that is its own misfortune
                    request.error = error
            if request.decoding:
                decoding.append(request)
            elif request.started:
                reading.append(request)
        return decoding, reading

    def _begin(self, request: Request) -> None:
        """Starts a request with what is computed of its prompt, or leaves it waiting for one that is computing that."""
        if self._cache is not None and request.sampler is not None:
            if request.waits_for is not None and self._is_coming(*request.waits_for):
                return
            n_at_hand = request.n_at_hand
            running = [r for r in self._requests if r.started and r.wants_step]
            found = self._cache.find(request.prompt, running)
            request.waits_for = self._better_soon(request, max(n_at_hand, found.n), running)
            if request.waits_for is not None:
                return
            if found.n > n_at_hand:
                replaced, request.sequence = request.sequence, self._cache.take(found)
                if replaced is not None:
                    self._cache.park(replaced)
        request.begin(self._model)

    @staticmethod
    def _is_coming(reader: Request, n: int) -> bool:
        return reader.wants_step and reader.n_held < n

    def _better_soon(self, request: Request, n_now: int, running: list[Request]) -> tuple[Request, int] | None:
        """The running request that is about to read much more of the same beginning than there is, and how much.

        Who has started keeps its place until it is through and waits for nobody: nobody waits in vain or in a circle.
        """
        best = None
        longest = n_now + self._model.PAGE_TOK - 1  # for less, waiting for a step costs more than it saves
        for reader in running:
            n = min(reader.common_prefix(request.prompt), len(request.prompt) - 1)
            if n > longest and self._is_coming(reader, n):
                best = (reader, n)
                longest = n
        return best

    def _plan(self) -> tuple[list[Request], list[Item]]:
        """Lays out the next step: a token of every decoding request, then chunks of prompts in order of arrival."""
        decoding, reading = self._choose()
        drafts = {} if self._drafter is None else self._drafts(decoding, reading)
        room = self._max_batch_tok
        members: list[Request] = []
        items: list[Item] = []
        for request in decoding + reading:
            if room <= 0:
                break
            item = request.next_item(room, drafts.get(request, ()))
            room -= len(item[1])
            members.append(request)
            items.append(item)
        return members, items

    def _n_more(self, members: list[Request]) -> int:
        """How many steps the engine may add by itself: none if anybody wants a say, or a look, before the next one."""
        if len(members) < min(len(self._requests), self._max_sequences):
            return 0
        n = _MOST_MORE if self._drafter is None else min(_MOST_MORE, self._guessless // _LOOKS_TO_REST)
        for request in members:
            if request.watched or not request.decoding:
                return 0
            n = min(n, request.limit - len(request.results) - 1)
        return n

    def _drafts(self, decoding: list[Request], reading: list[Request]) -> dict[Request, list[int]]:
        """What to guess, in rows that nobody else needs. A guess stops before a token that would end the text."""
        assert self._drafter is not None
        drafts: dict[Request, list[int]] = {}
        n_other = sum(len(r.prompt) - r.n_held for r in reading)
        room = self._max_batch_tok - n_other - len(decoding)
        able = [r for r in decoding if r.may_draft]
        if room <= 0 or not able:
            return drafts
        for request, draft in zip(able, self._drafter.draft(able, n_other, room), strict=True):
            if draft:
                n = next((i for i, token in enumerate(draft) if token in request.end_ids), len(draft))
                drafts[request] = draft[: min(n, request.room_for_draft, room)]
                room -= len(drafts[request])
        self._guessless = 0 if drafts else self._guessless + 1
        return drafts

    def _step(self) -> None:
        if self._chores:
            self._do_chores()
        if self._closed:
            self._fail_all(PyllamaError("the LLM was closed while this request was running"))
        if self._dirty:
            self._resync()
        members, items = self._plan()
        if not items:
            return
        self._dirty = True
        try:
            results = self._model.step(items, self._n_more(members))
        except Exception as error:
            if isinstance(error, MemoryError) and self._cache is not None and self._cache.clear():
                return  # the step has changed nothing: it is made again, with what the cache has given back
            if len(members) == 1 and not items[0][-1]:
                members[0].error = error
            else:
                self._step_apart(members, items)
            return
        now = time.perf_counter()
        for request, item, result in zip(members, items, results, strict=True):
            request.settle(len(item[1]), item[-1], result, now)
        self._dirty = False

    def _step_apart(self, members: list[Request], items: list[Item]) -> None:
        """After a step that failed: each member's part of it alone, so that only the one to blame gets an error.

        A step that raises has changed no sequence, and a part gives alone what it gives among others. Drafts are left
        out, now and later: a guess must not fail what it was for.
        """
        for request, (sequence, tokens, sampler, wanted, n_draft) in zip(members, items, strict=True):
            if n_draft:
                request.may_draft = False
                tokens = tokens[:-n_draft]
            try:
                (result,) = self._model.step([(sequence, tokens, sampler, wanted, 0)])
            except Exception as error:
                request.error = error
            else:
                request.settle(len(tokens), 0, result, time.perf_counter())

    def _fail_all(self, error: Exception) -> None:
        for request in list(self._requests):
            if request.wants_step:
                request.error = error
