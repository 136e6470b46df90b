"""Families from Hugging Face folders: what their configs mean, and which stored rows become which tensor.

Every family's folder is built from canonical weights by the tests' own names. Logits: tests/oracles/
test_checkpoints_hf.py, from what transformers writes; damaged and hostile configs: test_hostile_models.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.model_folder import LAYER_SHAPES, OPTIONAL, OUTER_SHAPES, check_config
from quantize import make_plan
from quantize.families import FAMILIES, NOT_YET, Family
from quantize.fields import ROPE_TYPES, Fields, window_of_some
from quantize.readers import Source, open_source
from quantize.readers.hf_config import read_hf_config
from tests import make_sources as make
from tests.make_sources import Shape

SHAPE = Shape(n_layers=3)
HF = {family.model_type: family for family in FAMILIES if family.container == "safetensors"}
WITHOUT = dict.fromkeys(("attention_bias", "mlp_bias", "rope_scaling"), ...)


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of a small model of this kind; `...` removes a key."""
    named = {"architectures": [HF[kind].architecture], "model_type": kind}
    return make.hf_config(SHAPE, **(named | WITHOUT | changes))


def canonical(kind: str, **changes: Any) -> dict[str, Any]:
    return read_hf_config(config_of(kind, **changes), "config.json").config


def folder_of(folder: Path, kind: str, weights: dict[str, NDArray[Any]], **changes: Any) -> Path:
    """A folder with these weights; those of fused parts lie one below the other."""
    family, names = HF[kind], dict[str, list[str]]()
    for name in weights:
        part = name.rsplit(".", 1)[-1]
        i = name.split(".")[1] if "." in name else ""
        source = family.layer[part].format(i=i) if i else family.outer[name]
        names.setdefault(source, []).append(name)
    folder.mkdir()
    stored = {source: np.concatenate([weights[part] for part in parts]) for source, parts in names.items()}
    tensors = {source: ("F32", values.shape, make.encode_dense(values, "F32")) for source, values in stored.items()}
    (folder / "model.safetensors").write_bytes(make.safetensors_of(tensors))
    (folder / "config.json").write_text(json.dumps(config_of(kind, **changes)))
    return folder


def weights_of(**shape: Any) -> dict[str, NDArray[np.float32]]:
    return make.random_weights(Shape(n_layers=3, **shape))


def with_head_norms(weights: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    norms = {f"layers.{i}.{part}": rng.random(16).astype(np.float32) for i in range(3) for part in ("q_norm", "k_norm")}
    return weights | norms


def same(source: Source, weights: dict[str, NDArray[np.float32]]) -> None:
    assert source.tensors.keys() == weights.keys()
    for name, values in weights.items():
        assert np.array_equal(source.tensors[name].read(), values), name


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.container} {family.architecture}")
def test_an_entry_is_whole(family: Family) -> None:
    parts = set(LAYER_SHAPES)
    assert parts - OPTIONAL <= family.layer.keys() <= parts and family.outer.keys() == OUTER_SHAPES.keys()
    assert set(family.optional) <= OPTIONAL & family.layer.keys()
    for group in family.fused:
        assert len({family.layer[part] for part in group}) == 1
    alone = [name for part, name in family.layer.items() if not any(part in group for group in family.fused)]
    assert len(set(alone)) == len(alone) and all("{i}" in name for name in family.layer.values())
    # A norm of queries and keys does not see the residual's scale, so folding it into the one norm_eps would be wrong.
    assert not ("residual_scale" in family.keys and "q_norm" in family.layer)
    assert family.window is None or "sliding_window" in family.keys


def test_names_are_told_apart() -> None:
    assert len({(family.container, family.architecture.lower()) for family in FAMILIES}) == len(FAMILIES)
    assert not NOT_YET.keys() & {family.architecture for family in FAMILIES}


