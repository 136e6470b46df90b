"""scripts/gpu_check.py without a GPU: what it runs, what becomes of parts that fail, hang or cannot be run, and whether
its report is short. What it proves on a device, only a device can show.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.delenv("OUT", raising=False)
    return module


def python(check: ModuleType, code: str, name: str = "job", **about: object) -> object:
    about.setdefault("seconds", 60)
    return check.Job("part", name, [sys.executable, "-c", code], **about)


def test_a_job_that_goes_well(check: ModuleType) -> None:
    job = python(
        check, "import os; print(os.environ['WISH']); print('3 passed, 1 skipped in 1s')", environment={"WISH": "x"}
    )
    done = check.run_job(job, time.monotonic() + 60, set())
    assert (done.state, done.passed) == ("ok", 3) and done.output.startswith("x\n")


def test_a_job_that_fails_says_why(check: ModuleType) -> None:
    done = check.run_job(python(check, "raise SystemExit('an error: no luck')"), time.monotonic() + 60, set())
    assert done.state == "failed" and done.why == "an error: no luck"
    done = check.run_job(check.Job("part", "job", ["/no/such/program"], 60), time.monotonic() + 60, set())
    assert done.state == "failed" and "/no/such/program" in done.why


def test_a_job_that_hangs_is_stopped_with_all_it_started(check: ModuleType) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid); time.sleep(600)"
    done = check.run_job(python(check, f"{code}", seconds=1), time.monotonic() + 60, set())
    assert done.state == "too slow" and done.why.startswith("stopped after")
    for word in done.output.split():  # none where this machine was too busy to come so far
        while (stat := Path(f"/proc/{word}/stat")).exists() and stat.read_text().rsplit(")")[-1].split()[0] != "Z":
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_what_runs_and_what_waits(number: signal.Signals, tmp_path: Path) -> None:
    """One worker: the first of three jobs runs, with a child of its own, when the signal comes."""
    code = f"""if True:
        import subprocess, sys, threading
        from pathlib import Path
        from scripts import gpu_check as check
        check.BUILD = Path({str(tmp_path)!r})
        check.end_on_signals()
        sleeps = "import os, subprocess; p = subprocess.Popen(['sleep', '600'])"
        sleeps += "; print(os.getpid(), p.pid, flush=True); p.wait()"
        jobs = [check.Job("part", str(i), [sys.executable, "-c", sleeps], 600) for i in range(3)]
        check.Check(check.BUILD, 600).stage("tests", jobs, 1)
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "part-0.log"
    while process.poll() is None and not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-2 if number == signal.SIGINT else 128 + number), errors
    assert [p.name for p in log.parent.iterdir()] == ["part-0.log"]  # the others were never begun
    children = [int(word) for word in log.read_text().split()]
    assert len(children) == 2
    for child in children:
        while (stat := Path(f"/proc/{child}/stat")).exists() and stat.read_text().rsplit(")")[-1].split()[0] != "Z":
            time.sleep(0.01)


def test_tests_are_run(check: ModuleType, tmp_path: Path) -> None:
    """By pytest as it will be on the device, whatever options pyproject.toml has."""
    file = tmp_path / "test_it.py"
    file.write_text("def test_a(tmp_path): pass\ndef test_b(): assert 1 == 2, 'a long reason ' * 5\n")
    job = check.Job("tests", "it", check.pytest_command("it", [str(file)]), 60)
    done = check.run_job(job, time.monotonic() + 60, set())
    assert (done.state, done.passed) == ("failed", 1)
    assert done.why.startswith("FAILED ") and done.why.count("a long reason") == 5


def test_what_cannot_be_run_is_not(check: ModuleType) -> None:
    done = check.run_job(python(check, "", needs=("extension",)), time.monotonic() + 60, {"extension"})
    assert (done.state, done.why) == ("not run", "extension: not built")
    done = check.run_job(python(check, ""), time.monotonic(), set())
    assert (done.state, done.why) == ("not run", "no time was left")


def test_the_rest_is_run_whatever_fails(check: ModuleType, tmp_path: Path) -> None:
    lines: list[str] = []
    whole = check.Check(tmp_path, 60, lines.append)
    build = [
        check.Job("build", name, [sys.executable, "-c", f"raise SystemExit({code})"], 60)
        for name, code in (("a", 1), ("b", 0))
    ]
    whole.stage("build", build, 2)
    jobs = [python(check, "print('the table')", "first", needs=("b",), told=True), python(check, "1/0", "second")]
    whole.stage("tests", [*jobs, python(check, "", "third", needs=("a",))], 2)
    assert [o.state for o in whole.outcomes] == ["failed", "ok", "ok", "failed", "not run"]
    assert "the table" in lines
    assert check.verdict(whole.outcomes, lines.append) == 3
    assert lines[-5] == "build: 1 ok, 1 failed (longest 0 s)" or lines[-5].startswith("build: 1 ok, 1 failed")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [job["state"] for job in report["jobs"]] == ["failed", "ok", "ok", "failed", "not run"]
    logs = (tmp_path / "logs.txt").read_text()
    assert "ZeroDivisionError" in logs and logs.index("ZeroDivisionError") < logs.index("the table")


