"""A format for each matrix by what it costs: the search against all possibilities, the costs against what a whole model
does, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pyllama.common.errors import QuantizeError
from pyllama.common.formats import TensorSpec
from pyllama.common.model_folder import read_model_folder
from quantize import convert
from quantize.allocate import Allocation, Target, allocate
from quantize.calibration_texts import Calibration, read_texts
from quantize.cli import main
from quantize.compare import EVALUATION_TEXT, compare
from quantize.convert import make_plan
from quantize.readers import open_source
from quantize.sensitivity import CHOICES, Choice, Costs, bytes_held, measured_costs
from quantize.writer import FolderWriter
from tests import make_sources as make
from tests.make_sources import Shape
from tests.test_calibration import byte_tokenizer

SHAPE = Shape(vocab_size=259, dim=64, hidden_dim=192, n_layers=3, max_seq_len=256)
TEXT = "What each matrix costs is measured, not guessed. " * 200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first w_down is much larger than the others, and so needs more bits."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    weights = make.random_weights(SHAPE)
    for name in weights:
        if "layers.0.mlp.down_proj" in name:
            weights[name] = weights[name] * 8
    make.write_hf_folder(folder, SHAPE, weights, dtype="BF16")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
    return folder


def random_costs(rng: np.random.Generator, n: int) -> dict[str, Costs]:
    """Costs that are neither convex nor even falling everywhere."""
    out = {}
    for i in range(n):
        sizes = np.cumsum(rng.integers(1, 40, 4)).tolist()
        kl = np.sort(rng.exponential(1.0, 4))[::-1] * rng.uniform(0.8, 1.2, 4)
        choices: list[Choice] = [("q4nl", 128), ("q4nl", 64), ("q5nl", 32), ("q8", 32)]
        out[f"m{i}"] = Costs(dict(zip(choices, sizes, strict=True)), dict(zip(choices, kl.tolist(), strict=True)))
    return out


def total(costs: dict[str, Costs], found: Allocation) -> tuple[int, float]:
    picked = [(costs[name].n_bytes[choice], costs[name].kl[choice]) for name, choice in found.choices.items()]
    return sum(size for size, _ in picked), sum(kl for _, kl in picked)


def test_the_best_of_all_possibilities() -> None:
    """At the sizes of the path nothing is better; between them it loses less than one matrix's share."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        costs = random_costs(rng, 5)
        smallest = sum(min(cost.n_bytes.values()) for cost in costs.values())
        largest = sum(max(cost.n_bytes.values()) for cost in costs.values())
        everything = [
            (sum(size for size, _ in picked), sum(kl for _, kl in picked))
            for picked in product(*([(c.n_bytes[k], c.kl[k]) for k in c.n_bytes] for c in costs.values()))
        ]
        for budget in range(smallest, largest + 1, 17):
            size, kl = total(costs, allocate(costs, 0, 1000, Target(n_bytes=budget), "imatrix"))
            assert size <= budget
            # Whole where it ends, for a solution of the relaxed problem is optimal at its own size.
            best = min(other for used, other in everything if used <= budget)
            assert best <= kl + 1e-9
            assert kl <= best + max(max(c.kl.values()) - min(c.kl.values()) for c in costs.values())
        unlimited = total(costs, allocate(costs, 0, 1000, Target(n_bytes=10 * largest), "imatrix"))[1]
        assert unlimited == pytest.approx(min(kl for _, kl in everything))


def test_a_divergence_as_target() -> None:
    costs = random_costs(np.random.default_rng(2), 6)
    sizes = []
    least = allocate(costs, 0, 1000, Target(n_bytes=1 << 20), "imatrix").kl
    for wanted in (3 * least, 2 * least, 1.2 * least):
        found = allocate(costs, 100, 1000, Target(kld=wanted), "imatrix")
        assert found.kl <= wanted
        sizes.append(total(costs, found)[0])
    assert sizes == sorted(sizes) and len(set(sizes)) > 1


def test_targets_that_cannot_be_met() -> None:
    costs = random_costs(np.random.default_rng(3), 3)
    with pytest.raises(QuantizeError, match="smallest model"):
        allocate(costs, 0, 1000, Target(n_bytes=2), "rtn")
    with pytest.raises(QuantizeError, match="cannot be had"):
        allocate(costs, 0, 1000, Target(kld=1e-9), "rtn")
    for wrong in ({}, {"n_bytes": 5, "bpw": 4.0}, {"bpw": float("nan")}, {"kld": -1.0}, {"bpw": 0.0}):
        with pytest.raises(ValueError):
            Target(**wrong)  # type: ignore[arg-type]


def test_costs_say_what_the_whole_model_shows(source: Path, tmp_path: Path) -> None:
    """Summed over all matrices they are about the divergence that quantizing them all makes."""
    opened = open_source(source)
    config = make_plan(opened).config()
    texts = read_texts(
        Calibration(tokens=1024), opened.tokenizer_files(), config, "test", lambda folder: folder, tmp_path
    )
    costs, yardstick = measured_costs(opened, texts, texts, 2)
    assert yardstick.hidden.shape == (sum(texts.lengths), SHAPE.dim)
    matrices = {name for name, tensor in opened.tensors.items() if len(tensor.shape) == 2}
    assert costs.keys() == matrices
    for cost in costs.values():
        assert set(cost.kl) == set(CHOICES) and min(cost.kl.values()) >= 0
        assert cost.kl["q8", 32] < cost.kl["q5nl", 32] < cost.kl["q4nl", 32] < cost.kl["q4nl", 128]
    assert costs["layers.0.w_down"].kl["q4nl", 32] > 3 * costs["layers.1.w_down"].kl["q4nl", 32]
    for format, group in (("q4nl", 32), ("q4nl", 128), ("q5nl", 64)):
        made = convert(source, tmp_path / f"{format}{group}", format=format, group_size=group, method="imatrix")
        measured = compare([made], source, TEXT)[0].divergence.kl_mean
        predicted = sum(cost.kl[format, group] for cost in costs.values())
        assert 0.4 < predicted / measured < 2.5
    assert bytes_held(opened, 1024) > 0