def test_unknown_families_are_named() -> None:
    for name, other, why in (
        ("SmolLM3ForCausalLM", "smollm3", "no rotary positions"),
        ("MixtralForCausalLM", "mixtral", "mixture of experts"),
        ("Gemma3ForCausalLM", "gemma3_text", "norms and activation"),
    ):
        for named, changes in ((name, {"architectures": [name]}), (other, {"architectures": ..., "model_type": other})):
            with pytest.raises(
                ModelFormatError, match=f"{named}' is not supported: .*{why}.*; this version knows Llama"
            ):
                canonical("llama", **changes)
    with pytest.raises(ModelFormatError, match="'StrangeLM' is not supported; this version knows LlamaForCausalLM, "):
        canonical("llama", architectures=["StrangeLM"])
    with pytest.raises(ModelFormatError, match="'strange' is not supported"):
        canonical("llama", architectures=..., model_type="strange")
    assert canonical("llama", architectures=["LLaMAForCausalLM"]) == canonical("llama")


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_qwen2_tensors(tmp_path: Path) -> None:
    """Biases without a word of them in the config."""
    weights = weights_of(biases=True)
    same(open_source(folder_of(tmp_path / "m", "qwen2", weights)), weights)
    with pytest.raises(ModelFormatError, match=r"tensor model.layers.0.self_attn.q_proj.bias .* is missing"):
        open_source(folder_of(tmp_path / "bare", "qwen2", weights_of()))


@pytest.mark.parametrize("biases", [False, True])
def test_qwen3_tensors(tmp_path: Path, biases: bool) -> None:
    weights = with_head_norms(weights_of(biases=biases))
    same(open_source(folder_of(tmp_path / "m", "qwen3", weights, attention_bias=biases)), weights)
    bare = weights_of(biases=biases)
    with pytest.raises(ModelFormatError, match=r"self_attn.q_norm.weight .* is missing"):
        open_source(folder_of(tmp_path / "bare", "qwen3", bare, attention_bias=biases))


def test_phi3_tensors(tmp_path: Path) -> None:
    weights = weights_of()
    source = open_source(folder_of(tmp_path / "m", "phi3", weights))
    same(source, weights)
    key = source.tensors["layers.1.wk"]
    assert key.source_name == "model.layers.1.self_attn.qkv_proj.weight" and key.n_bytes == 4 * key.shape[0] * 64
    assert np.array_equal(key.read(slice(3, 9)), weights["layers.1.wk"][3:9])
    assert list(source.tensors) == list(weights)


def test_a_fused_tensor_of_another_shape(tmp_path: Path) -> None:
    weights = weights_of()
    del weights["layers.2.w_up"]
    with pytest.raises(
        ModelFormatError,
        match=r"gate_up_proj.weight \(layers.2.w_gate, w_up\): shape \[96, 64\], expected \[192, 64\]; "
        "check intermediate_size, hidden_size",
    ):
        open_source(folder_of(tmp_path / "m", "phi3", weights))


def test_granite_tensors(tmp_path: Path) -> None:
    weights = weights_of()
    source = open_source(folder_of(tmp_path / "m", "granite", weights, attention_multiplier=0.25, logits_scaling=8))
    same(source, weights | {"norm": weights["norm"] / 8})


def test_zero_biases_are_dropped_and_others_refused(tmp_path: Path) -> None:
    weights = weights_of()
    folder = folder_of(tmp_path / "m", "mistral", weights)
    for values, match in ((np.zeros(64), None), (np.eye(1, 64)[0], "down_proj.bias is not zero")):
        bias = {"model.layers.1.mlp.down_proj.bias": ("F32", [64], make.encode_dense(values, "F32"))}
        tensors = {
            make.hf_name(name): ("F32", w.shape, make.encode_dense(w, "F32")) for name, w in weights.items()
        } | bias
        (folder / "model.safetensors").write_bytes(make.safetensors_of(tensors))
        if match is None:
            same(open_source(folder), weights)
        else:
            with pytest.raises(ModelFormatError, match=match):
                open_source(folder)


# --- configs ---------------------------------------------------------------------------------------------------------


