"""Writes a model folder so that nobody ever sees half of one.

Everything goes into a hidden folder beside the output, on the same file system; only when the last byte is on the disk
is it renamed. Whatever stops the writing (an exception, Ctrl-C, a full disk) removes the hidden folder and leaves the
output as it was. The header is laid out first with zeros for checksums, tensors follow one by one, then the header is
written again with the sums. Knows bytes and files; what they mean is said by pyllama/common/model_folder.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import QuantizeError
from pyllama.common.formats import TensorSpec
from pyllama.common.model_folder import CONFIG_FILE, WEIGHTS_FILE, config_bytes, header_bytes, is_model_folder

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
_HUGE_PAGE_BYTES = 1 << 21
_SLACK_BYTES = 1 << 20  # folder entries, rounding to blocks


class FolderWriter:
    """Writes one model folder; a context manager.

        with FolderWriter(out, specs, config, files) as writer:
            for spec in specs: writer.add_tensor(spec, payload)   # in this order
            writer.finish()

    files: the tokenizer's and the like, by name. Leaving the block without `finish` leaves nothing behind.
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
    ) -> None:
        foreign = sorted(files.keys() - {*TOKENIZER_FILES, GENERATION_FILE})
        if foreign:
            raise ValueError(f"{foreign[0]!r} is no file of a model folder")
        self._out = check_output(out, overwrite=overwrite)
        self._overwrite = overwrite
        self._specs = list(specs)
        self._files = {**files, CONFIG_FILE: config_bytes(config)}
        self._file_sums = {name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()}
        self._partial = self._out.with_name(f".{self._out.name}.{secrets.token_hex(4)}.partial")
        self._replaced = self._partial.with_suffix(".old")  # where an old output waits until the new one is in place
        self._checksums: dict[str, str] = {}
        self._fd = -1
        self._pending = bytearray()  # the end of the file so far, less than a huge page

    def __enter__(self) -> FolderWriter:
        with _explained(self._out):
            try:
                self._partial.mkdir()
                header = header_bytes(self._specs, None, self._file_sums)
                self._check_space(len(header) + sum(spec.payload_bytes for spec in self._specs))
                for name, data in self._files.items():
                    self._write_file(name, data)
                self._fd = _create(self._partial / WEIGHTS_FILE)
                self._append(memoryview(header))
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def add_tensor(self, spec: TensorSpec, payload: NDArray[np.uint8]) -> None:
        """Appends the payload of the next tensor of `specs`."""
        expected = self._specs[len(self._checksums)]
        if spec != expected or payload.nbytes != spec.payload_bytes:
            raise ValueError(f"{spec.name}, {payload.nbytes} bytes, expected {expected.name}, {expected.payload_bytes}")
        data = np.ascontiguousarray(payload).data.cast("B")
        with _explained(self._out):
            self._append(data)
        self._checksums[spec.name] = hashlib.sha256(data).hexdigest()

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

    def finish(self) -> Path:
        """Writes the checksums, makes everything durable and puts the folder in its place."""
        if len(self._checksums) != len(self._specs):
            raise ValueError(f"{len(self._checksums)} of {len(self._specs)} tensors were written")
        with _explained(self._out):
            _write_all(self._fd, self._pending)
            os.lseek(self._fd, 0, os.SEEK_SET)
            _write_all(self._fd, header_bytes(self._specs, self._checksums, self._file_sums))
            os.fsync(self._fd)
            self._close()
            _sync_folder(self._partial)
            self._put_in_place()
        return self._out

    def _put_in_place(self) -> None:
        """Renames the new folder to the output; an old one steps aside first and comes back if that fails."""
        check_output(self._out, overwrite=self._overwrite)  # once more: much time has passed
        try:
            if self._out.exists():
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
            os.close(fd)

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._out.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)


def check_output(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The resolved output path; raises QuantizeError when a model folder cannot or must not be put there.

    `overwrite` replaces a folder that holds nothing but a model of ours; anything else is never deleted.
    """
    path = Path(out).resolve()
    if not path.parent.is_dir():
        raise QuantizeError(f"{path}: the folder {path.parent} does not exist; make it first")
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
        what = f"holds {foreign[0]!r}" if foreign else "is no model folder"
        raise QuantizeError(
            f"{path}: {what}, which quantize did not write; it is not overwritten, choose another output"
        )
    return path


def _is_ours(name: str) -> bool:
    if name.startswith("model") and name.endswith(".safetensors"):
        return True
    return name in (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns a failure of the file system into one line that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space or choose another output",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another output",
            errno.EACCES: "no permission to write there; choose another output",
            errno.EROFS: "the file system is read-only; choose another output",
        }.get(error.errno or 0, error.strerror or str(error))
        raise QuantizeError(f"{out}: cannot be written: {advice}. Nothing was left there") from error


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.write(fd, view[at : at + _CHUNK_BYTES])


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:  # some network file systems cannot; the files themselves are durable
        pass
    finally:
        os.close(fd)
