"""Text to token ids and back, for every kind of vocabulary that a model folder can hold.

tokenizer.json goes through the `tokenizers` library, tokenizer.model through `sentencepiece`; only the one that is
needed is imported. What is ours: which tokens open and close a text, keeping users' text from turning into control
tokens, and decoding, streamed or whole. It knows nothing about chats (chat_template.py) or models, except for the sizes
and ids in config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from ..common.errors import ModelFormatError
from ..common.reader import shown
from .detokenizer import StreamDecoder, TokenTable, decode
from .special import VOCABULARY_LIMIT_BYTES, FolderFiles, SpecialTokens, read_special_tokens

__all__ = ["StreamDecoder", "Tokenizer"]

VOCABULARIES = ("tokenizer.json", "tokenizer.model")  # the first that is there counts
NO_VOCABULARY = "neither tokenizer.json nor tokenizer.model is there; a model needs one, put its own beside the weights"


class _Backend(Protocol):
    table: TokenTable
    adds_itself: bool  # the vocabulary file itself says which tokens are put around a text
    default_add_bos: bool
    default_add_eos: bool

    def id_of(self, content: str) -> int | None: ...
    def piece_of(self, index: int) -> str: ...
    def control_tokens(self) -> dict[str, int]: ...
    def control_spans(self, text: str) -> list[tuple[int, int]]: ...
    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...
    def encode_around(self, text: str, spans: list[tuple[int, int]]) -> list[int]: ...


class Tokenizer:
    """Token ids of a text and the text of token ids.

    `bos_id`: the id that opens a text, or None. `eos_ids`: the ids that end one, at least one unless the model names
    none. `bos_token`, `eos_token`: their text, "" for none. `vocab_size`: ids 0 to vocab_size − 1 can be decoded; those
    that the model has and the vocabulary has not are empty text.
    """

    def __init__(self, backend: _Backend, special: SpecialTokens, folder: Path) -> None:
        self._backend = backend
        table = backend.table
        missing = special.model_vocab_size - len(table.pieces)
        if missing > 0:
            table = TokenTable(table.pieces + [b""] * missing, table.special, table.strip_spaces, table.first_piece)
        self._table = table
        self.vocab_size = len(table.pieces)
        self.bos_id = self._first_id(special, folder)
        self.eos_ids = self._end_ids(special, folder)
        self.bos_token = "" if self.bos_id is None else backend.piece_of(self.bos_id)
        self.eos_token = special.eos or (backend.piece_of(self.eos_ids[0]) if self.eos_ids else "")
        control = backend.control_tokens()
        self.control_ids = frozenset(control.values())
        self.control_starts = frozenset(content[0] for content in control)
        self._prefix: list[int] = []
        self._suffix: list[int] = []
        if not backend.adds_itself:
            add_bos = backend.default_add_bos if special.add_bos is None else special.add_bos
            add_eos = backend.default_add_eos if special.add_eos is None else special.add_eos
            self._prefix = [self.bos_id] if add_bos and self.bos_id is not None else []
            self._suffix = [self.eos_ids[0]] if add_eos and self.eos_ids else []

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model folder: tokenizer.json, or else tokenizer.model. Raises ModelFormatError."""
        return cls._from(FolderFiles(Path(path)))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str | Path) -> Tokenizer:
        """The tokenizer of a model folder that is not written yet: name -> bytes, config.json among them.

        where: what messages call the folder. Raises ModelFormatError.
        """
        return cls._from(FolderFiles(Path(where), files))

    @classmethod
    def _from(cls, files: FolderFiles) -> Tokenizer:
        folder, special = files.folder, read_special_tokens(files)
        for name in VOCABULARIES:
            if name not in files:
                continue
            raw = files.read(name, VOCABULARY_LIMIT_BYTES, "vocabulary")
            if name == "tokenizer.json":
                from .hf import HfBackend

                return cls(HfBackend(raw, folder / name, special), special, folder)
            from .spm import SpmBackend

            return cls(SpmBackend(raw, folder / name, special), special, folder)
        raise ModelFormatError(f"{folder}: {NO_VOCABULARY}")

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        `add_special` puts the opening (and closing) tokens around it, as the model wants. `parse_special` turns the
        text of special tokens into them: for rendered chats only, never for what users type. With it, ids are Hugging
        Face's; without it they are too wherever the text names no special token. Raises ValueError when the text is no
        string or has a lone surrogate.
        """
        check_text(text)
        ids = self._backend.encode(text, add_special, parse_special)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids; bytes that are no UTF-8 are U+FFFD. Raises ValueError for an id out of range."""
        return decode(self._table, ids, skip_special)

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one by one; its pieces joined are `decode` of all of them."""
        return StreamDecoder(self._table, skip_special)

    def id_to_piece(self, token_id: int) -> str:
        """How the vocabulary writes a token, byte alphabet and all. Raises ValueError for an id out of range."""
        return self._backend.piece_of(self._table.check(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text. Raises ValueError for an id out of range."""
        return self._table.pieces[self._table.check(token_id)]

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where the text spells control tokens: [start, end) of each, as `parse_special` would find them."""
        return self._backend.control_spans(text)

    def encode_around(self, text: str, spans: list[tuple[int, int]]) -> list[int]:
        """The ids of a text in which exactly these spellings are control tokens; nothing is put around it.

        `spans`: some of `control_spans(text)`, ascending. With all of them this is `encode(text, False, True)`.
        """
        check_text(text)
        return self._backend.encode_around(text, spans)

    def _first_id(self, special: SpecialTokens, folder: Path) -> int | None:
        if special.bos is not None:
            index = self._backend.id_of(special.bos)
            if index is None:
                raise ModelFormatError(
                    f"{folder / 'tokenizer_config.json'}: bos_token {shown(special.bos)} is not in the vocabulary"
                )
            return index
        if special.says_bos or special.bos_id is None:
            return None
        return self._checked(special.bos_id, "bos_token_id", folder)

    def _end_ids(self, special: SpecialTokens, folder: Path) -> tuple[int, ...]:
        ids = [self._checked(i, "eos_token_id", folder) for i in special.eos_ids]
        if special.eos is not None:
            index = self._backend.id_of(special.eos)
            if index is None:
                raise ModelFormatError(
                    f"{folder / 'tokenizer_config.json'}: eos_token {shown(special.eos)} is not in the vocabulary"
                )
            ids.insert(0, index)
        return tuple(dict.fromkeys(ids))

    def _checked(self, index: int, key: str, folder: Path) -> int:
        if index >= self.vocab_size:
            raise ModelFormatError(f"{folder}: {key} is {index}, but the vocabulary has ids 0 to {self.vocab_size - 1}")
        return index


def check_text(text: str) -> None:
    """ValueError unless `text` is a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"expected a string to tokenize, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
            "which is no character; decode the source with errors='replace' or remove it"
        ) from None
