"""The fuzzer itself: marks change nothing and tell branches apart, what is written is seen, and a short run passes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.watch import Watch

ROOT = Path(__file__).resolve().parent.parent
PLANTED = '''
def kind(text):
    """A docstring stays the first statement."""
    if text.startswith("a") and len(text) > 2:
        return [c for c in text if c != "b"]
    for i in range(3):
        if i == len(text):
            break
    else:
        return "long" if text else ""
    match text:
        case "x":
            return 1
    try:
        return {}[text]
    except KeyError:
        return None
'''
PROBE = """
import sys
from fuzz import branches
sys.path.insert(0, sys.argv[1])
branches.install(["planted"])
import planted
news = []
for text in ("abc", "abd", "x", "y", "", "xyzz", "xyzz", "a"):
    branches.begin()
    print(planted.kind(text), planted.kind.__doc__ is not None, branches.news() > 0)
print(branches.untaken(), sorted(branches.words)[:2])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_marks_tell_branches_apart_and_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    done = run("-c", PROBE, str(tmp_path))
    values: dict[str, object] = {}
    exec(PLANTED, values)
    texts = ("abc", "abd", "x", "y", "", "xyzz", "xyzz", "a")
    new = [True, False, True, True, False, True, False, False]
    expected = [f"{values['kind'](text)} True {which}" for text, which in zip(texts, new, strict=True)]  # type: ignore[operator]
    assert done.stdout.splitlines()[:-1] == expected, done.stderr
    assert done.stdout.splitlines()[-1].endswith("planted.py:10'] ['A docstring stays the first statement.', 'a']")


def test_what_is_written_is_seen(tmp_path: Path) -> None:
    watch = Watch()
    (tmp_path / "may").mkdir()
    with watch.writing_only(tmp_path / "may"):
        (tmp_path / "may" / "a").write_text("x")
        (tmp_path / "may" / "a").read_text()
    for place in (tmp_path / "may", None):
        with pytest.raises(AssertionError, match="may not"), watch.writing_only(place):
            (tmp_path / "b").write_text("x")
    with pytest.raises(AssertionError, match="socket"), watch.writing_only(None):
        socket.socket().close()


def test_a_short_run() -> None:
    done = run("-m", "fuzz", "--runs", "1", "--only", "config", "pickle", "gguf", "journal")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runs"] >= 4 and found["accepted"] >= 4 and found["branches"] > 500 and found["failures"] == 0
