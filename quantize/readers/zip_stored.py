"""Where the entries of an uncompressed zip file lie, the container of PyTorch checkpoints.

Only what torch.save writes is taken: every entry stored as it is, one behind the other from the first byte to the
directory, each described twice (before its bytes and in the directory at the end) in the same words. Whatever would let
two readers see two different archives is refused: comments, holes, overlaps, names that stand twice, several disks.
Nothing is read but headers; checking an entry's CRC is the business of who reads the entry.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn

from pyllama.common.reader import BoundedFile, shown

MAX_ENTRIES = 100_000
MAX_DIRECTORY_BYTES = 1 << 25
MAX_NAME_BYTES = 1 << 10

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ZIP64_EXTRA = 1
_HAS_DESCRIPTOR = 1 << 3
_IS_UTF8 = 1 << 11
_ALL16, _ALL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One entry: its bytes are [start, start + size) of the file. crc: of the bytes, 0 where it was not computed."""

    name: str
    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Central:
    """What the directory says of an entry."""

    raw_name: bytes
    flags: int
    crc: int
    size: int
    offset: int

    @property
    def name(self) -> str:
        return self.raw_name.decode("utf-8")


def read_zip(file: BoundedFile) -> dict[str, Entry]:
    """The entries by name, in the order of the file. Raises ModelFormatError for anything but a plain stored zip."""
    count, start, end = _directory_place(file)
    listed = _read_directory(file, count, start, end)
    entries: dict[str, Entry] = {}
    at = 0
    ends = [central.offset for central in listed[1:]] + [start]
    for central, next_header in zip(listed, ends, strict=True):
        name = central.name
        if central.offset != at:
            _misplaced(file, central, at)
        entries[name] = _read_entry(file, central, next_header)
        at = next_header
    if at != start:
        file.fail(f"zip directory starts at byte {start}, expected {at}")
    return entries


def _misplaced(file: BoundedFile, central: _Central, at: int) -> NoReturn:
    what = "overlaps what stands before it" if central.offset < at else f"follows {central.offset - at} bytes of nobody"
    file.fail(f"zip entry {shown(central.name)} at byte {central.offset} {what}; the file is damaged or forged")


# ---------------------------------------------------------------------------------------------------- the directory


def _directory_place(file: BoundedFile) -> tuple[int, int, int]:
    """Number of entries, and the bytes [start, end) of the directory."""
    if file.size < _END.size:
        file.fail(f"holds {file.size} bytes, fewer than the end of a zip file takes")
    at = file.size - _END.size
    magic, disk, first_disk, here, total, size, start, comment = _END.unpack(file.read_at(at, _END.size))
    if magic != b"PK\5\6" or comment:
        file.fail("does not end with a zip directory (without a comment); truncated, or no file of torch.save")
    where = at
    if at >= _LOCATOR.size and file.read_at(at - _LOCATOR.size, 4) == b"PK\6\7":
        where, here64, total64, size64, start64 = _end64(file, at - _LOCATOR.size)
        pairs = ((here, here64, _ALL16), (total, total64, _ALL16), (size, size64, _ALL32), (start, start64, _ALL32))
        if any(small not in (large, mark) for small, large, mark in pairs):
            file.fail("the two ends of the zip directory disagree")
        here, total, size, start = here64, total64, size64, start64
    if disk or first_disk or here != total:
        file.fail("is one disk of a zip file in several parts, which is not supported")
    if total > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        file.fail(
            f"zip directory claims {total} entries in {size} bytes, at most {MAX_ENTRIES} in {MAX_DIRECTORY_BYTES} are"
            " allowed"
        )
    file.check(start, size, "zip directory")
    if start + size != where:
        file.fail(f"zip directory claims bytes {start} to {start + size}, expected it to end at {where}")
    if total * _CENTRAL.size > size:
        file.fail(f"zip directory claims {total} entries in {size} bytes")
    return total, start, where


def _end64(file: BoundedFile, locator_at: int) -> tuple[int, int, int, int, int]:
    """The directory's end in the zip64 form: its place, entries on this disk, entries, size and start."""
    _, disk, at, disks = _LOCATOR.unpack(file.read_at(locator_at, _LOCATOR.size))
    if disk or disks > 1 or at > locator_at or locator_at - at != _END64.size:
        file.fail(f"zip64 locator points to byte {at}, expected {locator_at - _END64.size}")
    magic, size, _, _, disk, first_disk, here, total, length, start = _END64.unpack(file.read_at(at, _END64.size))
    if magic != b"PK\6\6" or size != _END64.size - 12 or disk or first_disk:
        file.fail(f"at byte {at}: not the zip64 end of a directory")
    return at, here, total, length, start


def _read_directory(file: BoundedFile, count: int, start: int, end: int) -> list[_Central]:
    data = file.map(start, end - start, what="zip directory").data
    listed: list[_Central] = []
    names: set[bytes] = set()
    at = 0
    for number in range(count):
        if len(data) - at < _CENTRAL.size:
            file.fail(f"zip directory ends within entry {number} of {count}")
        fields = _CENTRAL.unpack_from(data, at)
        magic, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment, disk, _, _, offset = fields
        after = at + _CENTRAL.size
        if magic != b"PK\1\2" or len(data) - after < n_name + n_extra + n_comment:
            file.fail(f"at byte {start + at}: entry {number} of the zip directory is damaged")
        raw_name = bytes(data[after : after + n_name])
        name = _checked_name(file, raw_name, number)
        if raw_name in names:
            file.fail(f"zip entry {shown(name)} stands twice in the directory")
        names.add(raw_name)
        extra = bytes(data[after + n_name : after + n_name + n_extra])
        size, packed, offset, disk = _zip64(file, name, extra, (size, packed, offset, disk))
        _check_kind(file, name, flags, method, packed, size, disk, n_comment)
        listed.append(_Central(raw_name, flags, crc, size, offset))
        at = after + n_name + n_extra + n_comment
    if at != len(data):
        file.fail(f"{len(data) - at} bytes follow the last of {count} entries in the zip directory")
    listed.sort(key=lambda central: central.offset)
    return listed


