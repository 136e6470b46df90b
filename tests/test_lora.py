"""LoRA adapters merged at conversion, against W + alpha/r · B·A in float64; what cannot be merged, by name."""

from __future__ import annotations

import json
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
from quantize.cli import main
from quantize.lora import merge_adapters, open_adapter
from quantize.readers import Source, open_source

from . import make_sources as make

Array = NDArray[Any]
SHAPE = make.Shape(n_layers=2)
MODULES = {
    "self_attn.q_proj": "wq",
    "self_attn.k_proj": "wk",
    "self_attn.v_proj": "wv",
    "self_attn.o_proj": "wo",
    "mlp.gate_proj": "w_gate",
    "mlp.up_proj": "w_up",
    "mlp.down_proj": "w_down",
}


def config_of(**changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it; a change to `...` removes the key."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "small",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [module.split(".")[1] for module in MODULES],
        "use_dora": False,
        "use_rslora": False,
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


def random(shape: tuple[int, ...], seed: int) -> Array:
    """Multiples of 1/16 that every type holds, so that sums are exact in float64."""
    return np.random.default_rng(seed).integers(-16, 17, shape).astype(np.float32) / 16


def factors(layer: int, module: str, seed: int = 0, rank: int = 4) -> dict[str, Array]:
    n, k = SHAPE.tensors()[f"layers.{layer}.{MODULES[module]}"]
    seed = seed + 100 * layer + 2 * list(MODULES).index(module)
    name = f"base_model.model.model.layers.{layer}.{module}"
    return {f"{name}.lora_A.weight": random((rank, k), seed), f"{name}.lora_B.weight": random((n, rank), seed + 1)}


def all_factors(modules: tuple[str, ...] = tuple(MODULES), seed: int = 0) -> dict[str, Array]:
    out: dict[str, Array] = {}
    for layer in range(SHAPE.n_layers):
        for module in modules:
            out |= factors(layer, module, seed)
    return out


def write_adapter(folder: Path, tensors: dict[str, Array], dtype: str = "F32", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config_of(**changes)))
    entries = {name: (dtype, values.shape, make.encode_dense(values, dtype)) for name, values in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(make.safetensors_of(entries, format="pt"))
    return folder


def model(folder: Path, shape: make.Shape = SHAPE, **options: Any) -> tuple[Source, dict[str, Array]]:
    weights = make.random_weights(shape)
    return open_source(make.write_hf_folder(folder, shape, weights, **options)), weights


def product(tensors: dict[str, Array], layer: int, module: str) -> Array:
    name = f"base_model.model.model.layers.{layer}.{module}"
    b, a = (tensors[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "BA")
    return b @ a


def check(source: Source, weights: dict[str, Array], deltas: dict[str, Array]) -> None:
    for name, tensor in source.tensors.items():
        expected = (weights[name].astype(np.float64) + deltas.get(name, 0.0)).astype(np.float32)
        np.testing.assert_array_equal(tensor.read(), expected, err_msg=name)
        np.testing.assert_array_equal(tensor.read(slice(5, 19)), expected[5:19], err_msg=name)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_all_modules(dtype: str, tmp_path: Path) -> None:
    source, weights = model(tmp_path / "model")
    tensors = all_factors()
    merged = merge_adapters(source, [(write_adapter(tmp_path / "adapter", tensors, dtype), 1.0)])
    deltas = {
        f"layers.{i}.{ours}": 16 / 4 * product(tensors, i, module) for i in range(2) for module, ours in MODULES.items()
    }
    check(merged, weights, deltas)
    assert merged.tensors["layers.0.wq"].grid is None
    assert merged.tensors["layers.0.wq"].dtype == "F32+lora"
    assert merged.identity["lora"][0]["name"] == "adapter"
    watched = {file.path.name for file in merged.files}  # by the conversion, lest they change under it
    assert watched >= {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}


def test_two_adapters_with_factors(tmp_path: Path) -> None:
    source, weights = model(tmp_path / "model")
    first, second = all_factors(("self_attn.q_proj",)), all_factors(("self_attn.q_proj", "mlp.up_proj"), seed=7)
    paths = [write_adapter(tmp_path / f"a{i}", tensors) for i, tensors in enumerate((first, second))]
    merged = merge_adapters(source, [(paths[0], 0.5), (paths[1], -2.0)])
    deltas = {}
    for i in range(2):
        q = 0.5 * 4 * product(first, i, "self_attn.q_proj") - 2 * 4 * product(second, i, "self_attn.q_proj")
        deltas |= {f"layers.{i}.wq": q, f"layers.{i}.w_up": -2 * 4 * product(second, i, "mlp.up_proj")}
    check(merged, weights, deltas)
    assert [part["scale"] for part in merged.identity["lora"]] == [0.5, -2.0]


def test_ranks_alphas_and_rslora(tmp_path: Path) -> None:
    """alpha / sqrt(rank) with rslora; both may differ by module, where the first name that fits decides."""
    source, weights = model(tmp_path / "model")
    tensors = {**all_factors(("self_attn.q_proj",)), **factors(0, "mlp.up_proj"), **factors(1, "mlp.up_proj", rank=16)}
    adapter = write_adapter(
        tmp_path / "adapter",
        tensors,
        use_rslora=True,
        rank_pattern={"layers.1.mlp.up_proj": 16},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 2, r"mlp\.up_proj": 8.0, "up_proj": 99},
    )
    deltas = {
        "layers.0.wq": 2 / 2 * product(tensors, 0, "self_attn.q_proj"),
        "layers.1.wq": 16 / 2 * product(tensors, 1, "self_attn.q_proj"),
        "layers.0.w_up": 8 / 2 * product(tensors, 0, "mlp.up_proj"),
        "layers.1.w_up": 8 / 4 * product(tensors, 1, "mlp.up_proj"),
    }
    check(merge_adapters(source, [(adapter, 1.0)]), weights, deltas)


def test_dora(tmp_path: Path) -> None:
    """Rows of W + scale · B·A are brought to the lengths that the adapter has."""
    source, weights = model(tmp_path / "model")
    tensors = all_factors(("mlp.gate_proj",))
    lengths = {i: 1 + np.abs(random((SHAPE.hidden_dim,), 50 + i)) for i in range(2)}
    extra = {f"base_model.model.model.layers.{i}.mlp.gate_proj.lora_magnitude_vector": lengths[i] for i in lengths}
    adapter = write_adapter(tmp_path / "adapter", tensors | extra, use_dora=True)
    merged = merge_adapters(source, [(adapter, 1.0)])
    for i in range(2):
        rows = weights[f"layers.{i}.w_gate"].astype(np.float64) + 4 * product(tensors, i, "mlp.gate_proj")
        expected = rows / np.linalg.norm(rows, axis=1, keepdims=True) * lengths[i][:, None]
        np.testing.assert_allclose(merged.tensors[f"layers.{i}.w_gate"].read(), expected, rtol=2**-23)


def test_embedding_and_head(tmp_path: Path) -> None:
    """An update of the embedding, and a head that was trained whole."""
    source, weights = model(tmp_path / "model")
    a, b = random((4, SHAPE.vocab_size), 1), random((SHAPE.dim, 4), 2)
    head = random((SHAPE.vocab_size, SHAPE.dim), 3)
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
        "base_model.model.lm_head.weight": head,
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    merged = merge_adapters(source, [(adapter, 1.0)])
    check(merged, weights | {"output": head}, {"tok_embeddings": 4 * (b.astype(np.float64) @ a).T})


def test_rows_of_a_gguf(tmp_path: Path) -> None:
    """Interleaved rows are put in order before an adapter, which was trained on Hugging Face's order, is added."""
    weights = make.random_weights(SHAPE)
    source = open_source(make.write_gguf(tmp_path / "model.gguf", SHAPE, weights, "F32"))
    tensors = all_factors(("self_attn.q_proj", "self_attn.k_proj"))
    merged = merge_adapters(source, [(write_adapter(tmp_path / "adapter", tensors), 1.0)])
    deltas = {
        f"layers.{i}.w{part}": 4 * product(tensors, i, f"self_attn.{part}_proj") for i in range(2) for part in "qk"
    }
    check(merged, weights, deltas)


def test_fused_modules(tmp_path: Path) -> None:
    """An adapter of a model with fused matrices: each of ours takes its own rows of B."""
    source, weights = model(tmp_path / "model")
    q, kv, k = SHAPE.n_heads * SHAPE.head_dim, SHAPE.n_kv_heads * SHAPE.head_dim, SHAPE.dim
    a, b = random((4, k), 1), random((q + 2 * kv, 4), 2)
    name = "base_model.model.model.layers.1.self_attn.qkv_proj"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "adapter", tensors, layers_to_transform=[1])
    delta = 4 * (b.astype(np.float64) @ a)
    parts = dict(zip(("wq", "wk", "wv"), np.split(delta, [q, q + kv]), strict=True))
    check(merge_adapters(source, [(adapter, 1.0)]), weights, {f"layers.1.{part}": rows for part, rows in parts.items()})


