"""`pyllama plan`: the table, the JSON, devices that are not here; and that headers are enough for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyllama import DeviceError
from pyllama.cli.main import main
from pyllama.plan import Plan, plan_model
from tests import make_sources as make

from .conftest import Captured


def record(capsys: Captured, *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "-o", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def free_for(gguf: Path, gpu_layers: int, **options: Any) -> str:
    """What must be free for so many layers."""
    plan: Plan = plan_model(gguf, device_free=10**12, gpu_layers=gpu_layers, **options)
    assert plan.on_device is not None
    return str(plan.on_device.total)


def test_a_plan_for_the_cpu(gguf: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["plan", str(gguf), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "| MiB | CPU |" in out and "| layers | 2 |" in out and "Everything runs on the CPU" in out
    found = record(capsys, str(gguf), "--device", "cpu", "--n-ctx", "32", "--kv-dtype", "q8")
    assert (found["device"], found["gpu_layers"], found["n_ctx"], found["kv_dtype"]) == ("cpu", 0, 32, "q8")
    assert found["on_cpu"]["total"] == sum(value for key, value in found["on_cpu"].items() if key[0] in "lehcbus")
    assert not (tmp_path / "cache").exists(), "nothing was converted"


def test_a_plan_for_a_device_that_is_not_here(gguf: Path, capsys: Captured) -> None:
    everything = record(capsys, str(gguf), "--device-free", "24GB")
    assert everything["gpu_layers"] == everything["most_gpu_layers"] == 2 and everything["fits"]
    assert everything["device_free"] == 24 * 10**9 and len(everything["layer_bytes"]) == 2
    one = record(capsys, str(gguf), "--device-free", free_for(gguf, 1))
    assert one["gpu_layers"] == 1 and one["on_device"]["n_layers"] == one["on_cpu"]["n_layers"] == 1
    assert main(["plan", str(gguf), "--device-free", free_for(gguf, 1)]) == 0
    out = capsys.readouterr().out
    assert "| MiB | cuda:0 | CPU |" in out and "| layers | 1 | 1 |" in out
    assert "The last one of 2 layers and the head go to cuda:0, the others run on the CPU." in out


def test_what_does_not_fit_is_planned_and_said(gguf: Path, capsys: Captured) -> None:
    assert main(["plan", str(gguf), "--device-free", free_for(gguf, 1), "--gpu-layers", "all"]) == 0
    assert "This does not fit cuda:0: 1 layer would fit (gpu_layers=1)" in capsys.readouterr().out
    assert main(["plan", str(gguf), "--device-free", "1MB"]) == 0
    assert 'This does not fit cuda:0: nothing would fit, use device="cpu".' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "'tpu': expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "'cuda:x': expected auto"),
        (["--gpu-layers", "most"], "'most': expected an integer of at least 0"),
        (["--gpu-layers", "-1"], "expected an integer of at least 0"),
        (["--device-free", "much"], "'much': expected a size such as 24GB"),
        (["--n-ctx", "0"], "expected an integer of at least 1"),
    ],
)
def test_wrong_usage(gguf: Path, arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["plan", str(gguf), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_errors(gguf: Path, capsys: Captured) -> None:
    assert main(["plan", str(gguf), "--n-ctx", "100000"]) == 1
    assert "n_ctx=100000: this model was made for at most" in capsys.readouterr().err
    assert main(["plan", str(gguf), "--gpu-layers", "3", "--device-free", "1GB"]) == 1
    assert "gpu_layers=3: the model has 2 layers" in capsys.readouterr().err
    assert main(["plan", "/nowhere"]) == 1


def test_layers_on_the_cpu_are_none_on_a_device(gguf: Path) -> None:
    for options in ({"device_free": 10**12}, {"gpu_layers": 1}):
        with pytest.raises(ValueError, match='device="cpu" has no layers on a device'):
            plan_model(gguf, device="cpu", **options)
    with pytest.raises(ValueError, match="device="):
        plan_model(gguf, device="gpu", device_free=10**12)


def test_windows_are_held_against_the_context_that_is_asked_for(tmp_path: Path) -> None:
    shape = make.Shape()
    window = {"llama__attention__sliding_window": (make.U32, 40)}
    path = make.write_gguf(tmp_path / "window.gguf", shape, make.random_weights(shape), **window)
    assert plan_model(path, n_ctx=40, device_free=10**12).on_device is not None
    for n_ctx, longest in ((41, 41), (None, shape.max_seq_len)):
        with pytest.raises(DeviceError, match=f"sliding_window 40, shorter than the context of {longest} tokens"):
            plan_model(path, n_ctx=n_ctx, device_free=10**12)


def test_sizes_of_memory(gguf: Path) -> None:
    from pyllama.cli.plan import n_bytes

    found = [n_bytes(text) for text in ("12", "1K", "2KB", "1.5GiB", "24GB", "512 MiB", "7M")]
    assert found == [12, 1000, 2000, 3 << 29, 24 * 10**9, 1 << 29, 7 * 10**6]
