"""Readers against oracles of the tests' own: scalar decoders of each block type, and the weights that were written.

What is checked: values, row order, packed codes, config, names, identity. Damaged files: test_hostile_*.py; the
stock libraries: tests/oracles/test_readers_reference.py.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import dequantize
from pyllama.common.reader import BoundedFile, Cursor
from pyllama.common.safetensors import read_safetensors
from quantize.binding import halves_first
from quantize.readers import SourceTensor, open_source
from quantize.readers.gguf_file import read_gguf
from tests import make_sources as make
from tests.helpers_gguf import decode_rows
from tests.make_sources import Shape

Array = NDArray[Any]
ODD = Shape(dim=64, hidden_dim=96, n_heads=6, n_kv_heads=3, head_dim=32, vocab_size=51)  # head_dim is not dim / n_heads
WIDE = Shape(dim=256, hidden_dim=256, n_heads=4, n_kv_heads=2, head_dim=64, vocab_size=33)  # rows of whole Q6_K blocks
BLOCK_TYPES = tuple(make.BLOCKS)
GRIDS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q4_0": "q4", "Q4_1": "q4a", "Q5_0": "q5nl", "Q8_0": "q8"}
GRIDS |= {"IQ4_NL": "q4nl", "Q4_K": "q4a", "IQ4_XS": "q4nl", "Q8_K": "q8"}
ROUNDED = ("Q4_K", "IQ4_XS", "Q8_K")  # scales are rounded to f16


@given(heads=st.integers(1, 9), pairs=st.integers(1, 40))
def test_row_order_undoes_interleaving(heads: int, pairs: int) -> None:
    values = np.arange(heads * pairs * 2)
    order = halves_first(heads, 2 * pairs)
    assert np.array_equal(make.interleave(values, heads)[order], values)


# --- Hugging Face folders --------------------------------------------------------------------------------------------


def equal_values(tensors: dict[str, SourceTensor], weights: dict[str, Array]) -> None:
    assert tensors.keys() == weights.keys()
    for name, values in weights.items():
        found = tensors[name].read()
        assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable, name
        assert tensors[name].shape == values.shape and np.array_equal(found, values), name


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_hf_folder(tmp_path: Path, dtype: str) -> None:
    weights = make.random_weights(ODD)
    source = open_source(make.write_hf_folder(tmp_path / "m", ODD, weights, dtype=dtype))
    assert source.kind == "safetensors" and source.config == ODD.config()
    equal_values(source.tensors, weights)
    assert {t.dtype for t in source.tensors.values()} == {dtype}


@pytest.mark.parametrize("shape", [Shape(tied=True), Shape(biases=True), Shape(n_kv_heads=4), Shape(n_layers=11)])
def test_hf_variants(tmp_path: Path, shape: Shape) -> None:
    weights = make.random_weights(shape)
    source = open_source(make.write_hf_folder(tmp_path / "m", shape, weights))
    assert source.config == shape.config()
    equal_values(source.tensors, weights)


def test_hf_shards_and_single_file(tmp_path: Path) -> None:
    shape = Shape()
    weights = make.random_weights(shape)
    sharded = open_source(make.write_hf_folder(tmp_path / "sharded", shape, weights, shards=3))
    equal_values(sharded.tensors, weights)
    folder = make.write_hf_folder(tmp_path / "single", shape, weights)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    equal_values(open_source(folder).tensors, weights)
    equal_values(open_source(folder / "other.safetensors").tensors, weights)
    assert list(sharded.tensors) == list(open_source(folder).tensors)  # the order is the model's, not the file's


def test_hf_links_are_followed(tmp_path: Path) -> None:
    """A download cache is made of links."""
    weights = make.random_weights(Shape())
    folder = make.write_hf_folder(tmp_path / "blobs", Shape(), weights)
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    equal_values(open_source(tmp_path / "snapshot").tensors, weights)


def test_hf_defaults(tmp_path: Path) -> None:
    """Keys that older checkpoints lack take the architecture's published defaults."""
    shape = Shape(n_kv_heads=4, norm_eps=1e-6)
    absent = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings"), ...
    )
    absent |= dict.fromkeys(("attention_bias", "mlp_bias", "hidden_act", "bos_token_id", "eos_token_id"), ...)
    folder = make.write_hf_folder(tmp_path / "m", shape, make.random_weights(shape), **absent)
    assert open_source(folder).config == shape.config()


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 500000}, 500000.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 10000.0, {"rope_type": "llama3", **LLAMA3}),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 300}},
            300.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}, 7e4, None),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            5e5,
            {"rope_type": "llama3", **LLAMA3},
        ),
        (
            {
                "rope_theta": ...,
                "rope_parameters": {f"{kind}_attention": LINEAR | {"rope_theta": 7e4} for kind in ("full", "sliding")},
            },
            7e4,
            LINEAR,
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
            10000.0,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_hf_rope(tmp_path: Path, changes: dict[str, Any], theta: float, scaling: dict[str, Any] | None) -> None:
    folder = make.write_hf_folder(tmp_path / "m", Shape(), make.random_weights(Shape()), **changes)
    config = open_source(folder).config
    assert (config["rope_theta"], config["rope_scaling"]) == (theta, scaling)


def test_hf_generation_config_overrides_eos(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "m", Shape(), make.random_weights(Shape()), eos_token_id=[2, 7, 2])
    assert open_source(folder).config["eos_token_ids"] == [2, 7]
    (tmp_path / "none").mkdir()
    for ids in ([2, -1, 7], [None, 2, 7], [2, 7, 0xFFFFFFFF]):  # tools' ways of saying that there is no more
        other = make.write_hf_folder(tmp_path / "none", Shape(), make.random_weights(Shape()), eos_token_id=ids)
        assert open_source(other).config["eos_token_ids"] == [2, 7]
    assert open_source(folder).generation_config == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2], "temperature": 0.6}')
    source = open_source(folder)
    assert source.config["eos_token_ids"] == [5, 2]
    assert source.generation_config == {"eos_token_id": [5, 2], "temperature": 0.6}


