"""Predicted speeds: what is rehearsed, and how figures of some layers become a model's; no test looks at a clock."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pyllama import speeds
from pyllama.cli.main import main
from pyllama.plan import plan_model
from pyllama.speeds import Speeds, predict
from pyllama.synthetic import synthetic_config, synthetic_specs


def tiny(**other: Any) -> dict[str, Any]:
    return synthetic_config("tiny", 256) | other


def test_a_small_model_is_rehearsed_whole() -> None:
    config = tiny()
    found = predict(config, synthetic_specs(config, "q4"), n_prompt=32, threads=1)
    assert (found.rehearsed, found.n_prompt, found.n_depth, found.threads) == (2, 32, 0, 1)
    assert 0 < found.prompt_tok_per_s < math.inf and 0 < found.decode_tok_per_s(0) < math.inf
    assert found.cache_bytes_per_tok == 2 * 2 * 2 * 64 * 2, "layers, keys and values, heads, head_dim, halves"


@pytest.mark.parametrize(("layers_that_fit", "rehearsed"), [(0.5, 1), (1.5, 1), (2.5, 2), (100, 3)])
def test_of_a_large_model_some_layers(monkeypatch: pytest.MonkeyPatch, layers_that_fit: float, rehearsed: int) -> None:
    config = tiny(n_layers=3, tied_embeddings=False)
    specs = synthetic_specs(config, "q8", 64)
    layer = sum(spec.payload_bytes for spec in specs if spec.name.startswith("layers.0."))
    monkeypatch.setattr(speeds, "REHEARSED_BYTES", int(layer * layers_that_fit))
    assert predict(config, specs, n_prompt=8, threads=1).rehearsed == rehearsed


def test_layers_come_from_all_over_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(n_layers=4)
    specs = [
        spec if spec.name != "layers.2.wq" else dataclasses.replace(spec, format="q8")
        for spec in synthetic_specs(config, "q4")
    ]
    layer = sum(spec.payload_bytes for spec in specs if spec.name.startswith("layers.")) // 4
    monkeypatch.setattr(speeds, "REHEARSED_BYTES", 2 * layer)
    part, chosen = speeds._part(config, {spec.name: spec for spec in specs})
    assert part["n_layers"] == 2 and {spec.name: spec.format for spec in chosen}["layers.1.wq"] == "q8"


def test_figures_of_some_layers_become_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 layers 2 are rehearsed: their time twice, and the head at the speed of reading."""
    config = tiny(n_layers=4, tied_embeddings=False)
    specs = synthetic_specs(config, "q4")
    layer = sum(spec.payload_bytes for spec in specs if spec.name.startswith("layers.0."))
    head = next(spec.payload_bytes for spec in specs if spec.name == "output")
    monkeypatch.setattr(speeds, "REHEARSED_BYTES", 2 * layer)
    monkeypatch.setattr(speeds, "_time", lambda model, n_depth, work: 12.0)
    found = predict(config, specs, n_prompt=10, threads=1)
    step = 2 * layer + 256 * 256 * 2 + 256 * 4  # with the small embedding and the norm
    head_s = head / step  # a token took 12 s / 12
    assert found.token_s == pytest.approx(2 * 1.0 + head_s) and found.prompt_tok_per_s == pytest.approx(
        10 / (2 * 12.0 + head_s)
    )


def test_decoding_slows_by_the_cache_that_is_read() -> None:
    found = Speeds(2, "avx2", 512, 0, 3, 700.0, 0.025, 20.0, 100_000)
    assert found.decode_tok_per_s(0) == 40.0
    assert found.decode_tok_per_s(5000) == pytest.approx(20.0), "500 MB more at 20 GB/s are 25 ms"


def test_contexts_that_are_very_short() -> None:
    config = tiny(max_seq_len=3)
    assert predict(config, synthetic_specs(config, "q4"), n_prompt=3, threads=1).decode_tok_per_s(3) > 0


def test_a_plan_tells_them(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_model(gguf, device="cpu").speeds is None, "nothing is measured unless somebody asks"
    assert main(["plan", str(gguf), "--device", "cpu"]) == 0
    assert "Predicted tokens per second: " in capsys.readouterr().out
    assert main(["plan", str(gguf), "--device", "cpu", "--no-speed"]) == 0
    assert "Predicted" not in capsys.readouterr().out
    assert main(["plan", str(gguf), "--device", "cpu", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["speeds"]
    assert found["prompt_tok_per_s"] > 0 and found["decode_tok_per_s_d0"] >= min(
        speed for name, speed in found.items() if name.startswith("decode_tok_per_s_d")
    )


def test_no_prediction_where_a_device_works(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(gguf), "--device-free", "24GB"]) == 0
    assert "Predicted" not in capsys.readouterr().out


def test_bench_shows_what_was_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--synthetic", "tiny", "-p", "16", "-n", "4", "-r", "1", "-t", "1", "--predict"]
    assert main([*arguments, "-o", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["test"] for record in records] == ["pp16", "tg4"]
    assert all(record["predicted_ts"] > 0 for record in records)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count(", predicted ") == 2
