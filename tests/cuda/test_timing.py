"""benchmarks/gpu.py over tests/cuda/timing_entries.cpp, on a tiny shape: everything is measured, counted and told. The
emulation's times mean nothing, and no test looks at them.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import Clock, Report, Work, errors, figure, matrices
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


def test_figures() -> None:
    assert figure(None, "seconds") == "-"
    assert figure({"error": "no"}, "seconds") == "failed"
    assert figure({"seconds": 1.5e-6, "spread": 0.2}, "seconds", 1e6) == "1.50 ±20%"
    assert figure({"seconds": 1.0, "spread": 0.01, "gb_per_s": 3012.3}, "gb_per_s") == "3012"


def test_entries_say_what_is_wrong(emulated: Emulated) -> None:
    with pytest.raises(EmulationError, match="head_dim 7"):
        emulated.call("time_attend", np.array([0, 1, 7, 1, 1, 1, 1, 1, 1, 1]), np.zeros(1), np.zeros(1))
