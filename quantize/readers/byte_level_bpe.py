"""Byte-level BPE as a tokenizer.json, for readers whose sources write it in another way.

`PRE_TOKENIZERS` has the rules that cut a text into words before it, by the names that GGUF has for them; they are those
of the models' own published tokenizer.json. A nearly right rule gives wrong ids silently, so a name that is not there
is for its reader to refuse. Pure data; nothing is read or checked here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a GGUF means by "default": four cuts, one after the other.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _splits(*patterns: str) -> list[dict[str, Any]]:
    cuts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return [*cuts, _byte_level(use_regex=False)]


_DIGITS_GPT2 = [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]


@dataclass(frozen=True)
class PreTokenizer:
    """How a family cuts words. `ignore_merges`: a word that is a token is taken whole. `add_bos`: when the file does
    not say."""

    steps: list[dict[str, Any]]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: str | None = None


_LLAMA3_RULE = PreTokenizer(_splits(_LLAMA3), ignore_merges=True, add_bos=True)
_QWEN2_RULE = PreTokenizer(_splits(_QWEN2), normalizer="NFC")

PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer([_byte_level(use_regex=True)]),
    "default": PreTokenizer(_splits(*_DEFAULT)),
    "smollm": PreTokenizer(_DIGITS_GPT2),
    "starcoder": PreTokenizer(_DIGITS_GPT2),
    "refact": PreTokenizer(_DIGITS_GPT2),
    "llama-bpe": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "dbrx": PreTokenizer(_splits(_LLAMA3)),  # also Phi-4 and Granite 4: the rule of OpenAI's cl100k
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,  # Qwen2's vocabulary with other special tokens
    "tekken": PreTokenizer(_splits(_TEKKEN), ignore_merges=True, add_bos=True),
}


def tokenizer_json(
    rule: PreTokenizer,
    *,
    vocab: dict[str, int],
    merges: list[list[str]],
    added_tokens: list[dict[str, Any]],
    post_processor: dict[str, Any] | None,
) -> bytes:
    """tokenizer.json of a vocabulary whose tokens are spelt in the 256 characters of byte-level BPE, pairs by rank."""
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": rule.normalizer} if rule.normalizer else None,
        "pre_tokenizer": rule.steps[0] if len(rule.steps) == 1 else {"type": "Sequence", "pretokenizers": rule.steps},
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return to_json(document)


def to_json(document: dict[str, Any]) -> bytes:
    """As these files are written: on one line, characters as they are."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8")
