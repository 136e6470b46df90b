"""The emulated device: csrc/cuda and the test kernels of this folder, compiled by g++ into one library.

Needs a C++ compiler and no CUDA; loaded by ctypes. A kernel is `Emulated.run(name, in, out_words, …)`; other entry
points are `Emulated.call(name, *arguments)` with numpy arrays, numbers and strings. Results are compared in all thread
orders by `in_all_orders`.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, _shared_temp

ORDERS = ("ascending", "descending", "random:1", "random:2", "random:3")


class EmulationError(Exception):
    """What the emulation found."""


class Emulated:
    """The loaded library. Every failure of it is an EmulationError with its message."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.pyllama_test_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> None:
        converted = []
        for a in arguments:
            if isinstance(a, np.ndarray):
                assert a.flags.c_contiguous
                converted.append(ctypes.c_void_p(a.ctypes.data))
            elif isinstance(a, str):
                converted.append(ctypes.c_char_p(a.encode()))
            elif isinstance(a, float):
                converted.append(ctypes.c_double(a))
            else:
                converted.append(ctypes.c_int64(a))
        if getattr(self.library, name)(*converted):
            raise EmulationError(self.library.pyllama_test_error().decode())

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
        """What `run` returns, after checking that it is the same bits whatever the order of threads and blocks."""
        results = []
        try:
            for order in ORDERS:
                self.call("set_order", order)
                results.append(run())
        finally:
            self.call("set_order", "ascending")
        for order, result in zip(ORDERS, results, strict=True):
            assert result.tobytes() == results[0].tobytes(), f"thread order {order} gives other bits than {ORDERS[0]}"
        return results[0]


def compile_emulated(folder: Path) -> Path:
    """One library of everything under csrc/cuda that is not for nvcc alone, and of the C++ files of this folder.
    Objects stay in build/cuda-tests until a source, a header or the compiler's command is another one."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: there is no {compiler[0]} (set CXX)")
    cuda = ROOT / "csrc" / "cuda"
    here = Path(__file__).parent
    sources = [*cuda.glob("emulation/*.cpp"), *cuda.glob("*.cpp"), *here.glob("*.cpp")]
    sources += [p for p in cuda.glob("*.cu") if p.name != "runtime_cuda.cu"]
    flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fvisibility=hidden"]
    # Vectorising the plain code of an entry point in linear_entries.cpp, g++ 12 for ARM makes one of two arguments 0.
    flags += ["-fno-tree-vectorize", "-DPYLLAMA_CUDA_EMULATION", f"-I{ROOT / 'csrc'}"]
    headers = sorted(p for place in (ROOT / "csrc", cuda, cuda / "emulation", here) for p in place.glob("*.*h"))
    common = hashlib.sha256(" ".join([platform.machine(), *compiler, *flags]).encode())
    for header in headers:
        common.update(header.read_bytes())
    kept = ROOT / "build" / "cuda-tests" / hashlib.sha256(" ".join(compiler).encode()).hexdigest()[:8]
    kept.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        target = kept / f"{source.parent.name}-{source.name}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            command = [*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            partial.replace(target)
        return target

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    for old in set(kept.glob("*.o")) - set(objects):
        old.unlink(missing_ok=True)
    library = folder / "libpyllama_cuda_tests.so"
    subprocess.run([*compiler, "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    folder = _shared_temp(tmp_path_factory) / "cuda-emulation"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the processes of xdist share one library
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "libpyllama_cuda_tests.so"
        if not library.exists():
            compile_emulated(folder)
    yield Emulated(library)