def test_hf_tokenizer_files(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "m", Shape(), make.random_weights(Shape()))
    (folder / "tokenizer.model").write_bytes(b"\x00\xff")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "notes.txt").write_text("not a tokenizer")
    assert open_source(folder).tokenizer_files() == {"tokenizer.model": b"\x00\xff", "chat_template.jinja": b"{{ x }}"}


@pytest.mark.parametrize("window", [None, 128, 4096])
def test_mistral_without_a_window_in_effect(tmp_path: Path, window: int | None) -> None:
    shape = Shape()
    folder = make.write_hf_folder(
        tmp_path / "m",
        shape,
        make.random_weights(shape),
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=window,
        attention_bias=...,
        mlp_bias=...,
    )
    assert open_source(folder).config == shape.config()


def test_hf_model_type_decides_without_architectures(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "m", Shape(), make.random_weights(Shape()), architectures=...)
    assert open_source(folder).config == Shape().config()


def test_hf_harmless_tensors_are_dropped(tmp_path: Path) -> None:
    shape = Shape(tied=True, biases=True)
    weights = make.random_weights(shape)
    embedding = weights["tok_embeddings"]
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [8], bytes(32)),
        "model.layers.1.self_attn.o_proj.bias": ("F32", [shape.dim], bytes(4 * shape.dim)),
        "lm_head.weight": ("F32", embedding.shape, make.encode_dense(embedding, "F32")),
    }
    source = open_source(make.write_hf_folder(tmp_path / "m", shape, weights, extra=extra))
    equal_values(source.tensors, weights)
    assert source.config["tied_embeddings"] is True


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*BLOCK_TYPES, "F32", "F16", "BF16", "F64"])
def test_gguf_types(tmp_path: Path, kind: str) -> None:
    weights = make.random_weights(WIDE)
    source = open_source(make.write_gguf(tmp_path / "m.gguf", WIDE, weights, kind))
    assert source.kind == "gguf" and source.config == WIDE.config()
    assert source.tensors.keys() == weights.keys()
    for name, values in weights.items():
        tensor = source.tensors[name]
        grid = tensor.grid
        if values.ndim == 1:
            assert grid is None and tensor.dtype == "F32"
            assert np.array_equal(tensor.read(), values)
            continue
        assert tensor.dtype == kind and (grid.format if grid else None) == GRIDS.get(kind)
        # Rows are encoded one by one: the oracle encodes and decodes them in Hugging Face's order.
        raw = make.encode_blocks(values, kind)
        expected = decode_rows(kind, raw, values.shape) if kind in BLOCK_TYPES else values
        assert np.array_equal(tensor.read(), expected), name
        assert tensor.exact == (grid is not None and kind not in ROUNDED)
        if tensor.exact and grid is not None:
            assert np.array_equal(dequantize(grid, tensor.read_packed()), expected), name


