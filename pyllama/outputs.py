"""What a request gives back: plain frozen records. No logic beyond simple ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Usage:
    """Tokens read and written. `completion_tokens` counts the token that ended the reply.

    `cached_tokens` of the prompt's were not computed, because an earlier or a running request began alike.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Wall time of one request, as its caller saw it: neighbours in the batch slow it down.

    `prompt_s` runs from the first step to the first token; `decode_s` from the first token to the last.
    `prompt_tok` are the tokens that were computed in `prompt_s` (what was in a cache is not). With speculation,
    `draft_n` tokens were guessed and `draft_n_accepted` of them came true, each of which saved a step.
    """

    prompt_s: float
    decode_s: float
    prompt_tok: int
    decode_tok: int
    draft_n: int = 0
    draft_n_accepted: int = 0

    @property
    def prompt_tok_per_s(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tok / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens per second after the first one; 0 for a reply of one token."""
        return self.decode_tok / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Logprob:
    """A token and its natural log-probability, under the distribution before temperature and limits."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token's log-probability, and the likeliest tokens at that place, best first."""

    token_id: int
    token: str
    logprob: float
    top: tuple[Logprob, ...] = ()


class Piece(NamedTuple):
    """One step of a stream. Exactly one per token; `text` is empty while a character or a stop string is incomplete."""

    text: str
    token_id: int
    finish_reason: FinishReason | None = None  # set on the last piece
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished reply. `token_ids` has every sampled token, also the one that ended the reply and has no text."""

    text: str
    token_ids: list[int]
    finish_reason: (
        FinishReason  # "stop": the model's end, a stop string or token; "length": max_tokens or the context's end
    )
    usage: Usage
    timings: Timings
    seed: int
    prompt_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
