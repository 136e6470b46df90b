"""`--max-memory` is kept: peaks of processes of their own, for every source, over sparse checkpoints of a 70B's shapes.

Here a few blocks of each tensor are converted under the smallest limit that is accepted, which shows who reads a whole
tensor, and one scaled model whole. `make check-memory` converts everything, whole; docs/CHECKPOINTS.md has its table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .helpers_memory import KNOWN, measured, rehearsed
from .make_sparse import SCALED, SEVENTY, SOURCES

pytestmark = pytest.mark.skipif(not KNOWN, reason="the peak of a process is read from /proc")


# Looked through before conversion (a head compared with the embedding), or cut across all of a file: smaller, for time.
_SCALED = ("Meta, 8 .pth f16, tied", ".bin f16, transposed")


@pytest.mark.parametrize("name", SOURCES)
def test_no_source_is_read_whole(name: str, tmp_path: Path) -> None:
    limit, peak = rehearsed(SOURCES[name](tmp_path, SCALED if name in _SCALED else SEVENTY))
    assert peak <= limit <= 200 * 10**6


def test_the_limit_is_kept_to_the_end(tmp_path: Path) -> None:
    words = [*SOURCES["GGUF F16"](tmp_path, SCALED), "-o", str(tmp_path / "model"), "--format", "q8"]

    def peak(*options: str) -> int:
        ended, most = measured([*words, "--overwrite", *options])
        assert ended.returncode == 0, ended.stderr
        return most

    limit = 120 * 10**6
    assert peak("--max-memory", "120MB") <= limit
    assert peak() > 1.3 * limit  # what is measured is what would grow
