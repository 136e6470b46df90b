"""The weight files of a Hugging Face folder: one file, or shards with an index, in safetensors or as torch.save's.

Where both are there, safetensors are taken. Every tensor must lie where the index says, and every tensor that it lists
must be there. What the names mean is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import read_json, shown
from pyllama.common.safetensors import SafetensorsFile, read_safetensors

from .source import DENSE_TYPES, Rows, StoredTensor
from .torch_file import read_torch

MAX_INDEX_BYTES = 1 << 24
MAX_SHARDS = 4096
MAX_NAME_BYTES = 255  # what file systems allow


def safetensors_rows(file: SafetensorsFile) -> dict[str, StoredTensor]:
    """The tensors of an opened file; what is no number of ours has `trouble`."""
    return {
        name: StoredTensor(
            file.file, name, info.dtype, DENSE_TYPES.get(info.dtype), info.shape, info.start, info.end - info.start
        )
        for name, info in file.tensors.items()
    }


@dataclass(frozen=True)
class _Container:
    """How the files of a container are called. pattern: of a folder's only file, when it has another name."""

    single: str
    index: str
    suffix: str
    pattern: str
    read: Callable[[Path], Mapping[str, Rows]]


_SAFETENSORS = _Container(
    "model.safetensors",
    "model.safetensors.index.json",
    ".safetensors",
    "*.safetensors",
    lambda path: safetensors_rows(read_safetensors(path)),
)
_TORCH = _Container("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", "pytorch_model*.bin", read_torch)


def is_shard(path: Path) -> bool:
    """Whether a weight file is called like one of several, and an index lies beside it."""
    index = (_SAFETENSORS if path.suffix == _SAFETENSORS.suffix else _TORCH).index
    return re.search(r"-\d{5}-of-\d{5}$", path.stem) is not None and (path.parent / index).exists()


def read_weights(folder: Path, single: Path | None = None) -> tuple[list[Path], dict[str, Rows]]:
    """The weight files of a folder, or the one that was asked for, and all tensors in them. Raises ModelFormatError."""
    if single is not None:
        container = _SAFETENSORS if single.suffix == _SAFETENSORS.suffix else _TORCH
        return [single], dict(container.read(single))
    container = _container(folder)
    paths, index = _weight_files(folder, container)
    return paths, _load(container, paths, index)


def _container(folder: Path) -> _Container:
    has_safetensors = (folder / _SAFETENSORS.index).exists() or any(folder.glob(_SAFETENSORS.pattern))
    has_torch = (folder / _TORCH.index).exists() or any(folder.glob(_TORCH.pattern))
    return _TORCH if has_torch and not has_safetensors else _SAFETENSORS


def _weight_files(folder: Path, container: _Container) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder, and the index's map from tensor to file if there is one."""
    if (folder / container.single).exists():
        return [folder / container.single], None
    if (folder / container.index).exists():
        index = _read_index(folder / container.index, container.suffix)
        paths = [folder / name for name in sorted(set(index.values()))]
        for path in paths:
            if not path.exists():
                count = sum(name == path.name for name in index.values())
                raise ModelFormatError(f"{path}: is missing; {container.index} lists it for {count} tensors")
        return paths, index
    found = sorted(folder.glob(container.pattern))
    if not found:
        raise ModelFormatError(
            f"{folder}: expected weights in safetensors ({_SAFETENSORS.single}, {_SAFETENSORS.index}) or PyTorch's"
            f" {_TORCH.pattern}, found none"
        )
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:8])
        raise ModelFormatError(
            f"{folder}: expected {container.single}, {container.index} or a single {container.pattern} file,"
            f" found {names}"
        )
    return found, None


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{path}: weight_map: expected an object that maps tensors to files")
    for tensor, name in weight_map.items():
        if not _is_file_name(name, suffix):
            raise ModelFormatError(
                f"{path}: {shown(tensor)} lies in {shown(name)}, expected a {suffix} file in this folder"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise ModelFormatError(f"{path}: lists {len(set(weight_map.values()))} files, at most {MAX_SHARDS} are allowed")
    return weight_map


def _is_file_name(name: object, suffix: str) -> bool:
    """A name in this folder that can be looked for and shown as it is: nothing that moves a terminal's cursor."""
    if not isinstance(name, str) or not name.endswith(suffix) or set(name) & set("/\\"):
        return False
    return name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES


def _load(container: _Container, paths: list[Path], index: dict[str, str] | None) -> dict[str, Rows]:
    """All tensors of the files; with an index, each must lie where the index says, and none may be left out of it."""
    stored: dict[str, Rows] = {}
    for path in paths:
        for name, rows in container.read(path).items():
            if index is not None and index.get(name) != path.name:
                listed = (
                    f"{container.index} says {shown(index[name])}"
                    if name in index
                    else f"{container.index} does not list it"
                )
                raise ModelFormatError(f"{path}: holds tensor {shown(name)}, but {listed}")
            stored[name] = rows
    for name, shard in (index or {}).items():
        if name not in stored:
            raise ModelFormatError(
                f"{paths[0].parent / shard}: tensor {shown(name)} is not in it, though {container.index} says so"
            )
    return stored
