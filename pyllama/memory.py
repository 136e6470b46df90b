"""How much memory is free, as far as the system tells. Takes none itself."""

from __future__ import annotations


def available_bytes() -> int | None:
    """Memory that programs can get without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None
