"""The build keeps its promises: one version, one set of flags per instruction set, errors that say what is missing.

Looks at the dev build's compile commands and runs CMake and setup.py on small copies; it compiles nothing of ours.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("PYLLAMA_BUILD_DIR") or ROOT / "build" / "dev")
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def extension() -> Any:
    return pytest.importorskip("pyllama._C", reason="the extension is not built (run `make dev`)")


@pytest.fixture(scope="module")
def commands() -> dict[str, list[str]]:
    """Source, relative to the root -> the words of its compile command."""
    database = BUILD / "compile_commands.json"
    if not database.is_file():
        pytest.skip(f"no {database} (run `make dev`)")
    entries = json.loads(database.read_text())
    return {str(Path(e["file"]).relative_to(ROOT)): shlex.split(e["command"]) for e in entries}


def test_the_version_has_one_home() -> None:
    assert VERSION is not None
    assert extension().build_info()["version"] == VERSION[1]
    heads = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads == [] or heads[0] == VERSION[1]


def test_every_source_is_built_and_nothing_else(commands: dict[str, list[str]]) -> None:
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")}
    sources = {s for s in sources if not s.startswith("csrc/cuda/")}  # a library of its own
    arm = platform.machine() in ("aarch64", "arm64")
    foreign = {s for s in sources if re.search("/(kernels|rows)_avx" if arm else "/kernels_neon", s)}
    assert foreign
    assert {c for c in commands if not c.startswith("csrc/cuda/")} == sources - foreign


def test_results_do_not_depend_on_the_building_machine(commands: dict[str, list[str]]) -> None:
    for source, words in commands.items():
        assert "-ffp-contract=off" in words, source
        # The one architecture that is named is a floor: the extension has no flag of its own.
        harmful = [
            w
            for w in words
            if re.fullmatch(r"-march=(?!armv8\.2-a\+dotprod$).*|-mtune=.*|-ffast-math|-Ofast|-flto.*|-funsafe.*", w)
        ]
        assert harmful == [], source


def test_only_kernels_are_compiled_for_an_instruction_set(commands: dict[str, list[str]]) -> None:
    for source, words in commands.items():
        flags = [w for w in words if w.startswith("-m")]
        kernels = Path(source).name.startswith(("kernels_", "rows_"))
        kernels &= Path(source).stem not in ("kernels_scalar", "rows_baseline")
        assert bool(flags) == kernels, f"{source}: {flags}"


def configure(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    cmake = pytest.importorskip("cmake", reason="cmake is not installed as a Python package (pip install '.[dev]')")
    program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    wishes = [f"-DPython_EXECUTABLE={sys.executable}", "-DPYLLAMA_CUDA=OFF", *arguments]
    command = [program, "-S", str(tree), "-B", str(tree / "out"), *wishes]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """CMakeLists.txt over a csrc of empty files."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc/cuda/CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("tensor", "bindings", "model/model", "cpu/kernels_scalar", "cuda/library"):
        path = tmp_path / "csrc" / f"{name}.cpp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def test_an_unknown_instruction_set_is_an_error(small_tree: Path) -> None:
    (small_tree / "csrc/cpu/kernels_mmx.cpp").write_text("")
    done = configure(small_tree)
    assert done.returncode != 0
    assert "'mmx'" in done.stderr and "table in CMakeLists.txt" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("processor", "kernels"),
    [("x86_64", {"scalar", "avx2"}), ("aarch64", {"scalar", "neon"}), ("riscv64", {"scalar"})],
)
def test_every_architecture_builds_its_own_kernels(small_tree: Path, processor: str, kernels: set[str]) -> None:
    for isa in ("avx2", "neon"):
        (small_tree / f"csrc/cpu/kernels_{isa}.cpp").write_text("")
    toolchain = f"set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR {processor})\n"
    (small_tree / "toolchain.cmake").write_text(toolchain)
    done = configure(small_tree, f"-DCMAKE_TOOLCHAIN_FILE={small_tree / 'toolchain.cmake'}")
    assert done.returncode == 0, done.stderr
    built = {Path(e["file"]).name for e in json.loads((small_tree / "out/compile_commands.json").read_text())}
    assert built == {"tensor.cpp", "bindings.cpp", "model.cpp"} | {f"kernels_{isa}.cpp" for isa in kernels}


