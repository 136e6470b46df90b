"""A tiny random model as a whole `LLM`: tokens are bytes, so that texts, half characters and stop strings can be tested
on the real engine in milliseconds. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyllama.llm import LLM
from pyllama.open import OpenedModel
from pyllama.tokenizer import StreamDecoder
from pyllama.tokenizer.detokenizer import TokenTable, decode

from .helpers_models import Kind, Shape, small_model

BOS, EOS, FIRST_BYTE = 0, 1, 2
VOCAB = 258


class ByteTokenizer:
    """Token FIRST_BYTE + b is byte b."""

    bos_id = BOS
    eos_ids = (EOS,)
    vocab_size = VOCAB

    def __init__(self) -> None:
        self.table = TokenTable([b"<s>", b"</s>", *(bytes([b]) for b in range(256))], frozenset({BOS, EOS}))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return [BOS] * add_special + [FIRST_BYTE + b for b in text.encode()]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return decode(self.table, ids, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        return self.table.pieces[token_id]

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        return StreamDecoder(self.table, skip_special)


def tiny_model(
    *,
    kind: Kind | None = None,
    generation_config: dict[str, Any] | None = None,
    max_seq_len: int = 256,
    vocab_size: int = VOCAB,
    eos: list[int] | None = None,
    seed: int = 5,
) -> OpenedModel:
    """A random model of two layers over bytes. `eos`: the config's; the tokenizer's own is EOS."""
    shape = Shape(
        dim=32, hidden_dim=48, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=vocab_size, max_seq_len=max_seq_len
    )
    made = small_model(shape, kind or Kind("q8", 32), seed=seed)
    config = made.config | {"rope_theta": 10000.0, "rope_scaling": None, "eos_token_ids": eos or []}
    return OpenedModel(Path("tiny"), config, made.weights, ByteTokenizer(), None, generation_config or {})


def tiny_llm(
    n_ctx: int | None = None,
    *,
    kind: Kind | None = None,
    generation_config: dict[str, Any] | None = None,
    max_seq_len: int = 256,
    eos: list[int] | None = None,
    **options: Any,
) -> LLM:
    """`tiny_model` as an LLM; `options` are those of `LLM._from_opened`."""
    opened = tiny_model(kind=kind, generation_config=generation_config, max_seq_len=max_seq_len, eos=eos)
    return LLM._from_opened(opened, n_ctx, 1, **options)
