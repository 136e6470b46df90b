"""From samples to a verdict: medians, ratios round by round, shares of the floors, and whether the goals were reached.

Samples of a round belong together: machines drift within seconds, so a ratio is taken within each round, and a share
against the probes on both sides of its round; what is reported is the median of those. Plain numbers in, plain dicts
out; nothing here runs, reads or prints.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rows import Row, Work

Samples = Mapping[str, Sequence[float]]  # setting -> seconds (or seconds over seconds), one per round


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "samples": list(values)}


def best_setting(by_setting: Samples) -> str:
    """The one with the least median of seconds."""
    return min(by_setting, key=lambda setting: statistics.median(by_setting[setting]))


def check(what: str, value: float, goal: float, at_most: bool) -> dict[str, Any]:
    ok = value <= goal if at_most else value >= goal
    return {"what": what, "value": value, "goal": goal, "at_most": at_most, "ok": ok}


def needed(work: Work, floor: str, info: Mapping[str, Any]) -> float:
    """Bytes that the work must read, or int8 operations that it must do (a multiply-add is two).

    Read: all weights once a step, and the caches as deep as they are on average. Arithmetic: the layers' products for
    each token, the head's for the last.
    """
    if floor == "read":
        depth = work.depth + (work.n + 1) / 2
        return work.n * float(info["weight_bytes"] + work.parallel * depth * info["cache_bytes_per_tok"])
    head = 0 if work.kind == "matmuls" else int(info["head_macs"])
    return 2.0 * (work.n_tok * int(info["layer_macs"]) + head)


def shares(row: Row, seconds: Sequence[float], probes: Sequence[float], info: Mapping[str, Any]) -> list[float]:
    """Per round, what was drawn of the floor. `probes`: one before the first round and one after each, in 1e9 / s."""
    around = [(a + b) / 2 for a, b in itertools.pairwise(probes)]
    total = needed(row.work, row.floor, info) / 1e9
    return [total / s / probe for s, probe in zip(seconds, around, strict=True)]


def judge(
    row: Row,
    ours: Sequence[float],
    peer: Samples,
    probes: Sequence[float],
    info: Mapping[str, Any],
    ours_base: Sequence[float] = (),
    peer_base: Samples | None = None,
    own_probes: Sequence[float] = (),
) -> dict[str, Any]:
    """The record of a row from its seconds. `..._base`: seconds of `row.base`, for rows of kind "itself"; `own_probes`:
    one right after our run in each round, of the memory where the weights lie, or at the clock the run has left."""
    record: dict[str, Any] = {"checks": []}
    setting = best_setting(peer) if peer else ""
    if peer:
        record["ratio"] = spread([theirs / mine for mine, theirs in zip(ours, peer[setting], strict=True)])
    if row.floor:
        found = shares(row, ours, probes, info)
        record |= {"share": spread(found), "floor": spread(probes)}
        if own_probes:
            total = needed(row.work, row.floor, info) / 1e9
            own = [total / s / probe for s, probe in zip(ours, own_probes, strict=True)]
            record |= {"own_share": spread(own), "own_floor": spread(own_probes), "isa": info.get("isa", "")}
    if row.kind == "itself":
        assert row.base is not None and peer_base is not None
        record["ours"] = spread(_relative(row, ours, ours_base))
        record["peer"] = spread(_relative(row, peer[setting], peer_base[setting])) | {"setting": setting}
        record["checks"].append(_goal(row, row.unit, record["ours"]["median"]))
        return record
    if row.kind == "absolute":
        values = record["share"]["samples"] if row.floor else [1e6 * s for s in ours]
        record["ours"] = spread(values)
        record["checks"].append(_goal(row, row.unit, record["ours"]["median"]))
        return record
    record["ours"] = spread([row.work.n_tok / s for s in ours])
    record["peer"] = spread([row.work.n_tok / s for s in peer[setting]]) | {"setting": setting}
    record["peer"]["all_settings"] = {name: [row.work.n_tok / s for s in values] for name, values in peer.items()}
    record["checks"].append(_goal(row, "ratio", record["ratio"]["median"]))
    if row.share_goal is not None:
        record["checks"].append(check(f"share of {row.floor}", record["share"]["median"], row.share_goal, False))
    return record


def judge_start(
    row: Row, ours: Sequence[Mapping[str, float]], peer: Mapping[str, Sequence[Mapping[str, float]]], file_bytes: int
) -> dict[str, Any]:
    """The record of a start row: seconds and memory of ours, and of each of the peer's settings."""
    record: dict[str, Any] = {"ours": spread([s["seconds"] for s in ours]), "file_bytes": file_bytes}
    record["ours"]["extra"] = max(s["extra_bytes"] for s in ours) / file_bytes
    record["peer"] = {"by_setting": {}}
    for setting, starts in peer.items():
        found = spread([s["seconds"] for s in starts]) | {"extra": max(s["extra_bytes"] for s in starts) / file_bytes}
        record["peer"]["by_setting"][setting] = found
    record["checks"] = [_goal(row, "seconds", record["ours"]["median"])]
    if row.share_goal is not None:
        record["checks"].append(check("memory beyond the file", record["ours"]["extra"], row.share_goal, True))
    return record


def _relative(row: Row, seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """Times over the time of the base, or, where more is better, tokens per second over those of the base."""
    times = [a / b for a, b in zip(seconds, base, strict=True)]
    if row.at_most:
        return times
    assert row.base is not None
    return [row.work.n_tok / row.base.n_tok / t for t in times]


def _goal(row: Row, what: str, value: float) -> dict[str, Any]:
    assert row.goal is not None
    return check(what, value, row.goal, row.at_most)