def test_granite_scales() -> None:
    """y = x / r in place of x: what is added stays, the embedding and epsilon change."""
    found = canonical(
        "granite", embedding_multiplier=12, attention_multiplier=0.125, residual_multiplier=0.25, logits_scaling=8
    )
    plain = SHAPE.config()
    assert found == plain | {"embedding_scale": 48.0, "attention_scale": 0.125, "norm_eps": plain["norm_eps"] * 16}
    factors = read_hf_config(config_of("granite", logits_scaling=8), "config.json").factors
    assert factors == {"norm": 0.125}
    # Absent keys are 1, also attention's; the usual 1/sqrt(head_dim) needs no word.
    assert canonical("granite") == plain | {"attention_scale": 1.0}
    assert canonical("granite", attention_multiplier=0.25) == plain
    with pytest.raises(ModelFormatError, match="residual_multiplier: found 0, expected a number of 1e-06 to 1e"):
        canonical("granite", residual_multiplier=0)


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_windows_of_all_layers(kind: str) -> None:
    assert canonical(kind, sliding_window=32) == SHAPE.config() | {"sliding_window": 32}
    assert canonical(kind, sliding_window=None) == canonical(kind, sliding_window=128) == SHAPE.config()
    with pytest.raises(ModelFormatError, match="sliding_window: found 0, expected an integer of 1"):
        canonical(kind, sliding_window=0)


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
@pytest.mark.parametrize(
    ("window", "kinds"),
    [
        (16, ["full_attention"] * 3),
        (16, ["sliding_attention", "full_attention", "sliding_attention"]),
        (None, ["sliding_attention"] * 3),
        (16, ["sliding_attention"] * 2),
        (16, ["else"] * 3),
        (16, {"a": 1}),
    ],
)
def test_layer_types_that_contradict_the_window(kind: str, window: int | None, kinds: Any) -> None:
    with pytest.raises(ModelFormatError, match=r"layer_types: found "):
        canonical(kind, sliding_window=window, layer_types=kinds)


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_layer_types_that_agree_with_the_window(kind: str) -> None:
    for window, name in ((16, "sliding_attention"), (None, "full_attention")):
        same_without = canonical(kind, sliding_window=window)
        assert canonical(kind, sliding_window=window, layer_types=[name] * 3) == same_without


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_layer_types_mean_nothing_where_the_window_holds_the_context(kind: str) -> None:
    for kinds in (["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"] * 2 + ["sliding_attention"]):
        assert canonical(kind, sliding_window=SHAPE.max_seq_len, layer_types=kinds) == SHAPE.config()
    with pytest.raises(ModelFormatError, match="layer_types: found"):
        canonical(kind, sliding_window=SHAPE.max_seq_len - 1, layer_types=["full_attention"] * 3)


def test_yarn_needs_a_base_above_one(tmp_path: Path) -> None:
    """Refused before anything is converted: what it would become could not be opened."""
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    with pytest.raises(
        ModelFormatError, match=r"rope_theta is 1\.0, expected more than 1 with rope_scaling of type yarn"
    ):
        make_plan(open_source(folder_of(tmp_path / "bad", "llama", weights_of(), rope_theta=1.0, **yarn)))
    make_plan(open_source(folder_of(tmp_path / "good", "llama", weights_of(), rope_theta=1.5, **yarn)))