def fake_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> Path:
    """A program in nvcc's place that notes its arguments and ends so; returns the note."""
    note = folder / "nvcc.txt"
    program = folder / "nvcc"
    program.write_text(f'#!/bin/sh\necho "$*" >>"{note}"\necho "the words of nvcc" >&2\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(program))
    return note


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_an_nvcc_that_does_not_work(small_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = fake_nvcc(small_tree, monkeypatch, 1)
    done = configure(small_tree, "-DPYLLAMA_CUDA=AUTO")
    assert done.returncode == 0, done.stderr
    assert "no CUDA library" in done.stdout and "the words of nvcc" in done.stdout
    assert note.exists()
    done = configure(small_tree, "-DPYLLAMA_CUDA=ON")
    assert done.returncode != 0
    assert "PYLLAMA_CUDA=ON, but the CUDA library cannot be built" in one_line(done.stderr)
    assert "the words of nvcc" in done.stderr
    note.unlink()
    assert configure(small_tree, "-DPYLLAMA_CUDA=OFF").returncode == 0
    assert not note.exists()


def test_an_nvcc_that_is_not_there(small_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(small_tree / "no-nvcc"))
    assert configure(small_tree, "-DPYLLAMA_CUDA=AUTO").returncode == 0
    done = configure(small_tree, "-DPYLLAMA_CUDA=ON")
    assert done.returncode != 0 and "no-nvcc" in done.stderr


@pytest.mark.parametrize(
    ("wish", "codes"),
    [
        ("all", {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90", "sm_120"}),
        ("86", {"sm_86"}),
        ("80, 90+PTX", {"sm_80", "sm_90", "compute_90"}),
    ],
)
def test_architectures(small_tree: Path, monkeypatch: pytest.MonkeyPatch, wish: str, codes: set[str]) -> None:
    note = fake_nvcc(small_tree, monkeypatch, 0)
    monkeypatch.setenv("CUDAHOSTCXX", "/some/other/c++")
    done = configure(small_tree, "-DPYLLAMA_CUDA=ON", f"-DPYLLAMA_CUDA_ARCHS={wish}", "-DPYLLAMA_WERROR=ON")
    assert done.returncode == 0, done.stderr
    words = note.read_text()
    assert set(re.findall(r",code=(\w+)", words)) == codes
    assert "-ccbin /some/other/c++ " in words
    assert "-cudart static" in words and "-fmad=false" in words and "-Werror=all-warnings" in words


def test_wishes_that_cannot_be_met_are_named(small_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(small_tree, monkeypatch, 0)
    done = configure(small_tree, "-DPYLLAMA_CUDA=YES")
    assert done.returncode != 0 and "PYLLAMA_CUDA=YES: expected AUTO, ON or OFF" in one_line(done.stderr)
    done = configure(small_tree, "-DPYLLAMA_CUDA=AUTO", "-DPYLLAMA_CUDA_ARCHS=86 hopper")
    assert done.returncode != 0 and "'hopper' is no architecture" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [("", "no C++ compiler found"), ("no-such-compiler -O2", "no program no-such-compiler was found")],
)
def test_a_missing_compiler_is_named(compiler: str, expected: str, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path / "empty")}
    environment |= {"CXX": compiler} if compiler else {}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_every_source_stands_in_the_architecture() -> None:
    named = set(re.findall(r"[\w./]+\.\w+", (ROOT / "docs" / "ARCHITECTURE.md").read_text()))
    files = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    missing = {f"csrc: {p.name}" for p in files if p.name not in named}
    for package in ("pyllama", "quantize"):
        for path in (ROOT / package).rglob("*.py"):
            relative = str(path.relative_to(ROOT / package))
            if relative not in named | {"cli/__init__.py", "common/__init__.py"}:  # a docstring each
                missing.add(f"{package}: {relative}")
    assert missing == set(), "say in docs/ARCHITECTURE.md what these are for"


def test_every_extra_and_make_target_that_is_named_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    table = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    places = [ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci" / "run", *(ROOT / "benchmarks").glob("*.md")]
    places += [*(ROOT / "scripts").glob("*.sh"), *(ROOT / "pyllama").glob("*.py"), *(ROOT / "docs").glob("*.md")]
    found: set[str] = set()
    for place in filter(Path.is_file, places):  # .ci is not in the source distribution
        text = place.read_text()
        named = re.findall(r"(?:'\.|'pyllama)\[([\w,]+)\]'", text)
        assert {extra for some in named for extra in some.split(",")} <= extras, place
        found |= set(named)
        if place.name in ("README.md", "run"):
            called = r"^ {4}make ([a-z -]+)" if place.name == "README.md" else r"^[^#\n]*\bmake (?:-o dev )?([a-z-]+)"
            lines = re.findall(called, text, re.MULTILINE)
            assert lines and {target for line in lines for target in line.split()} <= targets, place
    assert found


def public_names(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {n for n in names if not n.startswith("_")}


def test_the_stub_and_the_extension_name_the_same_things() -> None:
    module = extension()
    tree = ast.parse((ROOT / "pyllama" / "_C.pyi").read_text())
    built = {n for n in dir(module) if not n.startswith("_")}
    assert public_names(tree.body) == built
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            thing = getattr(module, node.name)
            members = {n for n in dir(thing) if not n.startswith("_")}
            if isinstance(thing, type) and issubclass(thing, tuple):  # a record: what all have needs no telling
                members -= {"n_fields", "n_sequence_fields", "n_unnamed_fields", *dir(tuple)}
            assert public_names(node.body) == members, node.name


def test_the_stub_of_single_kernels_has_their_arguments() -> None:
    ops = extension().ops
    tree = ast.parse((ROOT / "pyllama" / "_C.pyi").read_text())
    stub = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ops")
    functions = [n for n in stub.body if isinstance(n, ast.FunctionDef)]
    assert functions
    for function in functions:
        signature = getattr(ops, function.name).__doc__.splitlines()[0]  # "name(a: int, isa: str = '') -> float"
        call = ast.parse(f"def {signature.split(' -> ')[0]}: ...").body[0]
        assert isinstance(call, ast.FunctionDef)
        assert [a.arg for a in function.args.args] == [a.arg for a in call.args.args], function.name
        defaults = [ast.unparse(d) for d in call.args.defaults]
        assert [ast.unparse(d) for d in function.args.defaults] == defaults, function.name


@pytest.mark.parametrize("command", ["pyllama", "quantize"])
def test_help_works_without_the_extension(command: str) -> None:
    code = f"""
import runpy, sys
sys.modules["pyllama._C"] = None
sys.argv = ["{command}", "--help"]
runpy.run_module("{command}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": "no-such-python"}
    command = ["bash", str(ROOT / "scripts" / "make_venv.sh"), str(tmp_path / "venv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no no-such-python found" in done.stderr
    assert not (tmp_path / "venv").exists()
