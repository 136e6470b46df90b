"""Reads the safetensors container: a JSON header, then the tensors' bytes, mapped and not copied.

The header is parsed by its own small grammar instead of as JSON at large, so that a hostile one can cost neither deep
recursion nor memory beyond a few times its own size. Each defect has one error that names the tensor.
This module knows nothing of models or of what the bytes mean; writing is quantize/writer.py's affair.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import ModelFormatError
from .reader import BoundedFile, Bytes, shown, unique_keys

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8

# Bytes of one element.
DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}

_SPACE = re.compile(r"[ \t\n\r]*")
_ENTRY = re.compile(r"\{[^{}]{0,4096}\}")  # a tensor's description holds no object within it
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [start, end) of the file, counted from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """An opened safetensors file. `tensors` keeps the header's order; payloads start at offset `data_start`."""

    file: BoundedFile
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int

    def data(self, name: str) -> Bytes:
        """The payload of `name`, uint8, read-only, mapped without a copy (or an aligned copy where maps are off)."""
        info = self.tensors.get(name)
        if info is None:
            self.file.fail(f"holds no tensor {shown(name)}")
        return self.file.map(info.start, info.end - info.start, what=f"tensor {shown(name)}")


def read_safetensors(path: str | os.PathLike[str], *, use_mmap: bool = True) -> SafetensorsFile:
    """Opens a safetensors file and checks its whole header. Raises ModelFormatError naming file and defect."""
    file = BoundedFile(path, use_mmap=use_mmap)
    if file.size < 8:
        file.fail(f"holds {file.size} bytes; a safetensors file starts with 8 bytes of header length")
    (header_bytes,) = struct.unpack("<Q", file.read_at(0, 8, "header length"))
    if header_bytes > MAX_HEADER_BYTES:
        file.fail(
            f"header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed; not a safetensors file?"
        )
    if header_bytes > file.size - 8:
        file.fail(f"header claims {header_bytes} bytes, the file holds {file.size - 8} after its length; truncated?")
    try:
        text = str(file.map(8, header_bytes, what="header").data, "utf-8")
    except UnicodeDecodeError as error:
        file.fail(f"header is not valid UTF-8: {error.reason} at its byte {error.start}")
    header = _Header(file, text, 8 + header_bytes)
    header.parse()
    _check_layout(file, header.tensors, 8 + header_bytes)
    return SafetensorsFile(file, header.metadata, header.tensors, 8 + header_bytes)


class _Header:
    """The header's grammar: one object of tensor descriptions, and of `__metadata__`, which maps strings to strings."""

    def __init__(self, file: BoundedFile, text: str, data_start: int) -> None:
        self.file = file
        self.text = text
        self.data_start = data_start
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.at = 0

    def parse(self) -> None:
        names: set[str] = set()
        if self._peek() != "{":
            self._fail("is not a JSON object")
        self.at += 1
        while self._next_member(first=not names, closer="}"):
            name = self._string("a tensor's name")
            self._expect(":")
            if name in names:
                self._fail(f"names {shown(name)} twice")
            names.add(name)
            if name == "__metadata__":
                self.metadata = self._metadata()
            else:
                self.tensors[name] = self._tensor(name)
        if self._peek():
            self._fail("goes on after its closing brace")

    def _metadata(self) -> dict[str, str]:
        out: dict[str, str] = {}
        if self._peek() != "{":
            self._fail("has a __metadata__ that is not an object")
        self.at += 1
        while self._next_member(first=not out, closer="}"):
            key = self._string("a key of __metadata__")
            self._expect(":")
            if key in out:
                self._fail(f"has the key {shown(key)} twice in __metadata__")
            out[key] = self._string(f"the value of {shown(key)} in __metadata__")
        return out

    def _tensor(self, name: str) -> TensorInfo:
        self._peek()
        match = _ENTRY.match(self.text, self.at)
        if match is None:
            self._fail(f"describes tensor {shown(name)} by something else than a small flat object")
        entry = match.group()
        if entry.count("[") > 2:
            self._fail(f"describes tensor {shown(name)} by more lists than shape and data_offsets")
        try:
            value = json.loads(entry, object_pairs_hook=unique_keys(f"{self.file.path}: tensor {shown(name)}"))
        except (ValueError, RecursionError) as error:
            self._fail(f"is not valid JSON at tensor {shown(name)}: {error}")
        self.at = match.end()
        return _tensor_info(self.file, name, value, self.data_start)

    def _peek(self) -> str:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1]

    def _expect(self, char: str) -> None:
        if self._peek() != char:
            self._fail(f"is not valid JSON: expected {char!r}")
        self.at += 1

    def _next_member(self, first: bool, closer: str) -> bool:
        """Steps over the comma before the next member; False, and past the closer, when there is none."""
        char = self._peek()
        if char == closer:
            self.at += 1
            return False
        if not first:
            self._expect(",")
            self._peek()
        return True

    def _string(self, what: str) -> str:
        if self._peek() != '"':
            self._fail(f"is not valid JSON: expected {what} as a string")
        try:
            value, self.at = _decoder.raw_decode(self.text, self.at)
            value.encode("utf-8")
        except ValueError as error:  # also a lone surrogate, which no file may be named after
            self._fail(f"is not valid JSON in {what}: {error}")
        return str(value)

    def _fail(self, message: str) -> NoReturn:
        self.file.fail(f"header {message} (character {self.at} of the header)")


def _tensor_info(file: BoundedFile, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Checks one description; offsets in the header count from the first payload byte."""
    label = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        file.fail(f"{label}: expected exactly dtype, shape and data_offsets, found {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        file.fail(f"{label}: unknown dtype {shown(dtype)}; known are {' '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in shape):
        file.fail(f"{label}: shape {shown(shape)} is not a list of at most {MAX_DIMS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        file.fail(f"{label}: data_offsets {shown(offsets)} are not two positions")
    start, end = offsets
    if start > end or end > file.size - data_start:
        held = file.size - data_start
        file.fail(
            f"{label}: data_offsets [{start}, {end}] do not fit in the {held} bytes of data; truncated or damaged?"
        )
    n_bytes = DTYPES[dtype]
    for n in shape:  # Python's integers do not wrap, and eight factors below 2^63 stay small numbers
        n_bytes *= n
    if n_bytes != end - start:
        file.fail(f"{label}: {dtype} {shape} takes {n_bytes} bytes, its data_offsets span {end - start}")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n < 2**63


def _check_layout(file: BoundedFile, tensors: dict[str, TensorInfo], data_start: int) -> None:
    """The payloads must cover the rest of the file, each byte once."""
    at, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < at:
            file.fail(f"tensor {shown(name)} overlaps {previous}: starts at byte {info.start}, expected {at}")
        if info.start > at:
            file.fail(f"hole of {info.start - at} bytes between {previous} and tensor {shown(name)}")
        at, previous = info.end, f"tensor {shown(name)}"
    if at != file.size:
        file.fail(f"{file.size - at} bytes follow {previous} and belong to no tensor")


__all__ = ["DTYPES", "ModelFormatError", "SafetensorsFile", "TensorInfo", "read_safetensors"]
