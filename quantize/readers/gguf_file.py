"""Reads GGUF files, versions 2 and 3, little-endian: header, metadata and tensor table.

Everything is checked (counts, lengths, alignment, overlaps) without knowing what the keys mean. Block types are
gguf_types.py's affair, models in several files gguf_split.py's, and what the metadata say about the model gguf.py's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyllama.common.reader import BoundedFile, Cursor, shown

from .gguf_types import GGUF_TYPES, OTHER_TYPES
from .source import StoredTensor

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
    """A GGUF file whose header holds together. metadata: Python scalars, strings and lists. tensors: by name.

    files: one, or the parts of a split model in order; metadata are those of the first.
    """

    files: tuple[BoundedFile, ...]
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
    return GgufFile((file,), version, metadata, tensors)


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
