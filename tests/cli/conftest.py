"""What the commands' tests share: no traces in the user's folders, quick probes, and a small model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import make_sources as make

ROOT = Path(__file__).resolve().parent.parent.parent
FAST = ["--threads", "1", "--temperature", "0"]
PYTHON = [sys.executable, "-m", "pyllama"]

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_debugging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYLLAMA_DEBUG", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("pyllama.cli.bench._PROBE_S", 0.02)
    monkeypatch.setattr("pyllama.doctor._PROBE_S", 0.02)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A small model of nonsense words, quick to open."""
    return make.write_gguf(tmp_path / "small.gguf", make.Shape(), make.random_weights(make.Shape()), "Q4_0")
