"""What every reader hands over: a Source of SourceTensors with canonical names; where their numbers come from.

`Rows` is a tensor as the source has it: bytes of a container (`StoredTensor`), some rows of another tensor (`Slice`),
parts of several (`Joined`), or whatever a reader computes. It stays where it lies in its mapped file until somebody
asks for some of its rows. `SourceTensor` is what conversion sees: values in the order of docs/FORMAT.md, checked to be
finite once for everything behind, made in steps of a few MiB whatever the tensor's size. No file format is known here.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import Packed, TensorSpec, from_bf16
from pyllama.common.reader import BoundedFile, shown

from ..kernels import widen_f16

Array = NDArray[Any]
Index = NDArray[np.intp]
_STEP_WEIGHTS = 1 << 20  # weights decoded at a time: 4 MiB of float32
_PASSED_BYTES = 1 << 22  # of a mapped matrix, looked through for its columns before its pages are let go of


@dataclass(frozen=True)
class Grid:
    """The format of ours that holds a tensor's values; fields as in TensorSpec.

    exact: the same values. Otherwise codes are taken over, and scales and offsets rounded to what the format stores.
    """

    format: str
    group: int = 0
    scale: str = "f16"
    offset: str = ""
    codebook: tuple[int, ...] = ()
    input_order: bool = False
    exact: bool = True

    def spec(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """A tensor of this grid."""
        return TensorSpec(
            name,
            self.format,
            shape,
            group=self.group,
            scale=self.scale,
            offset=self.offset,
            codebook=self.codebook,
            input_order=self.input_order,
        )


class Rows(ABC):
    """A tensor as its source has it. A matrix [N, K] has N rows; a vector [N] has N rows of one number.

    name: in the source. type_name: the source's own name of its type, as `Q4_1`. where: the path for messages.
    n_bytes: its size there. Reading what has `trouble` raises ModelFormatError, before its shape is relied on.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    @abstractmethod
    def where(self) -> str: ...

    @property
    def trouble(self) -> str:
        """What keeps this from being a tensor of a model, in words; "" if nothing does. Containers hold any others."""
        if 1 <= len(self.shape) <= 2 and all(self.shape):
            return ""
        return f"shape {list(self.shape)}, expected that of a matrix or a vector with numbers in it"

    def check(self) -> None:
        """Raises ModelFormatError where there is `trouble`."""
        if self.trouble:
            raise ModelFormatError(f"{self.where}: tensor {shown(self.name)} has {self.trouble}")

    @property
    def grid(self) -> Grid | None:
        """The grid of ours that it lies on, if there is one; always None for vectors."""
        return None

    @abstractmethod
    def read(self, index: Index) -> NDArray[np.float32]:
        """The rows `index` as float32 [len(index), K], of a vector [len(index)]; possibly not finite."""

    def read_packed(self, index: Index) -> Packed:
        """Codes, scales and offsets of the rows `index`, on `grid`; possibly not finite."""
        raise ValueError(f"{self.name}: {self.type_name} {list(self.shape)} has no grid of ours; use read()")

    @abstractmethod
    def release(self) -> None:
        """Lets go of what is in memory of mapped files, for who reads all rows before the conversion does."""


