"""What families add to LLaMA: norms of q and k, scales of embedding and scores, a sliding window in all layers or some.

Values against the float64 oracle; the same bits (==) however a text is cut into steps, batched, threaded, computed, cut
into two backends, forked, rewound or guessed. Texts are long enough for several pages and splits of attention. The
attention kernels' own windows are test_kernels.py's, RoPE scalings test_rope.py's.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama import _C, ModelFormatError
from pyllama.common.model_folder import check_config, check_tensors
from pyllama.synthetic import synthetic_config

from .helpers_models import Kind, Shape, SmallModel, all_logits, random_tokens, small_model


def variant(*, head_norms: bool = False, **extras: Any) -> Shape:
    return Shape(n_layers=3, vocab_size=17, max_seq_len=1400, head_norms=head_norms, extras=tuple(extras.items()))


VARIANTS = {
    "norms": variant(head_norms=True),
    "scales": variant(embedding_scale=12.0, attention_scale=0.03125),
    "window of 1": variant(sliding_window=1),
    "window of 40": variant(sliding_window=40),
    "window of a page": variant(sliding_window=64),
    "window of some layers": variant(sliding_window=100, sliding_layers=[0, 2]),
    "window of no layer": variant(sliding_window=100, sliding_layers=[]),
    "window beyond a split": variant(sliding_window=600),
    "all at once": variant(
        head_norms=True, embedding_scale=0.5, attention_scale=0.4, sliding_window=65, sliding_layers=[1]
    ),
}


# ---- values


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS.keys())
def test_dense_logits(shape: Shape) -> None:
    small = small_model(shape)
    tokens = random_tokens(small, 200)
    expected = small.oracle().logits(tokens)
    np.testing.assert_allclose(all_logits(small.model(), tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    plain = small_model(variant()).oracle()
    if dict(shape.extras).get("sliding_layers") != [] and dict(shape.extras).get("sliding_window", 0) <= 200:
        assert np.abs(expected - plain.logits(tokens)).max() > 1e-2 * np.abs(expected).max()


def test_a_window_beyond_a_split() -> None:
    small = small_model(variant(sliding_window=600))
    tokens = random_tokens(small, 1300)
    expected = small.oracle().logits(tokens)
    found = all_logits(small.model(), tokens, [512, 512, 276])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_quantized_logits() -> None:
    """As test_engine.py's: nearly all short texts agree closely, few have a code on the other side of a border."""
    small = small_model(VARIANTS["all at once"], Kind("q4", 64))
    oracle, model = small.oracle(), small.model()
    errors = []
    for seed in range(12):
        tokens = random_tokens(small, 5, seed)
        expected = oracle.logits(tokens)
        errors.append(np.abs(all_logits(model, tokens) - expected).max() / np.abs(expected).max())
    assert np.median(errors) < 2e-5 and max(errors) < 0.05


def test_a_scale_that_says_the_default_changes_no_bit() -> None:
    tokens = random_tokens(small_model(variant()), 70)
    plain = all_logits(small_model(variant()).model(), tokens)
    same = variant(embedding_scale=1.0, attention_scale=0.25, sliding_window=1400)  # head_dim is 16
    assert np.array_equal(all_logits(small_model(same).model(), tokens), plain)


# ---- the same bits

KINDS = [Kind("f32"), Kind("q8", 32)]


@pytest.fixture(scope="module", params=itertools.product(VARIANTS, ["f16", "q8"]), ids=lambda p: f"{p[0]}, {p[1]}")
def same(request: pytest.FixtureRequest) -> tuple[SmallModel, str, NDArray[np.int32], NDArray[np.float32]]:
    """A model, a type of cache, 720 tokens and their logits with one thread and the scalar kernels, which define them.

    Odd variants have f32 weights, even ones q8.
    """
    name, kv_dtype = request.param
    small = small_model(VARIANTS[name], KINDS[list(VARIANTS).index(name) % 2])
    tokens = random_tokens(small, 720)
    model = small.model(threads=1, isa="scalar", kv_dtype=kv_dtype)
    return small, kv_dtype, tokens, all_logits(model, tokens, [512, 208])


@pytest.mark.parametrize("isa", _C.isas())
def test_chunks_threads_and_instruction_sets(same: Any, isa: str) -> None:
    small, kv_dtype, tokens, expected = same
    if isa == "scalar":  # `expected` has its bits
        return
    model = small.model(threads=3, isa=isa, kv_dtype=kv_dtype)
    chunks = [1, 62, 1, 1, 7, 130, 300, 11, 150, 1, 10, *[1] * 46]
    assert np.array_equal(all_logits(model, tokens, chunks), expected)


def test_several_sequences_in_one_step(same: Any) -> None:
    small, kv_dtype, tokens, expected = same
    model = small.model(kv_dtype=kv_dtype)
    sequences = [model.sequence() for _ in range(4)]
    at = [0, 0, 0, 0]
    for sizes in ([500, 1, 3, 8], [1, 200, 9, 40], [60, 1, 300, 70], [1, 1, 1, 1]):
        items = [
            (sequence, tokens[start : start + size], None, "all")
            for sequence, start, size in zip(sequences, at, sizes, strict=True)
        ]
        for i, result in enumerate(model.step(items)):
            assert np.array_equal(result.logits, expected[at[i] : at[i] + sizes[i]])
            at[i] += sizes[i]


