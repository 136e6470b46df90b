"""Models split over several GGUF files, `name-00001-of-00003.gguf` and so on: opened from any of their parts.

Each part is a GGUF file with a number of its own; the first has the model's metadata, the others say only which part
they are. What names, counts and numbers say must agree: a part that is missing, swapped, copied twice or another
model's is an error that names it. Knows nothing about what is inside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import shown

from .gguf_file import MAX_ENTRIES, GgufFile, read_gguf

MAX_PARTS = 999  # the largest models have some hundred; each is an open file
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class _Claim:
    """What a part says about itself: its number from 0, the number of parts, and of the tensors of all parts."""

    number: int
    count: int
    n_tensors: int


def read_gguf_parts(path: str | Path) -> GgufFile:
    """A GGUF file, or all files of the split model that it is a part of, as one. Raises ModelFormatError."""
    path = Path(path)
    opened = read_gguf(path)
    if opened.metadata.get("split.count", 0) in (0, 1):
        return opened
    claim = _claim(path, opened.metadata)
    names = part_names(path.name)
    if len(names) != claim.count:
        raise ModelFormatError(
            f"{path}: is part {claim.number + 1} of a model in {claim.count} files, whose names must be like"
            f" model-00001-of-{claim.count:05}.gguf"
        )
    files: list[GgufFile] = []
    n_tensors = 0
    for number, name in enumerate(names):
        part = opened if name == path.name else _read_part(path.with_name(name), number, claim)
        _check_part(path.with_name(name), part, number, claim)
        n_tensors += len(part.tensors)
        if n_tensors > claim.n_tensors:  # before the next part is read, so that many parts cannot take much memory
            raise ModelFormatError(
                f"{path.with_name(name)}: parts 1 to {number + 1} hold {n_tensors} tensors, more than the"
                f" {claim.n_tensors} that the model has"
            )
        files.append(part)
    return _together(path, files, claim)


def part_names(name: str) -> list[str]:
    """The file names of all parts, from the name of any; [] for a name that is none of a part's."""
    found = _NAME.fullmatch(name)
    if not found or not 1 <= int(found["number"]) <= int(found["count"]) <= MAX_PARTS:
        return []
    return [f"{found['stem']}-{number + 1:05}-of-{found['count']}.gguf" for number in range(int(found["count"]))]


def _claim(path: Path, metadata: dict[str, Any]) -> _Claim:
    def integer(key: str, high: int) -> int:
        value = metadata.get(key)
        if type(value) is not int or not 0 <= value <= high:
            raise ModelFormatError(f"{path}: {key}: found {shown(value)}, expected an integer of 0 to {high}")
        return value

    count = integer("split.count", MAX_PARTS)
    return _Claim(integer("split.no", MAX_PARTS), count, integer("split.tensors.count", MAX_ENTRIES))


def _read_part(path: Path, number: int, claim: _Claim) -> GgufFile:
    if not path.exists():
        raise ModelFormatError(
            f"{path}: is missing: part {number + 1} of {claim.count}; put all parts of the model into one folder"
        )
    return read_gguf(path)


def _check_part(path: Path, part: GgufFile, number: int, claim: _Claim) -> None:
    found = _claim(path, part.metadata)
    if (found.number, found.count) != (number, claim.count):
        raise ModelFormatError(
            f"{path}: says that it is part {found.number + 1} of {found.count}, expected part {number + 1} of"
            f" {claim.count}; was it renamed or copied over another part?"
        )
    if found.n_tensors != claim.n_tensors:
        raise ModelFormatError(
            f"{path}: says that the model has {found.n_tensors} tensors, other parts say {claim.n_tensors}; it belongs"
            " to another model"
        )


def _together(path: Path, files: list[GgufFile], claim: _Claim) -> GgufFile:
    tensors = dict(files[0].tensors)
    for part in files[1:]:
        for name, tensor in part.tensors.items():
            first = tensors.setdefault(name, tensor)
            if first is not tensor:
                raise ModelFormatError(f"{tensor.where}: tensor {shown(name)} is in {first.where} already")
    if len(tensors) != claim.n_tensors:
        raise ModelFormatError(
            f"{path}: the model's {claim.count} parts hold {len(tensors)} tensors, expected {claim.n_tensors}; a part"
            " belongs to another model or is damaged"
        )
    opened = tuple(file for part in files for file in part.files)
    return GgufFile(opened, files[0].version, files[0].metadata, tensors)
