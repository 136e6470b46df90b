"""Whole models on the CUDA kernels, through the library's table: values against the float64 oracle and the CPU, and the
promises of a step: the same bits from run to run, in any company, direct or replayed.

The device is the emulated one unless PYLLAMA_CUDA_TESTS says otherwise. Models are tiny, since an emulated tensor core
instruction takes microseconds. What a failing device does to a model is test_model_errors.py's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama import _C
from pyllama.common.errors import DeviceError, ModelFormatError
from pyllama.common.formats import TensorSpec, dense
from tests.helpers_models import (
    DENSE,
    QUANTIZED,
    Kind,
    Shape,
    SmallModel,
    all_logits,
    native_weight,
    random_tokens,
    small_model,
)
from tests.oracle import Llama

from .conftest import ON_DEVICE, Emulated

ORDER_KIND = QUANTIZED[-1]
SMALL = Shape(dim=64, hidden_dim=96, n_heads=4, n_kv_heads=2, head_dim=16, vocab_size=67)
SHAPES = {
    "tied-biases": (Shape(tied=True, biases=True), Kind("q8", 32)),
    "heads-wider-than-dim": (Shape(dim=96, n_heads=5, n_kv_heads=1, head_dim=32, hidden_dim=80), Kind("f16")),
    "tiny-heads": (Shape(dim=33, hidden_dim=31, n_heads=9, n_kv_heads=3, head_dim=2, vocab_size=5), Kind("bf16")),
    "head-64": (Shape(dim=64, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=64, vocab_size=33), Kind("q4", 64)),
    "head-80": (Shape(dim=80, n_heads=1, n_kv_heads=1, head_dim=80, hidden_dim=64, vocab_size=33), Kind("q4nl", 32)),
    "head-128": (Shape(dim=64, n_heads=3, n_kv_heads=1, head_dim=128, hidden_dim=40, vocab_size=33), Kind("f32")),
}
MIXED = {"wv": Kind("q8", 32), "w_up": Kind("f16"), "w_down": ORDER_KIND, "tok_embeddings": Kind("q4", 32)}


@pytest.fixture(autouse=True)
def _library(cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", str(cuda_library))


def on_cuda(small: SmallModel, **options: Any) -> Any:
    return small.model(**({"device": "cuda", "max_batch_tok": 32} | options))


def exact(small: SmallModel) -> Llama:
    """The oracle with f16 keys and values, and activations as they are."""
    return Llama(small.config, small.values, kv_dtype=np.float16)


def check_logits(small: SmallModel, chunks: list[int], **options: Any) -> None:
    """A product's input is rounded to 11 bits, 2^-12 of each number on average; so are queries, keys, values and
    weights of attention. Errors of some hundred terms and ten products in a row add up as random ones do: 2^-9 of the
    largest logit was seen, 2^-7 is allowed."""
    tokens = random_tokens(small, sum(chunks))
    expected = exact(small).logits(tokens)
    found = all_logits(on_cuda(small, **options), tokens, chunks)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-7 * np.abs(expected).max())


def step_logits(model: Any, items: list[tuple[Any, Any]]) -> list[NDArray[np.float32]]:
    """Rows of all tokens of each (sequence, tokens)."""
    return [r.logits for r in model.step([(sequence, tokens, None, "all") for sequence, tokens in items])]


# ---- values


@pytest.mark.parametrize("kind", [*DENSE, *QUANTIZED], ids=str)
def test_logits_of_every_format(kind: Kind) -> None:
    """A prompt of more than eight tokens, then single ones: launched, recorded, replayed."""
    check_logits(small_model(Shape(n_layers=1), kind), [9, 1, 1, 1])


@pytest.mark.parametrize(("shape", "kind"), SHAPES.values(), ids=SHAPES.keys())
def test_logits_of_every_shape(shape: Shape, kind: Kind) -> None:
    check_logits(small_model(shape, kind), [9, 1, 1, 1])


def test_matrices_that_are_not_alike() -> None:
    check_logits(small_model(Shape(biases=True), Kind("q4", 32), kinds=MIXED), [9, 2, 2, 2])


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
@pytest.mark.parametrize("kind", [Kind("q4", 32), Kind("f16")], ids=str)
def test_as_near_to_the_cpu_as_promised(kind: Kind, kv_dtype: str) -> None:
    """Mean KL at most .003 and the same top token for 97 %, over prompts and single steps."""
    small = small_model(SMALL, kind, seed=3)
    tokens, chunks = random_tokens(small, 104), [32, 32, 32, *[1] * 8]
    logits = [
        all_logits(m, tokens, chunks) for m in (on_cuda(small, kv_dtype=kv_dtype), small.model(kv_dtype=kv_dtype))
    ]
    cuda, cpu = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (each.astype(np.float64) for each in logits))
    assert (np.exp(cpu) * (cpu - cuda)).sum(axis=1).mean() <= 0.003
    assert (cpu.argmax(axis=1) == cuda.argmax(axis=1)).mean() >= 0.97


def test_a_context_of_several_splits() -> None:
    """Graphs for more keys replace those for fewer, and attention's room grows."""
    shape = Shape(
        dim=33, hidden_dim=31, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=17, n_layers=1, max_seq_len=600
    )
    check_logits(small_model(shape, Kind("f16")), [61, 1, 1, 1, *[63] * 3, *[1] * 6, 64, 64, 1, 1, 1], max_batch_tok=64)


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
@pytest.mark.parametrize("head_dim", [6, 40, 128])
def test_norms_of_q_and_k_and_scales(head_dim: int, kv_dtype: str) -> None:
    extras = (("embedding_scale", 12.0), ("attention_scale", 0.3 / head_dim**0.5))
    shape = Shape(dim=64, hidden_dim=64, n_heads=4, n_kv_heads=2, head_dim=head_dim, vocab_size=33)
    shape = replace(shape, head_norms=True, biases=True, extras=extras)
    small = small_model(shape, Kind("f16"))
    check_logits(small, [9, 1, 1, 1])
    plain = small_model(replace(shape, head_norms=False, extras=()), Kind("f16"))
    tokens = random_tokens(small, 12)
    assert np.abs(exact(small).logits(tokens) - exact(plain).logits(tokens)).max() > 0.1
    cuda, cpu = on_cuda(small, kv_dtype=kv_dtype), small.model(kv_dtype=kv_dtype)
    found, expected = all_logits(cuda, tokens, [9, 3]), all_logits(cpu, tokens, [9, 3])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-7 * np.abs(expected).max())
    assert np.array_equal(all_logits(cuda, tokens, [9, 1, 1, 1]), found)


