"""`make gpu-check`: everything that only a GPU can tell, in one command and a given time.

Builds the extension, the CUDA library and the kernels' tests for the architecture of the device that is there; runs the
tests on it, once more with kernels that end late, and some under compute-sanitizer; compares whole models with the CPU
and with transformers; then measures, with the device to itself. Every part has a time limit and is run whatever
became of the others, unless it needs what they were to build. Prints short lines and the verdict last; JSON and logs go
to $OUT, else to build/gpu-check. Wants no network and installs nothing. docs/GPU.md says what it proves.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu-check"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
from tests.cuda.compiling import device_architecture, find_nvcc  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_CODE = 86
FOUND_BY_SANITIZER = re.compile(
    r"^=+ +(?:Invalid|Error|Race|Barrier|Divergent|Uninit|Potential|Program hit|ERROR SUM).*$", re.M
)
BOTH = ("extension", "test library")
NEEDED_MODULES = ("numpy", "pybind11", "setuptools", "tokenizers", "safetensors", "jinja2", "pytest", "hypothesis")


@dataclass(frozen=True)
class Job:
    """A command. `needs`: names of jobs that must have gone well before. `told`: its output is the report's."""

    part: str
    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    told: bool = False


@dataclass(frozen=True)
class Outcome:
    job: Job
    state: str  # ok, failed, too slow, not run
    seconds: float
    why: str = ""
    output: str = ""
    passed: int = 0  # tests


# ---------------------------------------------------------------------------------------------------- running


class Processes:
    """Those that jobs have started and that may still run. Each leads a session: Ctrl-C in a terminal does not reach
    it, so whoever ends the check must stop it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def start(self, command: Sequence[str], environment: dict[str, str], out: IO[bytes]) -> subprocess.Popen[bytes]:
        """Raises OSError, also once everything was stopped."""
        with self._lock:
            if self._stopped:
                raise InterruptedError("the check was ended")
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
            self._running.add(process)
            return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """With what it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """All of them, now, and none is started any more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            self.end(process)


def run_job(job: Job, deadline: float, not_built: set[str], processes: Processes | None = None) -> Outcome:
    """Never raises. Ends with the job's processes gone."""
    processes = processes or Processes()
    missing = [name for name in job.needs if name in not_built]
    if missing:
        return Outcome(job, "not run", 0, f"{', '.join(missing)}: not built")
    start = time.monotonic()
    limit = min(job.seconds, deadline - start)
    if limit < 1:
        return Outcome(job, "not run", 0, "no time was left")
    log = BUILD / "logs" / (re.sub(r"\W+", "-", f"{job.part}-{job.name}") + ".log")
    for folder in (log.parent, BUILD / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    ours = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}  # pytest cuts its reasons off there
    environment = os.environ | ours | job.environment
    late = False
    with open(log, "wb") as out:
        try:
            process = processes.start(job.command, environment, out)
        except OSError as error:
            return Outcome(job, "failed", 0, str(error))
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            late, code = True, -1
        finally:
            processes.end(process)
    seconds = time.monotonic() - start
    output = log.read_text(errors="replace")
    passed = sum(int(n) for n in re.findall(r"(\d+) passed", "\n".join(output.splitlines()[-3:])))
    if late:
        return Outcome(job, "too slow", seconds, f"stopped after {seconds:.0f} s", output, passed)
    if code != 0:
        return Outcome(job, "failed", seconds, reason(output, code), output, passed)
    return Outcome(job, "ok", seconds, "", output, passed)


