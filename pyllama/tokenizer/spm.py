"""tokenizer.model, through the `sentencepiece` library.

sentencepiece never makes a control piece out of text, so control tokens are cut out here when they are asked for.
Tokens that a Hugging Face folder adds behind the vocabulary (added_tokens_decoder, added_tokens.json) are handled the
same way. `legacy` is Hugging Face's word for the older rule: text after a control token gets sentencepiece's leading
space too.
"""

from __future__ import annotations

import re
from pathlib import Path

import sentencepiece

from ..common.errors import ModelFormatError
from ..common.reader import shown
from .detokenizer import TokenTable
from .special import MAX_TOKENS, SpecialTokens, looks_like_control

_BLANK = "▁"
# normalizer_spec { add_dummy_prefix: false }, appended to a serialized model: protobuf merges it over what stands
# there.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SpmBackend:
    """A vocabulary from tokenizer.model. Safe to use from several threads."""

    adds_itself = False
    default_add_bos = True
    default_add_eos = False

    def __init__(self, proto: bytes, path: Path, special: SpecialTokens) -> None:
        self._processor = _open(proto, path)
        size = self._processor.vocab_size()
        if size > MAX_TOKENS:
            raise ModelFormatError(f"{path}: {size} pieces; at most {MAX_TOKENS} is sensible")
        try:
            self._pieces: list[str] = [self._processor.id_to_piece(i) for i in range(size)]
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{path}: a piece is not valid UTF-8: {error.reason}") from None
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        control = {i for i in range(size) if self._processor.is_control(i) or self._processor.is_unknown(i)}
        self._cut = {self._pieces[i]: i for i in control}
        self._control = set(control)
        self._special = control
        self._rstrip: set[int] = set()
        self._add_tokens(special, path)
        self._has_prefix = self._processor.normalize("a").startswith(_BLANK)
        self._middle = self._processor
        if self._has_prefix and not special.legacy:
            self._middle = _open(proto + _NO_DUMMY_PREFIX, path)
        self._parse = _any_of(self._cut)
        self._added = _any_of({c: i for c, i in self._cut.items() if i not in self._control})
        self.table = TokenTable(self._byte_pieces(), frozenset(self._special), int(self._has_prefix))

    def _add_tokens(self, special: SpecialTokens, path: Path) -> None:
        for token in special.added:
            if token.id < len(self._pieces):
                if self._pieces[token.id] != token.content:
                    raise ModelFormatError(
                        f"{path}: id {token.id} is {shown(self._pieces[token.id])}, but added_tokens say "
                        f"{shown(token.content)}; do the files belong together?"
                    )
            elif token.id == len(self._pieces):
                self._pieces.append(token.content)
                self._ids[token.content] = token.id
            else:
                raise ModelFormatError(
                    f"{path}: added token {shown(token.content)} has id {token.id}, expected {len(self._pieces)}"
                )
            self._cut[token.content] = token.id
            if token.rstrip:
                self._rstrip.add(token.id)
            if token.special:
                self._special.add(token.id)
            if token.special or looks_like_control(token.content):
                self._control.add(token.id)

    def _byte_pieces(self) -> list[bytes]:
        size = self._processor.vocab_size()
        return [
            bytes([int(piece[3:5], 16)])
            if i < size and self._processor.is_byte(i)
            else piece.replace(_BLANK, " ").encode("utf-8")
            for i, piece in enumerate(self._pieces)
        ]

    def id_of(self, content: str) -> int | None:
        return self._ids.get(content)

    def piece_of(self, index: int) -> str:
        return self._pieces[index] if index < len(self._pieces) else ""

    def control_tokens(self) -> dict[str, int]:
        return {content: i for content, i in self._cut.items() if i in self._control}

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        if self._parse is None:
            return []
        return [m.span() for m in self._parse.finditer(text) if self._cut[m[0]] in self._control]

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return self.encode_around(text, self.control_spans(text) if parse_special else [])

    def encode_around(self, text: str, spans: list[tuple[int, int]]) -> list[int]:
        ids: list[int] = []
        position = 0
        for start, end in spans:
            self._append(ids, text[position:start])
            ids.append(self._cut[text[start:end]])
            position = end
        self._append(ids, text[position:])
        return ids

    def _append(self, ids: list[int], text: str) -> None:
        """Text without control tokens; added tokens that are none of these are still taken whole."""
        position = 0
        for match in self._added.finditer(text) if self._added else ():
            self._append_plain(ids, text[position : match.start()])
            ids.append(self._cut[match[0]])
            position = match.end()
        self._append_plain(ids, text[position:])

    def _append_plain(self, ids: list[int], text: str) -> None:
        if ids and ids[-1] in self._rstrip:
            text = text.lstrip()
        if text:
            ids += (self._middle if ids else self._processor).encode(text)


def _open(proto: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor()
        if not proto or not processor.LoadFromSerializedProto(proto):
            raise RuntimeError("empty or refused")
        return processor
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelFormatError(f"{path}: the sentencepiece library cannot open it: {error}") from None


def _any_of(contents: dict[str, int]) -> re.Pattern[str] | None:
    ordered = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
