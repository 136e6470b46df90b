"""Sound PyTorch files: windows into storages of every kind, Hugging Face folders, Meta's folders and their shards.

Defects of the container: test_hostile_torch.py; logits against the oracle and files of torch itself: tests/oracles.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantize import convert, verify
from quantize.readers import open_source
from quantize.readers.source import StoredTensor
from quantize.readers.torch_file import StridedTensor, read_torch
from tests import make_sources as make
from tests.helpers_hostile import refused
from tests.make_sources import Shape
from tests.make_torch import (
    ORDERED_DICT,
    Call,
    Global,
    TorchFile,
    meta_params,
    meta_shards,
    pickled,
    storage,
    tensor,
    torch_file,
    write_meta_folder,
)

SHAPE = Shape(vocab_size=46)
WEIGHTS = make.random_weights(SHAPE)


def written(path: Path, items: dict[str, Any], storages: dict[str, bytes]) -> Path:
    path.write_bytes(TorchFile(pickled(Call(ORDERED_DICT, (), items)), storages).bytes())
    return path


def all_rows(rows: Any) -> NDArray[np.float32]:
    return rows.read(np.arange(rows.shape[0]))


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize(
    ("dtype", "kind"), [("F64", "Double"), ("F32", "Float"), ("F16", "Half"), ("BF16", "BFloat16")]
)
def test_windows_into_one_storage(tmp_path: Path, dtype: str, kind: str) -> None:
    values = (np.arange(60, dtype=np.float32) - 30).reshape(10, 6) / 8
    place = storage("0", 60, kind + "Storage")
    items = {
        "whole": tensor(place, (10, 6)),
        "turned": tensor(place, (6, 10), (1, 6)),
        "rows": tensor(place, (3, 6), offset=12),
        "columns": tensor(place, (10, 2), (6, 1), offset=3),
        "column": tensor(place, (10,), (6,), offset=5),
        "vector": tensor(place, (60,)),
        "one": tensor(place, (1, 1), (17, 99), offset=59),
        "parameter": Call(
            Global("torch._utils _rebuild_parameter"), (tensor(place, (10, 6)), True, Call(ORDERED_DICT, ()))
        ),
    }
    found = read_torch(written(tmp_path / "windows.pth", items, {"0": make.encode_dense(values, dtype)}))
    expected = {
        "whole": values,
        "turned": values.T,
        "rows": values[2:5],
        "columns": values[:, 3:5],
        "column": values[:, 5],
        "vector": values.reshape(-1),
        "one": values[9:, 5:],
        "parameter": values,
    }
    for name, wanted in expected.items():
        rows = found[name]
        assert isinstance(rows, StridedTensor if name in ("turned", "columns", "column") else StoredTensor), name
        assert rows.type_name == dtype and rows.shape == wanted.shape
        assert rows.n_bytes == wanted.size * {"F64": 8, "F32": 4}.get(dtype, 2)
        assert np.array_equal(all_rows(rows), wanted), name
        some = np.array([wanted.shape[0] - 1, 0])
        assert np.array_equal(rows.read(some), wanted[some])
        if rows.grid is not None:
            packed = rows.read_packed(some)
            stored = np.frombuffer(make.encode_dense(np.ascontiguousarray(wanted[some]), dtype), packed.codes.dtype)
            assert np.array_equal(packed.codes.reshape(-1), stored)


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), min_size=1, max_size=2),
    st.integers(1, 40),
)
def test_a_window_is_what_numpy_says_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, offset: int, sides: list[tuple[int, int]], count: int
) -> None:
    values = np.arange(count, dtype=np.float32)
    shape, strides = tuple(side for side, _ in sides), tuple(stride for _, stride in sides)
    path = tmp_path_factory.mktemp("window") / "w.pth"
    written(path, {"t": tensor(storage("0", count), shape, strides, offset)}, {"0": values.tobytes()})
    last = offset + sum((side - 1) * stride for side, stride in sides)
    if last >= count or np.prod(shape) > count:
        refused(read_torch, path, r"storage")
        return
    bytes_strides = tuple(stride * 4 for stride in strides)
    wanted: NDArray[np.float32] = np.ndarray(shape, np.float32, values.data, offset * 4, bytes_strides)
    assert np.array_equal(all_rows(read_torch(path)["t"]), wanted)


def test_integers_are_listed_and_refused_as_a_models_tensors(tmp_path: Path) -> None:
    items = {
        "ids": tensor(storage("0", 4, "LongStorage"), (4,)),
        "t": tensor(storage("0", 4, "LongStorage"), (2, 2), (1, 2)),
    }
    found = read_torch(written(tmp_path / "ids.pth", items, {"0": bytes(32)}))
    assert all("type I64, which is not supported" in found[name].trouble for name in items)


# ----------------------------------------------------------------------------------------------- Hugging Face folders


def hf_folder(folder: Path, *, shards: int = 1, tied: bool = False, **changes: Any) -> Path:
    """A folder with pytorch_model.bin, or its shards and their index."""
    make.write_hf_folder(folder, SHAPE, WEIGHTS)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(make.hf_config(SHAPE, tie_word_embeddings=tied, **changes)))
    names = list(WEIGHTS)
    for i in range(shards):
        part = {make.hf_name(name): WEIGHTS[name] for name in names[i::shards]}
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        (folder / name).write_bytes(torch_file(part, "BF16").bytes())
    if shards > 1:
        index = {
            make.hf_name(name): f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
            for i in range(shards)
            for name in names[i::shards]
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def assert_model(source: Any, weights: dict[str, NDArray[np.float32]], shape: Shape) -> None:
    assert source.tensors.keys() == weights.keys()
    for name, values in weights.items():
        assert np.array_equal(source.tensors[name].read(), values), name
    wanted = shape.config()
    assert {key: source.config[key] for key in wanted if "token_id" not in key} == {
        key: value for key, value in wanted.items() if "token_id" not in key
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_folders(tmp_path: Path, shards: int) -> None:
    folder = hf_folder(tmp_path / "hf", shards=shards)
    (folder / "training_args.bin").write_bytes(b"PK\3\4 and whatever else")
    source = open_source(folder)
    assert source.kind == source.identity["kind"] == "torch"
    assert_model(source, WEIGHTS, SHAPE)
    if shards == 1:
        assert_model(open_source(folder / "pytorch_model.bin"), WEIGHTS, SHAPE)


def test_safetensors_go_first(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"broken")
    other = make.write_hf_folder(tmp_path / "other", SHAPE, WEIGHTS)
    shutil.copy(other / "model.safetensors", folder)
    assert open_source(folder).kind == "safetensors"


def test_a_head_that_shares_the_embeddings_storage(tmp_path: Path) -> None:
    tied = Shape(vocab_size=46, tied=True)
    folder = hf_folder(tmp_path / "hf", tied=True)
    wanted = {name: values for name, values in WEIGHTS.items() if name != "output"}
    storages = {str(i): make.encode_dense(values, "BF16") for i, values in enumerate(wanted.values())}
    items = {
        make.hf_name(name): tensor(storage(str(i), values.size, "BFloat16Storage"), values.shape)
        for i, (name, values) in enumerate(wanted.items())
    }
    items["lm_head.weight"] = items["model.embed_tokens.weight"]
    (folder / "pytorch_model.bin").write_bytes(TorchFile(pickled(items), storages).bytes())
    assert_model(open_source(folder), wanted, tied)


def test_shards_that_are_wrong(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", shards=3)
    first, second = folder / "pytorch_model-00001-of-00003.bin", folder / "pytorch_model-00002-of-00003.bin"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    refused(lambda _: open_source(folder), first, r"holds tensor '.*', but pytorch_model.bin.index.json says 'pytorch")
    first.unlink()
    refused(lambda _: open_source(folder), first, r"is missing; pytorch_model.bin.index.json lists it for \d+ tensors")
    first.write_bytes(kept)
    (folder / "pytorch_model.bin.index.json").unlink()
    refused(open_source, folder, r"expected pytorch_model.bin, pytorch_model.bin.index.json or a single")


# ------------------------------------------------------------------------------------------------------ Meta's folders


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("n", "axis"), [(1, 1), (2, 1), (2, 0)])
def test_meta_folders(tmp_path: Path, dtype: str, n: int, axis: int) -> None:
    """Rotary rows come back in our order; parts are joined along the axis that each matrix was cut along."""
    shards = meta_shards(SHAPE, WEIGHTS, n, axis)
    for shard in shards:
        shard["rope.freqs"] = np.ones(8, np.float32)
    folder = write_meta_folder(tmp_path / "meta", meta_params(SHAPE), shards, dtype)
    source = open_source(folder)
    assert source.kind == "meta"
    assert_model(source, WEIGHTS, SHAPE)
    assert open_source(folder / "consolidated.00.pth").identity == source.identity
    out = convert(folder, tmp_path / "out", format={"F32": "f32", "F16": "f16", "BF16": "bf16"}[dtype])
    verify(out)


def with_params(tmp_path: Path, shape: Shape = SHAPE, **changes: Any) -> dict[str, Any]:
    folder = write_meta_folder(
        tmp_path / "meta", meta_params(shape, **changes), meta_shards(shape, make.random_weights(shape))
    )
    config = open_source(folder).config
    shutil.rmtree(folder)
    return config


def test_what_params_json_leaves_out(tmp_path: Path) -> None:
    def context(**changes: Any) -> int:
        return with_params(tmp_path, **{"max_seq_len": ..., **changes})["max_seq_len"]

    assert context(norm_eps=1e-6) == 2048  # LLaMA 1
    assert context(norm_eps=1e-5) == 4096  # LLaMA 2
    assert context(rope_theta=500000.0) == 8192  # Llama 3
    assert context(rope_theta=1000000.0) == 16384  # Code Llama
    assert context(rope_theta=500000.0, use_scaled_rope=True) == 131072  # Llama 3.1 and later
    config = with_params(tmp_path, vocab_size=SHAPE.vocab_size, norm_eps=...)
    assert (config["norm_eps"], config["rope_theta"], config["rope_scaling"]) == (1e-5, 10000.0, None)
    window = with_params(tmp_path, max_seq_len=..., sliding_window=24)  # Mistral 7B v0.1
    assert (window["sliding_window"], window["max_seq_len"]) == (24, 32768)
    assert "sliding_window" not in with_params(tmp_path, sliding_window=None)
    scaling = with_params(tmp_path, use_scaled_rope=True)["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert with_params(tmp_path, use_scaled_rope=True, rope_scaling_factor=16)["rope_scaling"]["factor"] == 16.0
    assert with_params(tmp_path, Shape(n_kv_heads=4), n_kv_heads=...)["n_kv_heads"] == 4


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
@pytest.mark.parametrize(
    ("frequencies", "context"), [("layers.0.attention.inner_attention.rope.freqs", 2048), ("rope.freqs", 4096)]
)
def test_llama_1_and_2_differ_in_where_they_keep_the_frequencies(
    tmp_path: Path, frequencies: str, context: int, epsilon: float
) -> None:
    """Llama-2-7b-chat has LLaMA 1's params.json."""
    (shard,) = meta_shards(SHAPE, WEIGHTS)
    shard[frequencies] = np.ones(8, np.float32)
    params = meta_params(SHAPE, max_seq_len=..., norm_eps=epsilon)
    assert open_source(write_meta_folder(tmp_path, params, [shard])).config["max_seq_len"] == context


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize(
    "name", ["tok_embeddings.weight", "output.weight", "norm.weight"]
    + [f"layers.0.attention.{part}.weight" for part in ("wq", "wo")]
    + [f"layers.0.{part}.weight" for part in ("feed_forward.w2", "attention_norm")],
)  # fmt: skip
def test_tensors_of_other_dimensions(tmp_path: Path, name: str, shape: tuple[int, ...], shards: int) -> None:
    parts = meta_shards(SHAPE, WEIGHTS, shards)
    for part in parts:
        part[name] = np.ones(shape, np.float32)
    folder = write_meta_folder(tmp_path / "meta", meta_params(SHAPE), parts)
    sides = "3|6" if shape == (3,) else ", ".join(map(str, shape))  # vectors may have been joined
    refused(open_source, folder, rf"tensor .*{name}.* shape \[({sides})\]")


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "hidden"),
    [
        (4096, 256, None, 11008),  # 7B
        (5120, 256, None, 13824),  # 13B
        (8192, 4096, 1.3, 28672),  # 70B
        (4096, 1024, 1.3, 14336),  # 8B
        (2048, 256, 1.5, 8192),  # 1B
        (3072, 256, 1.0, 8192),  # 3B
        (16384, 4096, 1.2, 53248),  # 405B
    ],
)
def test_width_of_the_feed_forward(dim: int, multiple_of: int, multiplier: float | None, hidden: int) -> None:
    from quantize.fields import Fields
    from quantize.readers.meta import _hidden_dim

    params = {"dim": dim, "multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    assert _hidden_dim(Fields(params, "params.json")) == hidden


@pytest.mark.parametrize("has_head", [True, False])
def test_llama_3_2_is_tied(tmp_path: Path, has_head: bool) -> None:
    """Meta's files hold the head, which is the embedding, once more."""
    shape = Shape(tied=True)
    weights = make.random_weights(shape)
    shards = meta_shards(shape, weights)
    if has_head:
        shards[0]["output.weight"] = weights["tok_embeddings"]
    folder = write_meta_folder(tmp_path / "meta", meta_params(shape, use_scaled_rope=True), shards)
    config = open_source(folder).config
    assert config["tied_embeddings"] and config["rope_scaling"]["factor"] == 32.0
    if not has_head:
        (folder / "params.json").write_text(json.dumps(meta_params(shape)))
        refused(open_source, folder, r"tensor output.weight \(output\) is missing")


def test_shards_of_meta_that_are_wrong(tmp_path: Path) -> None:
    shards = meta_shards(SHAPE, WEIGHTS, 2)

    def made(name: str, shards: Any, **changes: Any) -> Path:
        return write_meta_folder(tmp_path / name, meta_params(SHAPE, **changes), shards)

    folder = made("missing", shards)
    (folder / "consolidated.01.pth").unlink()
    told = (
        r"consolidated.01.pth: is missing: tensor layers.0.attention.wq.weight has 32 of 64 rows .* there are 2 files"
    )
    refused(open_source, folder, told)
    folder = made("first-missing", shards)
    (folder / "consolidated.00.pth").unlink()
    refused(open_source, folder, r"consolidated.00.pth: is missing, though consolidated.01.pth is there")
    folder = made("one-too-many", [*shards, shards[1]])
    refused(open_source, folder, r"consolidated.02.pth: does not belong to this model")
    folder = made("duplicated", [shards[0], shards[0]])
    refused(open_source, folder, r"consolidated.01.pth: holds what consolidated.00.pth holds \(layers.0.attention.wq")
    folder = made("swapped", shards)
    kept = (folder / "consolidated.00.pth").read_bytes()
    (folder / "consolidated.00.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
    (folder / "consolidated.01.pth").write_bytes(kept)
    refused(open_source, folder, r"consolidated.00.pth: was saved as consolidated.01.pth; files are swapped")
    lacking = [shards[0], {name: v for name, v in shards[1].items() if name != "layers.1.attention.wo.weight"}]
    refused(open_source, made("lacking", lacking), r"01.pth: tensor 'layers.1.attention.wo.weight' is missing, other")
    surplus = [shards[0], shards[1] | {"layers.0.extra": np.ones(4, np.float32)}]
    refused(open_source, made("surplus", surplus), r"00.pth: tensor 'layers.0.extra' is missing, other shards")
    other = [shards[0], shards[1] | {"norm.weight": shards[1]["norm.weight"] * 2}]
    refused(open_source, made("other", other), r"01.pth: tensor 'norm.weight' differs .* different models")
    odd = [shards[0], shards[1] | {"layers.0.attention.wk.weight": np.ones((16, 32), np.float32)}]
    refused(open_source, made("odd", odd), r"01.pth: tensor 'layers.0.attention.wk.weight' has shape \[16, 32\], which")
    refused(
        open_source,
        made("scales", meta_shards(SHAPE, WEIGHTS), quantization_args={"scheme": "x"}),
        r"quantization_args",
    )
    more = [meta_shards(SHAPE, WEIGHTS)[0] | {"vision.weight": np.ones((2, 2), np.float32)}]
    refused(open_source, made("vision", more), r"tensor 'vision.weight' does not belong")
    flat = [meta_shards(SHAPE, WEIGHTS)[0] | {"output.weight": np.ones(4, np.float32)}]
    refused(open_source, made("flat", flat), r"tensor output.weight \(output\): shape \[4\], expected \[")
    folder = made("no-params", meta_shards(SHAPE, WEIGHTS))
    (folder / "params.json").unlink()
    refused(open_source, folder, r"params.json: is missing; Meta's consolidated.NN.pth need it")
    refused(open_source, folder / "consolidated.00.pth", r"expected config.json .* params.json \(Meta\) beside it")
