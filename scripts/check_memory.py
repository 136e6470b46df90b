"""`make check-memory`: the most memory that a conversion of Llama 3 70B's shapes takes, for every source that is read.

The model is cut to one layer: the largest matrices are all there, of the embedding 4,000 words where more would only
take time. Each source is converted under the smallest limit that is accepted (asked by one that is not) and under 1 GB.
The last column is the smallest limit for all 80 layers, which opening tells. A peak above its limit is a failure.
The checkpoints are sparse; the output takes up to 3 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.helpers_memory import measured, rehearsed
from tests.make_sparse import SEVENTY, SOURCES

ALL_WORDS = ("LoRA r 256, embeddings", "Meta, 8 .pth bf16, words cut", "GGUF Q6_K")  # all 128,256 of them


def least(words: list[str], out: Path) -> int:
    """The smallest limit in MB that is accepted, going by what a refusal says."""
    ended, _ = measured([*words, "-o", str(out), "--max-memory", "1MB"])
    found = re.search(r"needs at least (\d+) MB", ended.stderr)
    if ended.returncode != 1 or found is None or out.exists():
        raise SystemExit(f"1 MB was not refused: {ended.returncode}\n{ended.stderr}")
    return int(found[1])


def row(name: str, base: Path, output: Path, quick: bool) -> tuple[str, bool]:
    """A line of the table, and whether the promise was kept."""
    out, shape = output / "model", SEVENTY if name in ALL_WORDS else dataclasses.replace(SEVENTY, vocab_size=4000)
    (base / "one").mkdir()
    words = SOURCES[name](base / "one", shape)
    smallest = least(words, out)
    cells, good = [name], True
    for limit in (smallest, 1000):
        if quick and limit != smallest:
            most, peak = rehearsed(words, limit * 10**6)
            good = good and peak <= most
            cells.append(f"{(peak + limit * 10**6 - most) / 1e6:.0f} of {limit} MB, by some blocks")
            continue
        begun = time.monotonic()
        ended, peak = measured([*words, "-o", str(out), "--max-memory", f"{limit}MB"])
        seconds = time.monotonic() - begun
        shutil.rmtree(out, ignore_errors=True)
        kept = ended.returncode == 0 and peak <= limit * 10**6
        good = good and kept
        told = f"{peak / 1e6:.0f} of {limit} MB" if ended.returncode == 0 else ended.stderr.strip()[-300:]
        cells.append(f"{told} in {seconds:.0f} s" + ("" if kept else " **broken**"))
    (base / "whole").mkdir()
    cells.append(f"{least(SOURCES[name](base / 'whole', dataclasses.replace(SEVENTY, n_layers=80)), out)} MB")
    return " | ".join(cells), good


def main() -> int:
    parser = argparse.ArgumentParser(description="peaks under --max-memory for every source")
    parser.add_argument("sources", nargs="*", default=list(SOURCES), help="only these")
    parser.add_argument("--output", type=Path, help="a folder for what is converted (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="under 1 GB two blocks of each tensor instead of all")
    options = parser.parse_args()
    good = True
    print("source | smallest limit | limit of 1 GB | smallest with 80 layers", flush=True)
    for name in options.sources:
        with tempfile.TemporaryDirectory() as folder:
            line, kept = row(name, Path(folder), options.output or Path(folder), options.quick)
        good = good and kept
        print(line, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
