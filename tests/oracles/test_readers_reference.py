"""The readers against the stock libraries: block types bit for bit with the gguf package, containers with safetensors,
whole checkpoints with what transformers saves and loads.

Our test writers are checked here too: the stock libraries open what tests/make_sources.py writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from pyllama.common.errors import ModelFormatError
from pyllama.common.safetensors import read_safetensors
from quantize.readers import open_source
from quantize.readers.gguf_file import read_gguf
from quantize.readers.gguf_types import GGUF_TYPES
from tests import make_sources as make
from tests import test_hostile_files as hostile
from tests.make_sources import Shape

KINDS = [row.name for row in GGUF_TYPES.values() if row.name not in ("Q8_K", "F64")]  # the package decodes no others
WIDE = Shape(dim=256, hidden_dim=512, n_heads=4, n_kv_heads=2, head_dim=64, vocab_size=101)


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def hf_order(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Written on its own: pairs side by side -> first halves, then second halves, within each head."""
    return np.concatenate([np.concatenate([h[0::2], h[1::2]]) for h in np.split(values, heads)])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_decode_like_the_gguf_package(kind: str) -> None:
    row = next(row for row in GGUF_TYPES.values() if row.name == kind)
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (500, row.row_bytes(512)), np.uint8)
    with np.errstate(all="ignore"):  # some scales are NaN
        expected = np.ascontiguousarray(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]), np.float32)
        found = row.decode(raw)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5 and np.array_equal(np.isfinite(found), finite)
    assert same_bits(found[finite], expected[finite])


@pytest.mark.parametrize("kind", KINDS)
def test_our_gguf_files_are_read_by_the_gguf_package(tmp_path: Path, kind: str) -> None:
    path = make.write_gguf(tmp_path / "m.gguf", WIDE, make.random_weights(WIDE), kind)
    stock = gguf.GGUFReader(path)
    found = read_gguf(path)
    assert {
        f.name: f.contents() for f in stock.fields.values() if not f.name.startswith("GGUF.")
    }.keys() == found.metadata.keys()
    assert [t.name for t in stock.tensors] == list(found.tensors)
    source = open_source(path)
    theirs = {t.name: t for t in stock.tensors}
    for name, tensor in source.tensors.items():
        stored = theirs[tensor.source_name]
        expected = gguf.dequantize(stored.data, stored.tensor_type).reshape(tensor.shape)
        heads = {"wq": WIDE.n_heads, "wk": WIDE.n_kv_heads}.get(name.rsplit(".", 1)[-1])
        assert same_bits(tensor.read(), hf_order(expected, heads) if heads else expected), name


def test_files_of_the_gguf_package(tmp_path: Path) -> None:
    """The other direction: what its writer makes, with its own quantization."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_array("list.of.text", ["a", "é", ""])
    writer.add_array("list.of.floats", [0.5, 1.5])
    writer.add_bool("yes", True)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((6, 64)).astype(np.float32)
    for kind in ("Q4_0", "Q4_1", "Q8_0", "BF16"):
        quantized = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("plain", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "m.gguf")
    assert found.metadata["list.of.text"] == ["a", "é", ""] and found.metadata["yes"] is True
    assert found.metadata["list.of.floats"] == [0.5, 1.5] and found.metadata["llama.block_count"] == 1
    for stored in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        tensor = found.tensors[stored.name]
        assert tensor.data().tobytes() == stored.data.tobytes() and tensor.type_name == stored.tensor_type.name


def test_demo_model_like_the_gguf_package(demo_gguf: Path) -> None:
    source = open_source(demo_gguf)
    stored = {t.name: t for t in gguf.GGUFReader(demo_gguf).tensors}
    assert len(stored) == len(source.tensors)
    for name, tensor in source.tensors.items():
        theirs = stored[tensor.source_name]
        expected = gguf.dequantize(theirs.data, theirs.tensor_type).reshape(tensor.shape)
        heads = {"wq": 9, "wk": 3}.get(name.rsplit(".", 1)[-1])
        assert same_bits(tensor.read(), hf_order(expected, heads) if heads else expected), name


def test_demo_model_like_transformers(demo_gguf: Path) -> None:
    """Names, row order and config as transformers' own GGUF import has them."""
    theirs = AutoModelForCausalLM.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32)
    source = open_source(demo_gguf)
    state = theirs.state_dict()
    for name, tensor in source.tensors.items():
        assert np.array_equal(tensor.read(), state[make.hf_name(name)].numpy()), name
    config, ours = theirs.config, source.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (
        ours["dim"],
        ours["hidden_dim"],
        ours["n_layers"],
    )
    assert np.float32(config.rms_norm_eps) == np.float32(ours["norm_eps"])
    assert config.rope_parameters["rope_theta"] == ours["rope_theta"]
    assert (config.bos_token_id, [config.eos_token_id]) == (ours["bos_token_id"], ours["eos_token_ids"])


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_what_transformers_saves(tmp_path: Path, dtype: torch.dtype, kind: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config_type, model_type = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_type(**shape, num_key_value_heads=2, vocab_size=77, max_position_embeddings=256, **changes)
    model = model_type(config).to(dtype)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    state = model.state_dict()
    for folder in ("single", "sharded"):
        source = open_source(tmp_path / folder)
        for name, tensor in source.tensors.items():
            assert np.array_equal(tensor.read(), state[make.hf_name(name)].float().numpy()), name
        assert source.config["tied_embeddings"] is config.tie_word_embeddings
        assert source.config["head_dim"] == config.head_dim
        assert source.config["rope_theta"] == config.rope_parameters["rope_theta"]
        scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
        assert source.config["rope_scaling"] == (scaling if "rope_parameters" in changes else None)


def test_containers_like_the_safetensors_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        "a/ü": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.integers(-5, 5, (2, 2, 2)),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(7, np.uint8),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"k": "v\n\"'"})
    file = read_safetensors(tmp_path / "theirs.safetensors")
    assert file.metadata == {"k": "v\n\"'"} and file.tensors.keys() == arrays.keys()
    for name, values in arrays.items():
        assert file.tensors[name].shape == values.shape and file.data(name).tobytes() == values.tobytes()
    ours = {name: ("F32", [2, 3], rng.standard_normal(6).astype("<f4").tobytes()) for name in ("x", "y")}
    (tmp_path / "ours.safetensors").write_bytes(make.safetensors_of(ours, note="hello"))
    with safe_open(tmp_path / "ours.safetensors", "np") as opened:
        assert opened.metadata() == {"note": "hello"}
        assert all(opened.get_tensor(name).tobytes() == raw for name, (_, _, raw) in ours.items())


@pytest.mark.parametrize("defect", hostile.BAD_SAFETENSORS)
def test_we_are_at_least_as_strict_as_the_safetensors_package(tmp_path: Path, defect: str) -> None:
    """The table of defects holds no file that only we dislike by mistake; where we are stricter, it is said."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(hostile.BAD_SAFETENSORS[defect][0])
    with pytest.raises(ModelFormatError):
        read_safetensors(path)
    stricter = {"duplicate tensor", "duplicate metadata", "unknown key", "nine dimensions"}
    if defect not in stricter:
        with pytest.raises(SafetensorError), safe_open(path, "np") as opened:
            opened.keys()
