"""What README.md shows is what happens: its Python is executed and its commands are run, with the demo model.

Indented blocks (installing, make) are not run here; the gate does that by being built from them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_python_runs(demo_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks("python")
    assert found
    space: dict[str, object] = {}
    for code in found:
        exec(compile(code, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "Paris" in printed
    scores = space["scores"]
    assert getattr(scores, "ndim", 0) == 2


def test_the_commands_run(demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(demo_gguf)
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert lines
    # As `python -m`: the commands need not be on PATH, and the tree under test is the one that runs.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    printed = ""
    for line in lines:
        program, *arguments = shlex.split(line.removeprefix("$ "))
        assert program in {"pyllama", "quantize"}, line
        command = [sys.executable, "-m", program, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        printed += done.stdout
    assert "Paris" in printed


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for line in re.findall(r"^    make ([a-z -]+)", README, re.MULTILINE) for t in line.split()}
    assert named <= targets, named - targets
