"""Which tokens open and close a text: read from the small JSON files beside a vocabulary.

Looks at tokenizer_config.json, config.json (ours or Hugging Face's), generation_config.json and added_tokens.json. A
key that is missing is "not said", a key that says null is "none". Says nothing about the vocabulary itself; ids are
checked by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import ModelFormatError
from ..common.model_folder import NO_TOKEN
from ..common.reader import parse_json, read_bytes, shown

JSON_LIMIT_BYTES = 16 << 20
VOCABULARY_LIMIT_BYTES = 256 << 20
MAX_TOKENS = 4_000_000

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token outside the vocabulary file, as tokenizer_config.json or added_tokens.json declares it.

    rstrip: blanks and line ends behind it belong to it.
    """

    id: int
    content: str
    special: bool
    rstrip: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """What the JSON files say. `None` for a flag: not said. Ids are those of the config files, unchecked."""

    bos: str | None
    eos: str | None
    says_bos: bool
    add_bos: bool | None
    add_eos: bool | None
    names: tuple[str, ...]
    added: tuple[AddedToken, ...]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    model_vocab_size: int
    legacy: bool


class FolderFiles:
    """The files of a model folder: on the disk, or, before they are written, in memory (`contents`: name -> bytes).

    Errors name `folder` in both cases.
    """

    def __init__(self, folder: Path, contents: Mapping[str, bytes] | None = None) -> None:
        self.folder = folder
        self._contents = contents

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file() if self._contents is None else name in self._contents

    def read(self, name: str, limit: int, what: str) -> bytes:
        """A whole file. Raises ModelFormatError when it is larger than `limit`."""
        if self._contents is None:
            return read_bytes(self.folder / name, limit, what)
        if len(self._contents[name]) > limit:
            raise ModelFormatError(
                f"{self.folder / name}: {what} of {len(self._contents[name])} bytes, at most {limit} are allowed"
            )
        return self._contents[name]

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, {} when there is no such file. ModelFormatError when it holds anything else."""
        if name not in self:
            return {}
        return parse_json(self.read(name, JSON_LIMIT_BYTES, "JSON file"), str(self.folder / name))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} when there is no such file. ModelFormatError when it holds anything else."""
    return FolderFiles(path.parent).object(path.name)


def read_special_tokens(files: FolderFiles) -> SpecialTokens:
    """Everything the JSON files of a model folder say about special tokens. Raises ModelFormatError."""
    folder = files.folder
    config_path = folder / "tokenizer_config.json"
    config, model = files.object("tokenizer_config.json"), files.object("config.json")
    generation = files.object("generation_config.json")
    named = {name: _content(config.get(name), name, config_path) for name in _NAMED}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if isinstance(more, dict):
        more = list(more.values())
    if not isinstance(more, list):
        raise ModelFormatError(f"{config_path}: additional_special_tokens must be a list, found {type(more).__name__}")
    extra = [_content(token, "additional_special_tokens", config_path) for token in more]
    ids = [model.get("eos_token_ids"), model.get("eos_token_id"), generation.get("eos_token_id")]
    bos_ids = _ids(model.get("bos_token_id"), "bos_token_id", folder / "config.json")
    return SpecialTokens(
        bos=named["bos_token"],
        eos=named["eos_token"],
        says_bos="bos_token" in config,
        add_bos=_flag(config, "add_bos_token", config_path),
        add_eos=_flag(config, "add_eos_token", config_path),
        names=tuple(dict.fromkeys(name for name in [*named.values(), *extra] if name)),
        added=_added_tokens(files, config, config_path),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=tuple(dict.fromkeys(i for value in ids for i in _ids(value, "eos_token_id", folder))),
        model_vocab_size=_vocab_size(model, folder / "config.json"),
        legacy=bool(_flag(config, "legacy", config_path)),
    )


def _content(value: Any, key: str, path: Path) -> str | None:
    """A token's text: a string, or an object whose `content` is one."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelFormatError(f"{path}: {key} must be a string, found {type(value).__name__}")
    return value or None


def _flag(config: dict[str, Any], key: str, path: Path) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelFormatError(f"{path}: {key} must be true or false, found {shown(value)}")
    return value


def _ids(value: Any, key: str, path: Path) -> list[int]:
    """An id or a list of ids; null and a negative one mean "none", as NO_TOKEN does."""
    values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ModelFormatError(f"{path}: {key} must be an integer or a list of integers, found {shown(value)}")
    return [v for v in values if v >= 0 and v not in NO_TOKEN]


def _vocab_size(model: dict[str, Any], path: Path) -> int:
    size = model.get("vocab_size", 0)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_TOKENS:
        raise ModelFormatError(f"{path}: vocab_size must be an integer from 0 to {MAX_TOKENS}, found {shown(size)}")
    return size


def _added_tokens(files: FolderFiles, config: dict[str, Any], config_path: Path) -> tuple[AddedToken, ...]:
    """Tokens of `added_tokens_decoder`, then those that only added_tokens.json names (never special)."""
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ModelFormatError(f"{config_path}: added_tokens_decoder must be an object, found {type(decoder).__name__}")
    found: dict[int, AddedToken] = {}
    for key, value in decoder.items():
        content = _content(value, "added_tokens_decoder", config_path)
        if not key.isdecimal() or len(key) > 9 or content is None:
            raise ModelFormatError(
                f"{config_path}: added_tokens_decoder has an entry that is no id and token: {shown(key)}"
            )
        special, rstrip = (isinstance(value, dict) and bool(value.get(flag)) for flag in ("special", "rstrip"))
        found[int(key)] = AddedToken(int(key), content, special, rstrip)
    path = files.folder / "added_tokens.json"
    for content, index in files.object("added_tokens.json").items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < MAX_TOKENS:
            raise ModelFormatError(
                f"{path}: {shown(content)} must have an id from 0 to {MAX_TOKENS - 1}, found {shown(index)}"
            )
        if content:
            found.setdefault(index, AddedToken(index, content, False))
    return tuple(found[index] for index in sorted(found))


def looks_like_control(content: str) -> bool:
    """Whether a token is written as control tokens are, like <|user|>; not every vocabulary marks them as special."""
    return len(content) > 4 and (
        (content.startswith("<|") and content.endswith("|>")) or (content.startswith("<｜") and content.endswith("｜>"))
    )