@pytest.mark.parametrize("method", ["rtn", "imatrix"])
def test_bits_per_weight_as_target(source: Path, tmp_path: Path, method: str) -> None:
    made = convert(source, tmp_path / "out", target_bpw=5.0, method=method)
    folder = read_model_folder(made)
    specs = {name: tensor.spec for name, tensor in folder.tensors.items()}
    n_weights = sum(spec.n_weights for spec in specs.values())
    bits = sum(spec.payload_bytes for spec in specs.values()) * 8 / n_weights
    assert 4.7 < bits <= 5.0
    assert len({(spec.format, spec.group) for spec in specs.values() if not spec.is_vector}) > 1
    assert folder.config["quantization"]["target"] == "5 bits per weight"
    assert folder.config["quantization"]["predicted_kl"] > 0
    bits_of = {name: spec.payload_bytes / spec.n_weights for name, spec in specs.items()}
    assert bits_of["layers.0.w_down"] > bits_of["layers.1.w_down"]


def test_a_target_is_better_than_one_format(source: Path, tmp_path: Path) -> None:
    """At the same size, where one matrix matters more than the others."""
    uniform = convert(source, tmp_path / "uniform", format="q4nl", method="imatrix")
    n_bytes = (uniform / "model.safetensors").stat().st_size
    mixed = convert(source, tmp_path / "mixed", target_size=n_bytes, method="imatrix")
    assert (mixed / "model.safetensors").stat().st_size <= n_bytes
    one, other = compare([uniform, mixed], source, TEXT)
    assert other.divergence.kl_mean < 0.8 * one.divergence.kl_mean


@pytest.mark.parametrize("tied", [False, True])
def test_the_measured_divergence_is_that_of_compare(tmp_path: Path, tied: bool) -> None:
    """On the same text, but for the digits that are kept."""
    shape = replace(SHAPE, tied=tied)
    folder = tmp_path / "hf"
    make.write_hf_folder(folder, shape, make.random_weights(shape), dtype="BF16")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    made = convert(folder, tmp_path / "out", target_bpw=4.8, method="imatrix")
    measured = read_model_folder(made).config["quantization"]["measured_kl"]
    text = EVALUATION_TEXT.read_text("utf-8")
    assert measured == pytest.approx(compare([made], folder, text)[0].divergence.kl_mean, rel=0.15)
    again = convert(folder, tmp_path / "out", target_bpw=4.8, method="imatrix", resume=True)
    assert read_model_folder(again).config["quantization"]["measured_kl"] == measured


def test_matrices_that_are_fixed(source: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out", target_bpw=6.0, tensor_types=[("wq", "f16")])
    formats = {name: tensor.spec.format for name, tensor in read_model_folder(made).tensors.items()}
    assert {formats[name] for name in formats if name.endswith("wq")} == {"f16"}
    assert not {formats[name] for name in formats if name.endswith("wk")} & {"f16", "f32"}


def test_the_same_again(source: Path, tmp_path: Path) -> None:
    first, second = (convert(source, tmp_path / name, target_bpw=4.6, method="imatrix") for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), "--target-bpw", "5", "--dry-run"]) == 0
    assert "KL divergence predicted" in capsys.readouterr().out
    assert main([str(source), "-o", str(tmp_path / "o"), "--max-kld", "0.5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["target"] == "divergence 0.5" and record["predicted_kl"] <= 0.5
    from pyllama.cli.main import main as pyllama

    assert pyllama(["info", str(tmp_path / "o")]) == 0
    assert "for divergence 0.5; KL divergence predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-bpw", "5", "--format", "q4"], "give one of them"),
        (["--target-bpw", "5", "--group-size", "64"], "give one of them"),
        (["--target-bpw", "2"], "the smallest model"),
        (["--target-bpw", "nan"], "a target of nan"),
        (["--target-size", "10kB"], "the smallest model"),
        (["--max-kld", "0"], "a target of 0"),
        (["--target-bpw", "5", "--max-memory", "70MB"], "--max-memory 70 MB"),
    ],
)
def test_what_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(source), "-o", str(tmp_path / "out"), *arguments]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_already_on_the_disk_is_read_back(tmp_path: Path) -> None:
    """Measuring reads tensors of a folder that is still being written; large ones no longer wait in memory."""
    specs = [TensorSpec(name, "f32", (1024, 1024)) for name in ("tok_embeddings", "output")]
    payloads = [np.full(spec.payload_bytes, i + 1, np.uint8) for i, spec in enumerate(specs)]
    with FolderWriter(tmp_path / "out", specs, {"a": 1}, {}) as writer:
        for spec, payload in zip(specs, payloads, strict=True):
            writer.add_tensor(spec, payload)
        assert all(writer.payload(spec.name) == data.tobytes() for spec, data in zip(specs, payloads, strict=True))
        writer.set_config({"a": 2})
        writer.finish()
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == {"a": 2}
