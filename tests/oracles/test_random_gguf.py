"""The random GGUFs that speed is compared on, read by the package that defines the format."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.random_gguf import MIXES, kind_of, matrices, write_random_gguf
from pyllama.synthetic import SHAPES


@pytest.mark.parametrize("mix", MIXES)
def test_weights_are_sane(mix: str, tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    path = tmp_path / f"{mix}.gguf"
    write_random_gguf(path, shape, mix)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, (rows, columns) in matrices(shape).items():
        tensor = found[name]
        assert tensor.tensor_type == kind_of(mix, name, shape)
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert weights.shape == (rows, columns)
        deviation = weights.std() * np.sqrt(columns)  # 1 but for the scales' own spread of 1/12: sqrt(13/12) = 1.04
        assert 0.95 < deviation < 1.15 and np.abs(weights).max() * np.sqrt(columns) < 6, name
        assert abs(weights.mean()) * np.sqrt(columns) < 0.15, name
        assert len(np.unique(weights, axis=0)) == rows, name  # no two rows are alike


def test_the_mix_of_q4_k_m() -> None:
    kinds = {name: kind_of("q4_k_m", name, SHAPES["7b"]).name for name in matrices(SHAPES["7b"])}
    assert kinds["output.weight"] == "Q6_K" and kinds["token_embd.weight"] == "Q4_K"
    assert kind_of("q4_k_m", "token_embd.weight", SHAPES["1b"]).name == "Q6_K"  # tied: it is the head
    six_bits = [i for i in range(32) if kinds[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert six_bits == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert six_bits == [i for i in range(32) if kinds[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert {kinds[f"blk.{i}.{m}.weight"] for i in range(32) for m in ("attn_q", "attn_k", "ffn_up", "ffn_gate")} == {
        "Q4_K"
    }