def test_layers_with_norms_behind_others_on_the_cpu() -> None:
    shape = replace(SMALL, n_layers=3, head_norms=True, extras=(("embedding_scale", 3.0), ("attention_scale", 0.1)))
    small = small_model(shape, Kind("q8", 32))
    tokens = random_tokens(small, 11)
    found, expected = (all_logits(m, tokens, [9, 1, 1]) for m in (on_cuda(small, gpu_layers=2), small.model()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-5 * np.abs(expected).max())


def test_a_window_is_refused_where_it_would_be_felt() -> None:
    window = replace(SMALL, n_layers=3, extras=(("sliding_window", 20), ("sliding_layers", [0])))
    with pytest.raises(
        DeviceError, match="has a sliding_window shorter than its context of 512 tokens, which the CUDA"
    ):
        on_cuda(small_model(window, Kind("f16")))
    check_logits(small_model(window, Kind("f16")), [27, 1, 1], gpu_layers=2)  # the layer that has it is on the CPU
    check_logits(small_model(replace(window, max_seq_len=20), Kind("f16")), [9, 1])


def test_the_attention_factor() -> None:
    small = small_model(Shape(n_layers=1))
    small.config = small.config | {"rope_attention_factor": 1.2}
    check_logits(small, [5])


# ---- the same bits


@pytest.mark.parametrize(("kind", "kv_dtype"), [(Kind("q4", 32), "f16"), (Kind("q8", 64), "q8"), (ORDER_KIND, "f16")])
def test_from_run_to_run_and_in_chunks_of_up_to_eight(kind: Kind, kv_dtype: str) -> None:
    small = small_model(SMALL, kind)
    model, tokens = on_cuda(small, kv_dtype=kv_dtype), random_tokens(small, 27)
    expected = all_logits(model, tokens, [11, *[1] * 16])
    for chunks in ([11, *[1] * 16], [11, 8, 8], [11, 3, 5, 2, 6]):
        assert np.array_equal(all_logits(model, tokens, chunks), expected)
    assert np.array_equal(all_logits(on_cuda(small, kv_dtype=kv_dtype), tokens, [11, 8, 8]), expected)


def test_in_company() -> None:
    """Sequences of different lengths, one to eight at once, some with several tokens a step."""
    small = small_model(SMALL, Kind("q4", 32))
    model = on_cuda(small)
    texts = [random_tokens(small, 14 + i, seed=i) for i in range(8)]
    starts = [len(t) - 6 for t in texts]
    alone = [all_logits(model, t, [s, *[1] * 6]) for t, s in zip(texts, starts, strict=True)]
    for n in (2, 3, 8):
        sequences = [model.sequence() for _ in range(n)]
        for sequence, text, start in zip(sequences, texts, starts, strict=False):
            model.step([(sequence, text[:start], None, "none")])
        for i in range(3):
            rows = step_logits(
                model, [(q, t[s + i : s + i + 1]) for q, t, s in zip(sequences, texts, starts, strict=False)]
            )
            for row, expected, start in zip(rows, alone, starts, strict=False):
                assert np.array_equal(row[0], expected[start + i])
    one, other = model.sequence(), model.sequence()
    model.step([(one, texts[0][:8], None, "none")])
    model.step([(other, texts[1][:9], None, "none")])
    found = step_logits(model, [(one, texts[0][8:13]), (other, texts[1][9:12])])
    assert np.array_equal(found[0], alone[0][8:13]) and np.array_equal(found[1], alone[1][9:12])


def test_replayed_steps_equal_launched_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_model(SMALL, Kind("q4a", 32, "f16", "f16"))
    tokens = random_tokens(small, 30)
    chunks = [12, *[1] * 8, 2, 2, 2, 4]
    replayed = all_logits(on_cuda(small), tokens, chunks)
    monkeypatch.setenv("PYLLAMA_CUDA_GRAPHS", "0")
    assert np.array_equal(all_logits(on_cuda(small), tokens, chunks), replayed)
    monkeypatch.setenv("PYLLAMA_CUDA_GRAPHS", "perhaps")
    with pytest.raises(ValueError, match="PYLLAMA_CUDA_GRAPHS=perhaps: expected 0 or 1"):
        on_cuda(small)


def test_guesses_change_nothing() -> None:
    """Right and wrong guesses, verified in steps of several tokens, give the tokens of plain decoding."""
    small = small_model(SMALL, Kind("q4", 32))
    model, prompt = on_cuda(small), random_tokens(small, 11)
    sampler = _C.Sampler(temperature=0.8, seed=5)
    plain = model.sequence()
    result = model.step([(plain, prompt, sampler, "none")], n_more=15)[0]
    expected = [s.token for s in result.samples]
    guessed = model.sequence()
    tokens = [model.step([(guessed, prompt, sampler, "none")])[0].token]
    while len(tokens) < 12:
        n = len(tokens)
        guesses = expected[n : n + 3]
        if n % 2:  # the second one is wrong
            guesses[1] = (guesses[1] + 1) % small.shape.vocab_size
        tokens += [s.token for s in model.step([(guessed, [tokens[-1], *guesses], sampler, "none", 3)])[0].samples]
    assert tokens == expected[: len(tokens)]


SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 6},
]