@dataclass(frozen=True)
class StoredType:
    """How a container stores rows of numbers: `block` weights take `block_bytes` bytes.

    decode: uint8 [n, row_bytes] -> float32 [n, K], exactly. grid: the grid of ours that holds the same values, and
    repack: uint8 [n, row_bytes] -> Packed of that grid; None where there is none.
    """

    name: str
    block: int
    block_bytes: int
    decode: Callable[[Array], NDArray[np.float32]]
    grid: Grid | None = None
    repack: Callable[[Array], Packed] | None = None

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` weights; `k` is a multiple of `block`."""
        return k // self.block * self.block_bytes


# The dense types as numpy has them; bf16 is uint16 there.
NUMBERS: dict[str, np.dtype[Any]] = {
    name: np.dtype(code) for name, code in (("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2"))
}


def _decode_f64(rows: Array) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused as such
        return rows.view(NUMBERS["F64"]).astype(np.float32)


def _dense(name: str, decode: Callable[[Array], NDArray[np.float32]], grid: str = "") -> StoredType:
    if not grid:
        return StoredType(name, 1, NUMBERS[name].itemsize, decode)
    return StoredType(
        name, 1, NUMBERS[name].itemsize, decode, Grid(grid), lambda r: Packed(r.view(NUMBERS[name]).copy())
    )


DENSE_TYPES: dict[str, StoredType] = {
    "F64": _dense("F64", _decode_f64),
    "F32": _dense("F32", lambda r: r.view(NUMBERS["F32"]), "f32"),
    "F16": _dense("F16", lambda r: widen_f16(r.view(NUMBERS["F16"])), "f16"),
    "BF16": _dense("BF16", lambda r: from_bf16(r.view(NUMBERS["BF16"])), "bf16"),
}


@dataclass(frozen=True)
class StoredTensor(Rows):
    """Bytes [start, start + n_bytes) of `file`, in rows of `type_name`.

    The container has checked that the bytes are there and that they are what shape and type demand.
    """

    file: BoundedFile
    name: str
    type_name: str
    type: StoredType | None  # None: a type that no tensor of a model may have here
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    @property
    def where(self) -> str:
        return str(self.file.path)

    @property
    def trouble(self) -> str:
        if self.type is None:
            return f"type {self.type_name}, which is not supported; a model's tensors are {', '.join(DENSE_TYPES)} here"
        return super().trouble

    @property
    def grid(self) -> Grid | None:
        return self.type.grid if self.type is not None and len(self.shape) == 2 else None

    def release(self) -> None:
        self.file.release()

    def data(self) -> Array:
        """The bytes, uint8, mapped."""
        return self.file.map(self.start, self.n_bytes, what=f"tensor {shown(self.name)}")

    def read(self, index: Index) -> NDArray[np.float32]:
        kind = self._type()
        if len(self.shape) == 1:
            return kind.decode(self.data().reshape(1, -1)).reshape(-1)[index]
        return kind.decode(self._bytes(kind, index))

    def read_packed(self, index: Index) -> Packed:
        kind = self._type()
        if self.grid is None or kind.repack is None:
            return super().read_packed(index)
        return kind.repack(self._bytes(kind, index))

    def _type(self) -> StoredType:
        self.check()
        assert self.type is not None
        return self.type

    def _bytes(self, kind: StoredType, index: Index) -> Array:
        """The stored rows `index`, uint8 [len(index), row_bytes]."""
        whole = self.data().reshape(self.shape[0], kind.row_bytes(self.shape[1]))
        return np.ascontiguousarray(whole[consecutive(index)])  # of neighbours a view, nothing copied


class Slice(Rows):
    """Rows [first, first + n) of another tensor, under a name of its own."""

    def __init__(self, name: str, whole: Rows, first: int, n: int) -> None:
        if not 0 <= first < first + n <= whole.shape[0]:
            raise ModelFormatError(
                f"{whole.where}: tensor {shown(whole.name)} has {whole.shape[0]} rows, expected at least {first + n}"
            )
        self.name = name
        self.type_name = whole.type_name
        self.shape = (n, *whole.shape[1:])
        self.n_bytes = whole.n_bytes * n // whole.shape[0]
        self._whole, self._first = whole, first

    @property
    def where(self) -> str:
        return self._whole.where

    @property
    def trouble(self) -> str:
        return self._whole.trouble

    @property
    def grid(self) -> Grid | None:
        return self._whole.grid

    def read(self, index: Index) -> NDArray[np.float32]:
        return self._whole.read(index + self._first)

    def read_packed(self, index: Index) -> Packed:
        return self._whole.read_packed(index + self._first)

    def release(self) -> None:
        self._whole.release()


class Joined(Rows):
    """Parts of one tensor one after the other: below one another (axis 0) or side by side (axis 1, matrices only)."""

    def __init__(self, name: str, parts: Sequence[Rows], axis: int) -> None:
        first = parts[0]
        first.check()
        if len(first.shape) <= axis:
            raise ModelFormatError(
                f"{first.where}: tensor {shown(first.name)} has shape {list(first.shape)}, expected a matrix"
            )
        for part in parts[1:]:
            part.check()
            if len(part.shape) != len(first.shape) or any(
                a != b for i, (a, b) in enumerate(zip(part.shape, first.shape, strict=True)) if i != axis
            ):
                raise ModelFormatError(
                    f"{part.where}: tensor {shown(part.name)} has shape {list(part.shape)}, which does not continue"
                    f" {list(first.shape)} in {first.where}"
                )
            if part.type_name != first.type_name:
                raise ModelFormatError(
                    f"{part.where}: tensor {shown(part.name)} is {part.type_name}, but {first.type_name} in"
                    f" {first.where}"
                )
        self.name = name
        self.type_name = first.type_name
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        self.shape = tuple(shape)
        self.n_bytes = sum(part.n_bytes for part in parts)
        self._parts, self._axis = tuple(parts), axis

    @property
    def where(self) -> str:
        return self._parts[0].where

    @property
    def grid(self) -> Grid | None:
        grid = self._parts[0].grid
        if grid is None or grid.input_order or any(part.grid != grid for part in self._parts):
            return None
        cut = self._axis == 1 and any(part.shape[1] % max(1, grid.group) for part in self._parts[:-1])
        return None if cut else grid

    def read(self, index: Index) -> NDArray[np.float32]:
        pieces = []
        for here, part, rows in self._split(index):
            pieces.append((here, part.read(rows)))
            part.release()  # of each part some pages around what was read are in memory, and parts may be many
        return self._together([here for here, _ in pieces], [values for _, values in pieces])

    def read_packed(self, index: Index) -> Packed:
        if self.grid is None:
            return super().read_packed(index)
        pieces = [(here, part.read_packed(rows)) for here, part, rows in self._split(index)]
        places = [here for here, _ in pieces]

        def section(arrays: list[Array | None]) -> Array | None:
            present = [array for array in arrays if array is not None]
            return self._together(places, present) if present else None

        return Packed(
            self._together(places, [packed.codes for _, packed in pieces]),
            section([packed.scales for _, packed in pieces]),
            section([packed.offsets for _, packed in pieces]),
        )

    def release(self) -> None:
        for part in self._parts:
            part.release()

    def _split(self, index: Index) -> list[tuple[Index, Rows, Index]]:
        """Which places of `index` each part fills, and with which of its rows."""
        if self._axis == 1:
            return [(np.arange(len(index)), part, index) for part in self._parts]
        out, first = [], 0
        for part in self._parts:
            (here,) = np.nonzero((index >= first) & (index < first + part.shape[0]))
            if len(here):
                out.append((here, part, index[here] - first))
            first += part.shape[0]
        return out

    def _together(self, places: list[Index], pieces: list[Array]) -> Array:
        if self._axis == 1:
            return np.concatenate(pieces, axis=1)
        out = np.empty((sum(map(len, places)), *pieces[0].shape[1:]), pieces[0].dtype)
        for here, piece in zip(places, pieces, strict=True):
            out[here] = piece
        return out


class Scaled(Rows):
    """Another tensor times a number, in float32."""

    def __init__(self, whole: Rows, factor: float) -> None:
        self.name, self.type_name = whole.name, whole.type_name
        self.shape, self.n_bytes = whole.shape, whole.n_bytes
        self._whole, self._factor = whole, np.float32(factor)

    @property
    def where(self) -> str:
        return self._whole.where

    @property
    def trouble(self) -> str:
        return self._whole.trouble

    def read(self, index: Index) -> NDArray[np.float32]:
        return self._whole.read(index) * self._factor

    def release(self) -> None:
        self._whole.release()


def is_zero(rows: Rows) -> bool:
    """Whether all numbers of a tensor are zero, looked at in steps."""
    return not any(rows.read(index).any() for index in _passing(rows))


def same_numbers(a: Rows, b: Rows) -> bool:
    """Whether two tensors of one shape and type hold the same; in steps, and nothing stays in memory."""
    if isinstance(a, StoredTensor) and isinstance(b, StoredTensor):
        left, right, step = a.data(), b.data(), 1 << 22
        for i in range(0, left.size, step):
            if not np.array_equal(left[i : i + step], right[i : i + step]):
                return False
            a.release()
            b.release()
        return True
    return all(np.array_equal(a.read(index), b.read(index), equal_nan=True) for index in _passing(a, b))


def _passing(*tensors: Rows) -> Iterator[Index]:
    """All rows in steps; what a step has mapped is let go of before the next."""
    for index in _steps(np.arange(tensors[0].shape[0]), tensors[0].shape):
        yield index
        for rows in tensors:
            rows.release()


def name_of(path: Path) -> str:
    """What a checkpoint is called: the last part of its path, or in the hub's cache, where that is a commit's number,
    the repository's name."""
    here = Path(os.path.abspath(path))
    if here.parent.name == "snapshots" and here.parent.parent.name.startswith("models--"):
        return here.parent.parent.name.rpartition("--")[2]
    return here.name


def copy_columns(file: BoundedFile, matrix: Array, index: Index) -> Array:
    """matrix[:, index] of a matrix [n, m] that is mapped from `file`, in memory of its own.

    A few columns touch every page of a matrix. Where memory is bounded, no more than a few rows' pages stay.
    """
    columns = consecutive(index)
    if not file.sparing:
        return np.ascontiguousarray(matrix[:, columns])
    step = max(1, _PASSED_BYTES // max(1, abs(matrix.strides[0])))
    out = np.empty((len(matrix), len(index)), matrix.dtype)
    for first in range(0, len(matrix), step):
        out[first : first + step] = matrix[first : first + step, columns]
        file.release()
    return out


def consecutive(index: Index) -> slice | Index:
    """`index` as a slice where it is one, which numpy takes much faster."""
    if not len(index):
        return index
    first, last = int(index[0]), int(index[-1])
    steps_by_one = last - first == len(index) - 1 and np.array_equal(index, np.arange(first, last + 1))
    return slice(first, last + 1) if steps_by_one else index


def identity_of(kind: str, name: str, paths: Sequence[Path]) -> dict[str, Any]:
    """`Source.identity` over all files that a conversion reads, so that a new tokenizer or config makes another."""
    head, size, newest = hashlib.sha256(), 0, 0
    for path in paths:
        with BoundedFile(path) as file:
            head.update(file.read_at(0, min(file.size, 1 << 20)))
            size, newest = size + file.size, max(newest, file.mtime_ns)
    head.update(str(size).encode())
    return {"kind": kind, "name": name, "size_bytes": size, "mtime_ns": newest, "sha256_head": head.hexdigest()}


def _steps(index: Index, shape: tuple[int, ...]) -> list[Index]:
    """`index` cut so that a step's numbers take a few MiB."""
    step = max(1, _STEP_WEIGHTS // shape[1]) if len(shape) == 2 else max(1, len(index))
    return [index[first : first + step] for first in range(0, len(index), step)]


class SourceTensor:
    """A tensor of the model: canonical name, [N, K] or [N], rows in the order of docs/FORMAT.md.

    shape: logical shape. dtype: the source's own name of its type, as `Q4_1`. source_name: its name there.
    grid: the TensorSpec that it can be repacked to, or None (vectors, Q6_K, F64); exact: without any loss.
    n_bytes: its size in the source. row_order: for each row here, its row there.
    """

    def __init__(self, name: str, rows: Rows, row_order: Index | None = None) -> None:
        if rows.trouble:
            raise ModelFormatError(f"{rows.where}: tensor {shown(rows.name)} ({name}) has {rows.trouble}")
        self.name = name
        self.source_name = rows.name
        self.shape = rows.shape
        self.dtype = rows.type_name
        self.n_bytes = rows.n_bytes
        grid = rows.grid if len(rows.shape) == 2 else None
        self.grid = grid.spec(name, rows.shape) if grid is not None else None
        self.exact = grid is not None and grid.exact
        self._rows = rows
        self._row_order = row_order

    def __repr__(self) -> str:
        return f"SourceTensor({self.name}, {self.dtype}, {list(self.shape)})"

    def read(self, rows: slice | Index | None = None) -> NDArray[np.float32]:
        """Values as float32 [N, K], or [N] for a vector, C-contiguous and writable; `rows` takes some of them.

        Raises ModelFormatError when values are not finite, naming the tensor and how many.
        """
        index = self._index(rows)
        out = np.empty((len(index), *self.shape[1:]), np.float32)
        first = bad = 0
        for step in _steps(index, self.shape):
            part = out[first : first + len(step)]
            with np.errstate(all="ignore"):  # hostile scales make NaNs, which are counted below
                part[...] = self._rows.read(step)
            bad += _count_bad(part)
            first += len(step)
        self._refuse(bad, out.size, "values")
        return out

    def read_packed(self, rows: slice | Index | None = None) -> Packed:
        """Codes, scales and offsets of `grid`, exactly as the source has them; `rows` takes some of them.

        Raises ModelFormatError when scales, offsets or dense values are not finite; ValueError without a grid.
        """
        if self.grid is None:
            raise ValueError(f"{self.name}: {self.dtype} {list(self.shape)} has no grid of ours; use read()")
        with np.errstate(all="ignore"):
            packed = self._rows.read_packed(self._index(rows))
        if packed.scales is None:
            self._refuse(_count_bad(packed.codes), packed.codes.size, "values")
        else:
            self._refuse(_count_bad(packed.scales), packed.scales.size, "scales")
        if packed.offsets is not None:
            self._refuse(_count_bad(packed.offsets), packed.offsets.size, "offsets")
        return packed

    def release(self) -> None:
        """Lets go of what is in memory of mapped files."""
        self._rows.release()

    def _index(self, rows: slice | Index | None) -> Index:
        index = np.arange(self.shape[0]) if self._row_order is None else self._row_order
        return index if rows is None else index[rows]

    def _refuse(self, bad: int, of: int, what: str) -> None:
        if bad:
            raise ModelFormatError(
                f"{self._rows.where}: tensor {shown(self.source_name)} ({self.name}): {bad} of {of} {what} are"
                " not finite (NaN or infinite); the checkpoint is damaged"
            )


def _count_bad(values: Array) -> int:
    """How many numbers are NaN or infinite; uint16 holds bf16."""
    if values.dtype == np.uint16:
        return int(np.count_nonzero((values & 0x7F80) == 0x7F80))
    return int(values.size - np.count_nonzero(np.isfinite(values)))


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened and checked: every tensor of the model is there, with the shape that the config demands.

    kind: "safetensors", "torch", "meta" or "gguf". config: config.json of docs/FORMAT.md without `quantization` and
    `source`.
    tensors: by canonical name, in the order of the forward pass. generation_config: {} if there is none.
    identity: kind, name, size_bytes, mtime_ns, sha256_head; equal when, very likely, the source is. No absolute path.
    architecture: what the source calls it.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    generation_config: dict[str, Any]
    identity: dict[str, Any]
    _tokenizer_files: Callable[[], dict[str, bytes]] = field(repr=False)
    architecture: str = ""
    files: tuple[BoundedFile, ...] = field(default=(), repr=False)  # all that were opened

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer, by name, to be written beside the model. Raises ModelFormatError."""
        return self._tokenizer_files()


Stored = Mapping[str, Rows]
