"""Compiles every CUDA kernel for every architecture and looks at what came out: `make check-cuda`.

Fails when a kernel spills registers, has a stack frame, or takes more registers than its source promises, or more
instructions a weight (or a matrix instruction) in its inner loop. Needs nvcc and no device; without nvcc it says so and
passes. Instructions are counted where nvdisasm is there (in PATH, or from the package nvidia-cuda-nvdisasm). It runs
nothing and measures no time.

A source file promises in comments, whose first word is a part of the kernel's name, plain or mangled:

    // registers: read_kernel 32
    // loop: linear_kernel 2.1 per weight, 128 weights
    // loop: product_kernel 5.0 per mma, 64 mma

A kernel's inner loop is the one with most tensor core instructions (then: most instructions) of those that hold no
other loop: from the target of a backward branch to the branch, both included.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra,-Werror")
LOOP = r"(\w+) ([\d.]+) per (?:weight(?=, \d+ weights)|mma(?=, \d+ mma)), (\d+) (\w+)"
TENSOR_CORE = re.compile(r"\b[HIQ]?(?:GMMA|MMA)\b|\b[HI]MMA\.")


@dataclass
class Kernel:
    """What the compiler says of one kernel on one architecture. `loop`: instructions of its inner loop, if counted."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    loop: int | None = None


@dataclass(frozen=True)
class Loop:
    each: float  # instructions
    count: int
    unit: str  # of what: weights of a lane, or matrix instructions


@dataclass
class Promises:
    """Part of a kernel's name -> what its source promises."""

    registers: dict[str, int]
    loops: dict[str, Loop]


def parse_promises(texts: Iterable[str]) -> Promises:
    """The promises of these sources. Raises ValueError for a comment that begins like one and is none."""
    promises = Promises({}, {})
    for text in texts:
        for kind, rest in re.findall(r"^\s*// (registers|loop): (.*)$", text, re.MULTILINE):
            if kind == "registers" and (found := re.fullmatch(r"(\w+) (\d+)", rest.strip())):
                promises.registers[found[1]] = int(found[2])
            elif kind == "loop" and (found := re.fullmatch(LOOP, rest.strip())):
                promises.loops[found[1]] = Loop(float(found[2]), int(found[3]), found[4])
            else:
                raise ValueError(
                    f"// {kind}: {rest}: expected `// registers: NAME N` or `// loop: NAME X per weight, N weights`"
                    " or `// loop: NAME X per mma, N mma`"
                )
    return promises