def test_tokens_drawn_on_the_device_are_the_samplers() -> None:
    """In one step, alone and together, drawn on the device and, where a log-probability is wanted, on the host."""
    small = small_model(SMALL, Kind("q4", 32))
    model, prompt = on_cuda(small), random_tokens(small, 11)

    def generate(samplers: list[Any]) -> list[list[int]]:
        items = [(model.sequence(), prompt[i:], sampler, "none") for i, sampler in enumerate(samplers)]
        return [[s.token for s in result.samples] for result in model.step(items, n_more=11)]

    on_host = generate([_C.Sampler(**s, logprobs=0) for s in SAMPLERS])
    assert generate([_C.Sampler(**s) for s in SAMPLERS]) == on_host
    assert generate([_C.Sampler(**SAMPLERS[0])]) == on_host[:1]
    one_reports = [_C.Sampler(**s, logprobs=0 if i == 1 else -1) for i, s in enumerate(SAMPLERS)]
    assert generate(one_reports) == on_host  # all on the host
    assert len({tuple(tokens) for tokens in on_host}) == 3


def test_logits_that_are_not_finite_end_the_step() -> None:
    """Told as by the CPU, also where the logits stay on the device; nothing of the step counts."""
    small = small_model(SMALL, Kind("q4", 32))
    spec = TensorSpec("norm", "f32", (SMALL.dim,))
    broken = dense(spec, np.full(SMALL.dim, np.nan, np.float32))
    small.weights["norm"] = native_weight(spec, broken)
    model = on_cuda(small)
    sequence = model.sequence()
    with pytest.raises(ModelFormatError, match="logits are not finite at position 2"):
        model.step([(sequence, [1, 2, 3], _C.Sampler(), "none")])
    assert sequence.n_past == 0


