"""The parts of a layer on their own (`_C.convert.norm attention mlp add_product`), strung together as calibration does.

Strung together they are the model: the same logits, by ==, as `Model.step`, over families, formats, instruction sets,
threads and cuts into steps. What each part gives, which calibration counts, is compared with the float64 oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama import _C, ModelFormatError
from pyllama.common.formats import TensorSpec, dense

from .helpers_models import Kind, Shape, SmallModel, all_logits, native_weight, random_tokens, small_model
from .oracle import attention, rmsnorm, rope, silu
from .test_variants import VARIANTS, variant

ATTENTION = ("attn_norm", "wq", "wk", "wv", "bq", "bk", "bv", "q_norm", "k_norm")
MLP = ("mlp_norm", "w_gate", "w_up")
Floats = NDArray[np.float32]


def roles(small: SmallModel, layer: int, names: tuple[str, ...]) -> dict[str, Any]:
    prefix = f"layers.{layer}."
    return {name: small.weights[prefix + name] for name in names if prefix + name in small.weights}


def embedded(small: SmallModel, tokens: Any) -> Floats:
    scale = np.float32(small.config.get("embedding_scale") or 1)
    rows: Floats = small.values["tok_embeddings"].astype(np.float32)[tokens] * scale
    return rows


def run(small: SmallModel, tokens: Any, lengths: list[int], **options: Any) -> tuple[Floats, list[dict[str, Floats]]]:
    """x behind the last layer, and what each layer's products read."""
    convert, eps, x = _C.convert, small.config["norm_eps"], embedded(small, tokens)
    seen: list[dict[str, Floats]] = []
    for layer in range(small.shape.n_layers):
        of = {name: small.weights[f"layers.{layer}.{name}"] for name in ("attn_norm", "wo", "mlp_norm", "w_down")}
        inputs = {"wq": convert.norm(of["attn_norm"], eps, x, **options)}
        inputs["wo"] = convert.attention(small.config, layer, roles(small, layer, ATTENTION), x, lengths, **options)
        convert.add_product(of["wo"], inputs["wo"], x, **options)
        inputs["w_gate"] = convert.norm(of["mlp_norm"], eps, x, **options)
        inputs["w_down"] = convert.mlp(small.config, roles(small, layer, MLP), x, **options)
        convert.add_product(of["w_down"], inputs["w_down"], x, **options)
        seen.append(inputs)
    return x, seen


def logits_of(small: SmallModel, x: Floats) -> Floats:
    """What the model's own head makes of x: a model whose embeddings are x's rows, and whose layer adds nothing."""
    shape = small.shape
    assert len(x) <= shape.vocab_size
    config = small.config | {"n_layers": 1, "tied_embeddings": False, "embedding_scale": 1.0, "sliding_layers": None}
    table = np.zeros((shape.vocab_size, shape.dim), np.float32)
    table[: len(x)] = x
    weights = {name: weight for name, weight in small.weights.items() if name.startswith("layers.0.")}
    weights["norm"] = small.weights["norm"]
    weights["output"] = small.weights["tok_embeddings" if shape.tied else "output"]
    zeros = {
        "layers.0.wo": (shape.dim, shape.n_heads * shape.head_dim),
        "layers.0.w_down": (shape.dim, shape.hidden_dim),
    }
    for name, values in {
        "tok_embeddings": table,
        **{name: np.zeros(sides, np.float32) for name, sides in zeros.items()},
    }.items():
        spec = TensorSpec(name, "f32", values.shape)
        weights[name] = native_weight(spec, dense(spec, values))
    return all_logits(_C.Model(config, weights, threads=1), np.arange(len(x)))


SHAPES = {
    "plain": Shape(vocab_size=700),
    "biases, tied": Shape(vocab_size=700, biases=True, tied=True, n_kv_heads=2, head_dim=32, dim=128),
    **{
        name: Shape(vocab_size=700, n_layers=3, head_norms=shape.head_norms, extras=shape.extras)
        for name, shape in VARIANTS.items()
        if name in ("norms", "scales", "window of some layers", "window of 40", "all at once")
    },
}
KINDS = [
    Kind("q4", 32),
    Kind("f32"),
    Kind("q8", 64),
    Kind("q4a", 128, "f16", "u8"),
    Kind("q4nl", 64),
    Kind("bf16"),
    Kind("q4a", 64, "f16", "f16", input_order=True),
]


@pytest.mark.parametrize(("name", "kind"), list(zip(SHAPES, KINDS, strict=True)), ids=str)
def test_the_parts_are_the_model(name: str, kind: Kind) -> None:
    small = small_model(SHAPES[name], kind)
    lengths = [1, 70, 3, 300, 129]
    tokens = random_tokens(small, sum(lengths))
    model, starts = small.model(threads=1), np.cumsum([0, *lengths])
    expected = [all_logits(model, tokens[at : at + n]) for at, n in zip(starts, lengths, strict=False)]
    x, _ = run(small, tokens, lengths, threads=1)
    assert np.array_equal(logits_of(small, x), np.concatenate(expected))


