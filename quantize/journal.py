"""The lock of an output and what of it is on the disk: a small file beside it that lives while the output is written.

Whoever holds the lock of `.NAME.journal` writes `.NAME.partial`; the system lets go of it when the process dies. A line
names the conversion, the others each a finished tensor with its checksum, so that a later run can go on where this one
was killed. What a line claims is checked against the bytes before it is believed (writer.py). Knows no models.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from pyllama.common.errors import QuantizeError

try:
    import fcntl
except ImportError:  # no such locks: two writers of one output are the user's affair there
    fcntl = None  # type: ignore[assignment]

_MAX_BYTES = 1 << 26


class Journal:
    """The held lock of `path`; raises QuantizeError when another process holds it, OSError when it cannot be made."""

    def __init__(self, path: Path, out: Path) -> None:
        self.path = path
        self._fd = -1
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        while True:
            self._fd = os.open(path, flags, 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._close()
                raise QuantizeError(
                    f"{out}: is being written by another process; wait for it, or choose another output"
                ) from None
            except OSError:
                pass  # a file system without locks, as of some networks
            if self._is_current():
                return
            self._close()  # its holder has removed it meanwhile

    def _is_current(self) -> bool:
        here = os.fstat(self._fd)
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def read(self) -> tuple[str, dict[str, str]]:
        """The conversion that was begun, "" if none, and the tensors that were finished with their checksums."""
        if os.fstat(self._fd).st_size > _MAX_BYTES:
            return "", {}
        lines = os.pread(self._fd, _MAX_BYTES, 0).split(b"\n")[:-1]  # what follows the last line's end is half a line
        try:
            entries = [json.loads(line) for line in lines]
            if not entries:
                return "", {}
            return str(entries[0]["conversion"]), {str(e["tensor"]): str(e["sha256"]) for e in entries[1:]}
        except (ValueError, TypeError, KeyError, RecursionError):
            return "", {}

    def forget(self) -> None:
        """Nothing is begun."""
        os.ftruncate(self._fd, 0)

    def begin(self, conversion: str, finished: dict[str, str]) -> None:
        """Names the conversion; of one that goes on the first lines stay as they are, whenever this is cut short."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._write({"conversion": conversion})
        for name, sha256 in finished.items():
            self.add(name, sha256)
        os.ftruncate(self._fd, os.lseek(self._fd, 0, os.SEEK_CUR))

    def add(self, name: str, sha256: str) -> None:
        """A tensor is finished."""
        self._write({"tensor": name, "sha256": sha256})

    def _write(self, entry: dict[str, str]) -> None:
        data = json.dumps(entry).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]

    def release(self, *, remove: bool) -> None:
        """Lets go of the lock; `remove` also removes the file. Never raises."""
        if self._fd >= 0 and remove:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)