def test_two_backends(same: Any) -> None:
    """Each has its own layers' windows and norms."""
    small, kv_dtype, tokens, expected = same
    for gpu_layers in (1, 2):
        model = small.model(device="cpu", gpu_layers=gpu_layers, kv_dtype=kv_dtype)
        assert np.array_equal(all_logits(model, tokens[:300], [200, 1, 99]), expected[:300])


def test_forks_and_rewinding(same: Any) -> None:
    small, kv_dtype, tokens, expected = same
    model = small.model(kv_dtype=kv_dtype)
    first = model.sequence()
    model.step([(first, tokens[:400], None, "none")])
    fork = first.fork(333)
    assert np.array_equal(model.step([(fork, tokens[333:500], None, "all")])[0].logits, expected[333:500])
    first.truncate(70)
    assert np.array_equal(model.step([(first, tokens[70:200], None, "all")])[0].logits, expected[70:200])


def test_guessed_tokens(same: Any) -> None:
    """A step with guesses, right ones and wrong, samples the very tokens of plain decoding."""
    small, kv_dtype, tokens, _ = same
    model, sampler = small.model(kv_dtype=kv_dtype), _C.Sampler(seed=5, temperature=0.8)
    plain = model.sequence()
    fed = model.step([(plain, tokens[:130], sampler, "none")])[0].samples
    for _ in range(11):
        fed += model.step([(plain, [fed[-1].token], sampler, "none")])[0].samples
    expected = [sample.token for sample in fed]
    guided = model.sequence()
    found = [model.step([(guided, tokens[:130], sampler, "none")])[0].token]
    while len(found) < len(expected):
        guesses = expected[len(found) : len(found) + 4]
        guesses[2:3] = [(guess + 1) % 17 for guess in guesses[2:3]]
        result = model.step([(guided, [found[-1], *guesses], sampler, "none", len(guesses))])[0]
        found += [sample.token for sample in result.samples]
    assert found[: len(expected)] == expected


# ---- what makes no model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_scale": 0}, "embedding_scale is 0"),
        ({"embedding_scale": float("nan")}, "embedding_scale is nan"),
        ({"embedding_scale": "big"}, "embedding_scale is 'big'"),
        ({"attention_scale": -1.0}, "attention_scale is -1"),
        ({"attention_scale": float("inf")}, "attention_scale is inf"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": 2.5}, "sliding_window is 2.5"),
        ({"sliding_window": 2**40}, f"sliding_window is {2**40}"),
        ({"sliding_window": 5, "sliding_layers": [0, 2]}, "sliding_layers (holds 2|is )"),
        ({"sliding_window": 5, "sliding_layers": [-1]}, "sliding_layers (holds -1|is )"),
        ({"sliding_window": 5, "sliding_layers": "all"}, "sliding_layers is 'all'"),
        ({"sliding_window": 5, "sliding_layers": [0.5]}, "sliding_layers is "),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model(change: dict[str, Any], message: str) -> None:
    small = small_model(Shape(n_layers=2))
    small.config = small.config | change
    with pytest.raises(ModelFormatError, match=message):
        small.model()
    with pytest.raises(ModelFormatError, match=message):
        check_config(synthetic_config("tiny") | {"n_layers": 2} | change, "here")


@pytest.mark.parametrize("part", ["q_norm", "k_norm"])
@pytest.mark.parametrize("layer", [0, 1])
def test_norms_of_some_layers(part: str, layer: int) -> None:
    small = small_model(variant(head_norms=True))
    name = f"layers.{layer}.{part}"
    del small.weights[name]
    with pytest.raises(ModelFormatError, match=rf"^layers\.\d\.{part}: (missing|unexpected)"):
        small.model()
    config = synthetic_config("tiny") | {key: small.config[key] for key in ("n_layers", "head_dim")}
    shapes = {f"layers.{i}.{part}": (16,) for i in range(3)} | {"tok_embeddings": (1024, 256)}
    del shapes[name]
    for i, (which, sides) in itertools.product(range(3), Shape(dim=256).tensors().items()):
        if which.startswith("layers.0."):
            shapes[which.replace("layers.0.", f"layers.{i}.")] = sides
    config |= {"n_heads": 6, "n_kv_heads": 3, "hidden_dim": 176}
    with pytest.raises(ModelFormatError, match=rf"here: tensor {name} \[16\] is missing, but other layers have theirs"):
        check_tensors(config, shapes, "here")


def test_norms_of_another_width() -> None:
    small = small_model(variant(head_norms=True))
    other = small_model(Shape(n_layers=3, head_dim=32, head_norms=True))
    small.weights["layers.1.k_norm"] = other.weights["layers.1.k_norm"]
    with pytest.raises(ModelFormatError, match=r"layers\.1\.k_norm: shape \[32\], expected \[16\]"):
        small.model()
