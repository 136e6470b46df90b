"""pyllama and llama-cpp-python side by side: every row of rows.py, on the same machine, in the same run.

Rounds alternate the sides and who goes first; the peer is taken at its best setting, tried out beforehand; the floors
(read bandwidth, int8 peak) are probed between the rounds. Finished rows are kept when a run is cut short.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import judge, machine, models  # noqa: E402
from benchmarks.report import Results, table  # noqa: E402
from benchmarks.rows import ROWS, Row, Work, tokens_for  # noqa: E402
from benchmarks.side_peer import VARIANTS  # noqa: E402
from benchmarks.workers import Worker, WorkerError, run_start  # noqa: E402

# What a floor is compared with beside the probe of the machine: the memory, or the clock, that our run had.
_OWN = {"read": "weights", "int8": "int8 own"}
_CLOSE = 1.03  # settings that were tried within this factor of the best are measured too


class Desk:
    """The open processes: at most one of a kind, and none that the current row does not need."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._open: dict[tuple[str, ...], Worker] = {}

    def ours(self, row: Row) -> Worker:
        environment = {"PYLLAMA_ISA": self._arguments.isa} if self._arguments.isa else {}
        path = models.folder_path(row.ours, self._arguments.cache)
        words = [str(path), *self._threads(row), "--kv-dtype", row.kv_dtype]
        return self._get("ours", sys.executable, words, environment)

    def peer(self, row: Row, variant: str) -> Worker:
        path = models.gguf_path(row.peer, self._arguments.cache)
        words = [str(path), *self._threads(row), "--variant", variant]
        return self._get("peer", self._arguments.peer_python, words, VARIANTS[variant][1])

    def _threads(self, row: Row) -> list[str]:
        return ["--threads", str(row.threads or self._arguments.threads)]

    def _get(self, side: str, python: str, words: list[str], environment: dict[str, str]) -> Worker:
        key = (side, *words, *sorted(environment))
        if key not in self._open:
            self.close(side)
            self._open[key] = Worker(python, side, words, environment)
        return self._open[key]

    def close(self, side: str = "") -> None:
        for key in [key for key in self._open if key[0].startswith(side)]:
            self._open.pop(key).close()