@pytest.mark.parametrize("isa", _C.isas())
def test_instruction_sets_threads_and_steps(isa: str) -> None:
    small = small_model(SHAPES["all at once"], Kind("q4", 64))
    lengths = [20, 40, 9]
    tokens = random_tokens(small, 69)
    expected, inputs = run(small, tokens, lengths, isa="scalar", threads=1)
    found, same = run(small, tokens, lengths, isa=isa, threads=3)
    assert np.array_equal(found, expected)
    for a, b in zip(same, inputs, strict=True):
        assert all(np.array_equal(a[role], b[role]) for role in b)


def test_texts_longer_than_a_step() -> None:
    """A step takes 512 tokens; the text goes on in the next ones."""
    small = small_model(variant(sliding_window=65, sliding_layers=[1]), Kind("q8", 32))
    lengths = [30, 1100, 5]
    tokens = random_tokens(small, sum(lengths))
    together, _ = run(small, tokens, lengths)
    starts = np.cumsum([0, *lengths])
    alone = [run(small, tokens[at : at + n], [n])[0] for at, n in zip(starts, lengths, strict=False)]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("name", SHAPES)
def test_what_products_read(name: str) -> None:
    """Against float64, layer by layer: each part gets the x that the layer before it made."""
    small = small_model(SHAPES[name])
    n = 90
    tokens = random_tokens(small, n)
    oracle, x = small.oracle(), embedded(small, tokens).astype(np.float64)
    _, found = run(small, tokens, [n])
    for layer, inputs in enumerate(found):
        expected = oracle_inputs(oracle, small, layer, x)
        for role, values in expected.items():
            close = {"rtol": 0, "atol": 2e-4 * np.abs(values).max()}
            np.testing.assert_allclose(inputs[role], values, err_msg=f"{layer} {role}", **close)
        x = x + oracle._attention(x, layer)
        x = x + oracle._mlp(x, f"layers.{layer}.")


def oracle_inputs(oracle: Any, small: SmallModel, layer: int, x: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    config, prefix, w = small.config, f"layers.{layer}.", oracle.weights
    normed = rmsnorm(x, w[prefix + "attn_norm"], config["norm_eps"])
    q, k, v = (
        (normed @ w[prefix + "w" + one].T + w.get(prefix + "b" + one, 0)).reshape(len(x), -1, config["head_dim"])
        for one in "qkv"
    )
    if prefix + "q_norm" in w:
        q, k = (rmsnorm(a, w[prefix + b], config["norm_eps"]) for a, b in ((q, "q_norm"), (k, "k_norm")))
    at = np.arange(len(x), dtype=np.float64)
    q, k = (rope(a, at, oracle.inv_freq, config["rope_attention_factor"]) for a in (q, k))
    layers = config.get("sliding_layers")
    window = config.get("sliding_window") if layers is None or layer in layers else None
    scale = config.get("attention_scale") or config["head_dim"] ** -0.5
    o = attention(q, k.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64), scale, window)
    middle = rmsnorm(x + o @ w[prefix + "wo"].T, w[prefix + "mlp_norm"], config["norm_eps"])
    h = silu(middle @ w[prefix + "w_gate"].T) * (middle @ w[prefix + "w_up"].T)
    return {"wq": normed, "wo": o, "w_gate": middle, "w_down": h}


def test_what_does_not_fit_is_refused() -> None:
    small = small_model()
    x = embedded(small, random_tokens(small, 4))
    attend = lambda weights, lengths, rows=x, layer=0: _C.convert.attention(small.config, layer, weights, rows, lengths)  # noqa: E731
    weights = roles(small, 0, ATTENTION)
    with pytest.raises(ModelFormatError, match="wk: missing"):
        attend({name: weight for name, weight in weights.items() if name != "wk"}, [4])
    with pytest.raises(ModelFormatError, match=r"wq: shape \[48, 96\], expected \[96, 96\]"):
        attend(weights | {"wq": weights["wk"]}, [4])
    with pytest.raises(ModelFormatError, match="w_up: not of this part"):
        attend(weights | {"w_up": small.weights["layers.0.w_up"]}, [4])
    with pytest.raises(ValueError, match="texts of 5 tokens, x has 4 rows"):
        attend(weights, [4, 1])
    with pytest.raises(ValueError, match="a text of 0 tokens"):
        attend(weights, [4, 0])
    with pytest.raises(ValueError, match="layer 2 of 2"):
        attend(weights, [4], layer=2)
    with pytest.raises(ValueError, match=r"x must be float32 \[n, 96\]"):
        attend(weights, [4], np.zeros((4, 95), np.float32))
    with pytest.raises(TypeError):  # would be a copy, and y is changed in place
        _C.convert.add_product(small.weights["layers.0.wo"], np.zeros((4, 96), np.float32), np.zeros((4, 96)))
    assert attend(weights, [], np.zeros((0, 96), np.float32)).shape == (0, 96)
