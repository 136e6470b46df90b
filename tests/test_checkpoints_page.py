"""docs/CHECKPOINTS.md names tests: each must exist in the file at the head of its column, with its case.

Read from the sources, as the tests themselves need torch. A case's name is made of texts that its file, or one that it
imports its cases from, holds; pytest joins them.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from quantize.families import FAMILIES

ROOT = Path(__file__).parent.parent
ORACLES = ROOT / "tests" / "oracles"
# A test of the column's file, or with another file before it.
NAMED = re.compile(r"`((?:\.\./)?test_\w+\.py::)?(test_\w+)\[([^\]]+)\]`")
PAGE = (ROOT / "docs" / "CHECKPOINTS.md").read_text(encoding="utf-8")


def table() -> list[list[str]]:
    """The rows of the first table, its head first."""
    lines = [line for line in PAGE.split("## Source × family")[1].split("\n## ")[0].splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(rows[1])) == {"-"}
    return [rows[0], *rows[2:]]


@cache
def names_in(file: str) -> tuple[frozenset[str], frozenset[str]]:
    """Its tests, and its texts with those of the oracle files that it imports."""
    tree = ast.parse((ORACLES / file).read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    texts = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}  # numbers are cases, too
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and (node.module or "").startswith("test_"):
            texts |= names_in(f"{node.module}.py")[1]
    return frozenset(tests), frozenset(texts)


def made_of(case: str, texts: frozenset[str]) -> bool:
    if case in texts:
        return True
    starts = [text for text in texts if text and case.startswith(text)]
    rests = [case[len(text) :] for text in starts]
    return any(rest.startswith(join) and made_of(rest[len(join) :], texts) for rest in rests for join in ("-", ": "))


def test_every_named_test_exists() -> None:
    head, *rows = table()
    files = [found[1] if (found := re.search(r"`(test_\w+\.py)`", cell)) else "" for cell in head]
    assert len(rows) >= 19 and files.count("") == 1 and len(files) == 5
    counted = 0
    for row in rows:
        assert len(row) == len(head), row
        for file, cell in zip(files[1:], row[1:], strict=True):
            for other, name, case in NAMED.findall(cell):
                tests, texts = names_in(other[:-2] or file)
                assert name in tests, f"{row[0]}: {other or file} has no {name}"
                assert made_of(case, texts), f"{row[0]}: {other or file} has no case {case!r}"
                counted += 1
    assert counted >= 70


def test_every_cell_says_something() -> None:
    """A test, a dash, or the row that stands for this one."""
    _head, *rows = table()
    families = [row[0] for row in rows]
    for row in rows:
        for cell in row[1:]:
            named = NAMED.sub("", cell).strip(", ")
            assert named in ("", "—") or any(named == f"as {family.split(',')[0]}" for family in families), (
                row[0],
                cell,
            )
        assert "`test_" in row[1], f"{row[0]}: no test of the Hugging Face form"


def test_cases_are_not_made_up() -> None:
    texts = frozenset({"llama", "gptq", "gptq act-order", "plain"})
    assert made_of("llama-gptq act-order", texts) and made_of("llama: plain", texts) and made_of("plain", texts)
    assert not any(made_of(case, texts) for case in ("llama: other", "llamaplain", "gptq-", "", "plai"))


def test_every_family_stands_there() -> None:
    """By the name of its tests: a new entry in families.py wants a row."""
    cells = " ".join(" ".join(row) for row in table())
    for family in FAMILIES:
        tests = {"safetensors": (f"`test_{family.model_type}[",), "meta": ("`test_metas_folders[",)}.get(
            family.container, (f"`test_gguf_family[{family.architecture}: ", f"_our_order[{family.architecture}]`")
        )
        assert any(test in cells for test in tests), f"{family.container} {family.architecture}: no test is named"
