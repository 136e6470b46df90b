"""Builds PyTorch checkpoints byte by byte, without PyTorch: the zip, the pickle in it, and every defect of both.

Nothing here checks anything. `Zip` writes the layout of torch.save; its fields can lie, entry by entry. `pickled`
writes the opcodes of protocol 2 for a small set of Python values. Valid files are opened by torch in tests/oracles.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.make_sources import Shape, encode_dense, interleave

# ------------------------------------------------------------------------------------------------------------ the zip


@dataclass
class ZipEntry:
    """An entry and what its two headers say of it; None: the truth."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0x0800
    descriptor: bytes | None = None  # None: as the flags say
    size: int | None = None  # in both headers
    local_size: int | None = None
    local_name: bytes | None = None
    crc: int | None = None
    offset: int | None = None
    zip64: bool = False  # sizes and offset in the extra field
    extra: bytes = b""
    central_extra: bytes = b""
    disk: int = 0
    comment: bytes = b""
    magic: bytes = b"PK\3\4"
    align: int = 64
    before: bytes = b""  # bytes of nobody


@dataclass
class Zip:
    """A zip file; `count`, `start` and `size` are what its end says of the directory, None: the truth."""

    entries: list[ZipEntry]
    zip64: bool = False
    count: int | None = None
    start: int | None = None
    size: int | None = None
    comment: bytes = b""
    small: tuple[int, int, int] | None = None  # count, size and start in the 32-bit end beside a zip64 one
    before_end: bytes = b""
    disk: int = 0

    def bytes(self) -> bytes:
        out, central = b"", b""
        for entry in self.entries:
            out += entry.before
            at = len(out) if entry.offset is None else entry.offset
            local, record = _headers(entry, at, len(out))
            out += local + entry.data + _descriptor(entry)
            central += record
        start, size = len(out), len(central)
        count = len(self.entries) if self.count is None else self.count
        start_told = start if self.start is None else self.start
        size_told = size if self.size is None else self.size
        out += central + self.before_end
        small = (count & 0xFFFF, size_told & 0xFFFFFFFF, start_told & 0xFFFFFFFF)
        if self.zip64:
            end = len(out)
            out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size_told, start_told)
            out += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
            small = self.small or (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        out += struct.pack(
            "<4s4H2IH", b"PK\5\6", self.disk, self.disk, small[0], small[0], small[1], small[2], len(self.comment)
        )
        return out + self.comment


def _headers(entry: ZipEntry, at: int, place: int) -> tuple[bytes, bytes]:
    """The header before the bytes, padded so that they are aligned, and the one in the directory."""
    crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
    size = len(entry.data) if entry.size is None else entry.size
    local_size = size if entry.local_size is None else entry.local_size
    name = entry.name if entry.local_name is None else entry.local_name
    extra, central_extra = entry.extra, entry.central_extra
    sizes = (crc, local_size, local_size)
    central_sizes = (crc, size, size, at)
    if entry.flags & 8 and entry.local_size is None:
        sizes = (0, 0, 0)
    elif entry.zip64:
        extra = struct.pack("<2H2Q", 1, 16, local_size, local_size) + extra
        sizes = (crc, 0xFFFFFFFF, 0xFFFFFFFF)
    if entry.zip64:
        central_extra = struct.pack("<2H3Q", 1, 24, size, size, at) + central_extra
        central_sizes = (crc, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    if entry.align:
        padding = -(place + 30 + len(name) + len(extra) + 4) % entry.align
        extra += struct.pack("<2H", 0x4246, padding) + b"Z" * padding
    local = struct.pack("<4s5H3I2H", entry.magic, 0, entry.flags, entry.method, 0, 0, *sizes, len(name), len(extra))
    head = struct.pack(
        "<4s6H3I5H2I",
        b"PK\1\2",
        0,
        0,
        entry.flags,
        entry.method,
        0,
        0,
        *central_sizes[:3],
        len(entry.name),
        len(central_extra),
        len(entry.comment),
        entry.disk,
        0,
        0,
        central_sizes[3],
    )
    return local + name + extra, head + entry.name + central_extra + entry.comment


def _descriptor(entry: ZipEntry) -> bytes:
    if entry.descriptor is not None:
        return entry.descriptor
    if not entry.flags & 8:
        return b""
    return b"PK\7\10" + struct.pack("<3I", zlib.crc32(entry.data), len(entry.data), len(entry.data))


# --------------------------------------------------------------------------------------------------------- the pickle


@dataclass(frozen=True)
class Global:
    """A name in the pickle: "module name"."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of a name with arguments, and items and attributes set on what comes back."""

    function: Global
    arguments: Any
    items: Mapping[Any, Any] | None = None
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """A storage, by its id."""

    key: Any


@dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


def pickled(value: Any, *, protocol: int = 2, end: bytes = b".") -> bytes:
    """A pickle of protocol 2 that describes the value."""
    return b"\x80" + bytes([protocol]) + opcodes(value) + end


def opcodes(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Global):
        return b"c" + value.name.replace(" ", "\n").encode() + b"\n"
    if isinstance(value, Persistent):
        return opcodes(value.key) + b"Q"
    if isinstance(value, Call):
        out = opcodes(value.function) + opcodes(value.arguments) + b"R"
        if value.items is not None:
            out += b"(" + b"".join(map(opcodes, _flat(value.items))) + b"u"
        return out if value.state is None else out + opcodes(value.state) + b"b"
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        n = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([n]) + value.to_bytes(n, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    return b"}(" + b"".join(map(opcodes, _flat(value))) + b"u"


def _flat(items: Mapping[Any, Any]) -> list[Any]:
    return [part for item in items.items() for part in item]


# ----------------------------------------------------------------------------------------------------- a checkpoint

ORDERED_DICT = Global("collections OrderedDict")
REBUILD = Global("torch._utils _rebuild_tensor_v2")
_CLASSES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}


def storage(key: str, count: int, kind: str = "FloatStorage") -> Persistent:
    return Persistent(("storage", Global(f"torch {kind}"), key, "cpu", count))


def tensor(place: Any, shape: Sequence[int], strides: Sequence[int] | None = None, offset: int = 0) -> Call:
    """A tensor over a storage; C order if no strides are given."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return Call(REBUILD, (place, offset, tuple(shape), tuple(strides), False, Call(ORDERED_DICT, ())))


@dataclass
class TorchFile:
    """What torch.save writes: entries of one archive. `more` adds entries, `changes` alters entries by their name."""

    pickle: bytes
    storages: dict[str, bytes] = field(default_factory=dict)
    archive: str = "archive"

    def entries(self, **changes: Any) -> list[ZipEntry]:
        names = {"data.pkl": self.pickle, "byteorder": b"little"}
        names |= {f"data/{key}": data for key, data in self.storages.items()} | {"version": b"3\n"}
        return [ZipEntry(f"{self.archive}/{name}".encode(), data) for name, data in names.items()]

    def bytes(self) -> bytes:
        return Zip(self.entries()).bytes()


def torch_file(tensors: Mapping[str, NDArray[Any]], dtype: str = "F32", archive: str = "archive") -> TorchFile:
    """A state_dict with a storage for each tensor."""
    items, storages = {}, {}
    for i, (name, values) in enumerate(tensors.items()):
        storages[str(i)] = encode_dense(values, dtype)
        items[name] = tensor(storage(str(i), values.size, _CLASSES[dtype]), values.shape)
    state = {"_metadata": Call(ORDERED_DICT, (), {"": {"version": 1}})}
    return TorchFile(pickled(Call(ORDERED_DICT, (), items, state)), storages, archive)


# ----------------------------------------------------------------------------------------------------- Meta's layout

_META = {
    "tok_embeddings": ("tok_embeddings.weight", None),
    "norm": ("norm.weight", None),
    "output": ("output.weight", 0),
    "attn_norm": ("attention_norm.weight", None),
    "mlp_norm": ("ffn_norm.weight", None),
    "wq": ("attention.wq.weight", 0),
    "wk": ("attention.wk.weight", 0),
    "wv": ("attention.wv.weight", 0),
    "wo": ("attention.wo.weight", 1),
    "w_gate": ("feed_forward.w1.weight", 0),
    "w_down": ("feed_forward.w2.weight", 1),
    "w_up": ("feed_forward.w3.weight", 0),
}


def meta_name(name: str) -> str:
    """Meta's name of a canonical tensor."""
    if not name.startswith("layers."):
        return _META[name][0]
    _, i, part = name.split(".")
    return f"layers.{i}.{_META[part][0]}"


def meta_shards(
    shape: Shape, weights: Mapping[str, NDArray[Any]], n: int = 1, embedding_axis: int = 1
) -> list[dict[str, NDArray[Any]]]:
    """The tensors of each of `n` files, rotary rows interleaved."""
    shards: list[dict[str, NDArray[Any]]] = [{} for _ in range(n)]
    for name, values in weights.items():
        part = name.rsplit(".", 1)[-1]
        axis = embedding_axis if name == "tok_embeddings" else _META[part][1]
        if part in ("wq", "wk"):
            values = interleave(values, shape.n_heads if part == "wq" else shape.n_kv_heads)
        pieces = [values] * n if axis is None else np.split(values, n, axis)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[meta_name(name)] = np.ascontiguousarray(piece)
    return shards


def meta_params(shape: Shape, **changes: Any) -> dict[str, Any]:
    """params.json; a change to `...` removes the key. hidden_dim is reached by multiple_of and a multiplier."""
    multiplier = (shape.hidden_dim - 0.5) / int(8 * shape.dim / 3)
    params = {
        "dim": shape.dim,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "vocab_size": -1,
        "multiple_of": shape.hidden_dim,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": shape.norm_eps,
        "max_seq_len": shape.max_seq_len,
    } | changes
    return {key: value for key, value in params.items() if value is not ...}


def write_meta_folder(
    folder: Path, params: Mapping[str, Any], shards: Sequence[Mapping[str, NDArray[Any]]], dtype: str = "BF16"
) -> Path:
    """params.json and consolidated.NN.pth."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i, shard in enumerate(shards):
        stem = f"consolidated.{i:02d}"
        (folder / f"{stem}.pth").write_bytes(torch_file(shard, dtype, stem).bytes())
    return folder
