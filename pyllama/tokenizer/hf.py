"""tokenizer.json, through the `tokenizers` library.

Encoding is the library's. For text that must not become control tokens a second instance is kept, made on first need,
in which those tokens are never looked for. Decoding is ours: the decoder that the file declares is read once into a
table of bytes per token (detokenizer.py), and a kind of decoder that no Llama-like model uses is an error, not a guess.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import tokenizers

from ..common.errors import ModelFormatError
from ..common.reader import shown
from .detokenizer import TokenTable, byte_alphabet
from .special import MAX_TOKENS, SpecialTokens, looks_like_control

_BLANK = "▁"
_FIRST_STANDIN = 0x100000  # the last private-use plane
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PREFIX = re.compile(r'"continuing_subword_prefix"\s*:(?!\s*(?:null\b|""))')
_ESCAPED_LETTER = re.compile(r"\\u00[4-7]")


class HfBackend:
    """A vocabulary from tokenizer.json. Safe to use from several threads."""

    def __init__(self, raw: bytes, path: Path, special: SpecialTokens) -> None:
        self._path = path
        text = raw.decode("utf-8", "replace")
        _check_prefix(text, path)
        self._tokenizer = _from_json(text, path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_declared(special)
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if max(self._vocab.values(), default=0) >= MAX_TOKENS:
            raise ModelFormatError(
                f"{path}: a token id of {max(self._vocab.values())}; at most {MAX_TOKENS - 1} is sensible"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._control = {t.content for t in added.values() if t.special or looks_like_control(t.content)}
        # A normalizer may turn harmless text into a control token's; then looking at the raw text is not enough.
        self._always_plain = self._tokenizer.normalizer is not None and any(t.normalized for t in added.values())
        self._control_text = _any_of(self._control)
        self._plain: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()
        self._nonce = "".join(chr(_FIRST_STANDIN + secrets.randbelow(0xFFFE)) for _ in range(8))
        self._standins: dict[str, str] = {}
        self._standin_ids: dict[int, int] = {}
        explicit = special.add_bos is not None or special.add_eos is not None
        self.adds_itself = not explicit
        self.default_add_bos = self.default_add_eos = False
        self.table = _read_decoder(_declared_decoder(self._tokenizer), self._vocab, self._special, path)

    def _add_declared(self, special: SpecialTokens) -> None:
        """Tokens that tokenizer_config.json calls special are special though tokenizer.json may not list them."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        declared = [*special.names, *(token.content for token in special.added if token.special)]
        missing = [n for n in declared if n not in known and self._tokenizer.token_to_id(n) is not None]
        if missing:
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(n, normalized=False) for n in missing])

    def id_of(self, content: str) -> int | None:
        return self._vocab.get(content)

    def piece_of(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""

    def control_tokens(self) -> dict[str, int]:
        return {content: self._vocab[content] for content in self._control}

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in self._control_text.finditer(text)] if self._control_text else []

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        needs_plain = self._always_plain or (
            self._control_text is not None and self._control_text.search(text) is not None
        )
        tokenizer = self._plain_tokenizer() if needs_plain and not parse_special else self._tokenizer
        return self._ids(tokenizer, text, add_special and self.adds_itself)

    def encode_around(self, text: str, spans: list[tuple[int, int]]) -> list[int]:
        tokenizer = self._plain_tokenizer()
        parts, position = [], 0
        for start, end in spans:
            parts += [text[position:start], self._standins[text[start:end]]]
            position = end
        ids = self._ids(tokenizer, "".join([*parts, text[position:]]), False)
        return [self._standin_ids.get(i, i) for i in ids]

    def _ids(self, tokenizer: tokenizers.Tokenizer, text: str, add_special: bool) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special).ids
        except BaseException as error:
            raise _refusal(error, f"{self._path}: the tokenizers library cannot encode {shown(text, 40)}") from None
        return ids

    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """The same vocabulary, blind to control tokens; in their place it knows stand-ins that nobody can type."""
        with self._lock:
            if self._plain is None:
                document = json.loads(self._tokenizer.to_str())
                for token in document["added_tokens"]:
                    token["special"] = token["content"] in self._control
                plain = _from_json(json.dumps(document, ensure_ascii=False), self._path)
                plain.encode_special_tokens = True
                for token in document["added_tokens"]:
                    if token["special"]:
                        self._add_standin(plain, token)
                self._plain = plain
            return self._plain

    def _add_standin(self, plain: tokenizers.Tokenizer, token: dict[str, Any]) -> None:
        number = len(self._standins)
        standin = self._nonce + chr(_FIRST_STANDIN + number // 4096) + chr(_FIRST_STANDIN + number % 4096)
        flags = {flag: token[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        plain.add_tokens([tokenizers.AddedToken(standin, special=False, **flags)])
        self._standins[token["content"]] = standin
        self._standin_ids[cast(int, plain.token_to_id(standin))] = self._vocab[token["content"]]


def _any_of(contents: set[str]) -> re.Pattern[str] | None:
    ordered = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _check_prefix(text: str, path: Path) -> None:
    """Refuses a prefix of words' later parts, which no Llama-like vocabulary has: the library cuts as many bytes off a
    merge's second token, be they half a character or more than it has, and may end the process over it. Looked for in
    the text, for a vocabulary takes long to parse; only who hides the key behind escapes has it parsed.
    """
    if _ESCAPED_LETTER.search(text):
        try:
            text = json.dumps(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"{path}: not valid JSON: {error}") from None
    if _PREFIX.search(text):
        raise ModelFormatError(f"{path}: continuing_subword_prefix is set; only vocabularies without one are known")


def _from_json(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        raise _refusal(error, f"{path}: the tokenizers library cannot open it") from None


def _refusal(error: BaseException, what: str) -> BaseException:
    """What to raise for an error of the library's; its panics are no Exceptions. What is neither (Ctrl-C) must pass."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ModelFormatError(f"{what}: {str(error)[:300]}")
    return error


def _declared_decoder(tokenizer: tokenizers.Tokenizer) -> Any:
    """The decoder as it stands in the file: its pickled state is that JSON, which saves parsing megabytes a second
    time."""
    decoder = tokenizer.decoder
    return None if decoder is None else json.loads(decoder.__getstate__())


def _read_decoder(decoder: Any, vocab: dict[str, int], special: frozenset[int], path: Path) -> TokenTable:
    """The declared decoder as a table. Raises ModelFormatError for one that is not known here."""
    steps = _flatten(decoder, path)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = byte_alphabet()
        return _table(vocab, special, lambda token: _from_alphabet(token, alphabet))
    if kinds == ["Metaspace"]:
        return _metaspace_table(steps[0], vocab, special)
    if kinds and all(kind in ("Replace", "ByteFallback", "Fuse", "Strip") for kind in kinds):
        return _sentencepiece_table(steps, vocab, special, path)
    raise ModelFormatError(
        f"{path}: decoder {kinds or None} is not one that this build knows; expected ByteLevel, Metaspace, "
        "or a sequence of Replace, ByteFallback, Fuse and Strip"
    )


def _flatten(decoder: Any, path: Path) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if not isinstance(decoder, dict):
        raise ModelFormatError(f"{path}: decoder must be an object, found {type(decoder).__name__}")
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for part in decoder.get("decoders", []) for step in _flatten(part, path)]


def _table(
    vocab: dict[str, int], special: frozenset[int], to_bytes: Callable[[str], bytes], strip_spaces: int = 0
) -> TokenTable:
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        pieces[index] = to_bytes(token)
    return TokenTable(pieces, special, strip_spaces)


def _from_alphabet(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes([alphabet[c] for c in token])
    except KeyError:
        return token.encode("utf-8")


def _metaspace_table(step: dict[str, Any], vocab: dict[str, int], special: frozenset[int]) -> TokenTable:
    blank = step.get("replacement", _BLANK)
    table = _table(vocab, special, lambda token: token.replace(blank, " ").encode("utf-8"))
    if step.get("prepend_scheme", "always") == "never":
        return table
    first = {i: token.replace(blank, "").encode("utf-8") for token, i in vocab.items() if blank in token}
    return TokenTable(table.pieces, special, 0, first)


def _sentencepiece_table(
    steps: list[dict[str, Any]], vocab: dict[str, int], special: frozenset[int], path: Path
) -> TokenTable:
    """Replace and byte tokens work on one token each; Strip on the whole text, so it must stand behind Fuse."""
    kinds = [step["type"] for step in steps]
    replace = [
        (step.get("pattern", {}).get("String"), step.get("content", "")) for step in steps if step["type"] == "Replace"
    ]
    strips = [step for step in steps if step["type"] == "Strip"]
    strip: dict[str, Any] = {"content": " ", "start": 0, "stop": 0} | (strips[0] if strips else {})
    is_known = (
        all(isinstance(old, str) and isinstance(new, str) for old, new in replace)
        and len(strips) <= 1
        and strip.get("content") == " "
        and strip.get("stop") == 0
        and (not strips or (kinds[-1] == "Strip" and "Fuse" in kinds))
    )
    if not is_known:
        raise ModelFormatError(
            f"{path}: decoder {shown(steps, 300)} is not the usual one of a sentencepiece vocabulary"
        )
    has_bytes = "ByteFallback" in kinds

    def to_bytes(token: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        if match:
            return bytes([int(match[1], 16)])
        for old, new in replace:
            token = token.replace(old, new)
        return token.encode("utf-8")

    return _table(vocab, special, to_bytes, int(strip["start"]))
