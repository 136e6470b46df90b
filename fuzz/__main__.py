"""Damages foreign files of every kind, guided by the branches that our readers take, and opens them: each is read or
refused by our own exceptions, in little time and memory, and nothing is written.

`make fuzz` runs it for a minute, FUZZ_ARGS="--runs 10000" for so many. Inputs that take a branch for the first time are
damaged further; with --keep the few that take them all are written to fuzz/corpus, which every run replays first. What
breaks the rule is written there too and named. The work is done in a child process, so that a crash of a library counts
as one. Branches are noted by branches.py: its marks leave 92 % of the runs per second, atheris' 66 %, tracing of lines
41 %; in 12 s of processor time this took 602, 935 and 92 branches of three targets (config, gguf, pickle), libFuzzer
under atheris 525, 762 and 92, and with these mutators 513, 718 and 83.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"  # threads would not survive the fork, and one core is what this takes
os.environ["RUST_BACKTRACE"] = "0"

from . import branches  # noqa: E402

branches.install(["quantize", "pyllama"])

from . import mutate, targets  # noqa: E402
from .watch import Watch  # noqa: E402

CORPUS = Path(__file__).resolve().parent / "corpus"
MAX_SECONDS, HUNG_SECONDS = 2.0, 60  # of processor time for one input; of any time until it is given up
MAX_BYTES, MAX_GROWTH = 1 << 30, 96 << 20  # of addresses above those at the start; of resident memory by one input
MAX_CORPUS_BYTES = 250 << 10
MAX_DEATHS = 5


class Fuzzer:
    """The state of a run: inputs worth damaging with the branches that they took, failures."""

    def __init__(self, all_targets: dict[str, targets.Target], out: Path, seed: int) -> None:
        self.targets, self.out, self.rng, self.watch = all_targets, out, random.Random(seed), Watch()
        self.sound = {name: target.sound for name, target in all_targets.items()}
        self.seeds: dict[str, list[bytes]] = {name: [] for name in all_targets}
        self.found: dict[tuple[str, bytes], frozenset[int]] = {}
        self.spent = dict.fromkeys(all_targets, 0.0)
        self.runs = dict.fromkeys(all_targets, 0)
        self.accepted = dict.fromkeys(all_targets, 0)
        self.failures, self.refusal = 0, ""
        self.failed: set[tuple[object, ...]] = set()
        self.failing: set[Path] = set()

    def replay(self) -> None:
        """Sound files first, which must be accepted, then what was kept."""
        for name, target in self.targets.items():
            for content in (self.sound[name], *target.also):
                before = self.accepted[name], self.failures
                self.run(name, content)
                self.seeds[name].append(content)
                if (self.accepted[name], self.failures) != (before[0] + 1, before[1]):
                    raise SystemExit(f"{name}: a sound file is refused: {self.refusal}")
        for file in sorted(CORPUS.glob("*-*")):
            name, content = file.name.rsplit("-", 1)[0], file.read_bytes()
            if name in self.targets:
                self.run(name, content)
                self.seeds[name].append(content)

    def step(self, evenly: bool) -> None:
        """One more input; every target gets its share of time, or of runs."""
        share = self.runs if evenly else self.spent
        name = min(share, key=lambda name: share[name])
        seeds = self.seeds[name]
        content = self.rng.choice(seeds[-8:] if self.rng.random() < 0.3 else seeds)
        self.run(name, self.targets[name].damage(content, self.rng))

    def run(self, name: str, content: bytes) -> None:
        target = self.targets[name]
        _current.name(name)
        target.file.unlink(missing_ok=True)  # a new file each time: the old one may still be mapped
        target.file.write_bytes(content)
        self.runs[name] += 1
        signal.setitimer(signal.ITIMER_REAL, HUNG_SECONDS)
        begin, memory = time.process_time(), _resident_peak()
        branches.begin()
        try:
            with self.watch.writing_only(target.writes):
                accepted = self._opened(target)
            took = time.process_time() - begin
            assert took < MAX_SECONDS, f"took {took:.1f} s"
            assert _resident_peak() - memory < MAX_GROWTH, f"took {_resident_peak() - memory >> 20} MB"
            new = branches.news()
            if new:
                self.found[name, content] = branches.taken()
                self.seeds[name].append(content)
                if accepted and target.deeper is not None:
                    with self.watch.writing_only(self.out):
                        target.deeper(target.path, self.out / "model")
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
                raise
            self._fail(name, content, error)
        finally:
            shutil.rmtree(self.out / "model", ignore_errors=True)
        self.spent[name] += time.process_time() - begin

    def _fail(self, name: str, content: bytes, error: BaseException) -> None:
        """Counts a failure; the first of its place is shown and kept."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = (type(error), last.filename, last.lineno, str(error.__cause__ or error.__context__)[-40:])
        self.failures += 1
        if where not in self.failed:
            self.failed.add(where)
            self.failing.add(place := kept(name, content))
            print(f"{name}: {place}\n{traceback.format_exc(limit=-12)}", file=_errors, flush=True)

    def _opened(self, target: targets.Target) -> bool:
        try:
            target.open(target.path)
        except target.allowed as error:
            message = self.refusal = str(error)
            assert message.isprintable() and len(message) < 1000, f"not one short printable line: {message[:2000]!r}"
            return False
        self.accepted[_current.read()] += 1
        return True

    def keep(self) -> None:
        """Replaces the corpus by a small choice of inputs that take every branch: again and again the one
        with the most new branches for its size."""
        sound = {
            (name, content) for name, target in self.targets.items() for content in (self.sound[name], *target.also)
        }
        left = {item: seen for item, seen in self.found.items() if item not in sound}
        taken: set[int] = set().union(*(self.found.get(item, frozenset()) for item in sound))
        chosen, room = [], MAX_CORPUS_BYTES
        while left:
            left = {item: seen for item, seen in left.items() if len(item[1]) <= room and not seen <= taken}
            best = max(left, key=lambda item: len(left[item] - taken) / (len(item[1]) + 200), default=None)
            if best is None:
                break
            chosen.append(best)
            taken |= left.pop(best)
            room -= len(best[1])
        for file in set(CORPUS.glob("*-*")) - self.failing:
            file.unlink()
        for item in chosen:
            kept(*item)

    def report(self) -> dict[str, object]:
        return {
            "runs": sum(self.runs.values()),
            "accepted": sum(self.accepted.values()),
            "branches": branches.known(),
            "of": branches.total(),
            "failures": self.failures,
        }


