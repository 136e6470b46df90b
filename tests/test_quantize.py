"""From a checkpoint to a model folder: lossless where it must be, within the grid's error elsewhere, sound to read.

Sources are built byte by byte by make_sources.py. Values of repacked GGUF blocks are decoded here one number at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tracemalloc
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError, QuantizeError
from pyllama.common.formats import FORMATS, GROUPS, dequantize, unpack
from pyllama.common.model_folder import ModelFolder, read_model_folder
from quantize import convert, verify
from tests import make_sources as make
from tests.make_sources import Shape

ODD = Shape(dim=50, hidden_dim=77, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=14, vocab_size=45, biases=True)
QUANTIZED = [name for name, row in FORMATS.items() if row.quantized]
BITS = {"q8": 8, "q4": 4, "q4a": 4, "q4nl": 4, "q5nl": 5, "q6": 6}
REPACKED = {"Q4_0": "q4", "Q4_1": "q4a", "Q8_0": "q8"}


def hf_source(folder: Path, shape: Shape = ODD, dtype: str = "F32") -> Path:
    """A Hugging Face folder with something like a tokenizer."""
    make.write_hf_folder(folder, shape, make.random_weights(shape), dtype=dtype)
    (folder / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 5]}')
    (folder / "README.md").write_text("not wanted")
    return folder


def gguf_source(path: Path, kind: Any, shape: Shape | None = None) -> Path:
    shape = shape or Shape()
    return make.write_gguf(path, shape, make.random_weights(shape), kind)


def values(folder: ModelFolder, name: str) -> NDArray[np.float32]:
    tensor = folder.tensors[name]
    return dequantize(tensor.spec, unpack(tensor.spec, tensor.payload()))


def matrices(shape: Shape) -> list[str]:
    return [name for name, sides in shape.tensors().items() if len(sides) == 2]


def decode_block(raw: bytes, kind: str) -> list[float]:
    """The 32 values of a GGUF block by its definition, one at a time."""
    (d,) = struct.unpack_from("<e", raw)
    if kind == "Q8_0":
        return [float(np.float32(d) * np.float32(c)) for c in struct.unpack_from("<32b", raw, 2)]
    at = 4 if kind == "Q4_1" else 2
    codes = [raw[at + i] & 15 for i in range(16)] + [raw[at + i] >> 4 for i in range(16)]
    if kind == "Q4_0":
        return [float(np.float32(d) * np.float32(c - 8)) for c in codes]
    (m,) = struct.unpack_from("<e", raw, 2)
    return [float(np.float32(np.float32(d) * np.float32(c)) + np.float32(m)) for c in codes]


def decode_blocks(raw: bytes, kind: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = [decode_block(raw[at : at + size], kind) for at in range(0, len(raw), size)]
    return np.array(blocks, np.float32).reshape(shape)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(REPACKED))
def test_gguf_grids_come_over_without_loss(kind: str, tmp_path: Path) -> None:
    shape = Shape(biases=True)
    weights = make.random_weights(shape)
    out = convert(gguf_source(tmp_path / "m.gguf", kind, shape), tmp_path / "out")
    folder = read_model_folder(out)
    assert folder.config["quantization"]["format"] == REPACKED[kind]
    assert folder.config["quantization"]["method"] == "repack"
    for name in matrices(shape):
        assert folder.tensors[name].spec.format == REPACKED[kind] and folder.tensors[name].spec.group == 32
        expected = decode_blocks(make.encode_blocks(weights[name], kind), kind, weights[name].shape)
        np.testing.assert_array_equal(values(folder, name), expected, err_msg=name)
    for name in folder.tensors.keys() - set(matrices(shape)):
        np.testing.assert_array_equal(values(folder, name), weights[name], err_msg=name)


def test_the_same_format_asked_for_is_a_repack_too(tmp_path: Path) -> None:
    source = gguf_source(tmp_path / "m.gguf", "Q4_1")
    plain = convert(source, tmp_path / "plain")
    asked = convert(source, tmp_path / "asked", format="q4a", group_size=32)
    assert (plain / "model.safetensors").read_bytes() == (asked / "model.safetensors").read_bytes()
    other = convert(source, tmp_path / "other", format="q4a", group_size=64)
    folder = read_model_folder(other)
    assert folder.config["quantization"]["method"] == "rtn"
    assert all(folder.tensors[name].spec.group == 64 for name in matrices(Shape()))


def test_a_head_on_no_grid_of_ours_becomes_q8(tmp_path: Path) -> None:
    shape = Shape(dim=256)
    kinds = {"output": "Q6_K", "tok_embeddings": "F16"}
    source = gguf_source(tmp_path / "m.gguf", lambda name: kinds.get(name, "Q4_0"), shape)
    folder = read_model_folder(convert(source, tmp_path / "out"))
    formats = {name: folder.tensors[name].spec.format for name in matrices(shape)}
    assert formats.pop("output") == "q8" and formats.pop("tok_embeddings") == "q8"
    assert set(formats.values()) == {"q4"}
    assert folder.config["quantization"] | {"bits_per_weight": 0} == {
        "format": "q4",
        "group": 32,
        "method": "rtn",
        "bits_per_weight": 0,
    }
    head = make.random_weights(shape)["output"]
    assert np.abs(values(folder, "output") - head).max() < 0.03  # Q6_K's step here is 0.5 / 31, then a q8 of it


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_floats_become_q8_by_default(dtype: str, tmp_path: Path) -> None:
    weights = make.random_weights(ODD)
    out = convert(hf_source(tmp_path / "hf", dtype=dtype), tmp_path / "out")
    folder = read_model_folder(out)
    for name in matrices(ODD):
        assert folder.tensors[name].spec.format == "q8" and folder.tensors[name].spec.group == 32
        # A step is at most 0.5 / (127 · .96); the search may clip a little more than half of one.
        assert np.abs(values(folder, name) - weights[name]).max() < 0.5 / 120
    for name in ("norm", "layers.0.bq", "layers.0.mlp_norm"):
        np.testing.assert_array_equal(values(folder, name), weights[name])


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_dense_formats_keep_what_fits(format: str, dtype: str, tmp_path: Path) -> None:
    weights = make.random_weights(ODD)  # exact in all three
    folder = read_model_folder(convert(hf_source(tmp_path / "hf", dtype=dtype), tmp_path / "out", format=format))
    assert folder.config["quantization"]["format"] == format and "group" not in folder.config["quantization"]
    for name, expected in weights.items():
        np.testing.assert_array_equal(values(folder, name), expected, err_msg=name)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("group", GROUPS)
def test_every_format_and_group_on_odd_shapes(format: str, group: int, tmp_path: Path) -> None:
    weights = make.random_weights(ODD)
    out = convert(hf_source(tmp_path / "hf"), tmp_path / "out", format=format, group_size=group)
    assert verify(out).n_tensors == len(weights)
    folder = read_model_folder(out)
    for name in matrices(ODD):
        spec = folder.tensors[name].spec
        assert (spec.format, spec.group) == (format, group)
        # Uniform weights in ±0.5: the error is that of a step of 1 / 2^bits, uneven steps and clipping included.
        rms = np.sqrt(np.mean((values(folder, name) - weights[name]) ** 2))
        assert rms < 1.3 * 2.0 ** -BITS[format] / np.sqrt(12)


def test_types_of_single_tensors(tmp_path: Path) -> None:
    source = hf_source(tmp_path / "hf", Shape())
    rules = [(r"\.w_", "q4nl"), ("embeddings|output", "f16"), (r"^layers\.1\.w_down$", "q8")]
    folder = read_model_folder(convert(source, tmp_path / "out", format="q4", tensor_types=rules, group_size=64))
    formats = {name: tensor.spec.format for name, tensor in folder.tensors.items()}
    assert formats["tok_embeddings"] == formats["output"] == "f16"
    assert formats["layers.0.w_down"] == formats["layers.1.w_up"] == "q4nl"
    assert formats["layers.1.w_down"] == "q8"  # the last rule that fits
    assert formats["layers.0.wq"] == "q4" and formats["layers.1.attn_norm"] == "f32"
    assert {folder.tensors[name].spec.group for name in ("layers.0.wq", "layers.1.w_down")} == {64}


def test_big_tensors_go_through_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "q4nl": hf_source(tmp_path / "hf"),
        "f16": tmp_path / "hf",
        None: gguf_source(tmp_path / "m.gguf", "Q4_0"),
    }
    for format, source in sources.items():
        whole = convert(source, tmp_path / f"whole-{format}", format=format)
        with monkeypatch.context() as patch:
            patch.setattr(import_module("quantize.pipeline"), "_BLOCK_WEIGHTS", 1)
            steps: list[Any] = []
            blocks = convert(source, tmp_path / f"blocks-{format}", format=format, progress=steps.append)
        assert (whole / "model.safetensors").read_bytes() == (blocks / "model.safetensors").read_bytes()
        assert [step.done for step in steps] == sorted({step.done for step in steps})
        assert steps[-1].done == steps[-1].total
        assert len(steps) > len(read_model_folder(whole).tensors)


@pytest.mark.parametrize("format", ["q8", "f16"])
def test_memory_holds_a_payload_and_a_block(format: str, tmp_path: Path) -> None:
    shape = Shape(dim=64, n_layers=1, vocab_size=150_000, tied=True)
    weights = {name: np.zeros(sides, np.float32) for name, sides in shape.tensors().items()}
    make.write_hf_folder(tmp_path / "hf", shape, weights, dtype="BF16")
    tracemalloc.start()
    try:
        out = convert(tmp_path / "hf", tmp_path / "out", format=format)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    payload_bytes = read_model_folder(out).tensors["tok_embeddings"].spec.payload_bytes
    # A block has 2^21 weights, the tensor 4.6 blocks. Of a block there are its float32 values, the same rounded, a copy
    # to look for infinities and one to reorder.
    assert peak_bytes < payload_bytes + 16 * 2**21


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_files_and_config(tmp_path: Path) -> None:
    source = hf_source(tmp_path / "hf")
    out = convert(source, tmp_path / "out", format="q4", group_size=64)
    assert out == tmp_path / "out"
    names = [
        "config.json",
        "generation_config.json",
        "golden_ids.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(file.name for file in out.iterdir()) == names
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    described, origin = config.pop("quantization"), config.pop("source")
    assert config == ODD.config() | {"eos_token_ids": [2, 5]}
    folder = read_model_folder(out)
    payloads = sum(tensor.spec.payload_bytes for tensor in folder.tensors.values())
    n_weights = sum(int(np.prod(sides)) for sides in ODD.tensors().values())
    assert described == {
        "format": "q4",
        "group": 64,
        "method": "rtn",
        "bits_per_weight": round(payloads * 8 / n_weights, 4),
    }
    assert origin["kind"] == "safetensors" and origin["name"] == "hf" and "mtime_ns" not in origin
    assert str(tmp_path) not in (out / "config.json").read_text()


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    folder = read_model_folder(convert(hf_source(tmp_path / "hf", Shape(tied=True)), tmp_path / "out", format="q4"))
    assert "output" not in folder.tensors and folder.tensors["tok_embeddings"].spec.format == "q4"


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = hf_source(tmp_path / "hf")
    one, two = (convert(source, tmp_path / name, format="q4nl") for name in ("one", "two"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_stock_library_opens_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    out = convert(hf_source(tmp_path / "hf"), tmp_path / "out", format="q4")
    path = out / "model.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        assert metadata["format"] == "pyllama" and metadata["version"] == "1"
        for name, tensor in read_model_folder(out).tensors.items():
            data = file.get_tensor(name)
            assert data.dtype == np.uint8 and data.size % 64 == 0
            np.testing.assert_array_equal(data, tensor.payload())
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    assert (8 + length) % 64 == 0 and raw[8:9] == b"{"


def test_payloads_are_aligned_in_memory(tmp_path: Path) -> None:
    out = convert(hf_source(tmp_path / "hf"), tmp_path / "out")
    for use_mmap in (True, False):
        for tensor in read_model_folder(out, use_mmap=use_mmap).tensors.values():
            assert tensor.payload().ctypes.data % 64 == 0


def test_the_demo_model(demo_model: Path) -> None:
    folder = read_model_folder(demo_model)
    assert verify(demo_model).n_weights == 134_515_008
    formats = {name: tensor.spec.format for name, tensor in folder.tensors.items() if not tensor.spec.is_vector}
    assert formats.pop("tok_embeddings") == "q8" and set(formats.values()) == {"q4a"} and len(formats) == 210
    assert folder.config["quantization"]["method"] == "repack"
    assert folder.config["source"]["kind"] == "gguf"


# ---- bad sources and requests ----------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden files too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize(("dtype", "bad"), [("F32", np.nan), ("F32", -np.inf), ("F16", np.inf), ("BF16", np.nan)])
@pytest.mark.parametrize("victim", ["layers.0.w_up", "layers.0.bq", "norm"])
def test_weights_that_are_no_numbers(format: str | None, dtype: str, bad: float, victim: str, tmp_path: Path) -> None:
    weights = make.random_weights(ODD)
    weights[victim].reshape(-1)[-3] = bad
    make.write_hf_folder(tmp_path / "hf", ODD, weights, dtype=dtype)
    before = listing(tmp_path)
    with pytest.raises(ModelFormatError, match=re.escape(victim)):
        convert(tmp_path / "hf", tmp_path / "out", format=format)
    assert listing(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", list(REPACKED))
def test_scales_that_are_no_numbers(kind: str, tmp_path: Path) -> None:
    source = gguf_source(tmp_path / "m.gguf", kind)
    raw = bytearray(source.read_bytes())
    raw[-6 * 34 * 2 :] = b"\xff" * (6 * 34 * 2)  # the end of the last matrix: scales of NaN
    source.write_bytes(raw)
    with pytest.raises(ModelFormatError, match="output"):
        convert(source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_values_beyond_a_format(tmp_path: Path) -> None:
    weights = make.random_weights(ODD)
    weights["layers.0.wq"][3, 4] = 1e30
    make.write_hf_folder(tmp_path / "hf", ODD, weights)
    with pytest.raises(QuantizeError, match=r"layers\.0\.wq: has values up to 1e\+30, beyond f16; choose f32 or bf16"):
        convert(tmp_path / "hf", tmp_path / "out", format="f16")
    for format in QUANTIZED:
        with pytest.raises(ModelFormatError, match=r"layers\.0\.wq: has a weight of magnitude 1e\+30"):
            convert(tmp_path / "hf", tmp_path / "out", format=format)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    folder = read_model_folder(
        convert(tmp_path / "hf", tmp_path / "out", format="q4", tensor_types=[(r"layers\.0\.wq", "bf16")])
    )
    assert values(folder, "layers.0.wq")[3, 4] == pytest.approx(1e30, rel=2**-8)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"format": "q5"}, "unknown format 'q5', expected one of f32"),
        ({"format": "Q4"}, "unknown format 'Q4'"),
        ({"group_size": 48}, "group size 48, expected 32, 64 or 128"),
        ({"method": "magic"}, "unknown method 'magic', expected one of rtn"),
        ({"tensor_types": [("wq", "q3")]}, "unknown format 'q3'"),
        ({"tensor_types": [("(", "q4")]}, r"regular expression '\('"),
    ],
)
def test_bad_arguments(request_: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "never looked at", tmp_path / "out", **request_)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"group_size": 64}, "group size 64 would apply to no matrix"),
        ({"format": "f16", "group_size": 32}, "group size 32 would apply to no matrix"),
        ({"tensor_types": [("q_proj", "q8")]}, "'q_proj' fits no matrix"),
        ({"tensor_types": [("norm", "f16")]}, "'norm' fits no matrix"),
    ],
)
def test_requests_that_would_do_nothing(request_: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = gguf_source(tmp_path / "m.gguf", "Q4_0")
    with pytest.raises(QuantizeError, match=message):
        convert(source, tmp_path / "out", **request_)
    assert not (tmp_path / "out").exists()


# ---- reading back: one defect each -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder; copied by the tests that damage it."""
    base = tmp_path_factory.mktemp("sound")
    return convert(hf_source(base / "hf"), base / "out", format="q4")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format 'other', expected 'pyllama'"),
        ({"version": 2}, "version 2, this build reads 1"),
        ({"architecture": "bert"}, "architecture is 'bert'"),
        ({"dim": ...}, "dim is None"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": 50.0}, r"dim is 50\.0"),
        ({"dim": True}, "dim is True"),
        ({"n_layers": 10**9}, "n_layers is 1000000000"),
        ({"n_layers": 2}, r"tensor layers\.1\.attn_norm \[50\] is missing"),
        ({"n_kv_heads": 2}, "n_kv_heads is 2, expected a divisor of n_heads, which is 3"),
        ({"head_dim": 13}, "head_dim is 13, expected an even number"),
        ({"head_dim": 16}, r"layers\.0\.wq: shape \[42, 50\], expected \[48, 50\]; check n_heads, head_dim"),
        ({"hidden_dim": 78}, r"layers\.0\.w_gate: shape \[77, 50\], expected \[78, 50\]; check hidden_dim"),
        ({"vocab_size": 46}, r"tok_embeddings: shape \[45, 50\], expected \[46, 50\]; check vocab_size"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ({"rope_theta": -1.0}, "rope_theta is -1"),
        ({"rope_theta": 0.99}, r"rope_theta is 0\.99, expected at least 1"),
        ({"max_seq_len": 2**26 + 1}, "max_seq_len is 67108865, expected an integer of 1 to 67108864"),
        ({"n_heads": 2**14, "n_kv_heads": 1, "head_dim": 2**13}, "n_heads is 16384, expected .* at most 67108864"),
        ({"source": [1]}, r"source is \[1\], expected null or an object whose name and kind are text"),
        ({"source": "x"}, "source is 'x', expected null or an object"),
        ({"source": {"name": 7}}, "source is {'name': 7}, expected null or an object"),
        ({"source": {"name": "a", "kind": None}}, "source is .*, expected null or an object"),
        ({"quantization": [1]}, r"quantization is \[1\], expected null or an object"),
        ({"quantization": "x"}, "quantization is 'x', expected null or an object"),
        ({"quantization": 0}, "quantization is 0, expected null or an object"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected null or an object"),
        ({"tied_embeddings": 1}, "tied_embeddings is 1"),
        ({"tied_embeddings": True}, "tensor 'output' has no place .* tied"),
        ({"bos_token_id": 45}, "token id 45, expected an integer below vocab_size 45"),
        ({"eos_token_ids": 2}, "eos_token_ids is 2"),
        ({"eos_token_ids": [-1]}, "token id -1"),
    ],
)
def test_config_that_does_not_fit(changes: dict[str, Any], message: str, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(ModelFormatError, match=message):
        read_model_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": None, "quantization": None},
        {"source": ..., "quantization": ...},
        {"source": {}, "quantization": {}},
        {"max_seq_len": 2**26, "rope_theta": 1},
    ],
    ids=str,
)
def test_config_that_just_fits(changes: dict[str, Any], sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    edit_config(folder, **changes)
    assert set(read_model_folder(folder).tensors) == set(read_model_folder(sound).tensors)


def rewrite(folder: Path, change: Any) -> None:
    """Writes model.safetensors again with a changed header; `change` gets the parsed header."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    text = (change(header) or json.dumps(header)).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def set_metadata(key: str, value: str | None) -> Any:
    def change(header: dict[str, Any]) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    return change


def rename_tensor(header: dict[str, Any]) -> None:
    header["layers.0.other"] = header.pop("layers.0.wv")
    header["__metadata__"]["tensor.layers.0.other"] = header["__metadata__"].pop("tensor.layers.0.wv")


def as_i8(header: dict[str, Any]) -> None:
    header["layers.0.wq"]["dtype"] = "I8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_metadata("format", "pt"), "format 'pt', version '1', expected 'pyllama', '1'"),
        (set_metadata("version", "9"), "version '9'"),
        (set_metadata("version", None), "version None"),
        (set_metadata("tensor.layers.0.wq", None), r"'layers\.0\.wq' has no metadata"),
        (set_metadata("tensor.layers.0.wz", "{}"), r"'layers\.0\.wz' has metadata but no data"),
        (set_metadata("tensor.layers.0.wq", "{}"), r"model\.safetensors: layers\.0\.wq: unknown format None"),
        (
            set_metadata("tensor.layers.0.wq", '{"format": "q4", "shape": [420, 50], "group": 32}'),
            r"layers\.0\.wq: payload U8 \[1728\], expected U8 \[\d+\] for q4 \[420, 50\]",
        ),
        (
            set_metadata("tensor.layers.0.wq", '{"format": "q4", "shape": [42, 50], "group": 32, "sha256": 1}'),
            "sha256 1, expected",
        ),
        (as_i8, r"layers\.0\.wq: payload I8"),
        (rename_tensor, r"layers\.0\.wv \[14, 50\] is missing"),
    ],
)
def test_weights_file_that_does_not_fit(change: Any, message: str, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    rewrite(folder, change)
    with pytest.raises(ModelFormatError, match=message):
        read_model_folder(folder)


def test_weights_that_are_not_aligned(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    path.write_bytes(struct.pack("<Q", length + 32) + raw[8 : 8 + length] + b" " * 32 + raw[8 + length :])
    with pytest.raises(ModelFormatError, match="expected a multiple of 64"):
        read_model_folder(folder)


def test_missing_truncated_and_doubled_files(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    for kept in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        weights.write_bytes(raw[:kept])
        with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
            read_model_folder(folder)
    weights.write_bytes(raw)
    shutil.copy(weights, folder / "model-2.safetensors")
    with pytest.raises(ModelFormatError, match="one of them is left over"):
        read_model_folder(folder)
    (folder / "model-2.safetensors").unlink()
    weights.unlink()
    with pytest.raises(ModelFormatError, match=r"no model\*\.safetensors"):
        read_model_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        read_model_folder(folder)


def test_several_files_are_read_as_one_set(sound: Path, tmp_path: Path) -> None:
    from pyllama.common.model_folder import header_bytes

    whole = read_model_folder(sound)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(sound / "config.json", folder)
    tensors = list(whole.tensors.values())
    for part, chosen in enumerate((tensors[::2], tensors[1::2])):
        head = header_bytes([t.spec for t in chosen], {t.spec.name: t.sha256 for t in chosen})  # type: ignore[misc]
        (folder / f"model-{part}.safetensors").write_bytes(head + b"".join(t.payload().tobytes() for t in chosen))
    assert verify(folder).n_tensors == len(tensors)
    parts = read_model_folder(folder)
    assert list(parts.tensors) == list(whole.tensors)
    for name in whole.tensors:
        np.testing.assert_array_equal(parts.tensors[name].payload(), whole.tensors[name].payload())
