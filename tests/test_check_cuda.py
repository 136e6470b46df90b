"""scripts/check_cuda.py sees what it is there to see: its reading of the compiler's words and of disassembled loops.

The texts are made up in the tools' form; nvcc is not needed. That our kernels pass is the script's own work.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def check() -> ModuleType:
    path = ROOT / "scripts" / "check_cuda.py"
    spec = importlib.util.spec_from_file_location("check_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def ptxas(name: str, registers: int, *, stack: int = 0, stores: int = 0, loads: int = 0, tail: str = "") -> str:
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_80'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, {tail}376 bytes cmem[0]\n"
    )


SAXPY, SCALE = "_Z5saxpyv", "_Z5scalev"
GOOD = "// registers: saxpy 32\n// loop: saxpy 2.1 per weight, 8 weights\n"


def test_registers_spills_and_frames_are_read(check: ModuleType) -> None:
    text = "ptxas info    : 0 bytes gmem\n" + ptxas(SAXPY, 40, tail="4096 bytes smem, ")
    text += ptxas(SCALE, 255, stack=16, stores=8, loads=12)
    first, second = check.parse_ptxas(text, "80")
    assert (first.name, first.registers, first.shared_bytes, first.spill_bytes) == (SAXPY, 40, 4096, 0)
    assert (second.registers, second.stack_bytes, second.spill_bytes) == (255, 16, 20)
    with pytest.raises(ValueError, match="not understood"):
        check.parse_ptxas(f"Compiling entry function '{SAXPY}' for 'sm_80'\nsomething new\n", "80")


@pytest.mark.parametrize(
    ("words", "loop", "expected"),
    [
        (ptxas(SAXPY, 32), 16, []),
        (ptxas(SAXPY, 33), 16, ["33 registers, 32 are promised"]),
        (ptxas(SAXPY, 32, stores=4), 16, ["4 bytes of spilled registers"]),
        (ptxas(SAXPY, 32, stack=8), 16, ["a stack frame of 8 bytes"]),
        (ptxas(SAXPY, 32), 17, ["17 instructions for 8 weights = 2.12, 2.1 promised"]),
        (ptxas(SAXPY, 32), None, []),  # nothing to disassemble with
        (ptxas(SCALE, 255), 99, []),  # promises nothing
        (ptxas(SCALE, 255, stores=4), 99, ["4 bytes of spilled registers"]),
    ],
)
def test_what_is_complained_about(check: ModuleType, words: str, loop: int | None, expected: list[str]) -> None:
    (kernel,) = check.parse_ptxas(words, "80")
    kernel.loop = loop
    promises = check.parse_promises([GOOD])
    assert check.complaints(kernel, kernel.name, promises) == expected
    told: list[str] = []
    assert check.report([kernel], promises, told.append) == len(expected)
    assert sum(text in line for line in told for text in expected) == len(expected)


def test_on_the_oldest_architecture_a_loop_is_shown_and_not_judged(check: ModuleType) -> None:
    (kernel,) = check.parse_ptxas(ptxas(SAXPY, 32), "75")
    kernel.loop = 99
    assert check.complaints(kernel, kernel.name, check.parse_promises([GOOD])) == []


def test_matrix_instructions_are_a_unit_too(check: ModuleType) -> None:
    promises = check.parse_promises(["// loop: saxpy 4.5 per mma, 64 mma\n"])
    (kernel,) = check.parse_ptxas(ptxas(SAXPY, 32), "80")
    for loop, expected in ((288, []), (289, ["289 instructions for 64 mma = 4.52, 4.5 promised"])):
        kernel.loop = loop
        assert check.complaints(kernel, kernel.name, promises) == expected


def test_the_longest_name_promises(check: ModuleType) -> None:
    promises = check.parse_promises(["// registers: saxpy 32\n  // registers: saxpy_wide 64\n"])
    (kernel,) = check.parse_ptxas(ptxas("_Z10saxpy_widev", 64), "80")
    assert check.complaints(kernel, kernel.name, promises) == []


@pytest.mark.parametrize(
    "comment",
    [
        "// registers: saxpy",
        "// loop: saxpy 2.1",
        "// loop: saxpy 2.1 per mma, 8 weights",
        "// registers: saxpy about 40",
    ],
)
def test_a_promise_that_cannot_be_read_is_an_error(check: ModuleType, comment: str) -> None:
    with pytest.raises(ValueError, match="expected `// registers: NAME N`"):
        check.parse_promises([comment + "\n"])


def listing(*lines: str) -> list[str]:
    """Disassembly of these instructions and labels, with an end as the compiler writes it."""
    out, address = [], 0
    for line in [*lines, "EXIT ", ".L_x_99:", "BRA `(.L_x_99)", "NOP"]:
        if line.startswith(".L"):
            out.append(line)
        else:
            out.append(f"        /*{address:04x}*/                   {line};")
            address += 16
    return out


def test_loops_are_counted(check: ModuleType) -> None:
    assert check.inner_loop(listing("MOV R1, R2 ", "@P0 BRA `(.L_x_99) ")) is None
    assert check.inner_loop(listing(".L_x_1:", "FFMA R1 ", "FADD R2 ", "@!P0 BRA `(.L_x_1) ")) == 3
    # The outer loop holds the inner one; a branch forward inside a loop changes nothing.
    nested = [".L_x_1:", "MOV R1 ", ".L_x_2:", "FFMA R1 ", "@P1 BRA `(.L_x_3) ", "FADD R1 ", ".L_x_3:"]
    nested += ["@P0 BRA `(.L_x_2) ", "MOV R3 ", "@P2 BRA `(.L_x_1) "]
    assert check.inner_loop(listing(*nested)) == 4
    # Of several, the one with the tensor cores, though another is longer.
    two = [".L_x_1:", "HMMA.16816.F32 R1 ", "LOP3.LUT R1 ", "@P0 BRA `(.L_x_1) "]
    two += [".L_x_2:", *["FADD R2 "] * 9, "@P1 BRA `(.L_x_2) "]
    assert check.inner_loop(listing(*two)) == 3


def test_a_disassembly_is_cut_into_kernels(check: ModuleType) -> None:
    head = '//--------------------- .text.{0} ----------\n\t.section\t.text.{0},"ax"\n.text.{0}:\n{1}\n'
    text = head.format(SAXPY, "\n".join(listing(".L_x_1:", "FFMA R1 ", "BRA `(.L_x_1) ")))
    text += head.format(SCALE, "\n".join(listing("FMUL R1 ")))
    code = check.split_disassembly(text)
    assert set(code) == {SAXPY, SCALE}
    assert check.inner_loop(code[SAXPY]) == 2 and check.inner_loop(code[SCALE]) is None


def test_names_are_made_short(check: ModuleType) -> None:
    plain = "void pyllama::cuda::(anonymous namespace)::linear<pyllama::cuda::Q4, 8>(pyllama::cuda::Args<int>)"
    assert check.shorten(plain) == "linear<Q4, 8>"


def test_our_sources_promises_can_be_read(check: ModuleType) -> None:
    texts = [p.read_text() for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in {".cu", ".cuh", ".h"}]
    assert check.parse_promises(texts).registers["read_kernel"] > 0
