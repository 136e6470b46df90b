"""benchmarks/gpu.py over tests/cuda/timing_entries.cpp, and gpu_models.py, on a tiny shape: everything is measured,
counted and told. The emulation's times mean nothing, and no test looks at them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_models
from benchmarks.gpu import Clock, Report, Work, errors, figure, matrices
from pyllama import _C
from pyllama.synthetic import SHAPES
from tests.cuda.conftest import Emulated, EmulationError

WORK = Work(("tiny",), (("q4", 32), ("f16", 0)), (1, 2), prompt_tok=9, depths=(70,), stream_bytes=1 << 12)


def clock_of(emulated: Emulated, **about: Any) -> Clock:
    return Clock(emulated, l2_bytes=1, stop_at=time.monotonic() + 600, rounds=2, least_launches=2, **about)


@pytest.fixture(scope="module")
def told(emulated: Emulated) -> tuple[Clock, list[str]]:
    clock, lines = clock_of(emulated), []
    Report(clock, WORK, str(emulated.path), lines.append).run()
    return clock, lines


def test_everything_is_measured(told: tuple[Clock, list[str]]) -> None:
    clock, lines = told
    assert errors(clock.records) == [] and clock.n_left_out == 0
    assert all(record["seconds"] > 0 for record in clock.records)
    assert not any(word in line for line in lines for word in ("failed", " -", "nan"))
    assert max(map(len, lines)) <= 150
    steps = [record for record in clock.records if record["name"].startswith("products")]
    assert len(steps) == 2 * 2 + 1 and all(record["whole"] for record in steps)


def test_bytes_are_those_of_weights_and_keys(told: tuple[Clock, list[str]]) -> None:
    """q4: 4 bits and a half for every 32; a scale of 4 bytes a row. 70 keys and values of two heads of 64 halves."""
    found = {record["name"]: record for record in told[0].records}
    for m in matrices(SHAPES["tiny"]):
        for name, bits in (("q4-32", 4.5), ("f16", 16)):
            expected = m.rows * m.columns * bits / 8 + 4 * m.rows
            record = found[f"linear tiny {m.part} {name} 1"]
            assert record["bytes"] == expected
            assert record["gb_per_s"] == pytest.approx(expected / record["seconds"] / 1e9)
            assert record["tflops"] == pytest.approx(2 * m.rows * m.columns / record["seconds"] / 1e12)
    assert found["attend tiny f16 2x1 70"]["bytes"] == 2 * 70 * 2 * 2 * 64 * 2


def test_a_model_has_the_products_of_its_weights() -> None:
    """8B: 8.03 billion weights less the embedding's 0.53, which a step does not multiply by."""
    assert sum(m.rows * m.columns * m.times for m in matrices(SHAPES["8b"])) == 7_504_658_432


def test_failures_and_the_end_of_the_time_are_told(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = clock_of(emulated), []
    report = Report(clock, WORK, str(emulated.path), lines.append)
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["tiny"]._replace(head_dim=7))  # there is no attention of such heads
    report.attention()
    assert "failed" in lines[-1] and len(errors(clock.records)) == 4
    clock.stop_at = 0
    report.decoding()
    assert clock.n_left_out == 2 * 2 * 5 and len(errors(clock.records)) == 4


def test_the_yardstick(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """_C.cuda.read_bandwidth gives GB/s."""
    rates = iter([1000.0, 3000.0])
    monkeypatch.setattr("benchmarks.gpu.load_native", lambda: SimpleNamespace(cuda=stub))
    stub = SimpleNamespace(read_bandwidth=lambda path, device, n_bytes, repeats: next(rates))
    report = Report(clock_of(emulated), WORK, "", lambda text: None)
    report.memory()
    assert report.stream_gb_per_s == pytest.approx(2 / (1 / 1000 + 1 / 3000))  # of the mean time


def test_figures() -> None:
    assert figure(None, "seconds") == "-"
    assert figure({"error": "no"}, "seconds") == "failed"
    assert figure({"seconds": 1.5e-6, "spread": 0.2}, "seconds", 1e6) == "1.50 ±20%"
    assert figure({"seconds": 1.0, "spread": 0.01, "gb_per_s": 3012.3}, "gb_per_s") == "3012"


def test_entries_say_what_is_wrong(emulated: Emulated) -> None:
    with pytest.raises(EmulationError, match="head_dim 7"):
        emulated.call("time_attend", np.array([0, 1, 7, 1, 1, 1, 1, 1, 1, 1]), np.zeros(1), np.zeros(1))


# ---- whole models


def run_models(cuda_library: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", str(cuda_library))
    return gpu_models.main(["--decode", "2", "--prompt", "9", "--rounds", "1", *arguments])


@pytest.mark.many_blocks
def test_models_are_measured(
    cuda_library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "models.json"
    assert run_models(cuda_library, monkeypatch, "--cases", "tiny/q4-64", "--json", str(kept)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["tiny", "q4-64"]]
    for record in json.loads(kept.read_text())["models"]:
        assert (
            record["error"] == "" and len(record["tokens"]) == 8 and sum(record["shares"].values()) == pytest.approx(1)
        )
        assert all(len(record[what]) == 1 and record[what][0] > 0 for what in ("decode", "decode_batch", "prefill"))
        assert record["prompt_flops"] == 2 * sum(m.rows * m.columns * m.times for m in matrices(SHAPES["tiny"])[:-1])


def test_models_that_cannot_be_measured(
    cuda_library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_models(cuda_library, monkeypatch, "--cases", "tiny/q4-64", "--device", "cuda:7") == 1
    assert "tiny q4-64 failed: DeviceError: " in capsys.readouterr().out
    assert run_models(cuda_library, monkeypatch, "--cases", "tiny/q4-64", "--seconds", "-1") == 1
    assert "out of time: 1 models were left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_models(cuda_library, monkeypatch, "--cases", "tiny")


def test_eight_that_do_not_get_what_one_gets_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {1: [[1, 2]], gpu_models.BATCH: [[1, 2]] * 7 + [[1, 3]]}
    monkeypatch.setattr(gpu_models, "decoding", lambda native, model, batch, sizes: ([1.0], given[batch]))
    result = gpu_models.measure(("tiny", "q4", 64), "", gpu_models.Sizes(2, 2, 1))
    assert "some do not get the tokens of one alone" in result.error


def test_quick_models_have_logits(cuda_library: Path) -> None:
    """Their numbers keep their size from layer to layer: no infinity, no NaN, tokens that differ."""
    opened = gpu_models.quick_model(("tiny", "f16", 0), 64)
    model = _C.Model(opened.native_config(64), opened.weights, threads=2)
    logits = model.step([(model.sequence(), list(range(1, 40)), None, "all")])[0].logits
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10 and len(set(logits.argmax(-1).tolist())) > 20
