"""From token ids back to text, whole or piece by piece.

Every token is a byte string, fixed when the vocabulary is opened; a text is those bytes in a row, read as UTF-8, less
the space that sentencepiece puts in front of a text. `decode` and `StreamDecoder` are the same walk over the same
table, so streamed pieces joined are the decoded text by construction. Bytes that are no UTF-8 become U+FFFD, one per
maximal broken part, as in Unicode's recommended practice. Deliberately absent: `clean_up_tokenization_spaces`, which
would change what the model said.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

_Utf8 = codecs.getincrementaldecoder("utf-8")


def byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level vocabularies write bytes: printable Latin-1 as itself, the rest from U+0100
    on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class TokenTable:
    """What each id stands for.

    `pieces[id]`: its bytes (empty for a hole in the vocabulary). `special`: ids that `skip_special` leaves out.
    `strip_spaces`: how many spaces to take off the front of a text. `first_piece`: bytes of ids that read differently
    as the first token of a text (the Metaspace decoder drops every blank of the first token).
    """

    pieces: list[bytes]
    special: frozenset[int]
    strip_spaces: int = 0
    first_piece: dict[int, bytes] = field(default_factory=dict)

    def check(self, token_id: int) -> int:
        """The id as an int; ValueError when it is none or out of range."""
        try:
            index = operator.index(token_id)
        except TypeError:
            raise ValueError(f"a token id must be an integer, got {token_id!r}") from None
        if not 0 <= index < len(self.pieces):
            raise ValueError(f"token id {index} is out of range: the vocabulary has ids 0 to {len(self.pieces) - 1}")
        return index


class StreamDecoder:
    """Text of tokens as they come: `push` gives what is certain, `flush` what is left. Constant work per token."""

    def __init__(self, table: TokenTable, skip_special: bool = True) -> None:
        self._table = table
        self._skip_special = skip_special
        self._utf8 = _Utf8("replace")
        self._is_first = True
        self._strip_left = table.strip_spaces

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is still open. ValueError: id out of range."""
        return self._utf8.decode(self._bytes(self._table.check(token_id)))

    def flush(self) -> str:
        """What is still held back: a character that never got its last byte is U+FFFD. Ends the text."""
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text

    def _bytes(self, index: int) -> bytes:
        if self._skip_special and index in self._table.special:
            return b""
        piece = self._table.pieces[index]
        if self._is_first:
            self._is_first = False
            piece = self._table.first_piece.get(index, piece)
        if self._strip_left and piece:
            kept = piece
            while self._strip_left and kept.startswith(b" "):
                kept, self._strip_left = kept[1:], self._strip_left - 1
            if kept:
                self._strip_left = 0
            return kept
        return piece


def decode(table: TokenTable, ids: Iterable[int], skip_special: bool = True) -> str:
    """The text of a whole sequence of ids. ValueError: id out of range."""
    stream = StreamDecoder(table, skip_special)
    return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()