def test_a_prompt_with_logits_and_drawn_tokens_beside_each_other() -> None:
    small = small_model(SMALL, Kind("q8", 32))
    model, tokens = on_cuda(small), random_tokens(small, 20)
    drawn = model.step([(model.sequence(), tokens, _C.Sampler(temperature=0.0), "none")])[0]
    seen = model.step([(model.sequence(), tokens, _C.Sampler(temperature=0.0), "last")])[0]
    assert drawn.logits is None and drawn.token == seen.token == int(np.argmax(seen.logits))


def test_forks_and_truncated_sequences() -> None:
    """Shared pages, pages copied when somebody writes into them, and positions written twice."""
    small = small_model(SMALL, Kind("q4", 32))
    model, tokens = on_cuda(small), random_tokens(small, 80)
    expected = all_logits(model, tokens, [32, 32, 8, *[1] * 8])
    trunk = model.sequence()
    for start in (0, 32):
        model.step([(trunk, tokens[start : start + 32], None, "none")])
    model.step([(trunk, tokens[64:72], None, "none")])
    branch = trunk.fork(72)
    model.step([(branch, [1, 2, 3], None, "none")])
    whole_pages = trunk.fork(64)
    assert np.array_equal(step_logits(model, [(whole_pages, tokens[64:72])])[0], expected[64:72])
    for i in range(72, 75):
        assert np.array_equal(step_logits(model, [(trunk, tokens[i : i + 1])])[0][0], expected[i])
    branch.truncate(72)
    for i in range(72, 80):
        assert np.array_equal(step_logits(model, [(branch, tokens[i : i + 1])])[0][0], expected[i])


def test_steps_without_logits() -> None:
    small = small_model(SMALL, Kind("q4", 32))
    model, tokens = on_cuda(small), random_tokens(small, 20)
    expected = all_logits(model, tokens, [12, *[1] * 8])
    sequence = model.sequence()
    model.step([(sequence, tokens[:12], None, "none")])
    for i in range(12, 19):  # launched, recorded, replayed
        model.step([(sequence, tokens[i : i + 1], None, "none")])
    assert np.array_equal(step_logits(model, [(sequence, tokens[19:])])[0][0], expected[19])


