"""Compiles csrc/cuda and the C++ files of this folder into one library that ctypes can load: by g++ against the
emulation, or by nvcc for a device. Objects stay in build/cuda-tests until a source, a header or the command is another
one. Imports neither pytest nor numpy, so that scripts can use it; `python -m tests.cuda.compiling` does the latter.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = ROOT / "csrc" / "cuda"
HERE = Path(__file__).resolve().parent
EMULATION_ONLY = {"defect_kernels.cpp"}  # its kernels are wrong, and the emulation says how
DEFAULT_ARCHITECTURE = "90"
# Kernels that say "the next one may start" and then take 20 microseconds more: who does not wait for them is seen.
LATE_ENDS = "-DPYLLAMA_CUDA_LATE_ENDS"


class CannotCompileError(Exception):
    """There is no compiler, or it refuses a source: then with its words."""


def compile_emulated(target: Path) -> None:
    """The emulation, with the C++ compiler alone. Raises CannotCompileError."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise CannotCompileError(f"no C++ compiler: there is no {compiler[0]} (set CXX)")
    sources = [*CUDA.glob("emulation/*.cpp"), *CUDA.glob("*.cpp"), *HERE.glob("*.cpp")]
    sources += [p for p in CUDA.glob("*.cu") if p.name != "runtime_cuda.cu"]
    flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fvisibility=hidden"]
    # Vectorising the plain code of an entry point in linear_entries.cpp, g++ 12 for ARM makes one of two arguments 0.
    flags += ["-fno-tree-vectorize", "-DPYLLAMA_CUDA_EMULATION", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    objects = compile_all([*compiler, *flags], sources, jobs=min(4, os.cpu_count() or 1))
    link([*compiler, "-shared"], objects, target)


def compile_for_device(
    target: Path, architecture: str, *, late_ends: bool = False, tests_only: bool = False, jobs: int | None = None
) -> None:
    """Code for one architecture ("90"), by nvcc; tests_only: compiles them and links nothing. Raises
    CannotCompileError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise CannotCompileError("there is no nvcc (looked at CUDACXX, PATH, /usr/local/cuda)")
    sources = [p for p in HERE.glob("*.cpp") if p.name not in EMULATION_ONLY]
    if not tests_only:
        sources += [*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")]
    host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-ffp-contract=off"
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{architecture}", f"-Xcompiler={host}"]
    command += [f"-I{ROOT / 'csrc'}", f'-DPYLLAMA_CUDA_ARCHITECTURES="{architecture}"', *[LATE_ENDS] * late_ends]
    objects = compile_all([*command, "-x", "cu"], sources, jobs=jobs or len(os.sched_getaffinity(0)))
    if tests_only:
        return
    # torch may be in the same process: its copy of CUDA's runtime and this one must not see each other.
    link([nvcc, "-shared", "-cudart", "static", "-Xlinker=--exclude-libs,ALL"], objects, target)


def find_nvcc() -> str | None:
    for name in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and (found := shutil.which(name)):
            return found
    return None


def device_architecture() -> str | None:
    """The architecture of the first device that nvidia-smi lists, "90"; None where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"(\d+)\.(\d)", done.stdout)
    return found[1] + found[2] if found and done.returncode == 0 else None


def compile_all(command: Sequence[str], sources: Sequence[Path], jobs: int) -> list[Path]:
    headers = sorted(p for place in (ROOT / "csrc", CUDA, CUDA / "emulation", HERE) for p in place.glob("*.*h"))
    common = hashlib.sha256(" ".join([platform.machine(), *command]).encode())
    for header in headers:
        common.update(header.read_bytes())
    kept = ROOT / "build" / "cuda-tests" / hashlib.sha256(" ".join(command).encode()).hexdigest()[:8]
    kept.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        target = kept / f"{source.parent.name}-{source.name}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            run([*command, "-c", str(source), "-o", str(partial)], source.name)
            partial.replace(target)
        return target

    largest_first = sorted(sources, key=lambda p: -p.stat().st_size)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, largest_first))
    versions = {p for s in sources for p in kept.glob(f"{s.parent.name}-{s.name}-*.o")}
    for old in versions - set(objects):
        old.unlink(missing_ok=True)
    return objects


def link(command: Sequence[str], objects: Sequence[Path], target: Path) -> None:
    partial = target.with_suffix(f".{os.getpid()}")
    run([*command, "-o", str(partial), *map(str, objects)], target.name)
    partial.replace(target)


def run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotCompileError(f"{what}: {command[0]} says\n{done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels and their tests for a device.")
    parser.add_argument("target", type=Path, help="the library to make")
    parser.add_argument("--architecture", default=device_architecture() or DEFAULT_ARCHITECTURE)
    parser.add_argument("--late-ends", action="store_true", help="kernels end late after they let the next one start")
    parser.add_argument("--tests-only", action="store_true", help="compile the tests without the kernels, link nothing")
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    try:
        compile_for_device(
            arguments.target,
            arguments.architecture,
            late_ends=arguments.late_ends,
            tests_only=arguments.tests_only,
            jobs=arguments.jobs,
        )
    except CannotCompileError as error:
        raise SystemExit(f"compiling for sm_{arguments.architecture}: {error}") from None


if __name__ == "__main__":
    main()