def test_mistrals_default_window() -> None:
    """An absent key means 4096 for Mistral, and none for Phi-3."""
    assert canonical("mistral", max_position_embeddings=32768)["sliding_window"] == 4096
    assert "sliding_window" not in canonical("phi3", max_position_embeddings=32768)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_of_some_layers(kind: str) -> None:
    on = {"use_sliding_window": True, "sliding_window": 32, "attention_bias": ...}
    assert "sliding_window" not in canonical(kind, sliding_window=32, use_sliding_window=False, max_window_layers=0)
    found = canonical(kind, **on, max_window_layers=1)
    assert (found["sliding_window"], found["sliding_layers"]) == (32, [1, 2])
    assert "sliding_layers" not in canonical(kind, **on, max_window_layers=0)
    assert "sliding_window" not in canonical(kind, **on, max_window_layers=3)
    assert "sliding_window" not in canonical(kind, **on)  # 28 layers are full unless it is said otherwise
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert canonical(kind, **on, max_window_layers=3, layer_types=kinds)["sliding_layers"] == [0, 2]
    with pytest.raises(ModelFormatError, match="layer_types: has layers with sliding_attention, but no"):
        canonical(kind, sliding_window=32, layer_types=kinds)
    for wrong in (kinds[:2], "full_attention", ["full_attention", "full_attention", "chunked_attention"], [1, 2, 3]):
        with pytest.raises(ModelFormatError, match=r"layer_types: found .* expected 3 times full_attention or"):
            canonical(kind, **on, layer_types=wrong)


@given(n=st.integers(1, 40), first=st.integers(0, 50), window=st.integers(1, 1 << 30))
def test_max_window_layers(n: int, first: int, window: int) -> None:
    values = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first}
    found = window_of_some(HF["qwen2"], Fields(values, "here"), {"n_layers": n})
    assert found == (window, [i for i in range(n) if i >= first])


def test_defaults_of_absent_keys() -> None:
    """Those of transformers' classes, as transformers leaves out what is as always."""
    absent = dict.fromkeys(("rms_norm_eps", "rope_theta", "max_position_embeddings", "bos_token_id"), ...)
    expected = {
        "llama": (1e-6, 2048, 1, 4),
        "mistral": (1e-6, 131072, 1, 2),
        "qwen2": (1e-6, 32768, None, 2),
        "qwen3": (1e-6, 32768, None, 2),
        "granite": (1e-6, 2048, 1, 4),
        "phi3": (1e-5, 4096, 1, 4),
    }
    assert expected.keys() <= HF.keys()
    for kind, (eps, context, bos, n_kv_heads) in expected.items():
        heads = {"num_key_value_heads": ... if n_kv_heads == 4 else 2}
        found = canonical(kind, **absent, **heads)
        assert (found["norm_eps"], found["max_seq_len"], found["bos_token_id"]) == (eps, context, bos), kind
        assert (found["rope_theta"], found["n_kv_heads"]) == (10000.0, n_kv_heads), kind
    assert canonical("qwen3", head_dim=...)["head_dim"] == 128
    assert canonical("qwen2", head_dim=...)["head_dim"] == 16
    assert canonical("mistral", num_attention_heads=8, num_key_value_heads=..., head_dim=...)["n_kv_heads"] == 8


# --- rope ------------------------------------------------------------------------------------------------------------

LONG = {"short_factor": [1.0 + i for i in range(8)], "long_factor": [3.0 + i for i in range(8)]}


