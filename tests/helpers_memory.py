"""Runs `quantize` in a process of its own and says how much memory it had resident at most.

What counts is what the system counts (VmHWM): memory of its own, libraries, and pages of files that are mapped and in
memory; not the system's cache of files that nobody maps. Only Linux tells it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN = Path("/proc/self/status").exists()

_MEASURED = """
import sys
from quantize.cli import main
from quantize.pipeline import resident_bytes
code = main(sys.argv[1:])
print(resident_bytes()[1])
sys.exit(code)
"""


# Instead of whole tensors, two blocks of each: who reads a whole tensor for a block is seen as well, and sooner.
_REHEARSED = """
import re, sys
from quantize import pipeline
from quantize.cli import main
from quantize.convert import make_plan
from quantize.lora import merge_adapters
from quantize.readers import open_source
from pyllama.common.errors import QuantizeError
limit, threads = int(sys.argv[1]), 1 if sys.argv[1] == "0" else 2
source = merge_adapters(open_source(sys.argv[2]), [(path, 1.0) for path in sys.argv[4::2]])
plan = make_plan(source)
whole = pipeline._blocks
pipeline._blocks = lambda *words: (lambda blocks: blocks[:1] + blocks[1:][-1:])(list(whole(*words)))
watched = pipeline._Watched(source.files)
watched.release()
try:
    pipeline._Work.within(plan, 1, 1)
except QuantizeError as error:
    limit = limit or int(re.search(r"at least ([0-9]+) MB", str(error))[1]) * 10**6
work = pipeline._Work.within(plan, limit, threads)
for _ in pipeline._converted(plan.tensors, plan.method, work):
    watched.release()
waiting = max(sum(section.nbytes for section in item.spec.sections[1:]) for item in plan.tensors)
print(limit, pipeline.resident_bytes()[1], waiting)
"""


def rehearsed(words: Sequence[str], limit: int = 0) -> tuple[int, int]:
    """A limit, the smallest that `quantize` accepts for these words if none is given, without what scales take that
    wait for a tensor's last row; and the peak under it over two blocks of each tensor, without writing."""
    command = [sys.executable, "-c", _REHEARSED, str(limit), *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    limit, peak, waiting = map(int, ended.stdout.split())
    return limit - waiting, peak


def measured(words: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], int]:
    """`quantize` with these words, and its peak in bytes."""
    command = [sys.executable, "-c", _MEASURED, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    return ended, int(lines[-1]) if lines and lines[-1].isdigit() else 0
