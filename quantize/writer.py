"""Writes a model folder so that nobody ever sees half of one.

Everything goes into `.NAME.partial` beside the output, under a lock (journal.py); when the last byte is on the disk and
has been read back, one exchange of names puts it in place. An exception, Ctrl-C or a full disk leave the output as it
was and nothing beside it; with `resume` what is done stays, as it does when the process is killed, and a later run
with `resume` goes on from there, to the same bytes. The header is laid out first with zeros for checksums, tensors
follow one by one, then the header is written again with the sums. Knows bytes and files; what they mean is said by
pyllama/common/model_folder.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError, QuantizeError
from pyllama.common.formats import TensorSpec
from pyllama.common.model_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_bytes,
    header_bytes,
    is_model_folder,
    read_model_folder,
)
from pyllama.common.reader import BoundedFile

from .journal import Journal

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "golden_ids.json",
)
GENERATION_FILE = "generation_config.json"
_CHUNK_BYTES = 1 << 26
_READ_BYTES = 1 << 22
_HUGE_PAGE_BYTES = 1 << 21
_SLACK_BYTES = 1 << 20  # folder entries, rounding to blocks


class FolderWriter:
    """Writes one model folder; a context manager.

        with FolderWriter(out, specs, config, files) as writer:
            for spec in specs[len(writer.finished):]:     # in this order; `finished` is empty without `resume`
                writer.add_rows(spec, n_rows, payload)    # blocks of whole tiles, each packed as a tensor of its own
            writer.finish()

    files: the tokenizer's and the like, by name. source: what else must be the same for a conversion to go on.
    Leaving the block without `finish` leaves nothing behind but, with `resume`, what is done.
    Raises QuantizeError when the output cannot be made.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        config: Mapping[str, object],
        files: Mapping[str, bytes],
        *,
        overwrite: bool = False,
        resume: bool = False,
        source: str = "",
    ) -> None:
        foreign = sorted(files.keys() - {*TOKENIZER_FILES, GENERATION_FILE})
        if foreign:
            raise ValueError(f"{foreign[0]!r} is no file of a model folder")
        self._out = check_output(out, overwrite=overwrite)
        self._overwrite, self._resume = overwrite, resume
        self._specs = list(specs)
        self._files = {**files, CONFIG_FILE: config_bytes(config)}
        self._file_sums = {name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()}
        self._header = header_bytes(self._specs, None, self._file_sums)
        self._conversion = hashlib.sha256(self._header + source.encode()).hexdigest()
        self._partial = self._out.with_name(f".{self._out.name}.partial")
        self._replaced = self._out.with_name(f".{self._out.name}.old")  # only where names cannot be exchanged
        self._journal: Journal | None = None
        self._checksums: dict[str, str] = {}
        self._tensor: _Tensor | None = None
        self._begun = True  # as far as is known, by this run or a former one
        self._done = False
        self._fd = -1
        self._pending = bytearray()  # the end of the file so far, less than a huge page

    @property
    def finished(self) -> list[str]:
        """Tensors that are on the disk, the first of `specs`."""
        return list(self._checksums)

    def __enter__(self) -> FolderWriter:
        with self._explained():
            try:
                self._journal = Journal(self._out.with_name(f".{self._out.name}.journal"), self._out)
                self._recover()
                if not (self._resume and self._reopen()):
                    self._begin()
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Without `finish`: with `resume` what was begun stays, be it by this run or by a former one."""
        if self._resume and self._begun and not self._done:
            self._keep()
        self._discard()

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return _explained(self._out, "What is done is kept for --resume" if self._resume else "Nothing was left there")

    def _recover(self) -> None:
        """After a death between two renames, brings the old output back."""
        if not self._out.exists() and is_model_folder(self._replaced) and _is_all_ours(self._replaced):
            os.rename(self._replaced, self._out)
            check_output(self._out, overwrite=self._overwrite)

    def _begin(self) -> None:
        assert self._journal is not None
        self._begun = False
        self._journal.forget()
        _remove(self._partial)
        if os.path.lexists(self._partial):
            raise QuantizeError(
                f"{self._partial}: is in the way, and quantize did not write it; move it, or choose another output"
            )
        self._partial.mkdir()
        self._check_space(len(self._header) + sum(spec.payload_bytes for spec in self._specs))
        for name, data in self._files.items():
            self._write_file(name, data)
        self._fd = _create(self._partial / WEIGHTS_FILE)
        self._journal.begin(self._conversion, {})
        self._begun = True
        self._append(memoryview(self._header))

    # ---- going on -----------------------------------------------------------------------------------------------

    def _reopen(self) -> bool:
        """Takes over what a stopped run has left; False if there is nothing. Its bytes are compared, not believed."""
        assert self._journal is not None
        conversion, known = self._journal.read()
        path = self._partial / WEIGHTS_FILE
        if not conversion or not path.is_file() or path.is_symlink() or not _is_all_ours(self._partial):
            return False
        if conversion != self._conversion:
            raise QuantizeError(
                f"{self._out}: the stopped conversion beside it had another source or other options; "
                "repeat those, or start anew without --resume"
            )
        for name, data in self._files.items():
            (self._partial / name).unlink(missing_ok=True)
            self._write_file(name, data)
        self._fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        at = len(self._header)
        for spec in self._specs:
            sha256 = known.get(spec.name)
            if sha256 is None or _sha256_of(self._fd, at, spec.payload_bytes) != sha256:
                break
            self._checksums[spec.name] = sha256
            at += spec.payload_bytes
        start = at - at % _HUGE_PAGE_BYTES
        tail = bytearray(self._header[start:]) if start < len(self._header) else bytearray()
        first = start + len(tail)
        tail += _read_at(self._fd, first, at - first)
        os.ftruncate(self._fd, start)
        os.lseek(self._fd, 0, os.SEEK_SET)
        _write_all(self._fd, self._header[:start])
        os.lseek(self._fd, start, os.SEEK_SET)
        self._pending = tail
        self._check_space(sum(spec.payload_bytes for spec in self._specs[len(self._checksums) :]))
        self._journal.begin(self._conversion, self._checksums)
        return True

    def _keep(self) -> None:
        """Leaves what is done for a later run."""
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                _write_all(self._fd, self._pending)
        self._close()
        if self._journal is not None:
            self._journal.release(remove=False)
            self._journal = None

    # ---- tensors ------------------------------------------------------------------------------------------------

    def add_tensor(self, spec: TensorSpec, payload: NDArray[np.uint8]) -> None:
        """Appends the whole payload of the next tensor of `specs`."""
        if payload.nbytes != spec.payload_bytes:
            raise ValueError(f"{spec.name}, {payload.nbytes} bytes, expected {spec.payload_bytes}")
        self.add_rows(spec, spec.shape[0], payload)

    def add_rows(self, spec: TensorSpec, n_rows: int, payload: NDArray[np.uint8]) -> None:
        """Appends the next rows of the next tensor, packed as a tensor of their own; a vector comes whole."""
        expected = self._specs[len(self._checksums)]
        if spec != expected:
            raise ValueError(f"{spec.name} {spec.format}, expected {expected.name} {expected.format}")
        if self._tensor is None:
            self._tensor = _Tensor(spec, self._append)
        with self._explained():
            if not self._tensor.add(n_rows, np.ascontiguousarray(payload)):
                return
            self._checksums[spec.name] = self._tensor.sha256()
            self._tensor = None
            assert self._journal is not None
            self._journal.add(spec.name, self._checksums[spec.name])

    def payload(self, name: str) -> bytes:
        """That of a finished tensor, read back."""
        if name not in self._checksums:
            raise ValueError(f"{name} is not finished")
        at = len(self._header)
        for spec in self._specs:
            if spec.name == name:
                break
            at += spec.payload_bytes
        with _explained(self._out):
            written = os.lseek(self._fd, 0, os.SEEK_CUR)  # what follows waits in memory
            found = _read_at(self._fd, at, min(max(written - at, 0), spec.payload_bytes))
        first = max(at - written, 0)
        return found + bytes(self._pending[first : first + spec.payload_bytes - len(found)])

    def _append(self, data: memoryview) -> None:
        """Writes whole huge pages and keeps the rest for later.

        A file written so lies in huge pages in the system's cache where the file system has them (ext4 and XFS of
        recent Linux), and mapped weights read from there cost few misses of the address translation.
        """
        room = _HUGE_PAGE_BYTES - len(self._pending)
        self._pending += data[:room]
        if len(self._pending) < _HUGE_PAGE_BYTES:
            return
        rest = data[room:]
        whole = len(rest) - len(rest) % _HUGE_PAGE_BYTES
        _write_all(self._fd, self._pending)
        _write_all(self._fd, rest[:whole])
        self._pending = bytearray(rest[whole:])

    def set_config(self, config: Mapping[str, object]) -> None:
        """Another config.json of the same model, for what is known only when all tensors are written."""
        data = config_bytes(config)
        with self._explained():
            os.unlink(self._partial / CONFIG_FILE)
            self._write_file(CONFIG_FILE, data)
        self._files[CONFIG_FILE] = data
        self._file_sums[CONFIG_FILE] = hashlib.sha256(data).hexdigest()

    def finish(self) -> Path:
        """Writes the checksums, makes everything durable, reads it back and puts the folder in its place."""
        if len(self._checksums) != len(self._specs):
            raise ValueError(f"{len(self._checksums)} of {len(self._specs)} tensors were written")
        with self._explained():
            _write_all(self._fd, self._pending)
            self._pending = bytearray()
            os.lseek(self._fd, 0, os.SEEK_SET)
            header = header_bytes(self._specs, self._checksums, self._file_sums)
            _write_all(self._fd, header)
            os.fsync(self._fd)
            self._close()
            self._read_back(header)
            _sync_folder(self._partial)
            self._put_in_place()
        self._done = True
        return self._out

    def _read_back(self, header: bytes) -> None:
        """Compares every byte of the new folder with what was meant to be written."""
        for name, sha256 in self._file_sums.items():
            if hashlib.sha256((self._partial / name).read_bytes()).hexdigest() != sha256:
                raise QuantizeError(f"{self._out}: {name} reads back other bytes than were written; check the disk")
        fd = os.open(self._partial / WEIGHTS_FILE, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            found, at = _read_at(fd, 0, len(header)) == header, len(header)
            for spec in self._specs:
                found = found and _sha256_of(fd, at, spec.payload_bytes) == self._checksums[spec.name]
                if not found:
                    raise QuantizeError(
                        f"{self._out}: {spec.name} reads back other bytes than were written; check the disk"
                    )
                at += spec.payload_bytes
        finally:
            os.close(fd)

    def _put_in_place(self) -> None:
        """Gives the new folder the output's name, in one step where the system can exchange two names."""
        check_output(self._out, overwrite=self._overwrite)  # once more: much time has passed
        if self._out.exists() and _exchange(self._partial, self._out):
            _sync_folder(self._out.parent)
            return
        try:
            if self._out.exists():
                _remove(self._replaced)
                os.rename(self._out, self._replaced)
            os.rename(self._partial, self._out)
            _sync_folder(self._out.parent)
        except BaseException:
            if self._replaced.exists() and not self._out.exists():
                os.rename(self._replaced, self._out)
            raise

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._partial).free
        if free < needed + _SLACK_BYTES:
            raise QuantizeError(
                f"{self._out}: needs {needed / 1e6:.0f} MB, the file system has {free / 1e6:.0f} MB free; "
                "free some space or choose another output"
            )

    def _write_file(self, name: str, data: bytes) -> None:
        fd = _create(self._partial / name)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)

    def _discard(self) -> None:
        """Removes what lies beside the output; after an exchange of names that is the old output."""
        self._close()
        if self._journal is None:
            return
        _remove(self._partial)
        if self._out.exists():
            _remove(self._replaced)
        self._journal.release(remove=True)
        self._journal = None


