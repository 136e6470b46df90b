"""Sees what a run writes or starts: files outside what it may write, sockets, processes.

By Python's audit events alone: a library that writes by itself is not seen. The hook stays for the life of the process
and sleeps between runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.", "os.fork")
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    def __init__(self) -> None:
        self._awake = False
        self._place: str | None = None
        self._seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def writing_only(self, place: Path | None) -> Iterator[None]:
        """AssertionError when something outside `place` is written inside, or anything for None."""
        self._place, self._seen, self._awake = None if place is None else str(place), [], True
        try:
            yield
        finally:
            self._awake = False
        assert not self._seen, f"did what it may not: {self._seen[:5]}"

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._awake:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and not self._may(path):
                self._seen.append(f"open {path!r}")
        elif event.startswith(_FORBIDDEN):
            self._seen.append(event)
        elif event in _CHANGES and not self._may(arguments[0]):
            self._seen.append(f"{event} {arguments[0]!r}")

    def _may(self, path: Any) -> bool:
        if self._place is None or isinstance(path, int):
            return isinstance(path, int)
        name = os.fsdecode(path)
        return not os.path.isabs(name) or os.path.abspath(name).startswith(self._place)
