"""Reads the tensors of a PyTorch checkpoint (.pth, .pt, .bin) where they lie, without PyTorch and without pickle.

The file is a zip (zip_stored.py) with a pickle that describes the tensors (pickles.py) and an entry of bytes for each
storage. A tensor is a window into a storage: an offset, a shape and strides, checked here against the storage's true
size. Nothing is copied or decoded until rows are asked for. Files older than torch 1.6 hold no zip and are refused, as
is anything that holds more than a dict of tensors.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import Packed
from pyllama.common.reader import BoundedFile, shown
from pyllama.common.safetensors import DTYPES

from .pickles import MAX_PICKLE_BYTES, Name, describe, read_pickle
from .source import DENSE_TYPES, NUMBERS, Array, Grid, Index, Rows, StoredTensor, StoredType, consecutive, copy_columns
from .zip_stored import Entry, read_zip

MAX_DIMENSIONS = 8
MAX_SHARED = 1 << 10  # numbers of a storage that any number of tensors may share

# torch's storage classes -> safetensors' name of a number there; DENSE_TYPES says which of them a model may have.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class _Storage:
    """Numbers of one type, one behind the other; `entry` holds exactly these."""

    key: str
    type_name: str
    item_bytes: int
    count: int
    entry: Entry


@dataclass(frozen=True)
class _Tensor:
    """A window into a storage, checked to lie within it. offset, strides: in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        step = 1
        for side, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if side != 1 and stride != step:
                return False
            step *= side
        return True


class StridedTensor(Rows):
    """A matrix or vector whose numbers do not lie one behind the other, such as a transposed one."""

    def __init__(self, name: str, file: BoundedFile, tensor: _Tensor, kind: StoredType) -> None:
        self.name = name
        self.type_name = tensor.storage.type_name
        self.shape = tensor.shape
        self.n_bytes = math.prod(tensor.shape) * tensor.storage.item_bytes
        self._file, self._tensor, self._kind = file, tensor, kind

    @property
    def where(self) -> str:
        return str(self._file.path)

    @property
    def grid(self) -> Grid | None:
        return self._kind.grid if len(self.shape) == 2 else None

    def read(self, index: Index) -> NDArray[np.float32]:
        taken = self._taken(index)
        return self._kind.decode(_as_bytes(taken)).reshape(taken.shape)

    def read_packed(self, index: Index) -> Packed:
        if self.grid is None or self._kind.repack is None:
            return super().read_packed(index)
        return self._kind.repack(_as_bytes(self._taken(index)))

    def release(self) -> None:
        self._file.release()

    def _taken(self, index: Index) -> Array:
        self.check()
        storage = self._tensor.storage
        data = self._file.map(storage.entry.start, storage.entry.size, what=f"tensor {shown(self.name)}")
        item = storage.item_bytes
        view: Array = np.ndarray(  # checks once more that it stays within `data`
            self.shape,
            NUMBERS[storage.type_name],
            data.data,
            self._tensor.offset * item,
            tuple(stride * item for stride in self._tensor.strides),
        )
        if view.ndim == 2 and view.strides[0] < view.strides[1]:  # rows are columns of what lies in the file
            return np.ascontiguousarray(copy_columns(self._file, view.T, index).T)
        return np.ascontiguousarray(view[consecutive(index)])


def _as_bytes(values: Array) -> Array:
    """Contiguous numbers as uint8 [n, row_bytes]; a vector is one row."""
    rows = values if values.ndim == 2 else values.reshape(1, -1)
    return rows.view(np.uint8)


def read_torch(path: Path) -> dict[str, Rows]:
    """The tensors of a file that torch.save wrote from a dict of tensors (a state_dict), by name, in its order.

    Raises ModelFormatError for another kind of file, for one that names anything but tensors, and for any damage.
    """
    file = BoundedFile(path)
    if file.size < 4 or file.read_at(0, 4) != b"PK\3\4":
        _refuse_other(file)
    return _TorchFile(file).tensors()


