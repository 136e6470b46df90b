"""From Llama 3's own tokenizer.model to a tokenizer.json.

The file has a line for each token: its bytes in base64, and its rank. tiktoken joins whatever neighbours give the token
of lowest rank; byte-level BPE as tokenizer.json has it follows a list of pairs. The two agree when each token's pair is
the last one that joining finds on the way to that token alone, and the pairs stand in the order of the ranks. The rule
that cuts words and the special tokens are Llama 3's, which the file does not carry. Pure data in and out; nothing is
opened here.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import shown
from pyllama.tokenizer.detokenizer import byte_alphabet

from .byte_level_bpe import PRE_TOKENIZERS, to_json, tokenizer_json

MAX_TOKENS = 4_000_000
MAX_TOKEN_BYTES = 256
_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}\r?\n")

BEGIN, END, END_OF_MESSAGE, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
# Names of the first special ids behind the ranks; None: reserved, counted from 0 in the order of the ids.
_LLAMA_3 = [BEGIN, END, None, None, None, None, "<|start_header_id|>", "<|end_header_id|>", None, END_OF_TURN]
_LLAMA_3_1 = [
    *(BEGIN, END, None, None, "<|finetune_right_pad_id|>", None),
    *("<|start_header_id|>", "<|end_header_id|>", END_OF_MESSAGE, END_OF_TURN, "<|python_tag|>"),
]


def is_tiktoken(start: bytes) -> bool:
    """Whether a tokenizer.model that begins with these bytes is a list of ranks, and not a sentencepiece model."""
    return _FIRST_LINE.match(start) is not None


class TiktokenVocabulary:
    """A list of ranks with Llama 3's special tokens behind it, `vocab_size` ids in all.

    calls_tools: of 3.1 and later, whose special tokens have names for messages to tools. Raises ModelFormatError.
    """

    def __init__(self, raw: bytes, vocab_size: int, where: str, *, calls_tools: bool) -> None:
        self._where = where
        self.tokens = _read_ranks(raw, where)
        named = _LLAMA_3_1 if calls_tools else _LLAMA_3
        n_special = vocab_size - len(self.tokens)
        if n_special < len(named):
            raise ModelFormatError(
                f"{where}: {len(self.tokens)} ranks for a model of {vocab_size} ids, expected room for at least"
                f" {len(named)} special tokens behind them; do the files belong together?"
            )
        self.special = _special_names(named, n_special)

    def special_id(self, name: str) -> int:
        """The id of a special token."""
        return len(self.tokens) + self.special.index(name)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a text, a turn or a message."""
        return [self.special_id(name) for name in (END, END_OF_MESSAGE, END_OF_TURN) if name in self.special]

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json."""
        return {"tokenizer.json": self._document(), "tokenizer_config.json": to_json(self._config())}

    def _document(self) -> bytes:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        letters = {byte: letter for letter, byte in byte_alphabet().items()}
        written = ["".join([letters[byte] for byte in token]) for token in self.tokens]
        pairs = _merges(self.tokens, self._where)
        begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
        first, second = ({"Sequence": {"id": which, "type_id": n}} for n, which in enumerate("AB"))
        return tokenizer_json(
            PRE_TOKENIZERS["llama3"],
            vocab={token: i for i, token in enumerate(written)},
            merges=[["".join([letters[byte] for byte in part]) for part in pair] for pair in pairs],
            added_tokens=[{"id": len(written) + i, "content": name, **flags} for i, name in enumerate(self.special)],
            post_processor={
                "type": "TemplateProcessing",
                "single": [begin, first],
                "pair": [begin, first, {"SpecialToken": {"id": BEGIN, "type_id": 1}}, second],
                "special_tokens": {BEGIN: {"id": BEGIN, "ids": [self.special_id(BEGIN)], "tokens": [BEGIN]}},
            },
        )

    def _config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }


def _read_ranks(raw: bytes, where: str) -> list[bytes]:
    """The tokens in the order of their ranks, which must be 0, 1, 2 … and hold every single byte."""
    lines = raw.split(b"\n")
    if len(lines) > MAX_TOKENS:
        raise ModelFormatError(f"{where}: {len(lines)} lines, at most {MAX_TOKENS} are allowed")
    by_rank: dict[int, bytes] = {}
    seen: set[bytes] = set()
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
            raise ModelFormatError(
                f"{where}: line {number}: expected a token in base64 and its rank, found {shown(line)}"
            )
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError):
            raise ModelFormatError(f"{where}: line {number}: {shown(parts[0])} is not base64") from None
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ModelFormatError(
                f"{where}: line {number}: a token of {len(token)} bytes, expected 1 to {MAX_TOKEN_BYTES}"
            )
        if token in seen or rank in by_rank:
            what = "token" if token in seen else "rank"
            raise ModelFormatError(f"{where}: line {number}: the {what} in {shown(line)} stands there twice")
        seen.add(token)
        by_rank[rank] = token
    missing = next((rank for rank in range(len(by_rank)) if rank not in by_rank), None)
    if missing is not None or not by_rank:
        raise ModelFormatError(f"{where}: rank {missing or 0} of {len(by_rank)} is missing")
    single = next((byte for byte in range(256) if bytes([byte]) not in seen), None)
    if single is not None:
        raise ModelFormatError(f"{where}: no token for the single byte {single:#04x}; expected one for each of the 256")
    return [by_rank[rank] for rank in range(len(by_rank))]


def _merges(tokens: list[bytes], where: str) -> list[tuple[bytes, bytes]]:
    """For each token of two bytes or more, the pair that is joined last on the way to it, in the order of the ranks.

    A token that joining does not reach has no pair: it is only found as a whole word.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    never = len(tokens)
    out = []
    for token in tokens:
        if len(token) == 2:
            out.append((token[:1], token[1:]))
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        joined = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]
        while len(parts) > 2:
            best = min(joined)
            if best == never:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del joined[i]
            if i > 0:
                joined[i - 1] = ranks.get(parts[i - 1] + parts[i], never)
            if i < len(joined):
                joined[i] = ranks.get(parts[i] + parts[i + 1], never)
        if len(parts) == 2:
            out.append((parts[0], parts[1]))
    return out


def _special_names(named: list[str | None], count: int) -> list[str]:
    reserved = 0
    out = []
    for name in [*named, *[None] * (count - len(named))]:
        out.append(name if name is not None else f"<|reserved_special_token_{reserved}|>")
        reserved += name is None
    return out