def test_dynamic_scaling_knows_the_context_before() -> None:
    for given_by in (
        {"rope_scaling": {"type": "dynamic", "factor": 2.5}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e4}},
    ):
        found = canonical("llama", **given_by)
        assert found["max_seq_len"] == 320
        assert found["rope_scaling"] == {
            "rope_type": "dynamic",
            "factor": 2.5,
            "original_max_position_embeddings": 128,
        }
    with pytest.raises(ModelFormatError, match="original_max_position_embeddings: is 64 in rope_scaling, but 128"):
        canonical("llama", rope_scaling={"type": "dynamic", "factor": 2, "original_max_position_embeddings": 64})


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi3_longrope(name: str) -> None:
    found = canonical("phi3", rope_scaling={"type": name, **LONG}, original_max_position_embeddings=32)
    assert found["rope_scaling"] == {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        **LONG,
    }
    newer = {"rope_type": name, **LONG, "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert canonical("phi3", rope_parameters=newer, original_max_position_embeddings=32) == found


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"long_factor": [1.0] * 7}, "long_factor: found 7 numbers, expected 8"),
        ({"short_factor": None}, "short_factor: found None, expected a list"),
        ({"short_factor": [1.0] * 7 + [0]}, r"short_factor\[7\]: found 0, expected a number"),
        ({"short_factor": [1.0] * 7 + ["x"]}, r"short_factor\[7\]: found 'x', expected a number"),
        ({"long_mscale": 1.2}, "long_mscale: is not known with rope_type longrope; found 1.2"),
    ],
)
def test_bad_longrope(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        canonical("phi3", rope_scaling={"type": "longrope", **LONG} | changes)


def test_the_context_before_may_stand_outside() -> None:
    yarn = {"type": "yarn", "factor": 4.0}
    found = canonical("llama", rope_scaling=yarn, original_max_position_embeddings=32)
    assert found["rope_scaling"]["original_max_position_embeddings"] == 32
    assert canonical("llama", rope_scaling=yarn)["rope_scaling"]["original_max_position_embeddings"] == 128
    with pytest.raises(ModelFormatError, match="is 64 in rope_scaling, but 32 otherwise"):
        canonical(
            "llama",
            rope_scaling=yarn | {"original_max_position_embeddings": 64},
            original_max_position_embeddings=32,
        )


# --- settings that nobody knows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),  # Mistral has none
        ("attn_logit_softcapping", 50.0),
        ("clip_qkv", 8.0),
        ("embedding_multiplier", 12.0),
        ("layer_types", ["full_attention", "full_attention", "sliding_attention"]),
        ("logit_scale", 0.5),
        ("mlp_bias", True),
        ("no_rope_layers", [1, 1, 0]),
        ("num_local_experts", 8),
        ("partial_rotary_factor", 0.5),
        ("qk_layernorm", True),
        ("residual_multiplier", 0.2),
        ("rope_interleaved", True),
        ("use_parallel_residual", True),
    ],
)
def test_settings_that_are_not_known(key: str, value: Any) -> None:
    kind = "llama" if key == "layer_types" else "mistral"
    with pytest.raises(ModelFormatError, match=f"config.json: {key}: found "):
        canonical(kind, **{key: value})


def test_settings_that_change_nothing() -> None:
    """Of SmolLM2, Yi, TinyLlama and what training tools leave behind."""
    harmless = {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "pretraining_tp": 1,
        "initializer_range": 0.041666666666666664,
        "attention_dropout": 0.1,
        "use_flash_attention_2": True,
        "layer_norm_eps": 1e-5,
        "use_cache": True,
        "_name_or_path": "somewhere",
        "unsloth_fixed": True,
        "residual_multiplier": 1.0,
        "logit_scale": None,
        "num_local_experts": 0,
        "layer_types": ["full_attention"] * 3,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    }
    assert canonical("llama", **harmless) == SHAPE.config()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = sorted(
    {"type", "rope_type", "rope_theta", "truncate", *LONG} | {k for row in ROPE_TYPES.values() for k in row}
)


@given(data=st.data())
def test_any_config_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever stands in a field: a canonical config that is sound, or one exception of ours."""
    kind = data.draw(st.sampled_from(sorted(HF)))
    raw = config_of(kind)
    keys = sorted({*raw, *HF[kind].keys.values(), *HF[kind].defaults, "layer_types", "use_sliding_window", "mlp_bias"})
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=3, unique=True)):
        raw[key] = data.draw(JSON | st.integers(-2, 200))
    if data.draw(st.booleans()):
        rope = st.dictionaries(st.sampled_from(ROPE_KEYS), JSON | st.sampled_from([2.0, 64, LONG["long_factor"]]))
        kinds = st.sampled_from([*ROPE_TYPES, "su", "default"])
        raw[data.draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = data.draw(rope) | {
            "rope_type": data.draw(kinds)
        }
    try:
        found = read_hf_config(raw, "config.json")
    except ModelFormatError as error:
        assert str(error).startswith("config.json: ")
        return
    check_config(found.config, "here")
    json.dumps(found.config, allow_nan=False)
    assert found.optional <= OPTIONAL and all(0 < factor < 1e7 for factor in found.factors.values())
