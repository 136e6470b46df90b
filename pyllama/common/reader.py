"""Bounded reads of files that nobody has checked yet: offsets and counts are compared with the file's true size first.

`BoundedFile` reads and maps, `Cursor` walks over little-endian numbers, `read_json` takes a small file whole.
Every failure is a ModelFormatError that names the file. Nothing here knows what a model is, and nothing is written.
A file that shrinks while mapped cannot be guarded against (the system sends SIGBUS); `use_mmap=False` reads copies.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import reprlib
import stat
import struct
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import ModelFormatError

Bytes = NDArray[np.uint8]

MAX_JSON_DEPTH = 32
_POINTER_BYTES = 1024  # what git-lfs leaves in place of a file is smaller, by its specification
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def shown(text: object, limit: int = 80) -> str:
    """`text` from an untrusted file, safe to print on one line: quoted, escaped and cut.

    Of lists, tuples and dicts no more is looked at than could be shown, however deep or often they hold each other.
    """
    quoted = ascii(text[:limit]) if isinstance(text, (str, bytes)) else _nested(limit).repr(text)
    quoted = quoted.encode("ascii", "backslashreplace").decode()
    return quoted if len(quoted) <= limit else quoted[:limit] + "…"


def _nested(limit: int) -> reprlib.Repr:
    out = reprlib.Repr()
    out.maxlevel = 3
    out.maxtuple = out.maxlist = out.maxdict = out.maxset = out.maxfrozenset = out.maxdeque = out.maxarray = 16
    out.maxstring = out.maxlong = out.maxother = 2 * limit
    return out


_recorder: ContextVar[list[BoundedFile] | None] = ContextVar("_recorder", default=None)


@contextlib.contextmanager
def recorded_files() -> Iterator[list[BoundedFile]]:
    """Collects every file that is opened inside, so that somebody can look later whether it has changed."""
    opened: list[BoundedFile] = []
    token = _recorder.set(opened)
    try:
        yield opened
    finally:
        _recorder.reset(token)


class BoundedFile:
    """A regular file, opened once; reads and maps are checked against the size it had when it was opened.

    Raises ModelFormatError when the path cannot be opened or is no regular file (a link to one is followed).
    """

    def __init__(self, path: str | os.PathLike[str], *, use_mmap: bool = True) -> None:
        self._fd = -1
        self._map: Bytes | None = None
        self._pages: mmap.mmap | None = None
        self.path = Path(path)
        self.use_mmap = use_mmap
        self.sparing = False  # set by who bounds memory: readers let go of pages that they have only passed over
        # Non-blocking, because opening a FIFO would otherwise wait for its writer before fstat can refuse it.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(self.path, flags)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ModelFormatError(f"{self.path}: cannot be opened: {reason}") from None
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ModelFormatError(f"{self.path}: {_kind_of(status.st_mode)}, expected a regular file")
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self._place = (status.st_dev, status.st_ino)
        if self.size < _POINTER_BYTES and self.read_at(0, self.size).startswith(b"version https://git-lfs"):
            self.fail("is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")
        recorder = _recorder.get()
        if recorder is not None:
            recorder.append(self)

    def close(self) -> None:
        """Closes the descriptor; arrays that were mapped stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> BoundedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def fail(self, message: str) -> NoReturn:
        raise ModelFormatError(f"{self.path}: {message}")

    def check(self, offset: int, n: int, what: str = "read") -> None:
        """Raises unless bytes [offset, offset + n) lie within the file."""
        if offset < 0 or n < 0 or n > self.size or offset > self.size - n:
            self.fail(f"{what} claims {n} bytes at offset {offset}, the file holds {self.size}; truncated or damaged?")

    def read_at(self, offset: int, n: int, what: str = "read") -> bytes:
        """Bytes [offset, offset + n), copied."""
        return self.copy(offset, n, what=what).tobytes()

    def copy(self, offset: int, n: int, *, aligned: int = 64, what: str = "read") -> Bytes:
        """Bytes [offset, offset + n) in memory of their own that starts at a multiple of `aligned`."""
        self.check(offset, n, what)
        raw = np.empty(n + aligned, np.uint8)
        start = -raw.ctypes.data % aligned
        out = raw[start : start + n]
        view, done = out.data, 0
        while done < n:
            try:
                got = _pread_into(self._fd, view[done : done + (1 << 26)], offset + done)
            except OSError as error:
                self.fail(f"{what} at offset {offset + done} failed: {error.strerror}")
            if got == 0:
                self.fail(
                    f"{what} ends at offset {offset + done}, expected {offset + n}; the file shrank while being read"
                )
            done += got
        return out

    def map(self, offset: int, n: int, *, aligned: int = 1, what: str = "read") -> Bytes:
        """Bytes [offset, offset + n) as a read-only array over one shared map (a copy if `use_mmap` is false).

        `aligned`: the offset must be a multiple of it, so that the array's address is one too.
        """
        self.check(offset, n, what)
        if offset % aligned:
            self.fail(f"{what} starts at offset {offset}, expected a multiple of {aligned}")
        if n == 0:
            return np.empty(0, np.uint8)
        if not self.use_mmap:
            out = self.copy(offset, n, aligned=max(aligned, 64), what=what)
            out.flags.writeable = False
            return out
        return self._whole()[offset : offset + n]

    def mapped(self) -> tuple[int, Bytes] | None:
        """The descriptor and the map of the whole file, if something was mapped and neither is closed."""
        return None if self._map is None or self._fd < 0 else (self._fd, self._map)

    def release(self) -> None:
        """Lets go of the mapped pages that are in memory; they are read again when somebody looks at them."""
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):
                self._pages.madvise(mmap.MADV_DONTNEED)

    def change(self) -> str:
        """What has happened to the file at this path since it was opened, in words; "" if nothing."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            return f"cannot be looked at any more ({error.strerror})"
        if status.st_size != self.size:
            return f"changed its size from {self.size} to {status.st_size} bytes"
        if (status.st_dev, status.st_ino) != self._place:
            return "was replaced by another file"
        return "was written to" if status.st_mtime_ns != self.mtime_ns else ""

    def _whole(self) -> Bytes:
        if self._map is None:
            try:
                mapped = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                self.fail(f"cannot be mapped: {error}")
            if hasattr(mmap, "MADV_HUGEPAGE"):  # where the file system can: fewer misses of the address translation
                with contextlib.suppress(OSError):
                    mapped.madvise(mmap.MADV_HUGEPAGE)
            self._map, self._pages = np.frombuffer(mapped, np.uint8), mapped
        return self._map


class Cursor:
    """Walks over [offset, end) of a BoundedFile, little-endian, never past `end`; each error names where it stood."""

    def __init__(self, file: BoundedFile, offset: int = 0, end: int | None = None) -> None:
        self.file = file
        self.end = file.size if end is None else end
        file.check(offset, self.end - offset, "header")
        self._base = offset
        self._data = file.map(offset, self.end - offset).data
        self._at = 0

    @property
    def offset(self) -> int:
        """Position in the file."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes between here and the end."""
        return len(self._data) - self._at

    def fail(self, message: str) -> NoReturn:
        self.file.fail(f"at byte {self.offset}: {message}")

    def need(self, n: int, what: str) -> None:
        """Raises unless `n` more bytes are there."""
        if n < 0 or n > self.left:
            self.fail(f"{what} claims {n} bytes, only {max(self.left, 0)} are left; truncated or damaged?")

    def _number(self, code: str, what: str) -> Any:
        packing = struct.Struct("<" + code)
        self.need(packing.size, what)
        (value,) = packing.unpack_from(self._data, self._at)
        self._at += packing.size
        return value

    def u8(self, what: str = "u8") -> int:
        return int(self._number("B", what))

    def i8(self, what: str = "i8") -> int:
        return int(self._number("b", what))

    def u16(self, what: str = "u16") -> int:
        return int(self._number("H", what))

    def i16(self, what: str = "i16") -> int:
        return int(self._number("h", what))

    def u32(self, what: str = "u32") -> int:
        return int(self._number("I", what))

    def i32(self, what: str = "i32") -> int:
        return int(self._number("i", what))

    def u64(self, what: str = "u64") -> int:
        return int(self._number("Q", what))

    def i64(self, what: str = "i64") -> int:
        return int(self._number("q", what))

    def f32(self, what: str = "f32") -> float:
        return float(self._number("f", what))

    def f64(self, what: str = "f64") -> float:
        return float(self._number("d", what))

    def bytes(self, n: int, what: str = "bytes") -> bytes:
        self.need(n, what)
        out = bytes(self._data[self._at : self._at + n])
        self._at += n
        return out

    def array(self, dtype: str, count: int, what: str = "array") -> NDArray[Any]:
        """`count` numbers of a little-endian numpy dtype, copied."""
        raw = self.bytes(count * np.dtype(dtype).itemsize, what)
        return np.frombuffer(raw, dtype)

    def string(self, cap: int, what: str = "string") -> str:
        """A u64 length of at most `cap`, then that many bytes of UTF-8."""
        n = self.u64(f"length of {what}")
        if n > cap:
            self.fail(f"{what} claims {n} bytes, at most {cap} are allowed")
        raw = self.bytes(n, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8: {error.reason} at its byte {error.start}")

    def strings(self, count: int, cap: int, what: str = "string") -> list[str]:
        """`count` strings as `string` reads them; one loop without calls, since vocabularies hold 10^5 of them."""
        self.need(8 * count, what)
        out: list[str] = []
        data, at, end, length = self._data, self._at, len(self._data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            n = length(data, at)[0] if at + 8 <= end else cap + 1
            if n > cap or n > end - at - 8:
                break
            try:
                out.append(str(data[at + 8 : at + 8 + n], "utf-8"))
            except UnicodeDecodeError:
                break
            at += 8 + n
        self._at = at
        if len(out) < count:  # the slow way says what is wrong with the string that stopped the loop
            self.string(cap, f"{what}, element {len(out)}")
        return out


def read_bytes(path: str | os.PathLike[str], cap: int, what: str = "file") -> bytes:
    """The whole of a small file; raises ModelFormatError when it holds more than `cap` bytes."""
    with BoundedFile(path) as file:
        if file.size > cap:
            file.fail(f"{what} of {file.size} bytes, at most {cap} are allowed")
        return file.read_at(0, file.size, what)


def read_json(path: str | os.PathLike[str], cap: int = 1 << 20) -> dict[str, Any]:
    """The JSON object in a small file of at most `cap` bytes: UTF-8, no duplicate keys, bounded nesting, no NaN."""
    return parse_json(read_bytes(path, cap, "JSON file"), str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`, as `read_json`; `where` opens the message of each error."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{where}: not valid UTF-8: {error.reason} at byte {error.start}") from None
    _check_depth(text, where)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys(where), parse_constant=_no_constants(where))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{where}: not valid JSON: {error}") from None
    if _SURROGATE.search(text) and not _is_text(value):
        raise ModelFormatError(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    if not isinstance(value, dict):
        raise ModelFormatError(f"{where}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _is_text(value: Any) -> bool:
    """Whether every string in a JSON value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def unique_keys(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An `object_pairs_hook` for json.loads that refuses duplicate keys instead of keeping the last."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise ModelFormatError(f"{where}: key {shown(key)} appears twice")
            out[key] = value
        return out

    return build


def _no_constants(where: str) -> Callable[[str], NoReturn]:
    def refuse(name: str) -> NoReturn:
        raise ModelFormatError(f"{where}: holds {name}, which JSON does not allow")

    return refuse


def _check_depth(text: str, where: str) -> None:
    """Raises when brackets nest deeper than MAX_JSON_DEPTH, before a recursive parser sees them."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise ModelFormatError(f"{where}: JSON nests deeper than {MAX_JSON_DEPTH} levels")
        elif first in "]}":
            depth -= 1


def _kind_of(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return "not a regular file"


def _pread_into(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    os.lseek(fd, offset, os.SEEK_SET)
    part = os.read(fd, len(view))
    view[: len(part)] = part
    return len(part)
