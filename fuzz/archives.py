"""Takes GGUF files, torch.save's zips and the pickles in them apart, changes something, and writes them again.

Counts, offsets, sizes and checksums follow the change, so that what is refused is refused for what it says and not for
a broken frame; one time in a few a field of the frame lies. The writers are those of the tests.
"""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

from tests import make_sources as make
from tests.make_torch import Zip, ZipEntry

from . import mutate

# ----------------------------------------------------------------------------------------------------------------- GGUF

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class _Bytes:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, n: int) -> bytes:
        if n > len(self.content) - self.at:
            raise ValueError("ends early")
        self.at += n
        return self.content[self.at - n : self.at]

    def one(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def value(self, kind: int) -> Any:
        if kind == make.STRING:
            return self.take(self.one("Q"))
        if kind == make.ARRAY:
            element, count = self.one("I"), self.one("Q")
            if count > 5000:
                raise ValueError("long")
            return element, [self.value(element) for _ in range(count)]
        return self.one(_NUMBERS[kind])


def gguf(content: bytes, rng: random.Random) -> bytes:
    """Changes metadata and tensors of a GGUF file."""
    file = _Bytes(content)
    file.take(4)
    version, n_tensors, n_entries = file.one("I"), file.one("Q"), file.one("Q")
    if n_tensors + n_entries > 5000:
        raise ValueError("long")
    entries = []
    for _ in range(n_entries):
        key, kind = file.value(make.STRING), file.one("I")
        entries.append([key, kind, file.value(kind)])
    table = []
    for _ in range(n_tensors):
        name, sides = file.value(make.STRING), file.one("I")
        table.append([name, tuple(file.one("Q") for _ in range(sides)), file.one("I"), file.one("Q")])
    start = file.at + -file.at % 32
    tensors = []
    for name, dims, kind, offset in table:
        size = _block_bytes(kind, dims)
        tensors.append(make.GgufTensor(name, dims, kind, content[start + offset : start + offset + size]))
    lies: dict[str, int] = {}
    for _ in range(rng.choice([1, 1, 2, 4])):
        chance = rng.random()
        if chance < 0.5 and entries:
            _change_entry(entries, rng)
        elif chance < 0.95 and tensors:
            _change_gguf_tensor(tensors, rng)
        else:
            lies = {rng.choice(["n_tensors", "n_entries", "version"]): rng.choice([*mutate.EXTREMES[:5], 2, 3, 10])}
    for tensor in tensors:
        tensor.data = mutate.filled(tensor.data, _block_bytes(tensor.kind, tensor.dims))
    written = [_entry(*entry) for entry in entries]
    return make.gguf_bytes(written, tensors, **{"version": version, **lies})


def _block_bytes(kind: int, dims: Sequence[int]) -> int:
    name = next((name for name, number in make.TYPE_IDS.items() if number == kind), "F32")
    weights, size, _ = make.BLOCKS.get(name, (1, {"F64": 8, "F32": 4}.get(name, 2), ()))
    return mutate.sized(dims, 1) // weights * size


def _entry(key: bytes, kind: int, value: Any) -> bytes:
    return make.gguf_entry(key, kind, value)


def _change_entry(entries: list[list[Any]], rng: random.Random) -> None:
    lists = [entry for entry in entries if entry[1] == make.ARRAY]
    entry = rng.choice(lists if lists and rng.random() < 0.4 else entries)
    match rng.randrange(8):
        case 0:
            entries.remove(entry)
        case 1:
            entries.append(list(entry))
        case 2:
            entry[0] = rng.choice([mutate.changed_text(entry[0].decode(), rng), rng.choice(mutate.words)]).encode()
        case 3:
            entry[1:] = _any_value(rng)
        case 4:
            entries.append([rng.choice(mutate.words).encode(), *_any_value(rng)])
        case _:
            entry[2] = _changed_value(entry[1], entry[2], rng)


def _any_value(rng: random.Random) -> tuple[int, Any]:
    kind = rng.randrange(13)
    if kind != make.ARRAY:
        return kind, _some(kind, rng)
    element = rng.choice([kind for kind in range(13) if kind != make.ARRAY] + [make.STRING, make.F32])
    return kind, (element, [_some(element, rng) for _ in range(rng.choice([0, 1, 2, 3, 9]))])


def _some(kind: int, rng: random.Random) -> Any:
    if kind == make.STRING:
        return rng.choice([*mutate.words, "", "\0", "<0x41>", "<0xFF>", "▁", "a b", "é"]).encode()
    if kind in (make.F32, make.F64):
        return rng.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30, 2.5])
    low, high = {"B": (0, 255), "b": (-128, 127)}.get(_NUMBERS[kind], (0, 0))
    if not high:
        bits = 8 * struct.calcsize("<" + _NUMBERS[kind])
        low, high = (0, 2**bits - 1) if _NUMBERS[kind].isupper() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return min(high, max(low, rng.choice([0, 1, 2, 3, 4, 6, 9, 32, 1000, low, high])))


def _changed_value(kind: int, value: Any, rng: random.Random) -> Any:
    if kind != make.ARRAY:
        if kind == make.STRING and rng.random() < 0.5:
            return mutate.changed_text(value.decode(), rng).encode()
        return _some(kind, rng)
    element, values = value
    values = list(values)
    at = rng.randrange(len(values)) if values else 0
    match rng.randrange(5):
        case 0:
            values[at : at + 1] = []
        case 1:
            values.insert(at, _some(element, rng))
        case 2 if values:
            values[at] = rng.choice(values)
        case 3:
            return _any_value(rng)[1] if rng.random() < 0.01 else (element, values[::-1])
        case _ if values:
            values[at] = _changed_value(element, values[at], rng)
    return element, values


