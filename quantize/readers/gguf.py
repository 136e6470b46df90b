"""Reads GGUF, versions 2 and 3, little-endian: header, metadata, tensor table, and what they say about the model.

`read_gguf` checks the container (counts, lengths, alignment, overlaps) without knowing what the keys mean; `open_gguf`
makes a Source of it. Block types are gguf_types.py's affair, the vocabulary gguf_vocab.py's. Split files are refused.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import BoundedFile, Cursor, shown

from ..families import Family, Fields, base_config, bind, check_rope_scaling, find_family
from .gguf_types import GGUF_TYPES, OTHER_TYPES
from .source import Source, StoredTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16  # metadata entries, and tensors
MAX_ELEMENTS = 1 << 22  # of all metadata arrays together; the largest vocabularies with merges hold 1.5 million
MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = 255
MAX_ARRAY_DEPTH = 4
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4
MAX_SIDE = 1 << 40

# Metadata value types: number -> numpy's name of the fixed-size ones.
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "bool",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header holds together. metadata: Python scalars, strings and lists. tensors: by name."""

    file: BoundedFile
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: str | Path) -> GgufFile:
    """Opens a GGUF file and checks header, metadata and tensor table. Raises ModelFormatError naming the defect."""
    file = BoundedFile(path)
    cursor = Cursor(file)
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensor count", MAX_ENTRIES, 24)
    n_entries = _read_count(cursor, "metadata count", MAX_ENTRIES, 13)
    metadata = _Metadata(cursor).read(n_entries)
    alignment = _alignment(file, metadata)
    table = [_read_tensor_row(cursor) for _ in range(n_tensors)]
    tensors = _place_tensors(file, table, -(-cursor.offset // alignment) * alignment, alignment)
    return GgufFile(file, version, metadata, tensors)


def _read_version(cursor: Cursor) -> int:
    if cursor.left < 4 or (magic := cursor.bytes(4, "magic")) not in (MAGIC, MAGIC[::-1]):
        cursor.file.fail("does not start with GGUF; not a GGUF file")
    version = cursor.u32("version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if magic != MAGIC or (version not in VERSIONS and swapped in (1, *VERSIONS)):
        cursor.file.fail("is a big-endian GGUF file; only little-endian ones are supported, convert it first")
    if version not in VERSIONS:
        cursor.file.fail(f"is GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are supported")
    return version


def _read_count(cursor: Cursor, what: str, cap: int, least_bytes: int) -> int:
    """A u64 count of things that take at least `least_bytes` each; no count beyond the file's size gets through."""
    count = cursor.u64(what)
    if count > cap:
        cursor.fail(f"{what} is {count}, at most {cap} are allowed")
    if count * least_bytes > cursor.left:
        cursor.fail(f"{what} is {count}, more than the {cursor.left} bytes left can hold; truncated or damaged?")
    return count


class _Metadata:
    """The key-value section: typed values, arrays within arrays up to a depth, all counts bounded together."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.elements = 0

    def read(self, count: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for index in range(count):
            key = self.cursor.string(MAX_NAME_BYTES, f"key of metadata entry {index}")
            if not key:
                self.cursor.fail(f"metadata entry {index} has an empty key; damaged?")
            if key in out:
                self.cursor.fail(f"metadata key {shown(key)} appears twice")
            out[key] = self._value(self.cursor.u32(f"type of {shown(key)}"), f"metadata {shown(key)}", 0)
        return out

    def _value(self, kind: int, what: str, depth: int) -> Any:
        if kind == _STRING:
            return self.cursor.string(MAX_STRING_BYTES, what)
        if kind == _ARRAY:
            return self._array(what, depth + 1)
        (value,) = self._scalars(kind, 1, what)
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if _SCALARS[kind] == "<f4" else value

    def _array(self, what: str, depth: int) -> list[Any]:
        if depth > MAX_ARRAY_DEPTH:
            self.cursor.fail(f"{what}: arrays nest deeper than {MAX_ARRAY_DEPTH}")
        kind = self.cursor.u32(f"element type of {what}")
        least = 8 if kind == _STRING else 12 if kind == _ARRAY else self._item_bytes(kind, what)
        count = _read_count(self.cursor, f"{what}: element count", MAX_ELEMENTS, least)
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            self.cursor.fail(f"{what}: arrays hold more than {MAX_ELEMENTS} elements together")
        if kind == _STRING:
            return self.cursor.strings(count, MAX_STRING_BYTES, what)
        if kind == _ARRAY:
            return [self._array(what, depth + 1) for _ in range(count)]
        return self._scalars(kind, count, what)

    def _item_bytes(self, kind: int, what: str) -> int:
        if kind not in _SCALARS:
            self.cursor.fail(f"{what} has the unknown value type {kind}")
        return np.dtype(_SCALARS[kind]).itemsize

    def _scalars(self, kind: int, count: int, what: str) -> list[Any]:
        self._item_bytes(kind, what)
        if kind == 7:
            raw = self.cursor.array("u1", count, what)
            if count and raw.max() > 1:
                self.cursor.fail(f"{what} holds the byte {int(raw.max())}, expected 0 or 1 for a boolean")
            return list(raw.astype(bool).tolist())
        return list(self.cursor.array(_SCALARS[kind], count, what).tolist())


def _alignment(file: BoundedFile, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        file.fail(f"general.alignment is {shown(alignment)}, expected a power of two of 8 to {MAX_ALIGNMENT}")
    return alignment


@dataclass(frozen=True)
class _Row:
    name: str
    shape: tuple[int, ...]  # slowest dimension first, as numpy has it; the file has it the other way round
    kind: int
    offset: int


def _read_tensor_row(cursor: Cursor) -> _Row:
    name = cursor.string(MAX_NAME_BYTES, "tensor name")
    if not name:
        cursor.fail("a tensor has an empty name; damaged?")
    what = f"tensor {shown(name)}"
    n_dims = cursor.u32(f"{what}: dimension count")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{what} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
    sides = [cursor.u64(f"{what}: dimension") for _ in range(n_dims)]
    if not all(1 <= side <= MAX_SIDE for side in sides):
        cursor.fail(f"{what} has dimensions {sides}, expected 1 to {MAX_SIDE} each")
    while len(sides) > 2 and sides[-1] == 1:
        sides.pop()
    return _Row(name, tuple(reversed(sides)), cursor.u32(f"{what}: type"), cursor.u64(f"{what}: offset"))


def _place_tensors(file: BoundedFile, table: list[_Row], data_start: int, alignment: int) -> dict[str, StoredTensor]:
    """Checks types and sizes, and that tensors follow one another with nothing but padding between them."""
    tensors: dict[str, StoredTensor] = {}
    for row in table:
        if row.name in tensors:
            file.fail(f"tensor {shown(row.name)} appears twice")
        tensors[row.name] = _stored(file, row, data_start, alignment)
    at, previous = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < at:
            file.fail(f"tensor {shown(tensor.name)} overlaps {previous}: starts at byte {tensor.start}, expected {at}")
        if tensor.start - at >= alignment:
            file.fail(f"hole of {tensor.start - at} bytes between {previous} and tensor {shown(tensor.name)}")
        at, previous = tensor.start + tensor.n_bytes, f"tensor {shown(tensor.name)}"
    return tensors


def _stored(file: BoundedFile, row: _Row, data_start: int, alignment: int) -> StoredTensor:
    what = f"tensor {shown(row.name)}"
    kind = GGUF_TYPES.get(row.kind)
    if kind is None:
        named = OTHER_TYPES.get(row.kind, "unknown")
        readable = ", ".join(known.name for known in GGUF_TYPES.values())
        file.fail(f"{what} has type {named} ({row.kind}), which is not supported; this version reads {readable}")
    if row.shape[-1] % kind.block:
        file.fail(f"{what}: rows of {row.shape[-1]} weights are no multiple of {kind.name}'s block of {kind.block}")
    if row.offset % alignment:
        file.fail(f"{what} starts at offset {row.offset}, expected a multiple of the alignment {alignment}")
    n_bytes = math.prod(row.shape[:-1]) * kind.row_bytes(row.shape[-1])
    file.check(data_start + row.offset, n_bytes, what)
    return StoredTensor(file, row.name, kind.name, kind, row.shape, data_start + row.offset, n_bytes)


def open_gguf(path: str | Path) -> Source:
    """A GGUF file as a Source. Raises ModelFormatError for a damaged file or a model that this version cannot run."""
    gguf = read_gguf(path)
    where, metadata = str(path), gguf.metadata
    fields = Fields(metadata, where)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        fields.fail("general.architecture", f"found {shown(architecture)}, expected text")
    family = find_family("gguf", architecture, None, where)
    fields = Fields(_uniform(metadata, family, where), where, family.defaults)
    _refuse_variants(fields)
    config = base_config(family, fields, _vocab_size(fields, gguf, family))
    _check_variants(fields, config)
    config["rope_scaling"] = _rope_scaling(fields, gguf, config)
    config["tied_embeddings"] = family.outer["output"] not in gguf.tensors
    config["bos_token_id"] = fields.token("tokenizer.ggml.bos_token_id", config["vocab_size"])
    ends = [fields.token(f"tokenizer.ggml.{end}_token_id", config["vocab_size"]) for end in ("eos", "eot", "eom")]
    config["eos_token_ids"] = list(dict.fromkeys(end for end in ends if end is not None))
    biases = any(family.layer[bias].format(i=0) in gguf.tensors for bias in ("bq", "bk", "bv"))
    tensors = bind(family, config, gguf.tensors, where, biases=biases)
    return Source("gguf", config, tensors, {}, _identity(gguf.file), lambda: _tokenizer_files(metadata, where))


def _uniform(metadata: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Metadata in which a dimension given layer by layer is one number, as long as all layers agree."""
    out = dict(metadata)
    for name in ("hidden_dim", "n_heads", "n_kv_heads"):
        key = family.keys[name]
        value = out.get(key)
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise ModelFormatError(f"{where}: {key}: differs between layers, which is not supported")
            out[key] = value[0]
    return out


def _refuse_variants(fields: Fields) -> None:
    """Refuses what shares the name "llama" but computes something else."""
    if fields.integer("split.count", 0, 1 << 16, 0) > 1:
        fields.fail("split.count", "this is one part of a split model; merge the parts into one file first")
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if fields.integer(key, 0, 1 << 32, 0):
            fields.fail(key, f"found {fields.get(key)}, only 0 is supported in this version")
    for key in (
        "llama.attention.clamp_kqv",
        "llama.attention.max_alibi_bias",
        "llama.rope.scaling.yarn_log_multiplier",
    ):
        if fields.number(key, -1e30, 1e30, 0.0):
            fields.fail(key, f"found {fields.get(key)}, only 0 is supported in this version")


def _check_variants(fields: Fields, config: dict[str, Any]) -> None:
    """Fields that repeat what the config already says must agree with it."""
    head_dim = config["head_dim"]
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.integer(key, 1, 1 << 20, head_dim) != head_dim:
            fields.fail(key, f"found {fields.get(key)}, expected the head's {head_dim}; other sizes are not supported")
    scale = fields.number("llama.attention.scale", 0.0, 1e6, 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        fields.fail("llama.attention.scale", f"found {scale}, only 1/sqrt(head_dim) is supported")


def _vocab_size(fields: Fields, gguf: GgufFile, family: Family) -> int | None:
    """The number of the vocabulary's tokens where one is given; else the config's, else the embedding's rows."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is not None:
        if not isinstance(tokens, list) or not tokens:
            fields.fail("tokenizer.ggml.tokens", "expected a list of strings with at least one")
        return len(tokens)
    embedding = gguf.tensors.get(family.outer["tok_embeddings"])
    return embedding.shape[0] if fields.get(family.keys["vocab_size"]) is None and embedding else None


def _rope_scaling(fields: Fields, gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """rope_scaling in Hugging Face's words, or rope_type "factors": frequency i is divided by factors[i]."""
    prefix = "llama.rope.scaling."
    kind = fields.get(prefix + "type")
    factor = (
        fields.number(prefix + "factor", 0.0, 1e6, 0.0)
        or fields.number("llama.rope.scale_linear", 0.0, 1e6, 0.0)
        or 1.0
    )
    if kind not in (None, "none", "linear", "yarn"):
        fields.fail(prefix + "type", f"found {shown(kind)}, this version knows none, linear and yarn")
    factors = gguf.tensors.get("rope_freqs.weight")
    if kind == "yarn":
        if factors is not None:
            fields.fail(prefix + "type", "yarn together with the tensor rope_freqs.weight is not supported")
        return check_rope_scaling(_yarn(fields, prefix, factor), f"{fields.where}: {prefix[:-1]}")
    if fields.number(prefix + "attn_factor", 0.0, 1e6, 1.0) != 1.0:
        fields.fail(prefix + "attn_factor", "found without yarn, which is not supported")
    linear = factor if kind != "none" else 1.0
    if factors is not None:
        return _rope_factors(fields, factors, config["head_dim"] // 2, linear)
    scaling = {"rope_type": "linear", "factor": linear} if linear != 1.0 else None
    return check_rope_scaling(scaling, f"{fields.where}: {prefix[:-1]}")


def _yarn(fields: Fields, prefix: str, factor: float) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if fields.get(prefix + "original_context_length") is not None:
        out["original_max_position_embeddings"] = fields.integer(prefix + "original_context_length", 1, 1 << 26)
    extra = fields.number(prefix + "attn_factor", 1e-6, 1e6, 1.0)
    if extra != 1.0:  # there it multiplies YaRN's own factor, in Hugging Face's config it replaces it
        out["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0)
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if fields.get(prefix + theirs) is not None:
            out[ours] = fields.number(prefix + theirs, 1e-6, 1e6)
    if fields.number(prefix + "yarn_ext_factor", -1.0, 1.0, 1.0) not in (-1.0, 1.0):
        fields.fail(prefix + "yarn_ext_factor", f"found {fields.get(prefix + 'yarn_ext_factor')}, only 1 is supported")
    return out


def _rope_factors(fields: Fields, stored: StoredTensor, pairs: int, linear: float) -> dict[str, Any] | None:
    if stored.type_name != "F32" or stored.shape != (pairs,):
        raise ModelFormatError(
            f"{fields.where}: tensor rope_freqs.weight is {stored.type_name} {list(stored.shape)},"
            f" expected F32 [{pairs}]"
        )
    values = stored.data().view("<f4").astype(np.float64) * linear
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ModelFormatError(
            f"{fields.where}: tensor rope_freqs.weight holds factors that are not finite and positive"
        )
    return None if np.all(values == 1.0) else {"rope_type": "factors", "factors": values.tolist()}


def _identity(file: BoundedFile) -> dict[str, Any]:
    head = hashlib.sha256(file.read_at(0, min(file.size, 1 << 20)))
    head.update(str(file.size).encode())
    return {
        "kind": "gguf",
        "name": os.path.basename(os.path.abspath(file.path)),  # a link's own name: in a cache, its target's is a hash
        "size_bytes": file.size,
        "mtime_ns": file.mtime_ns,
        "sha256_head": head.hexdigest(),
    }


def _tokenizer_files(metadata: dict[str, Any], where: str) -> dict[str, bytes]:
    from .gguf_vocab import tokenizer_files

    try:
        return tokenizer_files(metadata)
    except ModelFormatError as error:  # it knows no file
        raise ModelFormatError(f"{where}: {error}") from None