def test_gguf_codes_come_over_untouched(tmp_path: Path) -> None:
    """Not only the values: the same codes and the same bits of scale and minimum."""
    shape = Shape(vocab_size=17)
    weights = make.random_weights(shape)
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        tensor = open_source(make.write_gguf(tmp_path / f"{kind}.gguf", shape, weights, kind)).tensors["layers.1.wk"]
        raw = make.encode_blocks(weights["layers.1.wk"], kind)
        size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
        packed = tensor.read_packed()
        n, k = tensor.shape
        for r in range(n):
            for g in range(k // 32):
                block = raw[(r * (k // 32) + g) * size :][:size]
                assert packed.scales is not None and packed.scales[r, g].tobytes() == block[:2]
                codes = packed.codes[r, 32 * g : 32 * g + 32]
                if kind == "Q8_0":
                    assert codes.tobytes() == block[2:]
                    continue
                if kind == "Q4_1":
                    assert packed.offsets is not None and packed.offsets[r, g].tobytes() == block[2:4]
                assert list(codes) == [b & 15 for b in block[-16:]] + [b >> 4 for b in block[-16:]]


@given(data=st.data())
def test_rows_are_a_slice_of_the_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = _mixed_gguf(tmp_path_factory)
    source = open_source(path)
    name = data.draw(
        st.sampled_from(["tok_embeddings", "layers.0.wq", "layers.0.wk", "layers.0.w_down", "layers.0.bq"])
    )
    tensor = source.tensors[name]
    n = tensor.shape[0]
    start = data.draw(st.integers(0, n))
    rows = slice(start, data.draw(st.integers(start, n)))
    assert np.array_equal(tensor.read(rows), tensor.read()[rows])
    if tensor.grid is not None:
        part, whole = tensor.read_packed(rows), tensor.read_packed()
        assert np.array_equal(part.codes, whole.codes[rows])
        if whole.scales is not None:
            assert part.scales is not None and np.array_equal(part.scales, whole.scales[rows])
        if whole.offsets is not None:
            assert part.offsets is not None and np.array_equal(part.offsets, whole.offsets[rows])


def _mixed_gguf(factory: pytest.TempPathFactory) -> Path:
    path = factory.getbasetemp() / "mixed.gguf"
    if not path.exists():
        shape = Shape(dim=256, hidden_dim=64, n_layers=1, head_dim=32, vocab_size=45, biases=True)
        kinds = {"tok_embeddings": "Q6_K", "layers.0.wq": "Q4_1", "layers.0.wk": "Q8_0", "layers.0.w_down": "F16"}
        make.write_gguf(path, shape, make.random_weights(shape), lambda name: kinds.get(name, "Q4_0"))
    return path


@pytest.mark.parametrize("shape", [Shape(tied=True), Shape(biases=True), ODD])
def test_gguf_variants(tmp_path: Path, shape: Shape) -> None:
    weights = make.random_weights(shape)
    source = open_source(make.write_gguf(tmp_path / "m.gguf", shape, weights, "F32"))
    assert source.config == shape.config()
    equal_values(source.tensors, weights)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_gguf_versions_and_alignments(tmp_path: Path, version: int, alignment: int) -> None:
    shape, path = Shape(), tmp_path / "m.gguf"
    weights = make.random_weights(shape)
    entries = make.llama_entries(shape, general__alignment=(make.U32, alignment))
    tensors = make.llama_tensors(shape, weights, "F16")
    path.write_bytes(make.gguf_bytes(entries, tensors, version=version, alignment=alignment))
    equal_values(open_source(tmp_path).tensors, weights)  # a folder with exactly one .gguf will do
    assert read_gguf(path).version == version


def test_gguf_metadata_of_every_type(tmp_path: Path) -> None:
    values: dict[str, tuple[int, Any, Any]] = {
        "u8": (make.U8, 255, 255),
        "i8": (make.I8, -128, -128),
        "u16": (make.U16, 65535, 65535),
        "i16": (make.I16, -32768, -32768),
        "u32": (make.U32, 2**32 - 1, 2**32 - 1),
        "i32": (make.I32, -(2**31), -(2**31)),
        "f32": (make.F32, 1e-5, 1e-5),
        "bool": (make.BOOL, 1, True),
        "string": (make.STRING, "häß\u2581🙂", "häß\u2581🙂"),
        "u64": (make.U64, 2**64 - 1, 2**64 - 1),
        "i64": (make.I64, -(2**63), -(2**63)),
        "f64": (make.F64, 0.1, 0.1),
        "strings": (make.ARRAY, (make.STRING, ["", "a", "é"]), ["", "a", "é"]),
        "floats": (make.ARRAY, (make.F32, [0.5, -2.0]), [0.5, -2.0]),
        "bools": (make.ARRAY, (make.BOOL, [0, 1]), [False, True]),
        "empty": (make.ARRAY, (make.U64, []), []),
        "nested": (make.ARRAY, (make.ARRAY, [(make.U8, [1, 2]), (make.STRING, ["x"])]), [[1, 2], ["x"]]),
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(
        make.gguf_bytes([make.gguf_entry(key, kind, value) for key, (kind, value, _) in values.items()], [])
    )
    found = read_gguf(path).metadata
    assert found == {key: expected for key, (_, _, expected) in values.items()}
    assert {key: type(value) for key, value in found.items()} == {key: type(v[2]) for key, v in values.items()}


PAIRS = Shape().head_dim // 2


@pytest.mark.parametrize(
    ("changes", "factors", "scaling"),
    [
        ({"llama.rope.scaling.type": (make.STRING, "none"), "llama.rope.scaling.factor": (make.F32, 4.0)}, None, None),
        (
            {"llama.rope.scaling.type": (make.STRING, "linear"), "llama.rope.scaling.factor": (make.F32, 4.0)},
            None,
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": (make.F32, 2.0)}, None, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": (make.STRING, "yarn"),
                "llama.rope.scaling.factor": (make.F32, 8.0),
                "llama.rope.scaling.original_context_length": (make.U32, 16),
            },
            None,
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
        ),
        (
            {
                "llama.rope.scaling.type": (make.STRING, "yarn"),
                "llama.rope.scaling.factor": (make.F32, 4.0),
                "llama.rope.scaling.attn_factor": (make.F32, 2.0),
                "llama.rope.scaling.yarn_beta_fast": (make.F32, 16.0),
                "llama.rope.scaling.yarn_ext_factor": (make.F32, 1.0),
            },
            None,
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "attention_factor": 2.0 * (0.1 * math.log(4.0) + 1.0),
                "beta_fast": 16.0,
            },
        ),
        ({}, [1.0] * PAIRS, None),
        ({}, [1.0] * 4 + [8.0] * 4, {"rope_type": "factors", "factors": [1.0] * 4 + [8.0] * 4}),
        (
            {"llama.rope.scaling.type": (make.STRING, "linear"), "llama.rope.scaling.factor": (make.F32, 2.0)},
            [1.0] * 4 + [8.0] * 4,
            {"rope_type": "factors", "factors": [2.0] * 4 + [16.0] * 4},
        ),
    ],
)
def test_gguf_rope(
    tmp_path: Path, changes: dict[str, Any], factors: list[float] | None, scaling: dict[str, Any] | None
) -> None:
    extra = [make.GgufTensor("rope_freqs.weight", (PAIRS,), 0, np.array(factors, "<f4").tobytes())] if factors else []
    path = make.write_gguf(tmp_path / "m.gguf", Shape(), make.random_weights(Shape()), extra=extra, **changes)
    assert open_source(path).config["rope_scaling"] == scaling


def test_gguf_reads_config_of_older_and_newer_writers(tmp_path: Path) -> None:
    shape = Shape()
    changes = {
        "llama.attention.key_length": None,
        "llama.attention.value_length": None,
        "llama.vocab_size": None,
        "llama.rope.freq_base": None,
        "llama.attention.head_count_kv": (make.ARRAY, (make.U32, [2, 2])),
        "tokenizer.ggml.eot_token_id": (make.U32, 7),
    }
    path = make.write_gguf(tmp_path / "m.gguf", shape, make.random_weights(shape), "F16", **changes)
    assert open_source(path).config == shape.config() | {"eos_token_ids": [2, 7]}


def test_gguf_without_a_vocabulary_or_with_trailing_dimensions(tmp_path: Path) -> None:
    shape = Shape()
    weights = make.random_weights(shape)
    tensors = make.llama_tensors(shape, weights, "F16")
    for tensor in tensors:
        if len(tensor.dims) == 2:
            tensor.dims = (*tensor.dims, 1, 1)
    path = tmp_path / "m.gguf"
    entries = make.llama_entries(shape, **{"tokenizer.ggml.tokens": None, "llama.vocab_size": None})
    path.write_bytes(make.gguf_bytes(entries, tensors))
    assert open_source(path).config == shape.config()
    equal_values(open_source(path).tensors, weights)


def test_no_packed_numbers_without_a_grid(tmp_path: Path) -> None:
    tensors = open_source(make.write_gguf(tmp_path / "m.gguf", WIDE, make.random_weights(WIDE), "Q6_K")).tensors
    for name in ("layers.0.wq", "norm"):
        with pytest.raises(ValueError, match=rf"{name}: .* has no grid of ours; use read"):
            tensors[name].read_packed()
    assert repr(tensors["layers.0.wq"]) == "SourceTensor(layers.0.wq, Q6_K, [256, 256])"


def test_gguf_tokenizer_files_come_from_the_vocabulary(tmp_path: Path) -> None:
    source = open_source(make.write_gguf(tmp_path / "m.gguf", Shape(), make.random_weights(Shape())))
    files = source.tokenizer_files()
    assert "tokenizer.model" in files and all(isinstance(raw, bytes) for raw in files.values())


def test_the_demo_model(demo_gguf: Path) -> None:
    source = open_source(demo_gguf)
    kinds = {(t.dtype, t.grid.format if t.grid else None) for t in source.tensors.values()}
    assert kinds == {("Q8_0", "q8"), ("Q4_1", "q4a"), ("F32", None)}
    assert len(source.tensors) == 272 and source.config["tied_embeddings"] is True
    assert {
        key: source.config[key] for key in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim")
    } == {
        "dim": 576,
        "hidden_dim": 1536,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "head_dim": 64,
    }
    for name in ("layers.7.wk", "layers.29.w_down"):
        tensor = source.tensors[name]
        assert tensor.grid is not None
        assert np.array_equal(dequantize(tensor.grid, tensor.read_packed()), tensor.read())
    rows = slice(40000, 40016)
    embedding = source.tensors["tok_embeddings"]
    assert 0.01 < float(embedding.read(rows).std()) < 1.0


# --- identity, bounds, memory ----------------------------------------------------------------------------------------


def test_identity(tmp_path: Path) -> None:
    weights = make.random_weights(Shape())
    folder = make.write_hf_folder(tmp_path / "m", Shape(), weights)
    first = open_source(folder).identity
    assert first == open_source(folder).identity
    assert first.keys() == {"kind", "name", "size_bytes", "mtime_ns", "sha256_head"}
    assert first["name"] == "m" and str(tmp_path) not in json.dumps(first)
    (folder / "tokenizer.model").write_bytes(b"x")
    second = open_source(folder).identity
    assert second["sha256_head"] != first["sha256_head"] and second["size_bytes"] == first["size_bytes"] + 1
    os.utime(folder / "model.safetensors", ns=(1, 10**18 * 4))
    assert open_source(folder).identity["mtime_ns"] == 10**18 * 4
    path = make.write_gguf(tmp_path / "m.gguf", Shape(), weights)
    assert open_source(path).identity["size_bytes"] == path.stat().st_size


def test_bounded_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(200)))
    for use_mmap in (True, False):
        with BoundedFile(path, use_mmap=use_mmap) as file:
            part = file.map(64, 100, aligned=64)
            assert part.tobytes() == bytes(range(64, 164)) and not part.flags.writeable and part.ctypes.data % 64 == 0
            assert file.read_at(198, 2) == b"\xc6\xc7" and file.map(200, 0).size == 0
            for offset, n in ((0, 201), (200, 1), (-1, 1), (0, -1), (2**63, 2**63), (1, 2**64)):
                for read in (file.map, file.read_at, file.copy):
                    with pytest.raises(ModelFormatError, match="the file holds 200"):
                        read(offset, n)
            with pytest.raises(ModelFormatError, match="multiple of 64"):
                file.map(8, 8, aligned=64)
        assert part[0] == 64  # arrays outlive the file


def test_cursor(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<BbHhIiQqfdQ3s", 1, -1, 2, -2, 3, -3, 4, -4, 0.5, 0.25, 3, "é!".encode()))
    cursor = Cursor(BoundedFile(path))
    ints = [
        read()
        for read in (cursor.u8, cursor.i8, cursor.u16, cursor.i16, cursor.u32, cursor.i32, cursor.u64, cursor.i64)
    ]
    assert ints == [1, -1, 2, -2, 3, -3, 4, -4]
    assert (cursor.f32(), cursor.f64(), cursor.string(3), cursor.left) == (0.5, 0.25, "é!", 0)
    with pytest.raises(ModelFormatError, match=r"at byte 53: last claims 1 bytes, only 0 are left"):
        cursor.u8("last")


def test_safetensors_data_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(make.safetensors_of({"a": ("U8", [5], b"hello"), "é": ("I64", [0, 3], b"")}, note="x"))
    file = read_safetensors(path)
    assert file.metadata == {"note": "x"} and file.data("a").tobytes() == b"hello"
    assert not file.data("a").flags.writeable and file.data("é").size == 0 and file.tensors["é"].shape == (0, 3)
    assert file.data("a").base is file.data("a")[1:].base  # one map, no copies
    with pytest.raises(ModelFormatError, match="no tensor 'b'"):
        file.data("b")


def test_rows_of_a_huge_tensor_cost_little_memory(tmp_path: Path) -> None:
    shape = Shape(dim=64, vocab_size=1 << 20, tied=True)  # 128 MiB of f16, as a file with a hole
    small = make.random_weights(Shape(tied=True))
    del small["tok_embeddings"]
    folder = tmp_path / "m"
    make.write_hf_folder(folder, shape, small, dtype="F16")
    header = {"model.embed_tokens.weight": {"dtype": "F16", "shape": [1 << 20, 64], "data_offsets": [0, 1 << 27]}}
    raw = make.safetensors_bytes(header)
    with open(folder / "big.safetensors", "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + (1 << 27))
    names = {make.hf_name(name): "rest.safetensors" for name in small}
    (folder / "model.safetensors").rename(folder / "rest.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "big.safetensors", **names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tracemalloc.start()
    embedding = open_source(folder).tensors["tok_embeddings"]
    embedding.read(slice(5, 1000))
    embedding.read_packed(slice(1 << 19, (1 << 19) + 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20, f"{peak} bytes"