def test_conversion_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--lora` and `--lora-scale` reach the folder; matrices that no adapter touches come over as they were."""
    weights = make.random_weights(SHAPE)
    source = make.write_gguf(tmp_path / "model.gguf", SHAPE, weights, "Q8_0")
    tensors = all_factors(("mlp.down_proj",))
    adapter = write_adapter(tmp_path / "adapter", tensors)
    out = tmp_path / "out"
    arguments = [str(source), "-o", str(out), "--format", "f32", "--lora", str(adapter), "--lora-scale", "0.25"]
    assert main(arguments) == 0
    plain = read_model_folder(convert(source, tmp_path / "plain", format="f32"))
    folder = read_model_folder(out)
    again = read_model_folder(convert(source, tmp_path / "again", format="f32", lora=[(adapter, 0.25)]))
    for name, tensor in folder.tensors.items():
        values = dequantize(tensor.spec, unpack(tensor.spec, tensor.payload())).astype(np.float64)
        before = dequantize(tensor.spec, unpack(tensor.spec, plain.tensors[name].payload())).astype(np.float64)
        if name.endswith("w_down"):
            before = (before + 0.25 * 4 * product(tensors, int(name.split(".")[1]), "mlp.down_proj")).astype(np.float32)
        np.testing.assert_array_equal(values, before, err_msg=name)
        np.testing.assert_array_equal(tensor.payload(), again.tensors[name].payload())
    assert folder.config["source"]["lora"][0]["scale"] == 0.25
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(source), "-o", str(tmp_path / "no"), "--lora-scale", "2", "--lora", str(adapter)])
    assert "--lora-scale belongs behind the --lora that it is for" in capsys.readouterr().err


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
GOOD = all_factors(("self_attn.q_proj",))
DEFECTS: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "method": (GOOD, {"peft_type": "LOHA"}, r"peft_type: found 'LOHA', only 'LORA'"),
    "bias": (GOOD, {"bias": "all"}, r"bias: found 'all'"),
    "lora_bias": (GOOD, {"lora_bias": True}, r"lora_bias: found True; biases beside B"),
    "transposed": (GOOD, {"fan_in_fan_out": True}, r"fan_in_fan_out: found True; matrices stored transposed"),
    "pissa": (GOOD, {"init_lora_weights": "pissa"}, r"init_lora_weights: found 'pissa'.*path_initial_model"),
    "replication": (GOOD, {"layer_replication": [[0, 2]]}, r"layer_replication"),
    "tokens": (GOOD, {"trainable_token_indices": [3]}, r"trainable_token_indices: found \[3\]; single rows"),
    "rank 0": (GOOD, {"r": 0}, r"r: found 0, expected a whole number of 1 to"),
    "no alpha": (GOOD, {"lora_alpha": ...}, r"lora_alpha: found None, expected a number"),
    "alpha nan": (GOOD, {"lora_alpha": 1e400}, r"lora_alpha|Infinity|not valid"),
    "flag": (GOOD, {"use_rslora": "yes"}, r"use_rslora: found 'yes'"),
    "expression": (GOOD, {"alpha_pattern": {"(a+)+b": 3}}, r"alpha_pattern: '\(a\+\)\+b' is a regular expression"),
    "other rank": (GOOD, {"r": 8}, r"q_proj': factors \[64, 4\] and \[4, 64\], expected the rank 8"),
    "no dora": (GOOD, {"use_dora": True}, r"has the parts A, B, expected A, B, lengths"),
    "half": ({A: GOOD[A]}, {}, r"q_proj' has the parts A, expected A, B"),
    "unknown": (GOOD | {"base_model.model.model.norm.weight": random((64,), 1)}, {}, r"norm.weight' is no factor"),
    "prefix": ({"q_proj.lora_A.weight": GOOD[A]}, {}, r"'q_proj.lora_A.weight' has type F32; expected base_model"),
    "module": (
        {name.replace("q_proj", "x_proj"): values for name, values in GOOD.items()},
        {},
        r"changes the module 'model.layers.0.self_attn.x_proj', which the model does not have",
    ),
    "layer": (
        {name.replace("layers.1", "layers.7"): values for name, values in GOOD.items()},
        {},
        r"layers.7.self_attn.q_proj', which the model does not have",
    ),
    "rows": (GOOD | {B: random((60, 4), 1)}, {}, r"an update of \[60, 64\], but the model's matrix has \[64, 64\]"),
    "columns": (GOOD | {A: random((4, 32), 1)}, {}, r"an update of \[64, 32\], but"),
    "missing layer": (factors(0, "self_attn.q_proj"), {}, r"has no update of model.layers.1.self_attn.q_proj"),
    "nothing": ({}, {}, r"holds no tensors"),
    "vocabulary": (
        {"base_model.model.lm_head.weight": random((46, 64), 1)},
        {},
        r"'lm_head': an update of \[46, 64\], but the model's matrix has \[45, 64\]",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects(defect: str, tmp_path: Path) -> None:
    tensors, changes, message = DEFECTS[defect]
    source, _ = model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", tensors, **changes)
    with pytest.raises(ModelFormatError, match=message):
        merge_adapters(source, [(adapter, 1.0)])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever adapter_config.json says: finite values, or our error."""
    names = [*config_of(), "lora_bias", "layers_to_transform", "exclude_modules", "target_parameters", "use_qalora"]
    simple = st.one_of(st.none(), st.booleans(), st.integers(-2, 1 << 20), st.floats(), st.text(max_size=4))
    nested = st.one_of(
        simple, st.lists(simple, max_size=3), st.dictionaries(st.sampled_from(["q_proj", "^(a+)+$"]), simple)
    )
    changes = data.draw(st.dictionaries(st.sampled_from(names), nested, max_size=3))
    if not (tmp_path / "model").exists():
        model(tmp_path / "model")
        write_adapter(tmp_path / "adapter", GOOD)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config_of(**changes)))
    try:
        merged = merge_adapters(open_source(tmp_path / "model"), [(tmp_path / "adapter", 1.0)])
    except ModelFormatError:
        return
    assert np.isfinite(merged.tensors["layers.0.wq"].read()).all()


def test_tied_model(tmp_path: Path) -> None:
    source, _ = model(tmp_path / "model", make.Shape(tied=True))
    head = {"base_model.model.lm_head.weight": random((SHAPE.vocab_size, SHAPE.dim), 3)}
    with pytest.raises(ModelFormatError, match=r"changes lm_head, but the model's head and embedding are one matrix"):
        merge_adapters(source, [(write_adapter(tmp_path / "adapter", head), 1.0)])


def test_files(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", GOOD)
    assert len(open_adapter(adapter / "adapter_model.safetensors").updates) == 2
    with pytest.raises(ValueError, match="finite"):
        open_adapter(adapter, float("nan"))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelFormatError, match=r"adapter_config.json: is missing; expected a PEFT adapter"):
        open_adapter(adapter)
    with pytest.raises(ModelFormatError, match=r"adapter_config.json: is missing"):
        open_adapter(tmp_path / "nowhere")


def test_not_finite(tmp_path: Path) -> None:
    source, _ = model(tmp_path / "model")
    tensors = {name: values.copy() for name, values in GOOD.items()}
    tensors[A][0, 0] = np.nan
    merged = merge_adapters(source, [(write_adapter(tmp_path / "adapter", tensors), 1.0)])
    with pytest.raises(ModelFormatError, match=r"adapter_model.safetensors: .*\(layers.0.wq\).*not finite"):
        merged.tensors["layers.0.wq"].read()


@pytest.mark.parametrize("embedding", [False, True])
def test_bits_do_not_depend_on_the_step(embedding: bool, tmp_path: Path) -> None:
    """Blocks of any number of rows, a single one too, give the same bits: --max-memory must not change a model."""
    rng = np.random.default_rng(3)
    n, k, rank = (SHAPE.vocab_size, SHAPE.dim, 24) if embedding else (SHAPE.dim, SHAPE.hidden_dim, 24)
    name = "base_model.model.model." + ("embed_tokens.lora_embedding_" if embedding else "layers.0.mlp.down_proj.lora_")
    left, right = rng.standard_normal((n, rank)), rng.standard_normal((rank, k))
    tensors = {f"{name}A": left.T, f"{name}B": right.T} if embedding else {}
    tensors |= {} if embedding else {f"{name}A.weight": right, f"{name}B.weight": left}
    adapter = open_adapter(write_adapter(tmp_path, tensors, r=rank, target_modules="any"))
    (update,) = adapter.updates.values()

    def applied(step: int) -> Array:  # in float64, for the rounding to float32 hides most of what differs
        out = np.ones((n, k))
        for first in range(0, n, step):
            update.apply(out[first : first + step], np.arange(first, min(first + step, n)))
        return out

    for step in (1, 2, 7, 16):
        np.testing.assert_array_equal(applied(step), applied(n))
