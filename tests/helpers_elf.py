"""Which libraries a built file needs and which symbols it shows, read from its tables; no readelf has to be there."""

from __future__ import annotations

import struct
from pathlib import Path

_DT_NEEDED = 1
_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11


def _sections(data: bytes) -> list[tuple[int, ...]]:
    """Rows of (name, type, flags, address, offset, size, link, info, align, entry size)."""
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    return [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def needed_libraries(path: Path) -> list[str]:
    """The libraries that the loader brings with this one."""
    data = path.read_bytes()
    sections = _sections(data)
    found = []
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind == _SHT_DYNAMIC:
            names = sections[link][4]
            pairs = (struct.unpack_from("<QQ", data, at) for at in range(offset, offset + size, 16))
            found += [_string(data, names + value) for tag, value in pairs if tag == _DT_NEEDED]
    return found


def shown_symbols(path: Path) -> set[str]:
    """The symbols that this library defines for others."""
    data = path.read_bytes()
    sections = _sections(data)
    found = set()
    for _, kind, _, _, offset, size, link, _, _, entry in sections:
        if kind == _SHT_DYNSYM:
            names = sections[link][4]
            for at in range(offset, offset + size, entry):
                name, info, _, section = struct.unpack_from("<IBBH", data, at)
                if section != 0 and info >> 4 != 0:
                    found.add(_string(data, names + name))
    return found