class Comparison:
    """A run: rows in order, with what is known about the peer's settings."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        self._arguments = arguments
        self._results = results
        self._desk = Desk(arguments)

    def close(self) -> None:
        self._desk.close()

    def measure(self, row: Row) -> dict[str, Any]:
        """The record of a row; one that this build or this peer cannot do says so."""
        try:
            return self._start(row) if row.kind == "start" else self._alternate(row)
        except WorkerError as error:
            self._desk.close()
            return {"skipped": str(error)}

    # ---------------------------------------------------------------------------- rounds

    def _alternate(self, row: Row) -> dict[str, Any]:
        peer, settings = self._best_peer(row) if row.peer else (None, [])
        ours = self._desk.ours(row)
        if peer is not None:
            self._agree(row, ours, peer)
        seconds: dict[tuple[str, str], list[float]] = {}
        jobs = [("ours", ours, ours.settings[0])] + [("peer", peer, s) for s in settings if peer is not None]
        probes, own_probes = [], []
        for at in range(-1, self._arguments.rounds):  # round -1 warms up
            for side, worker, setting in jobs if at % 2 == 0 else reversed(jobs):
                for work, what in ((row.work, ""), (row.base, "base ")):
                    if work is not None:
                        taken = worker.time(setting, work)
                        if at >= 0:
                            seconds.setdefault((what + side, setting), []).append(taken)
                        if at >= 0 and side == "ours" and row.floor and not what:
                            own_probes.append(float(ours.ask("probe", what=_OWN[row.floor])["value"]))
                time.sleep(self._arguments.pause)
            if row.floor:
                probes.append(float(ours.ask("probe", what=row.floor)["value"]))
        record = judge.judge(
            row,
            seconds["ours", ours.settings[0]],
            _of(seconds, "peer"),
            probes,
            ours.info,
            seconds.get(("base ours", ours.settings[0]), ()),
            _of(seconds, "base peer"),
            own_probes,
        )
        record["info"] = {"ours": ours.info} | ({"peer": peer.info} if peer is not None else {})
        if peer is not None:
            record["peer"]["setting"] = self._variant(row) + ", " + record["peer"]["setting"]
        return record

    def _start(self, row: Row) -> dict[str, Any]:
        """Fresh processes, nothing else open. Files are read once before, so that they lie in the page cache."""
        self._desk.close()
        folder = models.folder_path(row.ours, self._arguments.cache)
        gguf = models.gguf_path(row.peer, self._arguments.cache)
        weights = sorted(folder.glob("*.safetensors"))
        threads = ["--threads", str(self._arguments.threads)]
        ours: list[dict[str, float]] = []
        peer: dict[str, list[dict[str, float]]] = {variant: [] for variant in ("repacked", "as in the file")}
        environment = {"PYLLAMA_ISA": self._arguments.isa} if self._arguments.isa else {}
        for _ in range(self._arguments.rounds):
            _read_through(weights)
            ours.append(run_start(sys.executable, "ours", [str(folder), *threads], environment))
            _read_through([gguf])
            for variant, starts in peer.items():
                words = [str(gguf), *threads, "--variant", variant]
                starts.append(run_start(self._arguments.peer_python, "peer", words, VARIANTS[variant][1]))
        return judge.judge_start(row, ours, peer, sum(file.stat().st_size for file in weights))

    # ---------------------------------------------------------------------------- the peer at its best

    def _best_peer(self, row: Row) -> tuple[Worker, list[str]]:
        """The peer's process in its best variant for such work, and the settings within it that are worth measuring."""
        scout = self._scout(row)
        variant = self._variant(row)
        worker = self._desk.peer(row, variant)
        if row.work.depth > 100 or row.kind == "itself":
            return worker, list(worker.settings)  # tried out without depth and one token at a time: both count
        found = scout[variant]
        best = min(found.values())
        return worker, [setting for setting in worker.settings if found.get(setting, np.inf) <= best * _CLOSE]

    def _scout(self, row: Row) -> dict[str, dict[str, float]]:
        """Variant -> setting -> seconds of a short work of the row's kind; made once per file, threads and kind."""
        name = self._scout_name(row)
        scouts: dict[str, Any] = self._results.data["scouts"]
        if name not in scouts:
            work = _scout_work(row, self._arguments.quick)
            found: dict[str, dict[str, float]] = {}
            for variant in self._candidates(row):
                worker = self._desk.peer(row, variant)
                found[variant] = {worker.settings[0]: _least_seconds(worker, worker.settings[0], work)}
            best = min(found, key=lambda variant: min(found[variant].values()))
            worker = self._desk.peer(row, best)
            for setting in worker.settings[1:]:
                found[best][setting] = _least_seconds(worker, setting, work)
            scouts[name] = found
            self._results.save()
        ready: dict[str, dict[str, float]] = scouts[name]
        return ready

    def _variant(self, row: Row) -> str:
        scout = self._scout(row)
        return min(scout, key=lambda variant: min(scout[variant].values()))

    def _candidates(self, row: Row) -> list[str]:
        """All variants; of a 7B file, which takes long to open, the two that did best with the 1B file like it."""
        like_it = self._results.data["scouts"].get(self._scout_name(replace(row, peer=row.peer.replace("7b", "1b"))))
        if like_it is None:
            return list(VARIANTS)
        return sorted(like_it, key=lambda variant: min(like_it[variant].values()))[:2]

    def _scout_name(self, row: Row) -> str:
        kind = "prefill" if row.work.kind == "prefill" else "decode"
        return f"{row.peer}, {row.threads or self._arguments.threads} threads, {kind}"

    # ---------------------------------------------------------------------------- the same model on both sides

    def _agree(self, row: Row, ours: Worker, peer: Worker) -> None:
        """After the same tokens both sides expect the same; a wrong model must not be timed."""
        name = f"{row.ours}, {row.peer}, {row.kv_dtype}"
        agreed: dict[str, Any] = self._results.data["agreement"]
        if name in agreed or not models.same_weights(row.ours, row.peer):
            return
        tokens = tokens_for(1000, 24)
        a = np.array(ours.ask("logits", setting=ours.settings[0], tokens=tokens)["logits"])
        b = np.array(peer.ask("logits", setting=peer.settings[0], tokens=tokens)["logits"])
        if a.shape != b.shape:
            raise SystemExit(f"compare: {len(a)} logits here, {len(b)} there: not the same model")
        log_p, log_q = a - np.logaddexp.reduce(a), b - np.logaddexp.reduce(b)
        found = {
            "kl_nats": float(np.sum(np.exp(log_q) * (log_q - log_p))),
            "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        }
        if not found["cosine"] > 0.98:
            raise SystemExit(f"compare: the two sides disagree on the logits ({found}): not the same model")
        agreed[name] = found


def _of(seconds: dict[tuple[str, str], list[float]], side: str) -> dict[str, list[float]]:
    return {setting: values for (of, setting), values in seconds.items() if of == side}


def _scout_work(row: Row, quick: bool) -> Work:
    if row.work.kind == "prefill":
        return Work("prefill", 16 if quick else 64 if row.peer.startswith("7b") else 128)
    return Work("decode", 2 if quick else 8 if row.peer.startswith("7b") else 16)


def _least_seconds(worker: Worker, setting: str, work: Work) -> float:
    worker.time(setting, work)  # warms up
    return min(worker.time(setting, work) for _ in range(2))


def _read_through(files: Iterable[Path]) -> None:
    block = bytearray(1 << 24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


# -------------------------------------------------------------------------------- the command


def choose(keys: str, rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows named, in the table's order; "all", and names that end in a star. SystemExit for an unknown one."""
    chosen = set()
    for key in keys.split(","):
        fits = [
            row.key for row in rows if key in ("all", row.key) or (key.endswith("*") and row.key.startswith(key[:-1]))
        ]
        if not fits:
            raise SystemExit(f"compare: no row {key!r}; there are {' '.join(row.key for row in rows)}")
        chosen.update(fits)
    return [row for row in rows if row.key in chosen]


def shortened(row: Row) -> Row:
    """The row with few tokens, on tiny models: tries the harness, measures nothing."""

    def short(work: Work) -> Work:
        return replace(work, n=min(work.n, 8 if work.kind != "prefill" else 32), depth=min(work.depth, 32), repeat=2)

    def tiny(name: str) -> str:
        return name.replace("1b", "tiny").replace("7b", "tiny")

    base = short(row.base) if row.base is not None else None
    return replace(row, work=short(row.work), base=base, ours=tiny(row.ours), peer=tiny(row.peer))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="all", help='comma-separated keys, "decode-*" for all that start so')
    parser.add_argument("--rounds", type=int, default=5, help="samples per row and setting (at least 5 to be quoted)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="tiny models, few tokens: tries the harness")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has already")
    parser.add_argument("--prepare", action="store_true", help="only make the models of the rows")
    parser.add_argument("--isa", default="", help="hold our side to an instruction set (a peer is built for one)")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument(
        "--pause", type=float, default=0.2, help="seconds between runs, so that idle threads go to sleep"
    )
    parser.add_argument("--cache", type=Path, default=HERE.parent / "build" / "bench", help="where models are kept")
    parser.add_argument("-o", "--output", type=Path, default=None, help="JSON (default: CACHE/compare.json)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads: expected 1 or more")
    return arguments


def prepare(rows: Iterable[Row], cache: Path) -> None:
    """Makes the models before anything is timed."""
    cache.mkdir(parents=True, exist_ok=True)
    for row in rows:
        models.folder_path(row.ours, cache)
        if row.peer:
            models.gguf_path(row.peer, cache)


def main() -> None:
    arguments = parse_arguments()
    rows = choose(arguments.rows)
    if arguments.quick:
        rows = [shortened(row) for row in rows]
    prepare(rows, arguments.cache)
    if arguments.prepare:
        return
    settled = {"threads": arguments.threads, "isa": arguments.isa, "quick": arguments.quick}
    run = {
        "cpu": machine.cpu_name(),
        "rounds": arguments.rounds,
        "load_before": machine.load(),
        "must_match": settled | {"peer_python": arguments.peer_python},
    }
    output = arguments.output or arguments.cache / "compare.json"
    results = Results(output, run, resume=arguments.resume)
    comparison = Comparison(arguments, results)
    try:
        for row in rows:
            if row.key in results.rows and "skipped" not in results.rows[row.key]:
                continue
            began = time.monotonic()
            results.rows[row.key] = comparison.measure(row)
            results.save()
            print(f"{row.key}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        comparison.close()
    print(f"{run['cpu']}, {arguments.threads} threads, median (min–max) of {arguments.rounds} rounds\n")
    print(table(results.rows, tuple(rows)))
    print(f"\nall samples: {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