class _Tensor:
    """A tensor whose rows come in blocks: codes go out at once, the small sections wait until the last row."""

    def __init__(self, spec: TensorSpec, append: Callable[[memoryview], None]) -> None:
        self._spec, self._append = spec, append
        self._n_rows = self._n_bytes = 0
        self._digest = hashlib.sha256()
        self._waiting = {section.name: bytearray() for section in spec.sections[1:]}

    def add(self, n_rows: int, payload: NDArray[np.uint8]) -> bool:
        """True after the last row."""
        block = self._spec if self._spec.is_vector else replace(self._spec, shape=(n_rows, self._spec.shape[1]))
        if payload.nbytes != block.payload_bytes:
            raise ValueError(f"{block.name}: {payload.nbytes} bytes of {n_rows} rows, expected {block.payload_bytes}")
        for section in block.sections:
            data = payload.data[section.start : section.start + section.nbytes]
            if section.name == "codes":
                self._out(data)
            elif section.name != "input_order" or not self._n_rows:  # that is the whole tensor's in every block
                self._waiting[section.name] += data
        self._n_rows += n_rows
        if self._n_rows < self._spec.shape[0]:
            return False
        for section in self._spec.sections[1:]:
            self._out(memoryview(bytes(section.start - self._n_bytes)))
            self._out(memoryview(self._waiting[section.name]))
        self._out(memoryview(bytes(self._spec.payload_bytes - self._n_bytes)))
        return True

    def _out(self, data: memoryview) -> None:
        self._digest.update(data)
        self._append(data)
        self._n_bytes += len(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def is_written(
    out: Path, specs: Sequence[TensorSpec], config: Mapping[str, object], files: Mapping[str, bytes], *, after: int
) -> bool:
    """Whether `out` already is what this conversion would make: by its header, and written after the source was.

    after: time of the source's last change, in nanoseconds; the header knows but its first bytes.
    """
    try:
        folder = read_model_folder(out)
    except ModelFormatError:
        return False
    about, found = config.get("quantization"), folder.config.get("quantization")
    if isinstance(about, dict) and isinstance(found, dict) and "measured_kl" in found:  # known only afterwards
        config = {**config, "quantization": {**about, "measured_kl": found["measured_kl"]}}
    written = {**files, CONFIG_FILE: config_bytes(config)}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
    tensors = {name: tensor.sha256 or "" for name, tensor in folder.tensors.items()}
    if {spec.name for spec in specs} != tensors.keys():
        return False
    header = header_bytes(specs, tensors, sums)
    with BoundedFile(out / WEIGHTS_FILE) as file:
        return file.mtime_ns >= after and file.size > len(header) and file.read_at(0, len(header)) == header


def clear(out: Path) -> None:
    """Removes what a run that died after its last step has left beside `out`."""
    with _explained(out):
        journal = Journal(out.with_name(f".{out.name}.journal"), out)
        _remove(out.with_name(f".{out.name}.partial"))
        journal.release(remove=True)


def check_output(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The resolved output path; raises QuantizeError when a model folder cannot or must not be put there.

    `overwrite` replaces a folder that holds nothing but a model of ours; anything else is never deleted.
    """
    path = Path(os.path.realpath(out))
    with _explained(path):
        return _checked_output(path, overwrite)


def _checked_output(path: Path, overwrite: bool) -> Path:
    if not path.parent.is_dir():
        raise QuantizeError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.is_symlink():
        raise QuantizeError(f"{path}: is a link that leads back to itself; choose another output")
    if not path.exists():
        return path
    if not path.is_dir():
        raise QuantizeError(f"{path}: is a file, expected the name of a new folder")
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return path
    if not overwrite:
        raise QuantizeError(f"{path}: exists already; choose another output or pass --overwrite")
    foreign = [name for name in names if not _is_ours(name)]
    if foreign or not is_model_folder(path):
        what = f"holds {foreign[0]!r}, which quantize did not write" if foreign else "is no model that quantize wrote"
        raise QuantizeError(f"{path}: {what}; it is not overwritten, choose another output")
    return path


def _is_ours(name: str) -> bool:
    if name.startswith("model") and name.endswith(".safetensors"):
        return True
    return name in (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)


def _is_all_ours(path: Path) -> bool:
    """Whether `path` is a folder, itself and no link to one, that holds nothing but what is written here."""
    try:
        return not path.is_symlink() and all(_is_ours(entry.name) for entry in path.iterdir())
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Removes a folder of ours, whole or half-written; what somebody else has put at that name stays."""
    if _is_all_ours(path):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _explained(out: Path, left: str = "Nothing was left there") -> Iterator[None]:
    """Turns a failure of the file system into one line that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space or choose another output",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another output",
            errno.EACCES: "no permission to write there; choose another output",
            errno.EFBIG: "files may not grow that large there; lift the limit (ulimit -f) or choose another output",
            errno.EROFS: "the file system is read-only; choose another output",
        }.get(error.errno or 0, error.strerror or str(error))
        raise QuantizeError(f"{out}: cannot be written: {advice}. {left}") from error


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.write(fd, view[at : at + _CHUNK_BYTES])


def _read_at(fd: int, offset: int, n: int) -> bytes:
    """Bytes [offset, offset + n), fewer where the file ends."""
    parts = bytearray()
    while len(parts) < n:
        part = os.pread(fd, n - len(parts), offset + len(parts))
        if not part:
            break
        parts += part
    return bytes(parts)


def _sha256_of(fd: int, offset: int, n: int) -> str:
    digest = hashlib.sha256()
    for at in range(offset, offset + n, _READ_BYTES):
        digest.update(_read_at(fd, at, min(_READ_BYTES, offset + n - at)))
    return digest.hexdigest()


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot; the files themselves are durable
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
