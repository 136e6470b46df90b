"""What every reader hands over: a Source of SourceTensors with canonical names; how a stored tensor becomes numbers.

A tensor stays where it lies in its mapped file until `read` or `read_packed` asks for it, whole or by rows; temporaries
are a few MiB whatever the tensor's size. Values that are not finite are refused here, once for everything behind.
This module knows no file format: readers give it bytes, a StoredType and, where rows are interleaved, their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import Packed, TensorSpec, from_bf16
from pyllama.common.reader import BoundedFile, shown

Array = NDArray[Any]
_STEP_WEIGHTS = 1 << 20  # weights decoded at a time: 4 MiB of float32


@dataclass(frozen=True)
class StoredType:
    """How a container stores rows of numbers: `block` weights take `block_bytes` bytes.

    decode: uint8 [n, row_bytes] -> float32 [n, K], exactly. format, group, offset: the grid of ours that holds the same
    values, "" where there is none. repack: uint8 [n, row_bytes] -> Packed of that grid.
    """

    name: str
    block: int
    block_bytes: int
    decode: Callable[[Array], NDArray[np.float32]]
    format: str = ""
    group: int = 0
    offset: str = ""
    repack: Callable[[Array], Packed] | None = None

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` weights; `k` is a multiple of `block`."""
        return k // self.block * self.block_bytes


def _decode_bf16(rows: Array) -> NDArray[np.float32]:
    return from_bf16(rows.view("<u2"))


def _decode_f64(rows: Array) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused as such
        return rows.view("<f8").astype(np.float32)


DENSE_TYPES: dict[str, StoredType] = {
    row.name: row
    for row in (
        StoredType("F64", 1, 8, _decode_f64),
        StoredType("F32", 1, 4, lambda r: r.view("<f4"), "f32", repack=lambda r: Packed(r.view("<f4").copy())),
        StoredType(
            "F16",
            1,
            2,
            lambda r: r.view("<f2").astype(np.float32),
            "f16",
            repack=lambda r: Packed(r.view("<f2").copy()),
        ),
        StoredType("BF16", 1, 2, _decode_bf16, "bf16", repack=lambda r: Packed(r.view("<u2").copy())),
    )
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its container has it: bytes [start, start + n_bytes) of `file`, in rows of `type_name`.

    The container has checked that the bytes are there and that they are what shape and type demand.
    """

    file: BoundedFile
    name: str
    type_name: str
    type: StoredType | None  # None: a type that no tensor of a model may have here
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    def data(self) -> Array:
        """The bytes, uint8, mapped."""
        return self.file.map(self.start, self.n_bytes, what=f"tensor {shown(self.name)}")


class SourceTensor:
    """A tensor of the model: canonical name, [N, K] or [N], rows in the order of docs/FORMAT.md.

    shape: logical shape. dtype: the source's own name of its type, as `Q4_1`. source_name: its name there.
    grid: the TensorSpec that holds it without loss, or None (vectors, Q6_K, F64). n_bytes: its size in the source.
    """

    def __init__(self, name: str, stored: StoredTensor, row_order: NDArray[np.intp] | None = None) -> None:
        if stored.type is None:
            raise ModelFormatError(
                f"{stored.file.path}: tensor {shown(stored.name)} ({name}) has type {stored.type_name},"
                f" which is not supported; a model's tensors are {', '.join(DENSE_TYPES)} here"
            )
        self._type = stored.type
        self.name = name
        self.source_name = stored.name
        self.shape = stored.shape
        self.dtype = stored.type_name
        self.n_bytes = stored.n_bytes
        self._stored = stored
        self._row_order = row_order

    def __repr__(self) -> str:
        return f"SourceTensor({self.name}, {self.dtype}, {list(self.shape)})"

    @property
    def grid(self) -> TensorSpec | None:
        kind = self._type
        if not kind.format or len(self.shape) != 2:
            return None
        return TensorSpec(self.name, kind.format, self.shape, group=kind.group, offset=kind.offset)

    def read(self, rows: slice | None = None) -> NDArray[np.float32]:
        """Values as float32 [N, K], or [N] for a vector, C-contiguous and writable; `rows` takes a part of the rows.

        Raises ModelFormatError when values are not finite, naming the tensor and how many.
        """
        if len(self.shape) == 1:
            whole = self._decode(np.arange(1)).reshape(self.shape)
            values = whole if self._row_order is None else whole[self._row_order]
            return np.ascontiguousarray(values[rows] if rows is not None else values)
        return self._decode(np.arange(self.shape[0])[rows if rows is not None else slice(None)])

    def read_packed(self, rows: slice | None = None) -> Packed:
        """Codes, scales and offsets of `grid`, exactly as the source has them; `rows` takes a part of the rows.

        Raises ModelFormatError when scales, offsets or dense values are not finite; ValueError without a grid.
        """
        repack = self._type.repack
        if self.grid is None or repack is None:
            raise ValueError(f"{self.name}: {self.dtype} {list(self.shape)} has no grid of ours; use read()")
        taken = self._bytes(np.arange(self.shape[0])[rows if rows is not None else slice(None)])
        packed = repack(taken)
        if packed.scales is None:
            self._refuse(_count_bad(packed.codes), packed.codes.size, "values")
        else:
            self._refuse(_count_bad(packed.scales), packed.scales.size, "scales")
        if packed.offsets is not None:
            self._refuse(_count_bad(packed.offsets), packed.offsets.size, "offsets")
        return packed

    def _bytes(self, index: NDArray[np.intp]) -> Array:
        """The stored rows `index` (canonical numbers), uint8 [len(index), row_bytes]."""
        kind, k = self._type, self.shape[-1]
        whole = self._stored.data().reshape(-1, kind.row_bytes(k))
        if len(self.shape) == 2 and self._row_order is not None:
            return np.ascontiguousarray(whole[self._row_order[index]])
        if len(index) and index[-1] - index[0] == len(index) - 1:  # consecutive: a view, nothing copied
            return whole[index[0] : index[-1] + 1]
        return np.ascontiguousarray(whole[index])

    def _decode(self, index: NDArray[np.intp]) -> NDArray[np.float32]:
        k = self.shape[-1]
        out = np.empty((len(index), k), np.float32)
        step, bad = max(1, _STEP_WEIGHTS // k), 0
        for first in range(0, len(index), step):
            part = out[first : first + step]
            with np.errstate(all="ignore"):  # hostile scales make NaNs, which are counted below
                part[...] = self._type.decode(self._bytes(index[first : first + step]))
            bad += _count_bad(part)
        self._refuse(bad, out.size, "values")
        return out

    def _refuse(self, bad: int, of: int, what: str) -> None:
        if bad:
            raise ModelFormatError(
                f"{self._stored.file.path}: tensor {shown(self.source_name)} ({self.name}): {bad} of {of} {what} are"
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

    kind: "safetensors" or "gguf". config: config.json of docs/FORMAT.md without `quantization` and `source`.
    tensors: by canonical name, in the order of the forward pass. generation_config: {} if there is none.
    identity: kind, name, size_bytes, mtime_ns, sha256_head; equal when, very likely, the source is. No absolute path.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    generation_config: dict[str, Any]
    identity: dict[str, Any]
    _tokenizer_files: Callable[[], dict[str, bytes]] = field(repr=False)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer, by name, to be written beside the model. Raises ModelFormatError."""
        return self._tokenizer_files()


Stored = Mapping[str, StoredTensor]
