"""The device under test: csrc/cuda and the test kernels of this folder in one library, loaded by ctypes.

Usually the device is emulated on the CPU, which needs a C++ compiler and no CUDA. With PYLLAMA_CUDA_TESTS=device it is
a real one: the same sources compiled by nvcc, the same tests (`make gpu-check`); what only the emulation can tell is
marked `emulation_only`. A kernel is `Emulated.run(name, in, out_words, …)`; other entry points are
`Emulated.call(name, *arguments)` with numpy arrays, numbers and strings. Results are compared by `in_all_orders`: of
threads; on a device from run to run, with early starts and without.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import _shared_temp
from tests.cuda.compiling import (
    DEFAULT_ARCHITECTURE,
    CannotCompileError,
    compile_emulated,
    compile_for_device,
    device_architecture,
)
from tests.cuda.entries import Entries, EntryError

ORDERS = ("ascending", "descending", "random:1", "random:2", "random:3")
EARLY = (1, 1, 0)  # early starts of the runs on a device
# emulation, device, or the path of a library that was compiled before (tests/cuda/compiling.py).
TESTS_ON = os.environ.get("PYLLAMA_CUDA_TESTS") or "emulation"
ON_DEVICE = TESTS_ON != "emulation"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With PYLLAMA_CUDA_SAMPLE=2, two cases of each test, the first and one of the middle: for slow tools."""
    most = int(os.environ.get("PYLLAMA_CUDA_SAMPLE") or 0)
    if not most:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    items[:] = [
        case[i * len(case) // min(most, len(case))] for case in cases.values() for i in range(min(most, len(case)))
    ]


def emulation_only(why: str) -> pytest.MarkDecorator:
    """For tests of what a device does not do: `why` says what."""
    return pytest.mark.skipif(ON_DEVICE, reason=f"only in the emulation: {why}")


EmulationError = EntryError  # what the emulation found, or the device


class Emulated(Entries):
    """The loaded library."""

    on_device = ON_DEVICE

    def run(
        self,
        kernel: str,
        words: np.ndarray,
        out: int | np.ndarray,
        *,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: int = 32,
        shared: int = 0,
        early: bool = False,
    ) -> np.ndarray:
        """Runs a kernel of tests/cuda/*_kernels.cpp: words in, words out (their number, or what they are before)."""
        result = np.zeros(out, np.uint32) if isinstance(out, int) else out.astype(np.uint32)
        words = np.ascontiguousarray(words).view(np.uint32).ravel()
        shape = np.array([*grid, block, shared, early], np.uint32)
        self.call("run_kernel", kernel, words, words.size, result, result.size, shape)
        return result

    def in_all_orders(self, run: Callable[[], np.ndarray]) -> np.ndarray:
        """What `run` returns, after checking that it is the same bits whatever the order of threads and blocks; on a
        device, from run to run and whether kernels start early or not."""
        entry, ways = ("allow_early", EARLY) if self.on_device else ("set_order", ORDERS)
        results = []
        try:
            for way in ways:
                self.call(entry, way)
                results.append(run())
        finally:
            self.call(entry, ways[0])
        for way, result in zip(ways, results, strict=True):
            assert result.tobytes() == results[0].tobytes(), f"{entry} {way} gives other bits than {ways[0]} did first"
        return results[0]


def make_library(folder: Path) -> Path:
    """The library to test, compiled into the folder unless it is there."""
    library = folder / "libpyllama_cuda_tests.so"
    if TESTS_ON not in ("emulation", "device"):
        return Path(TESTS_ON).resolve()
    if not library.exists():
        if ON_DEVICE:
            compile_for_device(library, device_architecture() or DEFAULT_ARCHITECTURE)
        else:
            compile_emulated(library)
    return library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    """The device under test, emulated unless PYLLAMA_CUDA_TESTS says otherwise."""
    folder = _shared_temp(tmp_path_factory) / "cuda-emulation"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the processes of xdist share one library
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            path = make_library(folder)
        except CannotCompileError as error:
            if ON_DEVICE or "no C++ compiler" not in str(error):
                pytest.fail(str(error))
            pytest.skip(str(error))
    library = Emulated(path)
    if ON_DEVICE:
        try:
            library.call("allow_early", 1)
        except EmulationError as error:
            pytest.exit(f"PYLLAMA_CUDA_TESTS={TESTS_ON}: {error}", returncode=3)
    yield library


@pytest.fixture(scope="session")
def cuda_library(emulated: Emulated) -> Path:
    """What PYLLAMA_CUDA_LIBRARY is to be for tests of whole models: the same library, so that `emulated` rules it."""
    return emulated.path