def reason(output: str, code: int) -> str:
    """What of a failed job's output says why, in a few lines."""
    if code == SANITIZER_CODE:
        found = "\n".join(dict.fromkeys(line.strip("= ")[:200] for line in FOUND_BY_SANITIZER.findall(output)[:4]))
        if found:
            return found
    if exits := re.findall(r"^!+ _pytest\.outcomes\.Exit: (.*?) !+$", output, re.M):
        return str(exits[-1])[:300]
    lines = [line[:200] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not lines:
        lines = [line[:200] for line in output.splitlines() if re.search(r"\berror\b|Error\b", line)][:3]
    lines = lines or [line[:200] for line in output.splitlines() if line.strip()][-3:]
    more = [f"and {len(lines) - 4} more"] if len(lines) > 4 else []
    return "\n".join([*lines[:4], *more]) or f"exit code {code}"


def run_stage(
    jobs: Sequence[Job], workers: int, deadline: float, not_built: set[str], tell: Callable[[str], None]
) -> list[Outcome]:
    """All jobs, `workers` at once; tells of each as it ends that is more than one of many tests. What ends it before
    that, Ctrl-C say, ends the jobs that run, and those that wait are not begun."""
    lock, processes = threading.Lock(), Processes()

    def one(job: Job) -> Outcome:
        outcome = run_job(job, deadline, not_built, processes)
        with lock:
            if job.told and outcome.output:
                tell(outcome.output.rstrip())
        return outcome

    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            return list(pool.map(one, jobs))
        finally:  # before the pool waits for its threads
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()


# ---------------------------------------------------------------------------------------------------- the parts


def build_jobs(architecture: str, jobs: int) -> list[Job]:
    python = sys.executable
    wishes = {"PYLLAMA_BUILD_DIR": str(BUILD / "extension"), "PYLLAMA_CUDA": "ON", "PYLLAMA_CUDA_ARCHS": architecture}
    compiling = [python, "-m", "tests.cuda.compiling", "--architecture", architecture, "--jobs", str(jobs)]
    return [
        Job(
            "build",
            "extension",
            [python, "setup.py", "--quiet", "build_ext", "--inplace"],
            200,
            wishes | {"CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)},
        ),
        Job("build", "test library", [*compiling, str(BUILD / "tests.so")], 200),
        Job("build", "test library with late ends", [*compiling, "--late-ends", str(BUILD / "late.so")], 200),
    ]


def pytest_command(name: str, files: Sequence[str]) -> list[str]:
    quiet = ["-q", "--no-header", "--tb=short", "-rfE", "--maxfail=10", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return [sys.executable, "-m", "pytest", *quiet, f"--basetemp={BUILD / 'tmp' / name}", *files]


def test_files() -> list[str]:
    """Those of tests/cuda that have something to do on a device, slow ones first."""
    files = [
        p for p in (ROOT / "tests" / "cuda").glob("test_*.py") if p.name not in {"test_defects.py", "test_timing.py"}
    ]
    return [f"tests/cuda/{p.name}" for p in sorted(files, key=lambda p: (not p.name.startswith("test_model"), p.name))]


def test_jobs(library: str) -> list[Job]:
    """The kernels' tests on a device, a process for each file: what breaks the context spoils that file only."""
    late = library == "late"
    part, built = ("kernels that end late", "test library with late ends") if late else ("tests", "test library")
    environment = {"PYLLAMA_CUDA_TESTS": str(BUILD / f"{library}.so"), "OMP_NUM_THREADS": "2"}
    environment["PYLLAMA_CUDA_DEBUG"] = "poison"
    found = []
    for file in test_files():
        command = pytest_command(f"{library}-{Path(file).stem}", [file])
        found.append(Job(part, Path(file).stem, command, 150, environment, (built, "extension")))
    return found


def sanitizer_jobs(tool_path: str) -> list[Job]:
    """Two cases of each test under each tool. initcheck must see memory as it was allocated: no poison."""
    options = [f"--error-exitcode={SANITIZER_CODE}", "--print-limit=5", "--require-cuda-init=no"]
    found = []
    for tool in TOOLS:
        more = ["--report-api-errors=no"] if tool == "memcheck" else []
        for file in test_files():
            if file.endswith(("test_table.py",)):
                continue
            name = f"{tool} {Path(file).stem}"
            command = [tool_path, f"--tool={tool}", *options, *more, *pytest_command(name.replace(" ", "-"), [file])]
            environment = {
                "PYLLAMA_CUDA_TESTS": str(BUILD / "tests.so"),
                "PYLLAMA_CUDA_SAMPLE": "2",
                "OMP_NUM_THREADS": "2",
            }
            found.append(Job("compute-sanitizer", name, command, 100, environment, BOTH))
    return found


def oracle_jobs() -> list[Job]:
    """Comparisons with transformers, each file of tests/oracles that speaks of CUDA."""
    options = ["-o", "addopts=--strict-markers"]  # those of pyproject.toml leave the folder out
    on_device = {"PYLLAMA_CUDA_TESTS": str(BUILD / "tests.so")}
    return [
        Job("transformers", p.stem, [*pytest_command(p.stem, [str(p)]), *options], 120, on_device, BOTH)
        for p in sorted((ROOT / "tests" / "oracles").glob("test_cuda*.py"))
    ]


VARIANTS = {
    "early starts off": {"PYLLAMA_CUDA_DEBUG": "no-early"},
    "launched, not replayed": {"PYLLAMA_CUDA_GRAPHS": "0"},
}
VARIANT_CASE = "8b/q4-64"


def bench_jobs(out: Path, seconds: float) -> list[Job]:
    """With the device to themselves, within so many seconds together."""

    def job(name: str, module: str, share: float, json_file: Path, *more: str, **environment: str) -> Job:
        json_file.unlink(missing_ok=True)  # of an earlier check
        command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(json_file), *more]
        command += ["--seconds", f"{seconds * share:.0f}"]
        return Job("measurements", name, command, seconds * share + 20, environment, BOTH, told=True)

    found = [
        job("kernels", "gpu", 0.4, out / "kernels.json", "--entries", str(BUILD / "tests.so")),
        job("models", "gpu_models", 0.45, out / "models.json"),
    ]
    for name, environment in VARIANTS.items():
        options = ["--cases", VARIANT_CASE, "--rounds", "3", "--title", name]
        found.append(job(name, "gpu_models", 0.05, BUILD / f"{name}.json", *options, **environment))
    return found


def compare_tokens(files: Sequence[Path]) -> Outcome:
    """Did all runs of a model decode the same tokens? `files`: what gpu_models.py wrote."""
    tokens: dict[str, dict[str, str]] = {}
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            for model in json.loads(file.read_text())["models"]:
                if model["tokens"]:
                    tokens.setdefault(model["name"], {})[file.stem] = model["tokens"]
    job = Job("measurements", "the same tokens with early starts and without, replayed and launched", [], 0)
    bad = [f"{name}: {runs}" for name, runs in tokens.items() if len(set(runs.values())) > 1]
    if bad:
        return Outcome(job, "failed", 0, "\n".join(bad))
    if not any(len(runs) == len(files) for runs in tokens.values()):
        return Outcome(job, "not run", 0, "no model was run in all ways")
    return Outcome(job, "ok", 0)


def find_sanitizer() -> str | None:
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


# ---------------------------------------------------------------------------------------------------- the report


def machine_lines() -> list[str]:
    """What the machine is. Nothing depends on it."""

    def first(command: Sequence[str]) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return "none"
        return (done.stdout.strip().splitlines() or ["none"])[-1] if done.returncode == 0 else "none"

    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem"
    versions = []
    for module in ("torch", "transformers", "numpy", "pytest"):
        try:
            versions.append(f"{module} {importlib.metadata.version(module)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {module}")
    compiler, cores = first([find_nvcc() or "nvcc", "--version"]), len(os.sched_getaffinity(0))
    return [
        f"device: {first(['nvidia-smi', query, '--format=csv,noheader'])}",
        f"nvcc: {compiler}; {cores} cores; Python {sys.version.split()[0]}, {', '.join(versions)}",
    ]


def part_line(part: str, outcomes: Sequence[Outcome]) -> str:
    seconds = max((o.seconds for o in outcomes), default=0)
    counts = {state: sum(o.state == state for o in outcomes) for state in ("ok", "failed", "too slow", "not run")}
    if all(o.state == "ok" for o in outcomes):
        state = "ok"
    else:
        state = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    tests = sum(o.passed for o in outcomes)
    return f"{part}: {state}" + (f", {tests} tests passed" if tests else "") + f" (longest {seconds:.0f} s)"


def verdict(outcomes: Sequence[Outcome], tell: Callable[[str], None]) -> int:
    """Tells of every part, then of what went wrong; returns how much that is."""
    for part in dict.fromkeys(o.job.part for o in outcomes):
        tell(part_line(part, [o for o in outcomes if o.job.part == part]))
    wrong = [o for o in outcomes if o.state != "ok"]
    shown = sorted(wrong, key=lambda o: o.state == "not run")[:12]
    told: set[str] = set()
    for outcome in shown:
        why = "the same" if outcome.why in told else outcome.why.replace("\n", "\n    ")
        told.add(outcome.why)
        tell(f"  {outcome.job.part}, {outcome.job.name}: {outcome.state}: {why}")
    if len(wrong) > len(shown):
        tell(f"  and {len(wrong) - len(shown)} more; logs.txt has them all")
    return len(wrong)


def write_files(out: Path, outcomes: Sequence[Outcome], lines: Sequence[str]) -> None:
    """report.json and logs.txt: few files, since a remote machine may hand back only a few."""
    records = [
        {
            "part": o.job.part,
            "name": o.job.name,
            "state": o.state,
            "seconds": round(o.seconds, 1),
            "why": o.why,
            "passed": o.passed,
        }
        for o in outcomes
    ]
    (out / "report.json").write_text(json.dumps({"lines": list(lines), "jobs": records}, indent=1))
    with open(out / "logs.txt", "w", errors="replace") as logs:
        for outcome in sorted(outcomes, key=lambda o: o.state == "ok"):
            text = (
                outcome.output
                if len(outcome.output) < 200_000
                else outcome.output[:100_000] + "\n…\n" + outcome.output[-100_000:]
            )
            logs.write(f"\n##### {outcome.job.part}, {outcome.job.name}: {outcome.state} {outcome.why}\n{text}")


# ---------------------------------------------------------------------------------------------------- the whole


class Check:
    """One run: stages one after another, all within `seconds`."""

    def __init__(self, out: Path, seconds: float, tell: Callable[[str], None] = print) -> None:
        self.out = out
        self.lines: list[str] = []
        self._tell = tell
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.outcomes: list[Outcome] = []

    def tell(self, text: str) -> None:
        self.lines.append(text)
        self._tell(text)

    def stage(self, title: str, jobs: Sequence[Job], workers: int) -> None:
        not_built = {o.job.name for o in self.outcomes if o.job.part == "build" and o.state != "ok"}
        found = run_stage(jobs, workers, self.deadline, not_built, self.tell)
        self.outcomes += found
        n_wrong = sum(o.state != "ok" for o in found)
        self.tell(
            f"--- {title}: {len(found) - n_wrong} of {len(found)} ok, {time.monotonic() - self.start:.0f} s in all"
        )
        write_files(self.out, self.outcomes, self.lines)

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


def end_on_signals() -> None:
    """Those that would end this process alone and leave its jobs now end it as Ctrl-C does."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure pyllama's CUDA backend on the device that is here.")
    parser.add_argument("--seconds", type=float, default=460, help="for everything (default 460)")
    parser.add_argument("--only", nargs="+", choices=("build", "tests", "sanitizer", "bench"), help="some parts only")
    parser.add_argument("--architecture", help='"90": build for it, even where no device is; default: the device\'s')
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers and tests at once")
    arguments = parser.parse_args(argv)
    parts = arguments.only or ["build", "tests", "sanitizer", "bench"]
    out = Path(os.environ.get("OUT") or BUILD)
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, arguments.seconds)
    for line in machine_lines():
        check.tell(line)
    found = device_architecture()
    architecture = arguments.architecture or found
    if architecture is None:
        check.tell("gpu-check: nvidia-smi finds no NVIDIA device here (--architecture 90 would build without one)")
        return 2
    absent = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if absent:
        check.tell(f"gpu-check: this Python has no {', '.join(absent)}: what needs them will fail")
    if "build" in parts:
        check.stage(f"build for sm_{architecture}", build_jobs(architecture, arguments.jobs), 3)
    if found is None:
        wrong = verdict(check.outcomes, check.tell)
        check.tell("gpu-check: nothing was run, nvidia-smi finds no NVIDIA device here")
        return 1 if wrong else 2
    run_on_device(check, parts, arguments.jobs)
    wrong = verdict(check.outcomes, check.tell)
    seconds = time.monotonic() - check.start
    check.tell(
        f"gpu-check: {'PASSED' if wrong == 0 else f'{wrong} of {len(check.outcomes)} jobs NOT OK'}, {seconds:.0f} s"
    )
    write_files(out, check.outcomes, check.lines)
    return 1 if wrong else 0


def run_on_device(check: Check, parts: Sequence[str], jobs: int) -> None:
    tests: list[Job] = []
    if "tests" in parts:
        tests += test_jobs("tests") + oracle_jobs() + test_jobs("late")
    if "sanitizer" in parts:
        tool = find_sanitizer()
        if tool is None:
            job = Job("compute-sanitizer", "all tools", [], 0)
            check.outcomes.append(Outcome(job, "not run", 0, "compute-sanitizer is not here"))
        tests += sanitizer_jobs(tool) if tool else []
    if tests:
        check.stage("tests", tests, min(jobs, 8))
    if "bench" in parts:
        jobs_of_bench = bench_jobs(check.out, max(30.0, check.left() - 60))
        check.stage("measurements", jobs_of_bench, 1)
        files = [check.out / "models.json", *(BUILD / f"{name}.json" for name in VARIANTS)]
        check.outcomes.append(compare_tokens(files))


if __name__ == "__main__":
    end_on_signals()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