def _checked_name(file: BoundedFile, raw: bytes, number: int) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    if not 0 < len(raw) <= MAX_NAME_BYTES or not name.isprintable() or not name:
        file.fail(f"zip entry {number} has the name {shown(raw)}, expected 1 to {MAX_NAME_BYTES} bytes of plain text")
    return name


def _check_kind(
    file: BoundedFile, name: str, flags: int, method: int, packed: int, size: int, disk: int, n_comment: int
) -> None:
    """Raises unless the entry is stored as it is, readable, and here."""
    if flags & 1:
        file.fail(f"zip entry {shown(name)} is encrypted")
    if method:
        file.fail(f"zip entry {shown(name)} is compressed (method {method}); torch.save stores entries as they are")
    if flags & ~(_HAS_DESCRIPTOR | _IS_UTF8) or disk or n_comment:
        file.fail(f"zip entry {shown(name)} has flags {flags:#06x}, disk {disk} and a comment of {n_comment} bytes")
    if packed != size:
        file.fail(f"zip entry {shown(name)} claims {size} bytes stored in {packed}")


def _zip64(file: BoundedFile, name: str, extra: bytes, values: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Size, packed size, offset and disk, each taken from the zip64 record where the 32-bit field says so."""
    marks = (_ALL32, _ALL32, _ALL32, _ALL16)
    wanted = [value == mark for value, mark in zip(values, marks, strict=True)]
    record: bytes | None = None
    at = 0
    while at < len(extra):
        if len(extra) - at < 4:
            file.fail(f"zip entry {shown(name)} has a damaged extra field")
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if len(body) != length or (kind == _ZIP64_EXTRA and record is not None):
            file.fail(f"zip entry {shown(name)} has a damaged extra field")
        if kind == _ZIP64_EXTRA:
            record = body
        at += 4 + length
    if record is None:
        if any(wanted[:3]):
            file.fail(f"zip entry {shown(name)} has a size or place of zip64, but no zip64 record")
        return values
    out, at = list(values), 0
    for i, (is_wanted, width) in enumerate(zip(wanted, (8, 8, 8, 4), strict=True)):
        if is_wanted:
            if len(record) - at < width:
                file.fail(f"zip entry {shown(name)} has a zip64 record of {len(record)} bytes, which is too short")
            out[i] = int.from_bytes(record[at : at + width], "little")
            at += width
    return out[0], out[1], out[2], out[3]


# ------------------------------------------------------------------------------------------------------- an entry


def _read_entry(file: BoundedFile, central: _Central, limit: int) -> Entry:
    """The entry whose header lies at `central.offset`; it must reach to `limit`, where the next thing begins."""
    name, at = shown(central.name), central.offset
    if limit - at < _LOCAL.size:
        file.fail(f"zip entry {name} at byte {at} overlaps what follows it at {limit}")
    fields = _LOCAL.unpack(file.read_at(at, _LOCAL.size, f"zip entry {name}"))
    magic, _, flags, method, _, _, crc, packed, size, n_name, n_extra = fields
    start = at + _LOCAL.size + n_name + n_extra
    if magic != b"PK\3\4" or start > limit:
        file.fail(f"at byte {at}: expected the header of zip entry {name}")
    tail = file.read_at(at + _LOCAL.size, n_name + n_extra)
    if tail[:n_name] != central.raw_name or flags != central.flags or method:
        file.fail(f"at byte {at}: the header of zip entry {name} differs from the directory in name, flags or method")
    size, packed, _, _ = _zip64(file, central.name, tail[n_name:], (size, packed, 0, 0))
    told = (crc, packed, size)
    expected = (central.crc, central.size, central.size)
    later = bool(flags & _HAS_DESCRIPTOR) and told == (0, 0, 0)
    if told != expected and not later:
        file.fail(f"at byte {at}: the header of zip entry {name} says {size} bytes, the directory {central.size}")
    after = start + central.size
    if after > limit:
        file.fail(
            f"zip entry {name} claims {central.size} bytes at byte {start}, only {limit - start} are left before the"
            " next entry"
        )
    if not _is_descriptor(file.read_at(after, min(limit - after, 25)), central):
        file.fail(f"zip entry {name} ends at byte {after}, expected {limit}: bytes of nobody, or a damaged descriptor")
    return Entry(central.name, start, central.size, central.crc)


def _is_descriptor(found: bytes, central: _Central) -> bool:
    """Whether what follows an entry's bytes is what its flags promise: nothing, or its CRC and sizes once more."""
    if not central.flags & _HAS_DESCRIPTOR:
        return not found
    forms = []
    for width in (4, 8):
        if central.size < 1 << 8 * width:
            body = central.crc.to_bytes(4, "little") + 2 * central.size.to_bytes(width, "little")
            forms += [body, b"PK\7\10" + body]
    return found in forms
