"""Vocabularies for the tests: small ones, trained on the spot, and what a GGUF would say of one.

Everything here uses the reference libraries (tokenizers, sentencepiece) or writes plain files; nothing of ours is used,
so that a test can compare ours with it.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from .make_strings import strings

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]"]

# Each rule as its family's tokenizer.json has it, put together from the library's own parts.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _split(*patterns: str) -> Any:
    parts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def reference_pre_tokenizer(pre: str) -> Any:
    """What the models with this `tokenizer.ggml.pre` cut words with."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return gpt2
    if pre in ("smollm", "starcoder", "refact"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in ("llama-bpe", "llama3", "llama-v3", "dbrx"):
        return _split(_CL100K)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        return _split(_CL100K.replace("{1,3}", ""))
    if pre == "tekken":
        upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
        word = r"[^\r\n\p{L}\p{N}]?"
        rest = r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        return _split(f"{word}{upper}*{lower}+|{word}{upper}+{lower}*|{rest}")
    if pre == "default":
        words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
        return _split(r"[\p{P}\$\+<=>\^~\|]+", words, r"\p{N}+", "[0-9][0-9][0-9]")
    raise KeyError(pre)


def train_bpe(pre: str, n_tokens: int = 900) -> tokenizers.Tokenizer:
    """A byte-level BPE vocabulary that cuts words by the rule `pre`; special tokens first."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "llama3", "llama-v3", "tekken")))
    tokenizer.pre_tokenizer = reference_pre_tokenizer(pre)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(strings(1500, seed=1), trainer)
    return tokenizer


def bpe_metadata(tokenizer: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """What a GGUF would say of a trained BPE vocabulary."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def train_sentencepiece(n_tokens: int = 2000, **options: Any) -> bytes:
    """A sentencepiece BPE model as Llama's are made: identity normalization, byte fallback, blanks kept."""
    # Few scripts, so that the rest comes out as bytes.
    texts = [line for text in strings(4000, seed=1) for line in text.split("\n")]
    lines = [line for line in texts if 0 < len(line) < 1000 and all(0 < ord(c) < 0x400 for c in line.replace("▁", " "))]
    settings = {
        "model_type": "bpe",
        "vocab_size": n_tokens,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "control_symbols": ["[INST]", "[/INST]"],
        "user_defined_symbols": ["<think>", "▁▁▁▁"],
        "num_threads": 1,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings, **options}
    )
    return model.getvalue()


def piece_types(processor: sentencepiece.SentencePieceProcessor, user_defined: tuple[str, ...] = ()) -> list[int]:
    """GGUF's token types of a sentencepiece model's pieces."""
    types = []
    for index in range(processor.vocab_size()):
        kinds = [(processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6)]
        found = next((number for is_kind, number in kinds if is_kind(index)), 1)
        types.append(4 if processor.id_to_piece(index) in user_defined else found)
    return types


def sentencepiece_metadata(proto: bytes, user_defined: tuple[str, ...] = ("<think>", "▁▁▁▁")) -> dict[str, Any]:
    """What a GGUF would say of a sentencepiece model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    size = processor.vocab_size()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(index) for index in range(size)],
        "tokenizer.ggml.scores": [processor.get_score(index) for index in range(size)],
        "tokenizer.ggml.token_type": piece_types(processor, user_defined),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }


def write_folder(folder: Path, files: dict[str, bytes | str | dict[str, Any]]) -> Path:
    """Writes files into a folder; a dict as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, dict):
            content = json.dumps(content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder
