"""Objects compiled for an instruction set export their table of functions and nothing else.

One weak std::vector member compiled with AVX-512 flags may be the copy that the linker keeps for the whole library:
then an older processor dies of an illegal instruction in code that never asked for it. Reads the symbols of the dev
build's objects with a small ELF reader; it looks at names and bindings, not at instructions.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("PYLLAMA_BUILD_DIR") or ROOT / "build" / "dev")
SOURCES = sorted([*(ROOT / "csrc" / "cpu").glob("kernels_*.cpp"), *(ROOT / "csrc" / "convert").glob("rows_*.cpp")])
LOCAL = 0
BINDINGS = {0: "local", 1: "global", 2: "weak", 10: "unique"}


class Symbol(NamedTuple):
    name: str
    binding: str


def exported_symbols(path: Path) -> list[Symbol]:
    """Every symbol that a 64-bit little-endian ELF object defines and other objects can see."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path}: not a 64-bit little-endian ELF object"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # name, type, flags, address, offset, size, link, info, align, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    found = []
    for _, kind, _, _, offset, length, link, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for at in range(offset, offset + length, entry):
            name, info, _, section = struct.unpack_from("<IBBH", data, at)
            if section != 0 and info >> 4 != LOCAL:
                end = data.index(b"\0", names + name)
                found.append(Symbol(data[names + name : end].decode(), BINDINGS.get(info >> 4, str(info >> 4))))
    return found


def complaints(symbols: list[Symbol]) -> list[str]:
    """Why this list of exports is not "one table"; empty when it is."""
    weak = [f"{s.binding} symbol {s.name}" for s in symbols if s.binding != "global"]
    strong = [s.name for s in symbols if s.binding == "global"]
    return weak + ([] if len(strong) == 1 else [f"expected one exported table, found {strong}"])


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_an_isa_object_exports_only_its_table(source: Path) -> None:
    if not BUILD.is_dir():
        pytest.skip(f"no build folder at {BUILD} (run `make dev`)")
    if str(source) not in {entry["file"] for entry in json.loads((BUILD / "compile_commands.json").read_text())}:
        pytest.skip(f"{BUILD} is built for a processor that {source.name} is not for")
    found = [p for p in BUILD.rglob(f"{source.name}.o") if "CMakeFiles" in p.parts]
    assert found, f"{BUILD} holds no object of {source.name}: the build is older than the sources; run `make dev`"
    for path in found:
        symbols = exported_symbols(path)
        isa = source.stem.removeprefix("kernels_").removeprefix("rows_")
        assert complaints(symbols) == [], path
        assert isa in symbols[0].name, f"{path}: the table is called {symbols[0].name}, which does not name {isa}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("int a() { return 1; }", []),
        ("static int a() { return 1; } int b() { return a(); }", []),
        ("int a() { return 1; } int b() { return 2; }", ["expected one exported table"]),
        ("inline int a() { return 1; } int (*b())() { return a; }", ["weak symbol"]),
        ("#include <vector>\nvoid a(std::vector<int>& v) { v.push_back(1); }", ["weak symbol"]),
    ],
)
def test_the_check_sees_what_a_compiler_emits(code: str, expected: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to make an object with")
    (tmp_path / "a.cpp").write_text(code)
    subprocess.run([compiler, "-O1", "-c", "a.cpp", "-o", "a.o"], cwd=tmp_path, check=True)
    found = complaints(exported_symbols(tmp_path / "a.o"))
    assert bool(found) == bool(expected), found
    assert all(any(want in line for line in found) for want in expected), found
