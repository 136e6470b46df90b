"""From sampled tokens to text: one `Reply` per request, fed by the owner of the request after every step.

Streaming and waiting use the same code, so the pieces of a stream joined are the text of `generate`, by construction.
Nothing here runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .outputs import FinishReason, Logprob, Piece, RequestOutput, Timings, TokenLogprobs, Usage
from .scheduler import Request


class StopMatcher:
    """Finds the first stop string in a growing text, and holds back what could be the beginning of one.

    The result depends on the text alone, not on how it is cut into pushes, except that a text is searched as far as
    it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Adds text; returns what is certain to precede any stop string. After a match nothing more comes."""
        if not self._stops:
            return text
        if self.matched:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.matched = True
            self._held = ""
            return text[: min(places)]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text ends here: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a beginning of `stop`, and shorter than it."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0


class Reply:
    """The text side of one request. Used by one thread at a time."""

    def __init__(self, request: Request, tokenizer: Any, *, stop: Sequence[str], logprobs: bool, seed: int) -> None:
        self.request = request
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._matcher = StopMatcher(stop)
        self.has_stops = bool(stop)
        self._with_logprobs = logprobs
        self._seed = seed
        self.pieces: list[Piece] = []
        self.finish_reason: FinishReason | None = None

    def has_news(self) -> bool:
        """True when `take` has something to return or to raise."""
        request = self.request
        return len(request.results) > len(self.pieces) or request.done or request.error is not None

    def is_through(self) -> bool:
        """True when the reply is finished. Reads text only if that could end it. Raises what stopped the request."""
        request = self.request
        if self.has_stops or request.done or request.error is not None:
            self.take()
        return self.finish_reason is not None

    def take(self) -> list[Piece]:
        """The pieces of all tokens sampled since the last call. Raises what stopped the request, if anything did."""
        first = len(self.pieces)
        for result in self.request.results[first:]:
            self.pieces.append(self._next(result))
            if self.finish_reason is not None:
                self.request.done = True  # for a stop string, which the scheduler cannot see
                break
        if self.finish_reason is None and self.request.error is not None:
            raise self.request.error
        return self.pieces[first:]

    def _next(self, result: Any) -> Piece:
        token = result.token
        ended = token in self.request.end_ids
        full = len(self.pieces) + 1 >= self.request.limit
        text = "" if ended else self._matcher.push(self._decoder.push(token))
        if (ended or full) and not self._matcher.matched:
            text += self._matcher.push(self._decoder.flush())
            if not self._matcher.matched:
                text += self._matcher.flush()
        if ended or self._matcher.matched:
            self.finish_reason = "stop"
        elif full:
            self.finish_reason = "length"
        return Piece(text, token, self.finish_reason, self._logprobs(result) if self._with_logprobs else None)

    def _logprobs(self, result: Any) -> TokenLogprobs:
        def text(token: int) -> str:
            return str(self._tokenizer.decode([token], skip_special=False))

        top = tuple(Logprob(token, text(token), logprob) for token, logprob in result.top_logprobs)
        return TokenLogprobs(result.token, text(result.token), result.logprob, top)

    def output(self) -> RequestOutput:
        """The finished reply."""
        if self.finish_reason is None:
            raise RuntimeError("the reply is not finished")
        request = self.request
        n = len(self.pieces)
        timings = Timings(
            prompt_s=request.first_s - request.start_s,
            decode_s=request.last_s - request.first_s,
            prompt_tok=len(request.prompt) - request.n_reused,
            decode_tok=n - 1,
            draft_n=request.n_drafted,
            draft_n_accepted=request.n_accepted,
        )
        return RequestOutput(
            text="".join(piece.text for piece in self.pieces),
            token_ids=[piece.token_id for piece in self.pieces],
            finish_reason=self.finish_reason,
            usage=Usage(len(request.prompt), completion_tokens=n, cached_tokens=request.n_reused),
            timings=timings,
            seed=self._seed,
            prompt_token_ids=request.prompt.tolist(),
            logprobs=[piece.logprobs for piece in self.pieces if piece.logprobs] if self._with_logprobs else None,
        )
