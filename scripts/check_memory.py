"""`make check-memory`: the most memory that a conversion of Llama 3 70B's shapes takes, for every source that is read.

The model is cut to one layer: the largest tensors are all there. Each source is converted under the smallest limit
that is accepted (asked by a limit that is not) and under 1 GB. The last column is the smallest limit for all 80 layers,
which opening alone tells. A peak above its limit is a failure. The checkpoints are sparse; the output takes 4 GB.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.helpers_memory import measured
from tests.make_sparse import SEVENTY, SOURCES


def least(words: list[str], out: Path) -> int:
    """The smallest limit in MB that is accepted, going by what a refusal says."""
    ended, _ = measured([*words, "-o", str(out), "--max-memory", "1MB"])
    found = re.search(r"needs at least (\d+) MB", ended.stderr)
    if ended.returncode != 1 or found is None or out.exists():
        raise SystemExit(f"1 MB was not refused: {ended.returncode}\n{ended.stderr}")
    return int(found[1])


def row(name: str, base: Path) -> tuple[str, bool]:
    """A line of the table, and whether the promise was kept."""
    out = base / "out"
    (base / "one").mkdir()
    words = SOURCES[name](base / "one", SEVENTY)
    smallest = least(words, out)
    cells, good = [name], True
    for limit in (smallest, 1000):
        begun = time.monotonic()
        ended, peak = measured([*words, "-o", str(out), "--max-memory", f"{limit}MB"])
        seconds = time.monotonic() - begun
        shutil.rmtree(out, ignore_errors=True)
        kept = ended.returncode == 0 and peak <= limit * 10**6
        good = good and kept
        what = (
            f"{peak / 1e6:.0f} of {limit} MB in {seconds:.0f} s"
            if ended.returncode == 0
            else ended.stderr.strip()[-300:]
        )
        cells.append(what + ("" if kept else " **broken**"))
    shutil.rmtree(base / "one")
    (base / "whole").mkdir()
    cells.append(f"{least(SOURCES[name](base / 'whole', dataclasses.replace(SEVENTY, n_layers=80)), out)} MB")
    shutil.rmtree(base / "whole")
    return " | ".join(cells), good


def main() -> int:
    names = sys.argv[1:] or list(SOURCES)
    good = True
    print("source | smallest limit | limit of 1 GB | smallest with 80 layers", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            line, kept = row(name, Path(folder))
        good = good and kept
        print(line, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
