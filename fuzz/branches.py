"""Notes which branches of our readers a run takes: modules are given a mark in each branch when they are imported.

`install` must come before the first import of what is watched. A mark is one store into a byte array, so that a run
costs hardly more than without. Texts that stand in the modules are collected on the way: keys and words that they
look for. No lines, no counts, no paths; and nothing inside the libraries that we call.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import numpy as np

MAX_MARKS = 1 << 15

_hit = bytearray(MAX_MARKS)
_hits = np.frombuffer(_hit, np.uint8)
_known = np.zeros(MAX_MARKS, np.uint8)
_places: list[str] = []
words: set[str] = set()


def install(packages: Sequence[str]) -> None:
    """Marks the branches of these packages, and of what lies in them, from now on."""
    sys.meta_path.insert(0, _Finder(tuple(packages)))


def begin() -> None:
    """A run begins."""
    _hits[:] = 0


def taken() -> frozenset[int]:
    """Branches that were taken since `begin`."""
    return frozenset(map(int, np.flatnonzero(_hits)))


def news() -> int:
    """How many branches were taken since `begin` that no run had taken when this was last asked."""
    new = int(np.count_nonzero(_hits > _known))
    if new:
        np.maximum(_known, _hits, out=_known)
    return new


def known() -> int:
    return int(np.count_nonzero(_known))


def untaken() -> list[str]:
    """Branches that no run has taken: "file:line"."""
    return [place for i, place in enumerate(_places) if not _known[i]]


def total() -> int:
    return len(_places)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if not any(name == package or name.startswith(package + ".") for package in self._packages):
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # never from the cache, and never into it
        path = self.get_filename(fullname)
        tree = _Marker(path).visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(__hit__=_hit, __at__=_at)
        super().exec_module(module)


def _at(number: int) -> bool:
    _hit[number] = 1
    return False


class _Marker(ast.NodeTransformer):
    def __init__(self, path: str) -> None:
        self._name = "/".join(path.split("/")[-2:])

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = 1 if ast.get_docstring(node, clean=False) is not None else 0
            node.body[first:first] = [self._store(node)]
        elif isinstance(node, (ast.If, ast.For, ast.While)):
            node.body.insert(0, self._store(node))
            node.orelse.insert(0, self._store(node))
        elif isinstance(node, (ast.ExceptHandler, ast.match_case)):
            node.body.insert(0, self._store(node.body[0]))
        elif isinstance(node, ast.BoolOp):
            node.values[1:] = [self._marked(value) for value in node.values[1:]]
        elif isinstance(node, ast.IfExp):
            node.body, node.orelse = self._marked(node.body), self._marked(node.orelse)
        elif isinstance(node, ast.comprehension):
            node.ifs = [self._marked_below(condition) for condition in node.ifs]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) <= 40:
            words.add(node.value)
        return node

    def _number(self, node: Any) -> ast.Constant:
        _places.append(f"{self._name}:{node.lineno}")
        return ast.Constant(len(_places) - 1)

    def _store(self, node: ast.AST) -> ast.stmt:
        place = ast.Subscript(ast.Name("__hit__", ast.Load()), self._number(node), ast.Store())
        return ast.copy_location(ast.Assign([place], ast.Constant(1)), node)

    def _marked(self, value: ast.expr) -> ast.expr:
        """`value`, and a mark before it is looked at."""
        call = ast.Call(ast.Name("__at__", ast.Load()), [self._number(value)], [])
        return ast.copy_location(ast.BoolOp(ast.Or(), [call, value]), value)

    def _marked_below(self, condition: ast.expr) -> ast.expr:
        """A condition, and a mark where it holds."""
        call = ast.Call(ast.Name("__at__", ast.Load()), [self._number(condition)], [])
        return ast.copy_location(ast.BoolOp(ast.And(), [condition, ast.UnaryOp(ast.Not(), call)]), condition)
