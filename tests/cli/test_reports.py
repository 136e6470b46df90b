"""`pyllama bench`, `info` and `doctor`: what they measure and tell."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyllama import __version__
from pyllama.cli.main import main
from pyllama.common.errors import ModelFormatError
from pyllama.memory import available_bytes
from pyllama.native import load_native
from pyllama.open import cache_folder
from pyllama.tokenizer.kind import vocabulary_kind
from tests import make_sources as make

from .conftest import Captured


def test_bench_json(capsys: Captured) -> None:
    argv = ["bench", "--synthetic", "135m", "--format", "q8", "-p", "4,8", "-n", "2", "-d", "64", "-r", "2", "-t", "1"]
    assert main([*argv, "--parallel", "3", "-o", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["test"] for record in records] == ["pp4 @ d64", "pp8 @ d64", "tg2 @ d64"]
    for record in records:
        assert record["backend"] == "CPU" and record["n_threads"] == 1 and record["n_batch"] == 512
        assert len(record["samples_ts"]) == 2 and record["avg_ts"] == pytest.approx(sum(record["samples_ts"]) / 2)
        assert record["model_n_params"] == 134_515_008
        assert record["model_size"] == pytest.approx(134.5e6 * 8.5 / 8, rel=0.001)
        assert record["n_depth"] == 64
        assert record["bandwidth_share"] == pytest.approx(record["gb_per_s"] / record["read_gb_per_s"])
        assert record["peak_share"] == pytest.approx(record["gop_per_s"] / record["int8_gop_per_s"])
    assert [(record["n_prompt"], record["n_gen"]) for record in records] == [(4, 0), (8, 0), (0, 2)]
    four, _, parallel = records
    cache_per_tok = 2 * 30 * 3 * 64 * 2  # keys and values, layers, heads, their size, bytes of f16
    # Four tokens are one step after 64; two steps of three sequences have 65 and 66 in the cache.
    step_bytes = four["model_size"] + 68 * cache_per_tok
    assert four["gb_per_s"] == pytest.approx(four["avg_ts"] / 4 * step_bytes / 1e9)
    step_bytes = parallel["model_size"] + 3 * 65.5 * cache_per_tok
    assert parallel["gb_per_s"] == pytest.approx(parallel["avg_ts"] / 3 * step_bytes / 1e9)
    layer_macs = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert four["gop_per_s"] == pytest.approx(four["avg_ts"] * 2 * layer_macs / 1e9)


def test_bench_feeds_the_cache_once_and_steps_as_asked(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[int]] = []

    native = load_native()

    class Watched(native.Model):
        def step(self, batch: Any) -> Any:
            steps.append([len(tokens) for _, tokens, _, _ in batch])
            return super().step(batch)

    monkeypatch.setattr(native, "Model", Watched)
    argv = ["bench", "--synthetic", "tiny", "-t", "1", "-r", "2", "-b", "16", "-d", "20"]
    assert main([*argv, "-p", "4", "-n", "0"]) == 0
    assert steps == [[16], [4], [4], [4], [4]]  # the depth in chunks, a run to warm up, two that count
    steps.clear()
    assert main([*argv, "-p", "0", "-n", "2", "--parallel", "3"]) == 0
    assert steps == 3 * [[16], [4]] + 6 * [[1, 1, 1]]
    assert "| tg2 @ d20 |" in capsys.readouterr().out


def test_bench_table_of_a_file(gguf: Path, capsys: Captured) -> None:
    assert main(["bench", str(gguf), "-p", "8", "-n", "3", "-r", "1", "-t", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("| model | size | params | threads")
    share = r"\d+(\.\d)?, \d+ % of \d+"
    assert re.search(rf"\| pp8 \| .* \| {share} \| {share} \(\w+\) \|$", lines[2])
    assert re.search(rf"\| tg3 \| .* \| {share} \| {share} \(\w+\) \|$", lines[3])
    assert main(["bench", str(gguf), "-p", "8", "-n", "0", "-r", "1", "--profile"]) == 0
    title, line, row = capsys.readouterr().out.splitlines()
    assert title.endswith("| attention | head | products | rest |")
    assert title.count("|") == line.count("|") == row.count("|")
    assert sum(int(share) for share in re.findall(r"(\d+) % \|", row)) == pytest.approx(100, abs=2)
    assert main(["bench", str(gguf), "-p", "8,1000"]) == 1  # before it has measured anything
    assert capsys.readouterr().err == "pyllama: pp1000 needs a context of 1000 tokens, the model has 128\n"
    assert main(["bench", "--synthetic", "tiny", "--format", "f16", "-p", "8", "-n", "0", "-r", "1", "-t", "1"]) == 0
    assert "| tiny f16 | " in capsys.readouterr().out  # no groups


def test_info(demo_model: Path, gguf: Path, capsys: Captured) -> None:
    assert main(["info", str(demo_model)]) == 0
    text = capsys.readouterr().out
    assert "134,515,008" in text and "8192 tokens" in text and "tokenizer.json" in text
    assert re.search(r"chat template +yes", text) and re.search(r"q4a g32 +210 +106,168,320", text)
    assert main(["info", str(gguf), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["dim"] == 64 and record["chat_template"] is False and record["foreign"] is True
    assert record["tokenizer"] == "tokenizer.model" and not list(cache_folder().glob("small-*"))
    assert main(["info", str(gguf)]) == 0
    assert "a foreign checkpoint" in capsys.readouterr().out
    assert sum(row["params"] for row in record["formats"].values()) == record["n_params"]
    assert record["bits_per_weight"] == pytest.approx(8 * record["n_bytes"] / record["n_params"])


def test_info_tells_what_running_takes(gguf: Path, capsys: Captured) -> None:
    """The memory of weights, cache and buffers: those of `pyllama plan`."""
    assert main(["info", str(gguf), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(["plan", str(gguf), "--device", "cpu", "-o", "json"]) == 0
    share = json.loads(capsys.readouterr().out)["on_cpu"]
    (row,) = record["memory"]  # this model's context is shorter than 4096
    assert row["n_ctx"] == 128 and row["total"] == row["weights"] + row["cache"] + row["buffers"]
    assert (row["cache"], row["buffers"]) == (share["cache"], share["buffers"])
    assert row["weights"] == record["n_bytes"] == share["layers"] + share["embedding"] + share["head"]
    assert record["conversion"] == "16 matrices to q4 g32 repacked without loss"
    assert record["architecture"] == "llama" and record["features"] == []
    assert record["vocabulary"] == {"file": "tokenizer.model", "kind": "SentencePiece", "n_tokens": 45}
    assert record["stored"]["Q4_0"] == record["formats"]["q4 g32"] | {"bytes": record["stored"]["Q4_0"]["bytes"]}
    assert record["stored_bytes"] == sum(row["bytes"] for row in record["stored"].values())


def test_info_of_a_hugging_face_folder(tmp_path: Path, capsys: Captured) -> None:
    shape = make.Shape(max_seq_len=8192, biases=True)
    names = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": ...}
    window = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}
    yarn = {"type": "yarn", "factor": 2.0}
    folder = make.write_hf_folder(
        tmp_path / "m", shape, make.random_weights(shape), dtype="BF16", rope_scaling=yarn, **names, **window
    )
    vocabulary = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {"model": vocabulary, "added_tokens": [{"id": 2, "content": "</s>"}], "decoder": {"type": "ByteLevel"}}
        )
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert main(["info", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    features = ["a window of 100 tokens in 1 of 2 layers", "RoPE scaling yarn", "biases of query, key and value"]
    assert record["architecture"] == "Qwen2ForCausalLM" and record["features"] == features
    assert [row["n_ctx"] for row in record["memory"]] == [4096, 8192] and record["chat_template"] is True
    assert record["vocabulary"] == {"file": "tokenizer.json", "kind": "byte-level BPE", "n_tokens": 3}
    assert record["conversion"] == "16 matrices to q8 g32 by rtn"
    assert record["stored_bytes"] == 2 * record["n_params"] and list(record["stored"]) == ["BF16"]
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"architecture +Qwen2ForCausalLM; a window of 100 tokens in 1 of 2 layers; RoPE", text)
    assert re.search(r"memory +\d+ MiB with a context of 8192 tokens", text)
    assert re.search(r"BF16 +\d+ +[\d,]+ +100.0 % ", text)
    assert not cache_folder().exists()


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"[]", "tokenizer.json: is no tokenizer: TypeError"),
        (b"{}", "tokenizer.json: is no tokenizer: KeyError: 'model'"),
        (b'{"model": {"vocab": 3}}', "tokenizer.json: is no tokenizer: AttributeError"),
        (b'{"model": {"vocab": {"a": []}}}', "tokenizer.json: is no tokenizer: TypeError"),
        (b'{"model": ' + b"[" * 100_000, "tokenizer.json: is no tokenizer: RecursionError"),
        (b"\xff", "tokenizer.json: is no tokenizer: JSONDecodeError"),
    ],
)
def test_a_broken_vocabulary(raw: bytes, match: str) -> None:
    with pytest.raises(ModelFormatError, match=re.escape(match)):
        vocabulary_kind({"tokenizer.json": raw}, "here")


def test_vocabularies_by_their_files() -> None:
    unigram = json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]}}).encode()
    both = {"tokenizer.model": b"", "tokenizer.json": unigram}
    assert vocabulary_kind(both, "") == {"file": "tokenizer.json", "kind": "Unigram", "n_tokens": 2}
    assert vocabulary_kind({"vocab.txt": b""}, "") is None
    with pytest.raises(ModelFormatError, match=r"here: tokenizer.model: the sentencepiece library cannot open it"):
        vocabulary_kind({"tokenizer.model": b"\x99\x99"}, "here")


def test_doctor(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLAMA_ISA", raising=False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"{__version__}" in text and "GB/s read with" in text and "everything runs on the CPU" in text
    assert "scalar" in text and "[BAD]" not in text
    monkeypatch.setenv("PYLLAMA_ISA", "mmx")
    assert main(["doctor"]) == 1
    assert "[BAD] PYLLAMA_ISA=mmx: no such kernels in this build" in capsys.readouterr().out


def test_doctor_measures_only_where_there_is_memory(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLAMA_ISA", raising=False)
    native = load_native()

    def no_memory(threads: int, seconds: float) -> float:
        raise MemoryError

    fake = SimpleNamespace(**{name: getattr(native, name) for name in dir(native) if not name.startswith("__")})
    fake.read_bandwidth = no_memory
    monkeypatch.setattr("pyllama.doctor.load_native", lambda: fake)
    monkeypatch.setattr("pyllama.doctor.available_bytes", lambda: None)
    assert main(["doctor"]) == 0
    assert re.search(r"bandwidth +\[missing\] not measured: out of memory\n", capsys.readouterr().out)
    fake.read_bandwidth = lambda threads, seconds: pytest.fail("measured all the same")
    monkeypatch.setattr("pyllama.doctor.available_bytes", lambda: (2 << 30) - 1)
    assert main(["doctor"]) == 0
    assert "not measured: 2.0 GiB of memory are free, measuring takes 2" in capsys.readouterr().out
    fake.read_bandwidth = lambda threads, seconds: 12.5
    monkeypatch.setattr("pyllama.doctor.available_bytes", lambda: 2 << 30)
    assert main(["doctor"]) == 0
    assert "12.5 GB/s read with" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc/meminfo here")
def test_doctor_knows_the_free_memory() -> None:
    free = available_bytes()
    assert free is not None and 1 << 20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_doctor_without_the_extension(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("the C++ extension pyllama._C is not built; run `pip install .`")

    monkeypatch.setattr("pyllama.doctor.load_native", missing)
    assert main(["doctor"]) == 1
    assert "[BAD] the C++ extension pyllama._C is not built" in capsys.readouterr().out
