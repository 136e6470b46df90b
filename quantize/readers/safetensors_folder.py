"""Reads a Hugging Face folder: config.json, and weights in one safetensors file or in shards with an index.

What config.json means is hf_config.py's affair; here are the files: which there are, what lies where, what they hold.
Packed matrices are hf_quantized.py's affair, the container is pyllama.common.safetensors'. PyTorch files are refused.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import BoundedFile, read_bytes, read_json, shown
from pyllama.common.safetensors import SafetensorsFile, read_safetensors

from ..binding import bind
from ..families import Family
from ..fields import Fields
from .hf_config import read_hf_config
from .hf_quantized import unpack_quantized
from .source import DENSE_TYPES, Rows, Source, StoredTensor

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 24
MAX_SHARDS = 4096

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
    paths, index = ([single], None) if single is not None else _weight_files(folder)
    stored = unpack_quantized(raw, folder, _load(paths, index))
    _check_tied(found.family, config, stored, str(config_path))
    tensors = bind(found.family, config, stored, str(folder), optional=found.optional, factors=found.factors)
    used = [config_path, *paths, *(folder / name for name in TOKENIZER_FILES if (folder / name).exists())]
    identity = _identity(os.path.basename(os.path.abspath(single or folder)), used)
    name = found.family.architecture
    return Source("safetensors", config, tensors, generation, identity, lambda: _tokenizer_files(folder), name)


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder, and the index's map from tensor to file if there is one."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"], None
    if (folder / INDEX).exists():
        index = _read_index(folder / INDEX)
        paths = [folder / name for name in sorted(set(index.values()))]
        for path in paths:
            if not path.exists():
                count = sum(name == path.name for name in index.values())
                raise ModelFormatError(f"{path}: is missing; {INDEX} lists it for {count} tensors")
        return paths, index
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:8]) or "none"
        raise ModelFormatError(
            f"{folder}: expected model.safetensors, {INDEX} or a single *.safetensors file, found {names}"
        )
    return found, None


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{path}: weight_map: expected an object that maps tensors to files")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")
        if not plain:
            raise ModelFormatError(
                f"{path}: {shown(tensor)} lies in {shown(name)}, expected a .safetensors file in this folder"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise ModelFormatError(f"{path}: lists {len(set(weight_map.values()))} files, at most {MAX_SHARDS} are allowed")
    return weight_map


def _load(paths: list[Path], index: dict[str, str] | None) -> dict[str, StoredTensor]:
    """All tensors of the files; with an index, each must lie where the index says, and none may be left out of it."""
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        file = read_safetensors(path)
        for name in file.tensors:
            if index is not None and index.get(name) != path.name:
                listed = f"{INDEX} says {shown(index[name])}" if name in index else f"{INDEX} does not list it"
                raise ModelFormatError(f"{path}: holds tensor {shown(name)}, but {listed}")
            stored[name] = _stored(file, name)
    for name, shard in (index or {}).items():
        if name not in stored:
            raise ModelFormatError(
                f"{paths[0].parent / shard}: tensor {shown(name)} is not in it, though {INDEX} says so"
            )
    return stored


def _stored(file: SafetensorsFile, name: str) -> StoredTensor:
    info = file.tensors[name]
    kind = DENSE_TYPES.get(info.dtype)
    return StoredTensor(file.file, name, info.dtype, kind, info.shape, info.start, info.end - info.start)


def _check_tied(family: Family, config: Mapping[str, Any], stored: dict[str, Rows], where: str) -> None:
    """A tied checkpoint may carry the head a second time, as long as it is the same; the copy is dropped."""
    head, embedding = family.outer["output"], family.outer["tok_embeddings"]
    if not config["tied_embeddings"] or head not in stored or embedding not in stored:
        return
    copy, original = stored.pop(head), stored[embedding]
    if copy.shape != original.shape or copy.type_name != original.type_name or not _equal(copy, original):
        raise ModelFormatError(f"{where}: tie_word_embeddings is true, but {head} differs from {embedding}")


def _equal(a: Rows, b: Rows) -> bool:
    """In steps, because comparing makes an array as long as what it compares."""
    if isinstance(a, StoredTensor) and isinstance(b, StoredTensor):
        left, right, step = a.data(), b.data(), 1 << 22
        return all(np.array_equal(left[i : i + step], right[i : i + step]) for i in range(0, left.size, step))
    indexes = np.array_split(np.arange(a.shape[0]), 1 + math.prod(a.shape) // (1 << 20))
    return all(np.array_equal(a.read(index), b.read(index), equal_nan=True) for index in indexes)


def _identity(name: str, paths: list[Path]) -> dict[str, Any]:
    """Over all files that a conversion reads, so that a new tokenizer or config makes another identity."""
    head, size, newest = hashlib.sha256(), 0, 0
    for path in paths:
        with BoundedFile(path) as file:
            head.update(file.read_at(0, min(file.size, 1 << 20)))
            size, newest = size + file.size, max(newest, file.mtime_ns)
    head.update(str(size).encode())
    return {
        "kind": "safetensors",
        "name": name,
        "size_bytes": size,
        "mtime_ns": newest,
        "sha256_head": head.hexdigest(),
    }


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    return {
        name: read_bytes(folder / name, cap, name) for name, cap in TOKENIZER_FILES.items() if (folder / name).exists()
    }
