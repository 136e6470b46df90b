"""A conversion that is killed: run as a program, it converts and sends itself SIGKILL at a chosen moment.

`python -m tests.helpers_crash SRC OUT at N` dies in the N-th call that changes a file (a write is cut in half before),
`… after SECONDS` dies then. When it lives it prints the number of calls and its seconds. Used by `make check-crash`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate", "open")
FORMAT = "q4nl"


def crash(source: Path, out: Path, how: str, when: float, *, resume: bool) -> subprocess.CompletedProcess[str]:
    """Runs a conversion that dies (or is done before); always with --overwrite."""
    words = [sys.executable, "-m", "tests.helpers_crash", str(source), str(out), how, str(when), str(int(resume))]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(number: int) -> list[int]:
    """Patches the calls that change files; the list counts them."""
    import quantize.writer as writer

    count = [0]

    def patched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not (len(arguments) > 1 and arguments[1] & os.O_CREAT):
                return real(*arguments, **options)
            count[0] += 1
            if count[0] == number:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                die()
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, patched(name, getattr(os, name)))
    exchange = writer._exchange

    def late(a: Path, b: Path) -> bool:
        count[0] += 1
        if count[0] == number:
            die()
        done = exchange(a, b)
        count[0] += 1
        if count[0] == number:
            die()
        return done

    writer._exchange = late
    return count


def main() -> None:
    source, out, how, when, resume = sys.argv[1:]
    from quantize import convert

    count = [0]
    if how == "at":
        count = dying(int(float(when)))
    else:
        timer = threading.Timer(float(when), die)
        timer.daemon = True
        timer.start()
    started = time.monotonic()
    convert(source, out, format=FORMAT, overwrite=True, resume=resume == "1")
    print(count[0], time.monotonic() - started)


if __name__ == "__main__":
    main()