def archive_name(path: Path) -> str:
    """The folder inside the zip, which torch.save names after the file that it writes."""
    with BoundedFile(path) as file:
        return _archive_name(file, read_zip(file))


def _refuse_other(file: BoundedFile) -> None:
    start = file.read_at(0, min(file.size, 32))
    if start[:1] == b"\x80" or b"ustar" in file.read_at(0, min(file.size, 512)):
        file.fail(
            "is a PyTorch file of before version 1.6, which only unpickling could read; where you trust it, load it"
            " with torch.load and save it again with torch.save, or as safetensors"
        )
    file.fail(f"starts with {shown(start[:4])}, expected a zip file as torch.save writes it")


def _archive_name(file: BoundedFile, entries: dict[str, Entry]) -> str:
    folders = [name.split("/")[0] for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        file.fail(f"holds {len(folders)} entries called data.pkl, expected the one of a PyTorch checkpoint")
    return folders[0]


class _TorchFile:
    def __init__(self, file: BoundedFile) -> None:
        self._file = file
        self._entries = read_zip(file)
        self._folder = _archive_name(file, self._entries)
        self._storages: dict[str, _Storage] = {}

    def tensors(self) -> dict[str, Rows]:
        file, folder = self._file, self._folder
        if f"{folder}/constants.pkl" in self._entries:
            file.fail("is a TorchScript program, not a checkpoint; save its state_dict with torch.save")
        order = self._small("byteorder", b"little")
        if order != b"little":
            file.fail(f"was written in the byte order {shown(order)}, only 'little' is supported")
        entry = self._entries[f"{folder}/data.pkl"]
        if entry.size > MAX_PICKLE_BYTES:
            file.fail(f"data.pkl holds {entry.size} bytes, at most {MAX_PICKLE_BYTES} are allowed")
        data = file.read_at(entry.start, entry.size)
        if entry.crc and zlib.crc32(data) != entry.crc:
            file.fail("data.pkl does not have the CRC that the zip directory says; the file is damaged")
        found = read_pickle(data, f"{file.path}: data.pkl", self._names(), self._storage)
        if type(found) is not dict:
            file.fail(f"holds a {describe(found)}, expected a dict of tensors; save model.state_dict()")
        tensors = {self._checked_name(name, value): value for name, value in found.items()}
        self._check_shared(tensors)
        return {name: self._rows(name, tensor) for name, tensor in tensors.items()}

    def _small(self, name: str, default: bytes) -> bytes:
        """An entry of a few bytes."""
        entry = self._entries.get(f"{self._folder}/{name}")
        return default if entry is None else self._file.read_at(entry.start, min(entry.size, 16))

    def _names(self) -> dict[str, Name]:
        """What a dict of tensors needs to name."""
        names = {f"torch {name}": Name(name) for name in _STORAGES}
        names["collections OrderedDict"] = Name("OrderedDict", _ordered_dict)
        names["torch._utils _rebuild_tensor_v2"] = Name("_rebuild_tensor_v2", _tensor)
        names["torch._utils _rebuild_parameter"] = Name("_rebuild_parameter", _parameter)
        return names

    def _storage(self, key: tuple[Any, ...]) -> _Storage:
        """A persistent id: ("storage", class, entry, device, numbers)."""
        types = [type(part) for part in key]
        if types != [str, Name, str, str, int] or key[0] != "storage" or key[1].name not in _STORAGES:
            raise ModelFormatError(f"a storage named by {describe(key)} of {', '.join(map(describe, key[:8]))}")
        number, count = shown(key[2]), key[4]
        type_name = _STORAGES[key[1].name]
        item_bytes = DTYPES[type_name]
        entry = self._entries.get(f"{self._folder}/data/{key[2]}")
        if entry is None:
            raise ModelFormatError(f"storage {number} is not in the file")
        if count * item_bytes != entry.size:
            raise ModelFormatError(
                f"storage {number} claims {count} numbers of {type_name}, {count * item_bytes} bytes; it holds"
                f" {entry.size}"
            )
        storage = _Storage(key[2], type_name, item_bytes, count, entry)
        if self._storages.setdefault(key[2], storage) != storage:
            raise ModelFormatError(
                f"storage {number} is {type_name} here and {self._storages[key[2]].type_name} before"
            )
        return storage

    def _checked_name(self, name: Any, value: Any) -> str:
        if type(name) is not str or not name:
            self._file.fail(f"holds an entry called {shown(name)}, expected the name of a tensor")
        if type(value) is not _Tensor:
            self._file.fail(
                f"entry {shown(name)} is a {describe(value)}, expected a tensor; save model.state_dict() alone"
            )
        return name

    def _check_shared(self, tensors: dict[str, _Tensor]) -> None:
        """Raises where a small file would become a large model: every number may belong to two tensors on the average,
        as with a head that is the embedding; small storages, such as tables of all layers, to any number of them.
        """
        used: dict[str, int] = {}
        for name, tensor in tensors.items():
            storage = tensor.storage
            used[storage.key] = used.get(storage.key, 0) + math.prod(tensor.shape)
            if storage.count > MAX_SHARED and used[storage.key] > 2 * storage.count:
                self._file.fail(
                    f"tensor {shown(name)} and others before it take {used[storage.key]} numbers of storage"
                    f" {shown(storage.key)}, which holds {storage.count}; expected at most each twice, so save them"
                    " with .clone()"
                )

    def _rows(self, name: str, tensor: _Tensor) -> Rows:
        storage = tensor.storage
        kind = DENSE_TYPES.get(storage.type_name)
        if not tensor.is_contiguous and kind is not None:
            return StridedTensor(name, self._file, tensor, kind)
        start = storage.entry.start + tensor.offset * storage.item_bytes
        n_bytes = math.prod(tensor.shape) * storage.item_bytes
        return StoredTensor(self._file, name, storage.type_name, kind, tensor.shape, start, n_bytes)


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ModelFormatError(f"{len(arguments)} arguments, expected none")
    return {}


def _parameter(arguments: tuple[Any, ...]) -> _Tensor:
    """(tensor, requires_grad, hooks) -> the tensor."""
    if len(arguments) != 3 or type(arguments[0]) is not _Tensor:
        raise ModelFormatError(f"{len(arguments)} arguments, expected a tensor, requires_grad and hooks")
    return arguments[0]


def _tensor(arguments: tuple[Any, ...]) -> _Tensor:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata]), checked to lie within the storage."""
    if not 6 <= len(arguments) <= 7 or type(arguments[0]) is not _Storage:
        raise ModelFormatError(f"{len(arguments)} arguments, expected a storage, offset, shape, strides and two more")
    storage, offset, shape, strides = arguments[:4]
    if len(arguments) == 7 and arguments[6]:
        raise ModelFormatError("a tensor with conjugate, negative or other bits set; save it with .resolve_neg()")
    for what, numbers in (("offset", (offset,)), ("shape", shape), ("strides", strides)):
        if type(numbers) is not tuple or len(numbers) > MAX_DIMENSIONS:
            raise ModelFormatError(f"{what}: a {describe(numbers)}, expected a tuple of at most {MAX_DIMENSIONS}")
        if any(type(number) is not int or number < 0 for number in numbers):
            found = ", ".join(shown(number) if type(number) in (int, float) else describe(number) for number in numbers)
            raise ModelFormatError(f"{what}: expected numbers from 0 up, found {found}")
    if len(shape) != len(strides):
        raise ModelFormatError(f"a shape of {len(shape)} numbers with {len(strides)} strides")
    if 0 in shape or math.prod(shape) > storage.count:
        raise ModelFormatError(
            f"a tensor of shape {list(shape)} over a storage of {storage.count} numbers, expected each of its own; save"
            " it with .contiguous()"
        )
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if last >= storage.count:
        raise ModelFormatError(
            f"shape {list(shape)} with strides {list(strides)} from {offset} reaches number {last}, but storage"
            f" {shown(storage.key)} holds {storage.count}"
        )
    return _Tensor(storage, offset, shape, strides)