class _Current:
    """The target whose file is damaged now, where the parent process sees it."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 64)

    def name(self, name: str) -> None:
        self._map[:] = name.encode().ljust(64, b"\0")

    def read(self) -> str:
        return self._map[:].rstrip(b"\0").decode()


_current = _Current()
_errors = sys.stderr


def kept(name: str, content: bytes) -> Path:
    place = CORPUS / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
    place.write_bytes(content)
    return place


def _resident_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def limit_memory() -> None:
    with contextlib.suppress(ValueError, OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def quieten() -> None:
    """Libraries write of what they refuse by themselves; our own words still come out."""
    global _errors
    _errors = os.fdopen(os.dup(2), "w")
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)


def work(options: argparse.Namespace, all_targets: dict[str, targets.Target], out: Path, end: float, seed: int) -> int:
    limit_memory()
    quieten()
    warnings.simplefilter("error", RuntimeWarning)  # numpy's, which nobody who opens a file should see
    fuzzer = Fuzzer(all_targets, out, seed)
    fuzzer.replay()
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda which, frame: stopped.append(which))
    parent = os.getppid()  # a worker whose parent was killed stops too
    while not stopped and os.getppid() == parent:
        if sum(fuzzer.runs.values()) >= options.runs if options.runs else time.monotonic() >= end:
            break
        fuzzer.step(evenly=bool(options.runs))
    if options.keep:
        fuzzer.keep()
    if options.table:
        for name in fuzzer.runs:
            print(f"{name:22}{fuzzer.runs[name]:8} runs {fuzzer.accepted[name]:7} accepted {fuzzer.spent[name]:7.1f} s"
                  f" {len(fuzzer.seeds[name]):5} seeds")  # fmt: skip
    if options.untaken:
        print("\n".join(branches.untaken()))
    print(json.dumps(fuzzer.report()), flush=True)
    return 1 if fuzzer.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--runs", type=int, help="how many damaged files instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--only", nargs="+", help="targets by name")
    parser.add_argument(
        "--keep", action="store_true", help="replace fuzz/corpus by what takes every branch that was taken"
    )
    parser.add_argument("--table", action="store_true", help="runs of each target")
    parser.add_argument("--untaken", action="store_true", help="branches that no run took")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        base, out = Path(folder), Path(folder) / "out"
        out.mkdir()
        all_targets = targets.build(base)
        mutate.words[:] = sorted(word for word in branches.words if word.isprintable())
        if options.only:
            if strange := set(options.only) - all_targets.keys():
                parser.error(f"no target is called {' or '.join(sorted(strange))}; there are {' '.join(all_targets)}")
            all_targets = {name: all_targets[name] for name in options.only}
        return supervise(options, all_targets, out, end)


def supervise(options: argparse.Namespace, all_targets: dict[str, targets.Target], out: Path, end: float) -> int:
    """Has a child do the work; where one dies of an input, keeps that and lets another go on with other numbers."""
    failed = 0
    for attempt in range(MAX_DEATHS):
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = work(options, all_targets, out, end, options.seed + attempt)
            except SystemExit as error:
                print(error, file=_errors)
            except BaseException:
                traceback.print_exc(file=_errors)
            sys.stdout.flush()
            _errors.flush()
            os._exit(code)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the child gets too, and then reports
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status >= 0:
            return status or failed
        name = _current.read()
        place = kept(name, all_targets[name].file.read_bytes())
        print(f"{name}: {place}: killed by {signal.Signals(-status).name}", file=sys.stderr, flush=True)
        failed = 1
    return 1


if __name__ == "__main__":
    sys.exit(main())
