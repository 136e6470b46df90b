"""Enforces the arrows of docs/ARCHITECTURE.md: who may include or import whom, in csrc, pyllama and quantize.

Reads the sources only; nothing is built or imported. A new room must be placed here, or the test fails.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
SYSTEM_INCLUDE = re.compile(r"^\s*#\s*include\s*<([^>]+)>", re.MULTILINE)

# Rooms of csrc and what each may include. Files of one room may include each other.
CPP_ARROWS = {
    "words": {"words"},  # WORDS
    "backend": {"words", "backend"},
    "cpu": {"words", "backend", "cpu"},
    "cuda": {"words", "backend", "cuda"},
    "model": {"words", "backend", "model"},
    "split_backend": {"words", "backend", "split_backend"},
    "cuda_library": {"words", "backend", "cuda_library", "cuda"},  # of cuda/ only the table: see below
    "cuda_backend": {"words", "backend", "cuda_library", "cuda_backend"},
    "convert": {"words", "convert"},
    "bindings": {
        "words",
        "backend",
        "model",
        "cpu",
        "convert",
        "split_backend",
        "cuda_library",
        "cuda_backend",
        "bindings",
    },
}
WORDS = {"error", "formats", "tensor", "config", "portable_exp2", "portable_trig", "vocab"}

# Rooms of the Python packages, longest prefix first, and what each may import of ours.
PYTHON_ARROWS = {
    "pyllama.common": {"pyllama.common"},
    "pyllama.tokenizer": {"pyllama.common", "pyllama.tokenizer"},
    "pyllama.__main__": {"pyllama.cli"},  # `python -m pyllama` is the command
    "pyllama.cli": {"pyllama", "pyllama.common", "pyllama.tokenizer", "pyllama.cli", "pyllama.open", "pyllama._C"},
    "pyllama.open": {"pyllama", "pyllama.common", "pyllama.tokenizer", "pyllama._C", "quantize"},
    "pyllama": {"pyllama", "pyllama.open", "pyllama.common", "pyllama.tokenizer", "pyllama._C"},
    "quantize.compare": {"pyllama", "pyllama.common", "pyllama.open", "quantize"},  # it runs both models
    "quantize.calibration_texts": {"pyllama", "pyllama.common", "pyllama.tokenizer", "quantize"},  # `self` speaks
    "quantize": {
        "pyllama.common",
        "pyllama.tokenizer",
        "quantize",
        "quantize.compare",
        "quantize.calibration_texts",
        "pyllama._C",
    },
}
LAZY_ARROWS = {("pyllama.open", "quantize"), ("quantize.calibration_texts", "pyllama")}
ALLOWED_IN_COMMON = {"numpy"}


def cpp_files() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc"})


def python_files() -> list[Path]:
    return sorted(p for package in ("pyllama", "quantize") for p in (ROOT / package).rglob("*.py"))


def cpp_room(path: Path) -> str:
    """The room of a file of csrc, from its path alone."""
    relative = path.relative_to(ROOT / "csrc")
    if len(relative.parts) > 1:
        return relative.parts[0]
    stem = relative.stem
    if stem in WORDS:
        return "words"
    return "bindings" if stem.startswith("bindings") else stem


def resolve_include(source: Path, name: str) -> Path | None:
    """The file of ours that `#include "name"` means in `source`, or None."""
    for place in (source.parent, ROOT / "csrc"):
        found = (place / name).resolve()
        if found.is_file():
            return found
    return None


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_room(module: str) -> str:
    """The longest row of PYTHON_ARROWS (or the extension) that `module` lies in."""
    rooms = [*PYTHON_ARROWS, "pyllama._C"]
    inside = [room for room in rooms if module == room or module.startswith(room + ".")]
    return max(inside, key=len) if inside else module


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, lazy) of every import in a file; lazy: inside a function, or only for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, lazy
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                prefix = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    full = f"{prefix}.{alias.name}"
                    yield (full if is_module(full) else prefix), child.lineno, lazy
            else:
                deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(child)
                yield from walk(child, lazy or deferred)

    yield from walk(tree, False)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file() or name == "pyllama._C"


def is_ours(module: str) -> bool:
    return module.split(".")[0] in {"pyllama", "quantize"}


def ids(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


@pytest.mark.parametrize("path", cpp_files(), ids=ids(cpp_files()))
def test_includes_follow_the_arrows(path: Path) -> None:
    room = cpp_room(path)
    assert room in CPP_ARROWS, f"{path.name} lies in no room that docs/ARCHITECTURE.md and this test know"
    for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
        target = resolve_include(path, name)
        assert target is not None, f'#include "{name}" names no file of csrc; system headers go in <>'
        assert cpp_room(target) in CPP_ARROWS[room], f'{room} must not include {cpp_room(target)}: "{name}"'


def test_the_extension_knows_only_the_table_of_cuda() -> None:
    outside = [p for p in cpp_files() if cpp_room(p) != "cuda"]
    found = {name for p in outside for name in INCLUDE.findall(p.read_text(encoding="utf-8")) if "cuda/" in name}
    assert found == {"cuda/api.h"}


@pytest.mark.parametrize("path", cpp_files(), ids=ids(cpp_files()))
def test_only_the_bindings_know_python(path: Path) -> None:
    python = [
        n for n in SYSTEM_INCLUDE.findall(path.read_text(encoding="utf-8")) if n.startswith(("pybind11", "Python"))
    ]
    assert not python or cpp_room(path) == "bindings", f"only csrc/bindings*.cpp may include {python}"


@pytest.mark.parametrize("path", python_files(), ids=ids(python_files()))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = python_room(module_of(path))
    for module, line, lazy in imports(path):
        if is_ours(module):
            target = python_room(module)
            assert target in PYTHON_ARROWS[room], f"{path.name}:{line}: {room} must not import {module}"
            if (room, target) in LAZY_ARROWS:
                assert lazy, f"{path.name}:{line}: {room} imports {target} lazily, inside the function that needs it"
                assert target != "pyllama" or module == "pyllama", f"{path.name}:{line}: only pyllama's public names"
        elif room == "pyllama.common":
            top = module.split(".")[0]
            known = top in sys.stdlib_module_names or top in ALLOWED_IN_COMMON
            assert known, f"{path.name}:{line}: pyllama.common uses the standard library and numpy only, not {module}"


def test_the_package_is_lazy() -> None:
    """`import pyllama` must work, and `quantize` run, where the extension is not built."""
    for module, line, lazy in imports(ROOT / "pyllama" / "__init__.py"):
        heavy = is_ours(module) and python_room(module) != "pyllama.common"
        assert lazy or not heavy, f"pyllama/__init__.py:{line}: import {module} inside __getattr__, not at import time"


def test_a_wrong_arrow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above are worth nothing if they cannot fail: one planted fault per arrow."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for folder in ("csrc/model", "csrc/cpu", "pyllama/common", "quantize"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cpu/pool.h").write_text("")
    planted_cpp = {
        "csrc/model/a.cpp": '#include "cpu/pool.h"',
        "csrc/cpu/b.cpp": '#  include "nowhere.h"',
        "csrc/odd.cpp": "",
    }
    for name, text in planted_cpp.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AssertionError):
            test_includes_follow_the_arrows(tmp_path / name)
    (tmp_path / "csrc/cpu/c.cpp").write_text("#include <pybind11/numpy.h>")
    with pytest.raises(AssertionError):
        test_only_the_bindings_know_python(tmp_path / "csrc/cpu/c.cpp")
    (tmp_path / "pyllama/llm.py").write_text("")
    planted_python = {
        "quantize/a.py": "def f():\n    from pyllama import llm",
        "quantize/b.py": "import pyllama.llm",
        "pyllama/common/c.py": "from .. import llm",
        "pyllama/common/d.py": "import torch",
        "pyllama/open.py": "import quantize",
        "quantize/calibration_texts.py": "from pyllama import LLM",
        "pyllama/other.py": "from quantize import convert",
        "pyllama/chat.py": "from pyllama.cli import main",
    }
    (tmp_path / "pyllama/cli").mkdir()
    (tmp_path / "pyllama/cli/__init__.py").write_text("")
    for name, text in planted_python.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AssertionError):
            test_imports_follow_the_arrows(tmp_path / name)
    (tmp_path / "pyllama/__init__.py").write_text("from .llm import LLM")
    with pytest.raises(AssertionError):
        test_the_package_is_lazy()
