"""What this process and this machine are: for the notes beside the figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process: anonymous (its own) and of mapped files, in bytes. Linux only, else {}."""
    found = {}
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {"anonymous": 0, "file": 0}
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return {"anonymous": found.get("RssAnon", 0) + found.get("RssShmem", 0), "file": found.get("RssFile", 0)}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load() -> float:
    """Processes that wanted to run in the last minute, on average."""
    return os.getloadavg()[0]
