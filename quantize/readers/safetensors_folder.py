"""Reads a Hugging Face folder: config.json, weights, tokenizer files, in safetensors or in PyTorch's pytorch_model.bin.

Here everything is put together. What config.json means is hf_config.py's affair, which weight files there are and what
they hold hf_weights.py's, packed matrices are hf_quantized.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import read_bytes, read_json

from ..binding import bind
from ..families import Family
from ..fields import Fields
from .hf_config import read_hf_config
from .hf_quantized import OLD_DESCRIPTIONS, unpack_quantized
from .hf_weights import read_weights
from .source import Rows, Source, identity_of, name_of, same_numbers

# Files that a tokenizer may need, and the most bytes each may have.
TOKENIZER_FILES = {
    "tokenizer.json": 1 << 28,
    "tokenizer.model": 1 << 26,
    "tokenizer_config.json": 1 << 24,
    "special_tokens_map.json": 1 << 22,
    "added_tokens.json": 1 << 24,
    "generation_config.json": 1 << 20,
    "chat_template.jinja": 1 << 22,
}


def open_safetensors(folder: Path, single: Path | None = None) -> Source:
    """A Hugging Face folder as a Source; `single`: the one weight file that was asked for.

    Raises ModelFormatError for a damaged file or a model that this version cannot run.
    """
    config_path = folder / "config.json"
    if not config_path.exists():
        raise ModelFormatError(f"{config_path}: is missing; {single or folder} needs a config.json beside its tensors")
    raw = read_json(config_path)
    if raw.get("format") == "pyllama":
        raise ModelFormatError(f"{folder}: is already a pyllama model; open it as it is, or quantize its source again")
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    found = read_hf_config(raw, str(config_path))
    config = found.config
    if generation.get("eos_token_id") is not None:
        ends = Fields(generation, str(generation_path)).tokens("eos_token_id", config["vocab_size"])
        config["eos_token_ids"] = ends
    paths, whole = read_weights(folder, single)
    stored = unpack_quantized(raw, folder, whole)
    _check_tied(found.family, config, stored, str(config_path))
    tensors = bind(found.family, config, stored, str(folder), optional=found.optional, factors=found.factors)
    beside = (*OLD_DESCRIPTIONS, *TOKENIZER_FILES)
    used = [config_path, *paths, *(folder / name for name in beside if (folder / name).exists())]
    identity = identity_of(
        "safetensors" if paths[0].suffix == ".safetensors" else "torch",
        name_of(single or folder),
        used,
    )
    name = found.family.architecture
    return Source(identity["kind"], config, tensors, generation, identity, lambda: tokenizer_files(folder), name)


def _check_tied(family: Family, config: Mapping[str, Any], stored: dict[str, Rows], where: str) -> None:
    """A tied checkpoint may carry the head a second time, as long as it is the same; the copy is dropped."""
    head, embedding = family.outer["output"], family.outer["tok_embeddings"]
    if not config["tied_embeddings"] or head not in stored or embedding not in stored:
        return
    copy, original = stored.pop(head), stored[embedding]
    if copy.shape != original.shape or copy.type_name != original.type_name or not same_numbers(copy, original):
        raise ModelFormatError(f"{where}: tie_word_embeddings is true, but {head} differs from {embedding}")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """What a Hugging Face folder holds of its tokenizer, name -> bytes."""
    return {
        name: read_bytes(folder / name, cap, name) for name, cap in TOKENIZER_FILES.items() if (folder / name).exists()
    }
