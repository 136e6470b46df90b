"""Results on paper: one JSON file that grows row by row, and a Markdown table of it.

The file is written beside and renamed after each row, so that a run that was cut short has lost one row at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.rows import ROWS, Row

VERSION = 2  # of the JSON's layout


class Results:
    """The JSON file: {"version", "run": what ran where, "scouts": …, "rows": {key: record}}."""

    def __init__(self, path: Path, run: Mapping[str, Any], *, resume: bool) -> None:
        self._path = path
        self.data: dict[str, Any] = {"version": VERSION, "run": dict(run), "scouts": {}, "agreement": {}, "rows": {}}
        if resume and path.exists():
            found = json.loads(path.read_text())
            if found.get("version") != VERSION:
                raise SystemExit(f"compare: {path} is of another version; run without --resume")
            different = [
                key for key in run["must_match"] if found["run"]["must_match"].get(key) != run["must_match"][key]
            ]
            if different:
                raise SystemExit(f"compare: {path} was made with another {different[0]}; run without --resume")
            self.data = found

    @property
    def rows(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data["rows"]
        return found

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        os.replace(partial, self._path)


def table(rows: Mapping[str, Any], known: tuple[Row, ...] = ROWS) -> str:
    """A line per finished row, in the order of `known`."""
    lines = [
        "| work | goal | found | ours (min–max) | peer (min–max), its setting | share of the floor | |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for row in known:
        if row.key in rows:
            lines.append(f"| {' | '.join(_cells(row, rows[row.key], notes))} |")
    lines += [""] + [f"{i}: {note}." for i, note in enumerate(notes, 1)]
    return "\n".join(lines).rstrip()


def _cells(row: Row, record: Mapping[str, Any], notes: list[str]) -> list[str]:
    title = row.title + _mark_note(row.note, notes)
    if "skipped" in record:
        return [title, _goal(row), f"not measured: {record['skipped']}", "", "", "", ""]
    good = " ".join("✓" if c["ok"] else "✗" for c in record["checks"])
    return [title, _goal(row), _found(row, record), _ours(row, record), _peer(row, record), _share(row, record), good]


def _mark_note(note: str, notes: list[str]) -> str:
    if not note:
        return ""
    if note not in notes:
        notes.append(note)
    return f" [{notes.index(note) + 1}]"


def _goal(row: Row) -> str:
    sign = "≤" if row.at_most else "≥"
    if row.kind == "start":
        return f"{sign} {row.goal:g} s, ≤ {row.share_goal:.0%}"
    if row.kind == "absolute" and row.floor:
        return f"{sign} {row.goal:.0%}"
    unit = " µs" if row.kind == "absolute" else "×"
    share = f", ≥ {row.share_goal:.0%}" if row.share_goal is not None else ""
    return f"{sign} {row.goal:g}{unit}{share}"


def _found(row: Row, record: Mapping[str, Any]) -> str:
    if row.kind == "against":
        return f"**{record['ratio']['median']:.2f}×**"
    if row.kind == "itself":
        return f"**{record['ours']['median']:.2f}×**"
    if row.kind == "start":
        return f"**{record['ours']['median']:.2f} s**, {record['ours']['extra']:.1%}"
    return f"**{_number(row, record['ours']['median'])}**"


def _number(row: Row, value: float) -> str:
    if row.floor and row.kind == "absolute":
        return f"{value:.0%}"
    if row.unit == "tok/s":
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ours(row: Row, record: Mapping[str, Any]) -> str:
    found = record["ours"]
    return f"{_number(row, found['median'])} ({_number(row, found['min'])}–{_number(row, found['max'])})"


def _peer(row: Row, record: Mapping[str, Any]) -> str:
    peer = record.get("peer")
    if not peer:
        return ""
    if row.kind == "start":
        return "; ".join(f"{s['median']:.2f} s, {s['extra']:.0%}, {name}" for name, s in peer["by_setting"].items())
    numbers = f"{_number(row, peer['median'])} ({_number(row, peer['min'])}–{_number(row, peer['max'])})"
    return f"{numbers} {peer['setting']}"


def _share(row: Row, record: Mapping[str, Any]) -> str:
    if "share" not in record:
        return ""
    unit = "GB/s" if row.floor == "read" else "GOP/s"
    found = f"{record['share']['median']:.0%} of {record['floor']['median']:.0f} {unit}"
    if "own_share" in record:
        of = "where the weights lie" if row.floor == "read" else "at the clock of the work"
        if record.get("isa") == "amx" and row.floor == "int8":
            of = "of the tile unit's peak"
        found += f"; {of} {record['own_share']['median']:.0%} of {record['own_floor']['median']:.0f}"
    return found