def test_reasons(check: ModuleType) -> None:
    pytest_says = "\n".join(
        ["..F", *(f"FAILED tests/x.py::test_{i} - assert 1 == {i}" for i in range(9)), "9 failed in 2s"]
    )
    assert check.reason(pytest_says, 1).splitlines() == [
        *(f"FAILED tests/x.py::test_{i} - assert 1 == {i}" for i in range(4)),
        "and 5 more",
    ]
    exits = (
        "\nno tests ran in 0.44s\n!!! _pytest.outcomes.Exit: PYLLAMA_CUDA_TESTS=x.so: libcuda.so.1 is not there !!!\n"
    )
    assert check.reason(exits, 3) == "PYLLAMA_CUDA_TESTS=x.so: libcuda.so.1 is not there"
    sanitizer = "\n".join(
        [
            "========= COMPUTE-SANITIZER",
            "========= Invalid __global__ read of size 16 bytes",
            "=========     at product+0x10",
            "========= ERROR SUMMARY: 1 error",
        ]
    )
    assert check.reason(sanitizer, check.SANITIZER_CODE).splitlines() == [
        "Invalid __global__ read of size 16 bytes",
        "ERROR SUMMARY: 1 error",
    ]
    assert check.reason("", 7) == "exit code 7"


def test_a_report_of_many_failures_is_short(check: ModuleType) -> None:
    """Of a remote run only the last 12,000 characters may be seen, and the tables come before."""
    jobs = [check.Job("tests", f"test_{i}", [], 1) for i in range(60)]
    outcomes = [check.Outcome(job, "failed", 1.0, "\n".join([job.name, *["x" * 200] * 4])) for job in jobs[:30]]
    outcomes += [check.Outcome(job, "not run", 0.0, "no time was left") for job in jobs[30:]]
    lines: list[str] = []
    assert check.verdict(outcomes, lines.append) == 60
    assert len("\n".join(lines)) < 14_000 and lines[-1] == "  and 48 more; logs.txt has them all"


def test_every_kernel_test_is_run_on_the_device(check: ModuleType) -> None:
    files = {p.stem for p in (ROOT / "tests" / "cuda").glob("test_*.py")} - {"test_defects", "test_timing"}
    assert {job.name for job in check.test_jobs("tests")} == files
    for job in check.test_jobs("tests"):
        assert job.environment["PYLLAMA_CUDA_TESTS"].endswith("tests.so") and job.needs == ("test library", "extension")
    assert {job.name for job in check.test_jobs("late")} == files
    jobs = check.sanitizer_jobs("/x/compute-sanitizer")
    assert {job.name.split()[0] for job in jobs} == set(check.TOOLS)
    assert all("PYLLAMA_CUDA_DEBUG" not in job.environment for job in jobs)  # poison would hide what nobody wrote
    for job in [*jobs, *check.test_jobs("tests"), *check.oracle_jobs()]:
        assert all((ROOT / word).exists() for word in job.command if word.startswith("tests/"))


def test_without_a_device(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.main([]) == 2
    assert "nvidia-smi finds no NVIDIA device here" in capsys.readouterr().out
    monkeypatch.setattr(
        check, "build_jobs", lambda architecture, jobs: [python(check, f"print({architecture!r})", told=True)]
    )
    assert check.main(["--architecture", "90", "--only", "build"]) == 2  # built, and nothing was run
    out = capsys.readouterr().out
    assert "\n90\n" in out and out.rstrip().endswith("nothing was run, nvidia-smi finds no NVIDIA device here")


def test_with_a_device(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for nvidia-smi; jobs that need no device stand for those that do."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\ncase \"$1\" in *compute_cap*) echo 9.0;; *) echo 'A Device, 580.1';; esac\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(
        check, "build_jobs", lambda architecture, jobs: [python(check, f"assert {architecture!r} == '90'")]
    )
    monkeypatch.setattr(
        check, "run_on_device", lambda whole, parts, jobs: whole.stage("tests", [python(check, "print('5 passed')")], 1)
    )
    assert check.main([]) == 0
    out = capsys.readouterr().out
    assert "device: A Device, 580.1" in out and "5 tests passed" in out and "gpu-check: PASSED" in out
    assert (tmp_path / "out" / "report.json").exists()


def test_the_parts_of_a_run(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages: list[tuple[str, list[str]]] = []
    whole = check.Check(tmp_path, 400, lambda text: None)
    monkeypatch.setattr(whole, "stage", lambda title, jobs, workers: stages.append((title, [j.part for j in jobs])))
    monkeypatch.setattr(check, "find_sanitizer", lambda: "/x/compute-sanitizer")
    check.run_on_device(whole, ["build", "tests", "sanitizer", "bench"], 16)
    assert [title for title, _ in stages] == ["tests", "measurements"]
    assert {"tests", "kernels that end late", "compute-sanitizer"} <= set(stages[0][1])
    assert set(stages[1][1]) == {"measurements"}


def test_tokens_are_compared(check: ModuleType, tmp_path: Path) -> None:
    def file(name: str, **tokens: str) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"models": [{"name": k, "tokens": v} for k, v in tokens.items()]}))
        return path

    one, two = file("one", a="1234", b="5678", c=""), file("two", a="1234", c="9abc")
    assert check.compare_tokens([one, two]).state == "ok"
    assert check.compare_tokens([one, two, tmp_path / "missing.json"]).state == "not run"
    found = check.compare_tokens([one, two, file("three", b="0000")])
    assert (found.state, found.why) == ("failed", "b: {'one': '5678', 'three': '0000'}")


def test_a_missing_sanitizer_is_no_pass(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "find_sanitizer", lambda: None)
    whole = check.Check(tmp_path, 60, lambda text: None)
    check.run_on_device(whole, ["sanitizer"], 1)
    assert [(o.job.part, o.state) for o in whole.outcomes] == [("compute-sanitizer", "not run")]
