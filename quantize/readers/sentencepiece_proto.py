"""Writes a sentencepiece model (tokenizer.model): protobuf's wire format for the few fields that matter, by hand.

Only BPE models, and only what changes how a text is cut: pieces with score and type, byte fallback and the leading
blank. Field numbers are those of sentencepiece_model.proto. Reading such files is sentencepiece's business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

_BPE = 2
_UNKNOWN = 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `type` as in both GGUF and sentencepiece: 1 normal … 6 byte."""

    text: str
    score: float
    type: int


def model_bytes(
    pieces: list[Piece],
    *,
    byte_fallback: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """A serialized ModelProto, with sentencepiece's identity normalization."""
    unk_id = next((index for index, piece in enumerate(pieces) if piece.type == _UNKNOWN), 0)
    trainer = b"".join(
        [_number(3, _BPE), _number(4, len(pieces)), _number(35, int(byte_fallback)), _number(40, unk_id)]
        + [_text(45, pieces[unk_id].text)]
    )
    normalizer = b"".join(
        [
            _text(1, "identity"),
            _number(3, int(add_dummy_prefix)),
            _number(4, int(remove_extra_whitespaces)),
            _number(5, 1),
        ]
    )
    return b"".join(_pieces(pieces)) + _bytes(2, trainer) + _bytes(3, normalizer)


def _pieces(pieces: Iterable[Piece]) -> Iterable[bytes]:
    for piece in pieces:
        score = _varint(2 << 3 | _FLOAT) + struct.pack("<f", piece.score)
        yield _bytes(1, _text(1, piece.text) + score + _number(3, piece.type))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode("utf-8"))