@pytest.mark.many_blocks
def test_more_shapes_than_graphs_are_kept() -> None:
    """The least recently used are made anew."""
    small = small_model(Shape(dim=33, hidden_dim=31, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=17, n_layers=1))
    model = on_cuda(small)
    tokens = random_tokens(small, 8)
    expected = all_logits(model, tokens, [8])

    def run(sizes: tuple[int, ...]) -> None:
        sequences = [model.sequence() for _ in sizes]
        rows = step_logits(model, [(q, tokens[:n]) for q, n in zip(sequences, sizes, strict=True)])
        for row, n in zip(rows, sizes, strict=True):
            assert np.array_equal(row, expected[:n])

    shapes = [(a, b) for a in range(1, 5) for b in range(1, 5) if a >= b] + [(n, 1, 1) for n in range(1, 7)]
    shapes += [(n,) for n in range(1, 9)] + [(n, 2, 1) for n in range(2, 6)] + [(n, 1, 1, 1) for n in range(1, 6)]
    assert len(set(shapes)) > 32
    for _ in range(2):
        for sizes in shapes:
            run(sizes)
    for sizes in shapes[-3:]:  # replayed
        run(sizes)


def test_in_all_thread_orders(emulated: Emulated) -> None:
    small = small_model(SMALL, Kind("q4a", 64, "bf16", "bf16"))
    tokens = random_tokens(small, 13)
    emulated.in_all_orders(lambda: all_logits(on_cuda(small), tokens, [10, 1, 1, 1]))


# ---- some of the layers


def test_the_last_layers_of_a_model() -> None:
    """Embedding and first layers on the CPU: the device's part has no embedding, and takes x in its place."""
    small = small_model(Shape(n_layers=3, tied=True, biases=True), Kind("f16"))
    tokens = random_tokens(small, 20)
    expected = exact(small).logits(tokens)
    for gpu_layers in (1, 2):
        model = on_cuda(small, gpu_layers=gpu_layers)
        found = all_logits(model, tokens, [12, *[1] * 8])
        np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-7 * np.abs(expected).max())
        assert np.array_equal(all_logits(model, tokens, [12, 8]), found)


# ---- what a model says of itself


def test_a_model_says_where_it_runs() -> None:
    model = on_cuda(small_model(SMALL, Kind("q4", 32)))
    assert model.backend == "cuda emulated" or (ON_DEVICE and model.backend.startswith("cuda sm_"))
    assert model.page_bytes == 64 * 32 * 2 * 2 * SMALL.n_kv_heads * SMALL.n_layers  # head_dim 16 takes 32 places
    assert model.max_batch_tok == 32 and model.pages_in_use == 0


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_it_takes_what_it_says(cuda_library: Path, kv_dtype: str) -> None:
    """Memory that is gone after opening, and for a page, against `model_sizes`; a real device rounds it up."""
    if ON_DEVICE:
        pytest.skip("only in the emulation: memory is given out to the byte")

    def free_bytes() -> int:
        return int(_C.cuda.devices(str(cuda_library))[0]["free_bytes"])

    for shape in (Shape(tied=True, biases=True), Shape(head_norms=True)):
        small = small_model(shape, Kind("q4", 32), kinds={"wv": Kind("q8", 32), "w_up": Kind("f16")})
        sizes = _C.cuda.model_sizes(small.config, small.weights, max_batch_tok=32, kv_dtype=kv_dtype)
        assert (
            sizes["weights"]
            == sizes["embedding"] + sizes["layers"] + sizes["head"] * (not shape.tied) + 512 * shape.tied
        )
        before = free_bytes()
        model = on_cuda(small, kv_dtype=kv_dtype)
        inputs = 8 * 4 * 3 + 8 * 48 + 8 * 16 + 8 * 8 + 8 * 8 * 8 + shape.head_dim // 2 * 4
        assert before - free_bytes() == sizes["weights"] + sizes["buffers"] + inputs
        assert sizes["page"] == model.page_bytes
        del model
        assert before == free_bytes()


def test_profile_tells_where_the_time_goes() -> None:
    small = small_model(SMALL, Kind("q4", 32))
    model, tokens = on_cuda(small), random_tokens(small, 16)
    expected = all_logits(model, tokens, [10, *[1] * 6])
    assert set(model.profile(True).values()) == {0.0}
    assert np.array_equal(all_logits(model, tokens, [10, *[1] * 6]), expected)
    times = model.profile(False)
    assert all(seconds > 0 for seconds in times.values())
    assert np.array_equal(all_logits(model, tokens, [10, *[1] * 6]), expected)
    assert set(model.profile(False).values()) == {0.0}