def parse_ptxas(text: str, architecture: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` prints. Raises ValueError where it is not understood."""
    kernels = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part[: part.index("'")]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if frame is None or used is None:
            raise ValueError(f"{name} for sm_{architecture}: the words of ptxas are not understood:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        spill = int(frame[2]) + int(frame[3])
        kernels.append(Kernel(name, architecture, int(used[1]), int(shared[1]) if shared else 0, int(frame[1]), spill))
    return kernels


def inner_loop(lines: Iterable[str]) -> int | None:
    """Instructions of the inner loop (see above) of one kernel's disassembly, None when it has no loop."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
    loops = []
    for at, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if target and labels.get(target[1], len(code)) < at:  # a branch to itself is the end of the code
            loops.append((labels[target[1]], at))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]

    def weight(loop: tuple[int, int]) -> tuple[int, int]:
        body = code[loop[0] : loop[1] + 1]
        return sum(bool(TENSOR_CORE.search(i)) for i in body), len(body)

    return max(map(weight, innermost))[1] if innermost else None


def split_disassembly(text: str) -> dict[str, list[str]]:
    """Kernel -> the lines of its code."""
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    return {
        name: body.split("\n//-----", 1)[0].splitlines() for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def promised(table: dict[str, int] | dict[str, Loop], kernel: Kernel, plain: str) -> int | Loop | None:
    """The promise with the longest name that is part of the kernel's."""
    names = [name for name in table if name in plain or name in kernel.name]
    return table[max(names, key=len)] if names else None


def complaints(kernel: Kernel, plain: str, promises: Promises) -> list[str]:
    """Why this kernel does not pass; empty when it does."""
    wrong = []
    if kernel.spill_bytes:
        wrong.append(f"{kernel.spill_bytes} bytes of spilled registers")
    if kernel.stack_bytes:
        wrong.append(f"a stack frame of {kernel.stack_bytes} bytes")
    ceiling = promised(promises.registers, kernel, plain)
    if isinstance(ceiling, int) and kernel.registers > ceiling:
        wrong.append(f"{kernel.registers} registers, {ceiling} are promised")
    loop = promised(promises.loops, kernel, plain)
    # On sm_75 the tensor cores take half as much at once: its count is shown and has no limit.
    if isinstance(loop, Loop) and kernel.loop is not None and int(kernel.architecture) >= 80:
        each = kernel.loop / loop.count
        if each > loop.each:
            wrong.append(f"{kernel.loop} instructions for {loop.count} {loop.unit} = {each:.2f}, {loop.each} promised")
    return wrong


# ---------------------------------------------------------------------------------------------------- tools


def find_nvcc() -> str | None:
    for name in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and (found := shutil.which(name)):
            return found
    return None


def find_nvdisasm() -> str | None:
    if found := shutil.which("nvdisasm"):
        return found
    places = (Path(folder) / "nvidia" for folder in sys.path)
    return next((str(p) for place in places for p in place.glob("*/bin/nvdisasm")), None)


def known_architectures(nvcc: str) -> set[str]:
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    return set(re.findall(r"sm_(\d+[a-z]?)", done.stdout))


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled -> readable, without arguments; as they are where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = done.stdout.splitlines()
    return {name: shorten(text) for name, text in zip(names, plain, strict=True)}


def shorten(name: str) -> str:
    """Without return type, namespaces and arguments."""
    name = re.sub(r"^void ", "", name.replace("(anonymous namespace)::", "").replace("pyllama::cuda::", ""))
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and i:
            return name[:i]
    return name


def compile_one(nvcc: str, nvdisasm: str | None, source: Path, architecture: str, folder: Path) -> list[Kernel]:
    """The kernels of a source on an architecture, counted where possible; SystemExit with the compiler's words."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    command = [
        nvcc,
        *FLAGS,
        f"-arch=sm_{architecture}",
        "-I",
        str(ROOT / "csrc"),
        "-cubin",
        str(source),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"check-cuda: {source.name} for sm_{architecture} does not compile:\n{done.stdout}{done.stderr}"
        )
    kernels = parse_ptxas(done.stderr + done.stdout, architecture)
    if nvdisasm and kernels:
        done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
        code = split_disassembly(done.stdout)
        for kernel in kernels:
            kernel.loop = inner_loop(code[kernel.name])
    return kernels


def report(kernels: list[Kernel], promises: Promises, tell: Callable[[str], None] = print) -> int:
    """Prints the table and then what is wrong. Returns how much that is."""
    plain = demangle([kernel.name for kernel in kernels])
    width = max((len(name) for name in plain.values()), default=6)
    tell(f"{'kernel':<{width}}  {'arch':>6} {'registers':>9} {'promised':>8} {'shared':>6} {'loop':>5} {'each':>8}")
    for kernel in sorted(kernels, key=lambda k: (plain[k.name], int(re.sub(r"\D", "", k.architecture)))):
        loop = promised(promises.loops, kernel, plain[kernel.name])
        each = f"{kernel.loop / loop.count:.2f}" if isinstance(loop, Loop) and kernel.loop is not None else ""
        count = "" if kernel.loop is None else str(kernel.loop)
        ceiling = promised(promises.registers, kernel, plain[kernel.name]) or "-"
        row = f"{kernel.registers:>9} {ceiling!s:>8} {kernel.shared_bytes:>6} {count:>5} {each:>8}"
        tell(f"{plain[kernel.name]:<{width}}  {'sm_' + kernel.architecture:>6} {row}")
    wrong = [(k, text) for k in kernels for text in complaints(k, plain[k.name], promises)]
    for kernel, text in wrong:
        tell(f"check-cuda: {plain[kernel.name]} on sm_{kernel.architecture}: {text}")
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every CUDA kernel and check registers, spills and loops.")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help=f"default: {' '.join(ARCHITECTURES)}")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("check-cuda: skipped, there is no nvcc (looked at CUDACXX, PATH, /usr/local/cuda)")
        return 0
    known = known_architectures(nvcc)
    unknown = [a for a in arguments.architectures if a not in known]
    if unknown:
        print(f"check-cuda: this nvcc has no {' '.join('sm_' + a for a in unknown)}; left out")
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        print("check-cuda: no nvdisasm, so instructions are not counted (pip install nvidia-cuda-nvdisasm)")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    headers = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in {".h", ".cuh"}]
    promises = parse_promises(path.read_text(encoding="utf-8") for path in [*sources, *headers])
    tasks = [(source, a) for source in sources for a in arguments.architectures if a in known]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda task: compile_one(nvcc, nvdisasm, *task, Path(folder)), tasks)
        kernels = [kernel for some in found for kernel in some]
    n_wrong = report(kernels, promises)
    print(f"check-cuda: {len(kernels)} kernels compiled, {n_wrong} complaints")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
