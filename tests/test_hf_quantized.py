"""GPTQ, AWQ and MLX folders, packed by make_packed.py: the same values to the last bit, and every defect by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import dequantize, unpack
from pyllama.common.model_folder import read_model_folder
from quantize import convert
from quantize.readers import open_source
from quantize.readers.source import Slice

from . import make_packed as pack
from . import make_sources as make
from .helpers_models import Kind, SmallModel, all_logits, native_weight, random_tokens
from .helpers_models import Shape as EngineShape

Array = NDArray[Any]
SHAPE = make.Shape(dim=96, hidden_dim=160, n_layers=1, n_heads=6)
FUZZED = make.Shape(dim=32, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=8)
PLAIN = [("embeddings|output", "f32")]
ENGINE_SIZES = (
    "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_seq_len", "norm_eps"
)  # fmt: skip
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
MLX: dict[str, Any] = {"group_size": 32, "bits": 4}

Packer = Callable[[str, pack.Matrix], pack.Tensors]


def folder_of(
    path: Path,
    packer: Packer,
    config: dict[str, Any],
    shape: make.Shape = SHAPE,
    embeddings: bool = False,
    **random: Any,
) -> dict[str, Array]:
    """A folder whose projections are packed (with `embeddings`, all matrices); returns the values in float64."""
    weights = make.random_weights(shape)
    plain, extra, values = {}, {}, {}
    for i, (name, value) in enumerate(weights.items()):
        if value.ndim == 1 or (not embeddings and not name.startswith("layers.")):
            plain[name], values[name] = value, value.astype(np.float64)
            continue
        matrix = pack.random_matrix(value.shape, i, **random)
        extra |= packer(make.hf_name(name).removesuffix(".weight"), matrix)
        values[name] = matrix.values()
    make.write_hf_folder(path, shape, plain, dtype="F16", extra=extra, **config)
    return values


CASES: dict[str, tuple[Packer, dict[str, Any], dict[str, Any], tuple[str, int, str, str, bool]]] = {
    "gptq": (pack.gptq, {}, {"zeros": (1, 15)}, ("q4a", 32, "f16", "u8", False)),
    "gptq-sym": (pack.gptq, {"sym": True}, {"zeros": (8, 8)}, ("q4a", 32, "f16", "u8", False)),
    "gptq-zero-0": (pack.gptq, {}, {"zeros": (0, 15)}, ("q4a", 32, "f16", "u8", False)),
    "gptq-v2": (
        lambda m, x: pack.gptq(m, x, v2=True),
        {"checkpoint_format": "gptq_v2"},
        {"zeros": (0, 15)},
        ("q4a", 32, "f16", "u8", False),
    ),
    "gptq-act-order": (
        pack.gptq,
        {"desc_act": True},
        {"zeros": (1, 15), "act_order": True},
        ("q4a", 32, "f16", "u8", True),
    ),
    "gptq-act-order-short-group": (
        pack.gptq,
        {"desc_act": True, "group_size": 64},
        {"zeros": (1, 15), "group": 64, "act_order": True},
        ("q4a", 64, "f16", "u8", True),
    ),
    "gptq-rows": (
        pack.gptq,
        {"group_size": -1, "desc_act": True},
        {"zeros": (1, 15), "group": -1},
        ("q4a", 128, "f16", "u8", False),
    ),
    "gptq-bf16": (
        lambda m, x: pack.gptq(m, x, number="BF16", g_idx=False),
        {"group_size": 64},
        {"zeros": (1, 15), "group": 64, "number": "BF16"},
        ("q4a", 64, "bf16", "u8", False),
    ),
    "gptq-8-sym": (
        lambda m, x: pack.gptq(m, x, bits=8),
        {"bits": 8, "sym": True},
        {"zeros": (128, 128), "bits": 8},
        ("q8", 32, "f16", "", False),
    ),
    "awq": (pack.awq, AWQ, {"zeros": (0, 15)}, ("q4a", 32, "f16", "u8", False)),
    "awq-gemv": (
        lambda m, x: pack.awq_gemv(m, x, 4),
        AWQ | {"version": "GEMV"},
        {"zeros": (0, 15)},
        ("q4a", 32, "f16", "u8", False),
    ),
    "mlx": (pack.mlx, MLX, {}, ("q4a", 32, "f16", "f16", False)),
    "mlx-bf16": (
        lambda m, x: pack.mlx(m, x, number="BF16"),
        MLX,
        {"number": "BF16"},
        ("q4a", 32, "bf16", "bf16", False),
    ),
    "mlx-3-bits": (
        lambda m, x: pack.mlx(m, x, bits=3),
        MLX | {"bits": 3},
        {"bits": 3},
        ("q4a", 32, "f16", "f16", False),
    ),
}


def keys_of(case: str, changes: dict[str, Any]) -> dict[str, Any]:
    if case.startswith("mlx"):
        return {"quantization": changes, "quantization_config": changes}
    return {"quantization_config": changes if case.startswith("awq") else GPTQ | changes}


@pytest.mark.parametrize("case", CASES)
def test_values_and_grid(case: str, tmp_path: Path) -> None:
    packer, config, random, grid = CASES[case]
    values = folder_of(tmp_path, packer, keys_of(case, config), **random)
    source = open_source(tmp_path)
    for name, tensor in source.tensors.items():
        expected = values[name].astype(np.float32)
        np.testing.assert_array_equal(tensor.read(), expected)
        if tensor.grid is None or not tensor.grid.info.quantized:
            continue
        spec = tensor.grid
        assert (spec.format, spec.group, spec.scale, spec.offset, spec.input_order) == grid
        np.testing.assert_array_equal(dequantize(spec, tensor.read_packed()), expected)
        np.testing.assert_array_equal(tensor.read(slice(16, 29)), expected[16:29])
    quantized = [name for name, tensor in source.tensors.items() if tensor.grid and tensor.grid.info.quantized]
    assert len(quantized) == 7 * SHAPE.n_layers


@pytest.mark.parametrize("case", ["gptq-act-order", "gptq-8-sym", "awq", "awq-gemv", "mlx"])
def test_any_rows(case: str, tmp_path: Path) -> None:
    """Rows that begin and end within a word, and rows in any order, as fused matrices and reordered ones ask for."""
    packer, config, random, _ = CASES[case]
    values = folder_of(tmp_path, packer, keys_of(case, config), **random)
    tensor = open_source(tmp_path).tensors["layers.0.w_gate"]
    whole, expected = tensor._rows, values["layers.0.w_gate"].astype(np.float32)
    assert tensor.grid is not None
    for index in (np.arange(3, 30), np.array([159, 0, 17, 17, 8])):
        np.testing.assert_array_equal(whole.read(index), expected[index])
        np.testing.assert_array_equal(dequantize(tensor.grid, whole.read_packed(index)), expected[index])
    part = Slice("part", whole, 5, 21)
    np.testing.assert_array_equal(part.read(np.arange(21)), expected[5:26])


@pytest.mark.parametrize("case", ["gptq", "gptq-act-order", "gptq-rows", "gptq-8-sym", "awq", "mlx-bf16"])
def test_converted_without_loss(case: str, tmp_path: Path) -> None:
    packer, config, random, grid = CASES[case]
    values = folder_of(tmp_path / "source", packer, keys_of(case, config), **random)
    folder = read_model_folder(convert(tmp_path / "source", tmp_path / "out"))
    for name, tensor in folder.tensors.items():
        if name in ("tok_embeddings", "output"):
            assert tensor.spec.format == "q8"
            continue
        np.testing.assert_array_equal(
            dequantize(tensor.spec, unpack(tensor.spec, tensor.payload())), values[name].astype(np.float32)
        )
        assert tensor.spec.is_vector or tensor.spec.format == grid[0]


@pytest.mark.parametrize(
    ("packer", "config", "random"),
    [
        (lambda m, x: pack.gptq(m, x, bits=8), GPTQ | {"bits": 8}, {"bits": 8, "zeros": (100, 140)}),
        (pack.gptq, GPTQ | {"group_size": 16}, {"group": 16, "zeros": (1, 15)}),
        (lambda m, x: pack.mlx(m, x, bits=8), MLX | {"bits": 8}, {"bits": 8}),
        (lambda m, x: pack.mlx(m, x, bits=6), MLX | {"bits": 6}, {"bits": 6}),
        (lambda m, x: pack.mlx(m, x, number="F32"), MLX, {"number": "F32"}),
    ],
    ids=["gptq-8-asym", "gptq-16", "mlx-8", "mlx-6", "mlx-f32"],
)
def test_on_no_grid(packer: Packer, config: dict[str, Any], random: dict[str, Any], tmp_path: Path) -> None:
    """What no grid of ours holds is read by value, and then quantized like any other matrix."""
    key = "quantization_config" if "quant_method" in config else "quantization"
    values = folder_of(tmp_path, packer, {key: config}, **random)
    tensor = open_source(tmp_path).tensors["layers.0.w_down"]
    assert tensor.grid is None
    expected = values["layers.0.w_down"]
    if config.get("quant_method"):
        np.testing.assert_array_equal(tensor.read(), expected.astype(np.float32))
    else:  # s · c is rounded to float32 before m is added, where s has 24 bits
        np.testing.assert_allclose(tensor.read(), expected, rtol=0, atol=2**-23 * np.abs(expected).max() * 2)


def test_mlx_modules_of_their_own(tmp_path: Path) -> None:
    """Embeddings are quantized too, and a module may have bits and groups of its own."""
    own = {"model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 8}, "lm_head": {"group_size": 64, "bits": 4}}
    shape = make.Shape(dim=128, hidden_dim=128, n_layers=1)

    def packer(module: str, matrix: pack.Matrix) -> pack.Tensors:
        of = own.get(module, MLX)
        other = pack.random_matrix(matrix.codes.shape, 9, bits=of["bits"], group=of["group_size"])
        vars(matrix).update(vars(other))
        return pack.mlx(module, matrix, bits=of["bits"])

    values = folder_of(tmp_path, packer, {"quantization": MLX | own}, shape, embeddings=True)
    tensors = open_source(tmp_path).tensors
    for name, value in values.items():
        np.testing.assert_array_equal(tensors[name].read(), value.astype(np.float32))
    assert tensors["tok_embeddings"].grid is not None and tensors["tok_embeddings"].grid.format == "q4a"
    assert tensors["output"].grid is not None and tensors["output"].grid.group == 64
    assert tensors["layers.0.w_down"].grid is None


def test_dynamic_gptq(tmp_path: Path) -> None:
    """gptqmodel's rules are regular expressions; which bits and groups a module has is read off its tensors."""

    def packer(module: str, matrix: pack.Matrix) -> pack.Tensors:
        if "down_proj" in module:
            vars(matrix).update(vars(pack.random_matrix(matrix.codes.shape, 1, bits=8, group=64, zeros=(128, 128))))
            return pack.gptq(module, matrix, bits=8)
        return pack.gptq(module, matrix)

    rules = {"dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 64}, "-:lm_head": {}}, "sym": True}
    values = folder_of(tmp_path, packer, {"quantization_config": GPTQ | rules}, zeros=(8, 8))
    tensors = open_source(tmp_path).tensors
    for name, value in values.items():
        np.testing.assert_array_equal(tensors[name].read(), value.astype(np.float32))
    assert tensors["layers.0.w_down"].grid is not None and tensors["layers.0.w_down"].grid.format == "q8"


@pytest.mark.parametrize(
    ("name", "packer", "described"),
    [
        ("quantize_config.json", pack.gptq, {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
        ("quant_config.json", pack.awq, {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_description_beside(name: str, packer: Packer, described: dict[str, Any], tmp_path: Path) -> None:
    """Older exports say it in a file of their own."""
    values = folder_of(tmp_path, packer, {}, zeros=(1, 15))
    with pytest.raises(ModelFormatError, match=r"quantization_config is missing, though tensors are packed"):
        open_source(tmp_path)
    (tmp_path / name).write_text(json.dumps(described))
    tensor = open_source(tmp_path).tensors["layers.0.wq"]
    np.testing.assert_array_equal(tensor.read(), values["layers.0.wq"].astype(np.float32))


Q = "model.layers.0.self_attn.q_proj"
DEFECTS: dict[str, tuple[Packer, dict[str, Any], str]] = {
    "method": (
        pack.gptq,
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        r"'bitsandbytes' cannot be read.*take",
    ),
    "fp8": (pack.gptq, {"quantization_config": {"quant_method": "fp8"}}, r"'fp8' cannot be read.*original in bf16"),
    "compressed": (
        pack.gptq,
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        r"'compressed-tensors' cannot be read.*GPTQ or AWQ",
    ),
    "no method": (pack.gptq, {"quantization_config": {"bits": 4}}, r"quant_method None cannot be read"),
    "no object": (pack.gptq, {"quantization_config": "gptq"}, r"quantization_config: found 'gptq', expected an object"),
    "unknown key": (pack.gptq, {"quantization_config": GPTQ | {"rounding": 2}}, r"'rounding': is not known"),
    "bits": (pack.gptq, {"quantization_config": GPTQ | {"bits": 3}}, r"bits: found 3, expected one of 4, 8"),
    "bits true": (pack.gptq, {"quantization_config": GPTQ | {"bits": True}}, r"bits: found True"),
    "group": (pack.gptq, {"quantization_config": GPTQ | {"group_size": 48}}, r"group_size: found 48"),
    "group lie": (pack.gptq, {"quantization_config": GPTQ | {"group_size": 64}}, r"scales': F16 \[3, 96\], expected"),
    "bits lie": (pack.gptq, {"quantization_config": GPTQ | {"bits": 8}}, r"expected F16 or BF16 or F32 \[2, 96\]"),
    "marlin": (pack.gptq, {"quantization_config": GPTQ | {"checkpoint_format": "marlin"}}, r"'marlin', only gptq and"),
    "two formats": (
        pack.gptq,
        {"quantization_config": GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}},
        r"gptq and gptq_v2, which disagree",
    ),
    "pack dtype": (pack.gptq, {"quantization_config": GPTQ | {"pack_dtype": "int16"}}, r"pack_dtype: found 'int16'"),
    "rotation": (pack.gptq, {"quantization_config": GPTQ | {"rotation": "hadamard"}}, r"rotation: found 'hadamard'"),
    "no g_idx": (
        lambda m, x: pack.gptq(m, x, g_idx=False),
        {"quantization_config": GPTQ | {"desc_act": True}},
        r"desc_act: is true, but module .* has no g_idx",
    ),
    "awq version": (
        pack.awq,
        {"quantization_config": AWQ | {"version": "gemv_fast"}},
        r"'gemv_fast', only gemm and gemv",
    ),
    "awq zero point": (pack.awq, {"quantization_config": AWQ | {"zero_point": 8}}, r"zero_point: found 8"),
    "awq llm": (pack.awq, {"quantization_config": AWQ | {"backend": "llm-awq"}}, r"llm-awq packs in a form of its own"),
    "awq as gptq": (pack.awq, {"quantization_config": GPTQ}, r"q_proj.*expected"),
    "mlx mode": (pack.mlx, {"quantization": MLX | {"mode": "mxfp4"}}, r"mode: found 'mxfp4', expected 'affine'"),
    "mlx key": (pack.mlx, {"quantization": MLX | {"scheme": 1}}, r"'scheme': is not known"),
    "mlx disagree": (
        pack.mlx,
        {"quantization": MLX, "quantization_config": {"quant_method": "gptq"}},
        r"quantization and quantization_config disagree",
    ),
    "mlx not": (pack.mlx, {"quantization": MLX | {Q: False}}, r"q_proj': is false, but the module is quantized"),
    "mlx own key": (pack.mlx, {"quantization": MLX | {Q: {"bitts": 3}}}, r"'bitts': is not known"),
    "mlx group lie": (pack.mlx, {"quantization": MLX | {"group_size": 16}}, r"scales': F16 \[96, 3\], expected"),
    "none packed": (lambda m, x: {}, {"quantization_config": GPTQ}, r"no tensor is named \*\.qweight"),
    "missing part": (
        lambda m, x: {name: t for name, t in pack.gptq(m, x).items() if not name.endswith("qzeros")},
        {"quantization_config": GPTQ},
        r"has no qzeros",
    ),
    "twice": (
        lambda m, x: pack.gptq(m, x) | {f"{m}.weight": ("F16", (1,), bytes(2))},
        {"quantization_config": GPTQ},
        r"has both qweight and weight",
    ),
    "g_idx range": (
        lambda m, x: pack.gptq(m, x) | {f"{m}.g_idx": ("I32", (len(x.group_of),), b"\xff" * 4 * len(x.group_of))},
        {"quantization_config": GPTQ},
        r"g_idx' names group -1, expected 0 to 2",
    ),
    "word type": (
        lambda m, x: {
            name: ("F32" if name.endswith("qweight") else kind, *rest)
            for name, (kind, *rest) in pack.gptq(m, x).items()
        },
        {"quantization_config": GPTQ},
        r"qweight': F32 .*expected I32",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects(defect: str, tmp_path: Path) -> None:
    packer, config, message = DEFECTS[defect]
    zeros = None if config.get("quantization") else (1, 15)
    folder_of(tmp_path, packer, config, zeros=zeros)
    with pytest.raises(ModelFormatError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("packer", "config", "random"),
    [
        (pack.gptq, GPTQ | {"desc_act": True}, {"zeros": (1, 15), "act_order": True}),
        (pack.awq, AWQ, {"zeros": (0, 15)}),
        (pack.mlx, MLX, {}),
    ],
    ids=["gptq-act-order", "awq", "mlx"],
)
def test_fused_modules(packer: Packer, config: dict[str, Any], random: dict[str, Any], tmp_path: Path) -> None:
    """Phi-3's qkv and gate-up matrices, packed as one: each part takes its rows of the codes, all have one order."""
    shape = make.Shape(n_layers=1, n_heads=4, n_kv_heads=1, head_dim=12, dim=96, hidden_dim=52)
    fused = {"self_attn.qkv_proj": ("wq", "wk", "wv"), "mlp.gate_up_proj": ("w_gate", "w_up")}
    weights = make.random_weights(shape)
    extra, values = {}, {}
    for module, parts in fused.items():
        rows = [len(weights.pop(f"layers.0.{part}")) for part in parts]
        matrix = pack.random_matrix((sum(rows), shape.dim), len(module), **random)
        extra |= packer(f"model.layers.0.{module}", matrix)
        cut = np.split(matrix.values(), np.cumsum(rows)[:-1])
        values |= {f"layers.0.{part}": one for part, one in zip(parts, cut, strict=True)}
    named = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": ..., "mlp_bias": ...}
    key = "quantization_config" if "quant_method" in config else "quantization"
    make.write_hf_folder(tmp_path / "source", shape, weights, extra=extra, **named, **{key: config})
    folder = read_model_folder(convert(tmp_path / "source", tmp_path / "out"))
    for name, value in values.items():
        tensor = folder.tensors[name]
        assert tensor.spec.format == "q4a" and tensor.spec.input_order == ("desc_act" in config)
        found = dequantize(tensor.spec, unpack(tensor.spec, tensor.payload()))
        np.testing.assert_array_equal(found, value.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("config", [GPTQ, AWQ, MLX], ids=["gptq", "awq", "mlx"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_description(config: dict[str, Any], data: st.DataObject, tmp_path: Path) -> None:
    """Whatever a description says: the very values, or our error."""
    packer: Packer = {"gptq": pack.gptq, "awq": pack.awq}.get(config.get("quant_method", ""), pack.mlx)
    keys = [*config, "dynamic", "format", "backend", "mode", "model.layers.0.mlp.up_proj", "lm_head"]
    key = "quantization_config" if "quant_method" in config else "quantization"
    values = st.one_of(
        st.none(), st.booleans(), st.integers(-1, 130), st.floats(), st.sampled_from(["gptq", "gptq_v2", "gemv"]),
        st.dictionaries(st.sampled_from(["bits", "group_size", "mode"]), st.integers(2, 64)), st.lists(st.integers()),
    )  # fmt: skip
    changes = data.draw(st.dictionaries(st.sampled_from(keys), values, max_size=2))
    whole = make.hf_config(FUZZED, **{key: config | changes})
    folder = tmp_path / "model"
    if not folder.exists():
        folder_of(folder, packer, {}, FUZZED, zeros=None if packer is pack.mlx else (1, 15))
    (folder / "config.json").write_text(json.dumps(whole))
    try:
        tensors = open_source(folder).tensors
    except ModelFormatError:
        return
    assert np.isfinite(tensors["layers.0.w_up"].read()).all()


def test_logits_after_act_order(tmp_path: Path) -> None:
    """The engine on the converted folder, against the float64 oracle on the values that were packed."""
    shape = make.Shape(n_layers=1, dim=96, hidden_dim=160, n_heads=6)
    config = {"quantization_config": GPTQ | {"desc_act": True}}
    values = folder_of(tmp_path / "source", pack.gptq, config, shape, zeros=(6, 10), act_order=True)
    folder = read_model_folder(convert(tmp_path / "source", tmp_path / "out", format=None, tensor_types=PLAIN))
    small = SmallModel(EngineShape(**{key: vars(shape)[key] for key in ENGINE_SIZES}), Kind("q4a"), {})
    small.config = small.shape.config()
    for name, tensor in folder.tensors.items():
        packed = unpack(tensor.spec, tensor.payload())
        small.weights[name], small.values[name] = native_weight(tensor.spec, packed), values[name]
        if packed.input_order is not None:
            small.orders[name] = packed.input_order
    assert len(small.orders) == 7
    errors = []
    for seed in range(8):
        tokens = random_tokens(small, 3, seed)
        expected = small.oracle().logits(tokens)
        errors.append(np.abs(all_logits(small.model(), tokens) - expected).max() / np.abs(expected).max())
    assert np.median(errors) < 1e-5  # bounds as in test_engine.py
    assert max(errors) < 0.05


def test_zero_points_that_are_not_symmetric(tmp_path: Path) -> None:
    """A lie that only the zero points themselves show: said when they are read."""
    config = GPTQ | {"bits": 8, "sym": True}
    folder_of(tmp_path, lambda m, x: pack.gptq(m, x, bits=8), {"quantization_config": config}, bits=8, zeros=(127, 128))
    with pytest.raises(ModelFormatError, match=r"holds other zero points than 128"):
        open_source(tmp_path).tensors["layers.0.wq"].read_packed()


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_auto_gptq_overwrote(bits: int, tmp_path: Path) -> None:
    """Beside a zero point of 0 it left ones only. Where there is none, its files are read as ever."""
    config = GPTQ | {"bits": bits}

    def packer(module: str, matrix: pack.Matrix) -> pack.Tensors:
        return pack.gptq(module, matrix, bits=bits, overwrites=True)

    folder_of(tmp_path / "bad", packer, {"quantization_config": config}, bits=bits, zeros=(0, 14))
    tensor = open_source(tmp_path / "bad").tensors["layers.0.wq"]
    for read in (tensor.read, lambda: tensor.read(slice(3, 4))) + ((tensor.read_packed,) if bits == 4 else ()):
        with pytest.raises(ModelFormatError, match=r"q_proj\.qzeros' holds \d+ zero points that were lost"):
            read()
    values = folder_of(tmp_path / "good", packer, {"quantization_config": config}, bits=bits, zeros=(1, 15))
    found = open_source(tmp_path / "good").tensors["layers.0.wq"].read()
    assert (found == values["layers.0.wq"].astype(np.float32)).all()


def test_zero_points_of_gptqmodel_are_never_doubted(tmp_path: Path) -> None:
    """A 0 with nothing but 1 above it looks like an overwritten word; its own name in the description decides."""

    def packer(module: str, matrix: pack.Matrix) -> pack.Tensors:
        matrix.offsets[:] = 1
        matrix.offsets[5::8] = 0
        return pack.gptq(module, matrix)

    meta = {"meta": {"quantizer": ["gptqmodel:2.2.0"]}}
    values = folder_of(tmp_path / "known", packer, {"quantization_config": GPTQ | meta}, zeros=(1, 15))
    found = open_source(tmp_path / "known").tensors["layers.0.wq"].read()
    assert (found == values["layers.0.wq"].astype(np.float32)).all()
    folder_of(tmp_path / "unknown", packer, {"quantization_config": GPTQ}, zeros=(1, 15))
    with pytest.raises(ModelFormatError, match="zero points that were lost"):
        open_source(tmp_path / "unknown").tensors["layers.0.wq"].read()


def test_zero_points_of_another_form(tmp_path: Path) -> None:
    """Symmetric ones are 8: what would be 9 was stored as gptq_v2 does, whatever the description says."""
    config = {"quantization_config": GPTQ | {"sym": True}}
    folder_of(tmp_path, lambda m, x: pack.gptq(m, x, v2=True), config, zeros=(8, 8))
    with pytest.raises(ModelFormatError, match=r"not less one; set checkpoint_format to gptq_v2"):
        open_source(tmp_path).tensors["layers.0.wq"].read_packed()


def test_scales_not_finite(tmp_path: Path) -> None:
    def packer(module: str, matrix: pack.Matrix) -> pack.Tensors:
        tensors = pack.gptq(module, matrix)
        kind, shape, raw = tensors[f"{module}.scales"]
        return tensors | {f"{module}.scales": (kind, shape, b"\x00\x7c" + raw[2:])}

    folder_of(tmp_path, packer, {"quantization_config": GPTQ}, zeros=(1, 15))
    tensor = open_source(tmp_path).tensors["layers.0.wq"]
    with pytest.raises(ModelFormatError, match=r"scales are not finite"):
        tensor.read_packed()
    with pytest.raises(ModelFormatError, match=r"values are not finite"):
        tensor.read()