def _change_gguf_tensor(tensors: list[make.GgufTensor], rng: random.Random) -> None:
    tensor = rng.choice(tensors)
    match rng.randrange(8):
        case 0:
            tensors.remove(tensor)
        case 1:
            tensors.append(make.GgufTensor(tensor.name, tensor.dims, tensor.kind, tensor.data))
        case 2:
            name = tensor.name if isinstance(tensor.name, bytes) else tensor.name.encode()
            tensor.name = mutate.changed_text(name.decode(), rng).encode()
        case 3 | 4:
            tensor.kind = rng.choice([*make.TYPE_IDS.values(), 4, 9, 99])
        case 5:
            tensor.offset = rng.choice([0, 1, 32, 2**63, 2**64 - 32, len(tensor.data)])
        case 6:
            tensor.data = mutate.plain(tensor.data, rng)
        case _:
            tensor.dims = tuple(mutate.changed_shape(tensor.dims, rng))


# ------------------------------------------------------------------------------------------------------- zip and pickle


def torch_zip(content: bytes, rng: random.Random) -> bytes:
    """Changes the pickle in a zip, or the entries; offsets and checksums follow, or one lies."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [ZipEntry(info.filename.encode(), archive.read(info)) for info in archive.infolist()]
    out = Zip(entries)
    if rng.random() < 0.7:
        pickle = next(entry for entry in entries if entry.name.endswith(b"data.pkl"))
        pickle.data = opcodes(pickle.data, rng)
        return out.bytes()
    entry = rng.choice(entries)
    extreme = rng.choice([*mutate.EXTREMES[:5], 2, 30, 64, len(entry.data) - 1, len(entry.data) + 1])
    match rng.randrange(14):
        case 0:
            entries.remove(entry)
        case 1:
            entries.append(entry)
        case 2:
            entry.name = mutate.changed_text(entry.name.decode(), rng).encode()
        case 3:
            entry.data = mutate.plain(entry.data, rng)
        case 4:
            entry.data = mutate.filled(entry.data, rng.choice([0, 1, len(entry.data) // 2, len(entry.data) + 4]))
        case 5:
            entry.method = rng.choice([8, 1, 99])
        case 6:
            entry.flags = rng.choice([0, 1, 8, 0x0808, 0xFFFF])
        case 7:
            setattr(entry, rng.choice(["size", "local_size", "crc", "offset"]), extreme & 0xFFFFFFFF)
        case 8:
            entry.zip64 = True
        case 9:
            entry.extra = rng.choice([b"\1\0\0\0", b"\1\0\xff\xff", b"\1\0\x08\0" + bytes(8), b"x"])
        case 10:
            entry.central_extra = rng.choice([b"\1\0\0\0", b"\1\0\xff\xff", b"\1\0\x08\0" + bytes(8), b"x"])
        case 11:
            setattr(out, rng.choice(["count", "start", "size"]), extreme & 0xFFFFFFFF)
        case 12:
            out.comment = rng.choice([b"x", b"PK\5\6" + bytes(18), bytes(70)])
        case _:
            out.zip64 = True
            out.small = rng.choice([None, (0, 0, 0), (len(entries), extreme & 0xFFFFFFFF, 0)])
    return out.bytes()


_PIECES = [
    b"N", b"\x88", b"\x89", b"K\x01", b"K\x00", b"M\xff\xff", b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s",
    b"u", b"R", b"b", b"Q", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"2", b"0", b"h\x00h\x00\x86q\x00",
    b"X\x01\x00\x00\x00a", b"X\x00\x00\x00\x00", b"G" + bytes(8), b"G\x7f\xf8" + bytes(6),
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ctorch\nHalfStorage\n", b"cos\nsystem\n", b"ctorch._utils\n_rebuild_parameter\n", b"K\x01K\x02\x86",
    b"](h\x00h\x00e", b"\x80\x02", b"r\xff\xff\xff\x7f", b".",
]  # fmt: skip


def opcodes(content: bytes, rng: random.Random) -> bytes:
    """Changes a pickle opcode by opcode."""
    starts = [at for _, _, at in pickletools.genops(content) if at is not None]
    steps = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        at = rng.randrange(len(steps))
        far = min(len(steps), at + rng.choice([1, 1, 2, 3, 10]))
        match rng.randrange(8):
            case 0:
                del steps[at:far]
            case 1:
                steps[at:at] = steps[at:far]
            case 2:
                other = rng.randrange(len(steps))
                steps[at], steps[other] = steps[other], steps[at]
            case 3:
                steps[at] = rng.choice(_PIECES)
            case 4:
                steps.insert(at, rng.choice(_PIECES))
            case 5:
                steps[at:far] = [rng.choice(_PIECES)] * rng.choice([1, 2, 70])
            case 6 if len(steps[at]) > 1:
                steps[at] = steps[at][:1] + mutate.plain(steps[at][1:], rng)[: len(steps[at]) - 1]
            case _:
                integers = [i for i, step in enumerate(steps) if step[:1] in b"KMJ"]
                if integers:
                    steps[rng.choice(integers)] = b"J" + struct.pack("<i", rng.choice([-1, 0, 1, 2, 3, 16, 2**31 - 1]))
        if not steps:
            break
    return b"".join(steps)
