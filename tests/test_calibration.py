"""Conversions that run texts through the model: which texts, what is summed up, in which order, and going on.

The proof of "true-sequential" is a fixed point: in the finished model every product's input, computed anew from the
model's own weights, gives the statistics under which its matrix was quantized, and so its very codes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama import _C, LLM
from pyllama.common.errors import QuantizeError
from pyllama.common.formats import Packed, TensorSpec, dequantize, unpack
from pyllama.common.model_folder import read_model_folder
from pyllama.open import load_folder
from pyllama.tokenizer import Tokenizer
from quantize import convert, make_plan, verify
from quantize.calibration import bytes_needed, gather
from quantize.calibration_texts import Calibration, Texts, read_texts
from quantize.cli import main
from quantize.methods import METHODS, Method, Statistics, quantize_imatrix, quantize_rtn
from quantize.readers import open_source
from tests import make_sources as make
from tests.make_sources import Shape
from tests.test_convert_kernels import same_bits
from tests.test_quantize import listing
from tests.test_quantize_resume import names, stopped_at
from tests.test_rtn import values_of

SHAPE = Shape(vocab_size=259, max_seq_len=256, biases=True)
TOKENS = 600
STAGES = (("wq", "wk", "wv"), ("wo",), ("w_gate", "w_up"), ("w_down",))
Floats = NDArray[np.float32]


def byte_tokenizer() -> bytes:
    """A tokenizer with a token for each byte behind three special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + at) for at, byte in enumerate(b for b in range(256) if b not in letters)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letters[byte]: 3 + byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = [
        {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    document = {"version": "1.0", **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))}
    document |= {"added_tokens": special, "pre_tokenizer": level, "decoder": level}
    return json.dumps(document | {"model": {"type": "BPE", "vocab": vocab, "merges": []}}).encode()


def write_source(
    folder: Path, shape: Shape = SHAPE, config: str = '{"bos_token": "<s>", "add_bos_token": true}'
) -> Path:
    make.write_hf_folder(folder, shape, make.random_weights(shape), dtype="BF16")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    (folder / "tokenizer_config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "hf")


def options(**changes: Any) -> dict[str, Any]:
    return {"format": "q4", "method": "imatrix", "calibration_tokens": TOKENS} | changes


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("whole") / "model", **options())


def texts_of(source: Path, name: str = "mix", tokens: int = TOKENS) -> Texts:
    opened = open_source(source)
    return read_texts(
        Calibration(name, tokens), opened.tokenizer_files(), opened.config, "here", lambda path: path, Path()
    )


# ---- the fixed point -------------------------------------------------------------------------------------------------


def products_of(folder: Path, texts: Texts) -> dict[str, Floats]:
    """What each product of a model reads of some texts, from a matrix's name; behind a "+", what it is added to."""
    opened = load_folder(folder)
    config, weights, convert = opened.native_config(max(texts.lengths)), opened.weights, _C.convert
    table = read_model_folder(folder).tensors["tok_embeddings"]
    x = dequantize(table.spec, unpack(table.spec, table.payload()))[np.concatenate(texts.ids)]
    x *= np.float32(config.get("embedding_scale") or 1)
    eps, found = config["norm_eps"], {}
    for layer in range(config["n_layers"]):
        of = {name.split(".")[2]: weight for name, weight in weights.items() if name.startswith(f"layers.{layer}.")}
        first = {role: of[role] for role in ("attn_norm", "wq", "wk", "wv", "bq", "bk", "bv") if role in of}
        inputs = [convert.norm(of["attn_norm"], eps, x), convert.attention(config, layer, first, x, texts.lengths)]
        found[f"+layers.{layer}.wo"] = x.copy()
        convert.add_product(of["wo"], inputs[1], x)
        found[f"+layers.{layer}.w_down"] = x.copy()
        inputs.append(convert.norm(of["mlp_norm"], eps, x))
        inputs.append(convert.mlp(config, {role: of[role] for role in ("mlp_norm", "w_gate", "w_up")}, x))
        convert.add_product(of["w_down"], inputs[3], x)
        found |= {f"layers.{layer}.{role}": rows for roles, rows in zip(STAGES, inputs, strict=True) for role in roles}
    found["output"] = convert.norm(weights["norm"], eps, x)
    return found


def packed_of(folder: Path, name: str) -> Packed:
    tensor = read_model_folder(folder).tensors[name]
    return unpack(tensor.spec, tensor.payload())


def quantized_again(source: Path, name: str, rows: Floats, format: str) -> Packed:
    """A matrix of the source under the statistics of its input."""
    weights = open_source(source).tensors[name].read()
    return quantize_imatrix(weights, format, 32, None, gather([rows], rows.shape[1]))


@pytest.mark.parametrize("format", ["q4", "q8", "q4a", "q4nl"])
def test_statistics_are_those_of_the_finished_model(format: str, source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "model", **options(format=format))
    verify(out)
    for name, rows in products_of(out, texts_of(source)).items():
        if not name.startswith("+"):
            same_bits(packed_of(out, name), quantized_again(source, name, rows, format))
    embeddings = quantize_rtn(open_source(source).tensors["tok_embeddings"].read(), format, 32)
    same_bits(packed_of(out, "tok_embeddings"), embeddings)
    plain = convert(source, tmp_path / "rtn", format=format)
    assert (packed_of(plain, "layers.0.wq").codes != packed_of(out, "layers.0.wq").codes).any()


def test_matrices_that_are_not_quantized(source: Path, tmp_path: Path) -> None:
    """Dense ones and others between quantized ones: the states go through all of them."""
    rules = [("w_up|wo|embeddings", "f32"), ("w_gate", "q8"), ("layers.1.wq", "bf16")]
    out = convert(source, tmp_path / "model", **options(tensor_types=rules))
    found = products_of(out, texts_of(source))
    for name in ("layers.1.w_down", "layers.1.wv", "output"):
        same_bits(packed_of(out, name), quantized_again(source, name, found[name], "q4"))


def test_a_tied_matrix_has_the_head_s_statistics(tmp_path: Path) -> None:
    shape = replace(SHAPE, tied=True, n_layers=1)
    source = write_source(tmp_path / "hf", shape)
    out = convert(source, tmp_path / "model", **options(tensor_types=[("layers", "f32")]))
    verify(out)
    # The layer is f32, so x can be had from a model whose table is rtn's, as it is while the statistics are gathered.
    like = convert(source, tmp_path / "like", format="q4", tensor_types=[("layers", "f32")])
    rows = products_of(like, texts_of(source))["output"]
    again = quantized_again(source, "tok_embeddings", rows, "q4")
    same_bits(packed_of(out, "tok_embeddings"), again)
    assert (packed_of(like, "tok_embeddings").codes != again.codes).any()


def test_what_quantization_did_so_far(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model that comes into being goes the original."""
    seen: dict[str, Statistics] = {}

    def probe(weights: Floats, spec: TensorSpec, statistics: Statistics | None) -> Packed:
        assert statistics is not None
        seen[spec.name] = statistics
        return METHODS["rtn"].quantize(weights, spec, None)

    monkeypatch.setitem(METHODS, "probe", Method(probe, "gram"))
    out = convert(source, tmp_path / "model", **options(method="probe"))
    exact = convert(source, tmp_path / "exact", format="f32")
    texts = texts_of(source)
    with_loss, without = products_of(out, texts), products_of(exact, texts)
    assert seen.keys() == {name for name in with_loss if not name.startswith("+")}
    for name, found in seen.items():
        x, other = with_loss[name].astype(np.float64), without[name].astype(np.float64)
        assert found.gram is not None and found.drift is not None
        np.testing.assert_allclose(found.gram, x.T @ x, rtol=0, atol=1e-5 * np.diag(x.T @ x).max())
        drift = (other - x).T @ x
        np.testing.assert_allclose(found.drift, drift, rtol=0, atol=1e-4 * np.abs(drift).max())
        assert (found.ahead is not None) == (f"+{name}" in with_loss)
        if found.ahead is not None:
            residual = (without[f"+{name}"] - with_loss[f"+{name}"]).astype(np.float64).T @ x
            np.testing.assert_allclose(found.ahead, residual, rtol=0, atol=1e-4 * np.abs(residual).max())
    assert np.abs(seen["layers.0.wq"].drift).max() > 0  # of the embeddings
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "again", **options(method="probe", resume=True, progress=stopped_at("layers.0.wo")))
    before = seen.copy()
    again = convert(source, tmp_path / "again", **options(method="probe", resume=True))
    assert listing(again) == listing(out)
    assert all(np.array_equal(seen[name].drift, before[name].drift) for name in seen)


def test_gptq_comes_nearer_to_the_original_and_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    made = {method: convert(source, tmp_path / method, **options(method=method)) for method in ("imatrix", "gptq")}
    verify(made["gptq"])
    texts, exact = texts_of(source), convert(source, tmp_path / "exact", format="f32")
    wanted = products_of(exact, texts)["output"]
    off = {m: float(((products_of(path, texts)["output"] - wanted) ** 2).sum()) for m, path in made.items()}
    assert off["gptq"] < 0.8 * off["imatrix"]
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "again", **options(method="gptq", resume=True, progress=stopped_at("layers.0.wo")))
    assert listing(convert(source, tmp_path / "again", **options(method="gptq", resume=True))) == listing(made["gptq"])


# ---- going on, threads, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [64, 1 << 21])
@pytest.mark.parametrize("stop", ["tok_embeddings", "layers.0.wk", "layers.0.w_gate", "layers.1.wo", "norm"])
def test_a_stopped_calibration_goes_on_to_the_same_bytes(
    stop: str, pages: int, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.writer._HUGE_PAGE_BYTES", pages)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "model", **options(resume=True, progress=stopped_at(stop)))
    assert names(place) == [".model.journal", ".model.partial"]
    seen: list[str] = []
    out = convert(source, place / "model", **options(resume=True, progress=lambda step: seen.append(step.name)))
    order = [item.spec.name for item in make_plan(open_source(source), **options()).tensors]
    assert seen == order[order.index(stop) + 1 :]
    assert listing(out) == listing(whole) and names(place) == ["model"]


def test_threads_blocks_and_memory_change_no_byte(source: Path, whole: Path, tmp_path: Path) -> None:
    plan = make_plan(open_source(source), **options())
    pipeline = import_module("quantize.pipeline")
    for threads in (1, 3):
        assert listing(pipeline.write_plan(plan, tmp_path / f"{threads}", threads=threads)) == listing(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_BLOCK_WEIGHTS", 1)
        assert listing(pipeline.write_plan(plan, tmp_path / "blocks")) == listing(whole)
    enough = pipeline.resident_bytes()[1] + (400 << 20)
    assert listing(convert(source, tmp_path / "bounded", **options(max_memory=enough))) == listing(whole)
    with pytest.raises(QuantizeError, match=r"--max-memory 20 MB: this model needs at least \d+ MB"):
        convert(source, tmp_path / "too-little", **options(max_memory=20_000_000))


def test_memory_that_calibration_takes_is_counted(source: Path) -> None:
    few, many = (make_plan(open_source(source), **options(calibration_tokens=n)) for n in (600, 100_600))
    row = 4 * (SHAPE.dim + SHAPE.hidden_dim)
    assert bytes_needed(many) - bytes_needed(few) == 100_000 * row
    assert bytes_needed(make_plan(open_source(source), format="q4")) == 0
    held = {}
    for layer in (0, 1):  # whichever is the largest
        plan = make_plan(open_source(source), **options(tensor_types=[(rf"layers\.{layer}\.w", "f32")]))
        held[layer] = bytes_needed(plan)
    assert held[0] == held[1] > bytes_needed(few) + SHAPE.dim * SHAPE.hidden_dim


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_sums_are_exact_enough_and_do_not_depend_on_pieces() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1000, 40)) * np.exp(rng.standard_normal(40) * 3)).astype(np.float32)
    wide = x.astype(np.float64)
    found = gather([x[:512], x[512:]], 40, [x[:512], x[512:]])
    assert found.n == 1000 and found.gram is not None
    np.testing.assert_allclose(found.square_sums, (wide * wide).sum(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.mean_squares, (wide * wide).mean(axis=0), rtol=1e-13)
    size = np.sqrt(np.diag(wide.T @ wide))
    assert (np.abs(found.gram - wide.T @ wide) < 1e-5 * np.outer(size, size)).all()
    assert np.array_equal(found.gram, found.gram.T)
    assert gather([x], 40).gram is None


def test_what_blocks_share_is_made_once() -> None:
    statistics, made = Statistics(1, np.ones(3)), []

    def make_it() -> int:
        made.append(1)
        return 7

    assert [statistics.once("a", make_it), statistics.once("a", make_it), statistics.once("b", make_it)] == [7] * 3
    assert len(made) == 2


def test_the_search_minimizes_what_it_is_asked_to() -> None:
    """Σ E[x²]·(w − q)² is below that of plain rounding for nearly every row, and far below in sum."""
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((64, 256)).astype(np.float32)
    h = np.exp(2 * rng.standard_normal(256))
    statistics = Statistics(10, 10 * h)
    for format in ("q8", "q4", "q4a", "q4nl"):
        error = [
            ((values_of(packed, format, 32) - weights.astype(np.float64)) ** 2 @ h)
            for packed in (
                quantize_rtn(weights, format, 32),
                quantize_imatrix(weights, format, 32, None, statistics),
            )
        ]
        assert (error[1] <= error[0] * 1.02).mean() > 0.98
        assert error[1].sum() < (0.97 if format == "q8" else 0.85) * error[0].sum()


def test_columns_that_count_alike_are_plain_rounding() -> None:
    weights = np.random.default_rng(4).standard_normal((32, 96)).astype(np.float32)
    for format in ("q8", "q4", "q4a", "q4nl"):
        for squares in (np.full(96, 5.0), np.zeros(96)):
            same = quantize_imatrix(weights, format, 64, None, Statistics(5, squares))
            same_bits(same, quantize_rtn(weights, format, 64))


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_the_mix(source: Path) -> None:
    texts = texts_of(source, tokens=16 * 256)
    assert texts.lengths == [256] * 16  # of this model's longest text
    assert all(ids[0] == 1 for ids in texts.ids)
    tokenizer = Tokenizer.from_folder(source)
    assert all(len(tokenizer.decode(ids)) > 60 for ids in texts.ids[:14])
    assert len({int(i) for ids in texts.ids[14:] for i in ids}) > 200  # random tokens
    assert texts_of(source, tokens=16 * 256).record() == texts.record()
    record = texts_of(source, tokens=257).record()
    assert record["name"] == "mix" and record["tokens"] == 512 and len(record["sha256"]) == 64


def test_a_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("αβγ and so on " * 4)
    texts = texts_of(source, str(file), 1000)
    assert [list(ids) for ids in texts.ids] == [Tokenizer.from_folder(source).encode(file.read_text())]
    assert texts.name == "mine.txt"
    file.write_bytes(bytes(range(256)) * 40_000)  # of a large file, windows from all over
    texts = texts_of(source, str(file), 255 * 5)
    assert texts.lengths == [256] * 5
    file.write_text("")
    with pytest.raises(QuantizeError, match="has no text to calibrate with"):
        texts_of(source, str(file))


def test_self(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "model", **options(calibration="self"))
    record = json.loads((out / "config.json").read_text())["quantization"]["calibration"]
    assert record["name"] == "self" and record["tokens"] == 3 * 256
    again = convert(source, tmp_path / "again", **options(calibration="self"))
    assert listing(out) == listing(again)
    assert names(tmp_path) == ["again", "model"]
    with pytest.raises(QuantizeError, match="to sample from the model it is opened whole, 0 MB; calibrate with a file"):
        convert(source, tmp_path / "third", **options(calibration="self", max_memory=1_000_000))
    assert names(tmp_path) == ["again", "model"]
    with LLM(convert(source, tmp_path / "plain"), n_ctx=256) as llm:
        said = [1, *llm.generate([1], max_tokens=255, temperature=1.0, seed=0, ignore_eos=True).token_ids]

    def sample(path: Path) -> Path:
        return convert(source, path)

    opened = open_source(source)
    texts = read_texts(
        Calibration("self", 1), opened.tokenizer_files(), opened.config, "here", sample, tmp_path / "fourth"
    )
    assert [list(ids) for ids in texts.ids] == [said]


@pytest.mark.parametrize("moment", ["written", "half written", "another model"])
def test_what_a_killed_run_sampled_from_is_removed(
    moment: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of nobody's beside each output of each killed run would fill the disk."""
    if moment == "half written":
        (tmp_path / "..model.self.partial").mkdir()
        (tmp_path / "..model.self.partial" / "model.safetensors").write_bytes(b"half")
    else:
        convert(source, tmp_path / ".model.self", format="q8" if moment == "another model" else None)
    out = convert(source, tmp_path / "model", **options(calibration="self"))
    clean = tmp_path / "clean"
    clean.mkdir()
    assert listing(out) == listing(convert(source, clean / "model", **options(calibration="self")))
    assert names(tmp_path) == ["clean", "model"] and names(clean) == ["model"]

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(source, clean / "second", **options(calibration="self"))
    assert names(clean) == ["model"]


def test_config_tells_of_it(whole: Path, source: Path) -> None:
    described = json.loads((whole / "config.json").read_text())["quantization"]
    assert described["method"] == "imatrix" and described["calibration"] == texts_of(source).record()


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    """A tokenizer of 259 tokens, prose uses some 230 of them: random ones come from what the model has."""
    fewer = write_source(tmp_path / "fewer", replace(SHAPE, vocab_size=258))
    texts = texts_of(fewer, tokens=16 * 256)
    assert 200 < max(int(ids.max()) for ids in texts.ids) < 258
    few = write_source(tmp_path / "few", replace(SHAPE, vocab_size=60))
    with pytest.raises(
        QuantizeError, match=r"here: its tokenizer gives token \d+, and the model has 60; is it the right"
    ):
        texts_of(few)
    with pytest.raises(QuantizeError, match=r"its tokenizer gives token \d+, and the model has 60"):
        convert(few, tmp_path / "model", **options())
    assert names(tmp_path) == ["few", "fewer"]


@pytest.mark.parametrize("calibration", ["mix", "self"])
def test_a_model_of_one_token(calibration: str, tmp_path: Path) -> None:
    """No room for a token that opens texts."""
    single = write_source(tmp_path / "single", replace(SHAPE, max_seq_len=1))
    convert(single, tmp_path / "model", **options(calibration=calibration, calibration_tokens=20))
    verify(tmp_path / "model")


# ---- requests that make no sense -------------------------------------------------------------------------------------


def test_refusals(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="method rtn needs no calibration; methods that do are imatrix"):
        convert(source, tmp_path / "model", calibration="mix")
    with pytest.raises(ValueError, match="0 tokens for calibration"):
        convert(source, tmp_path / "model", **options(calibration_tokens=0))
    bare = write_source(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(QuantizeError, match="has no tokenizer, and calibration runs texts; use --method rtn"):
        convert(bare, tmp_path / "model", **options())
    command = [str(source), "-o", str(tmp_path / "model"), "--format", "q4", "--method", "imatrix"]
    assert main([*command, "--calibration", str(tmp_path / "nothing.txt")]) == 1
    assert "nothing.txt" in capsys.readouterr().err
    assert main([*command, "--calibration-tokens", "700", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "imatrix"
    assert names(tmp_path) == ["bare", "model"]


@pytest.mark.parametrize(("method", "largest"), [("imatrix", 3e38), ("gptq", 1e25)])
def test_activations_that_leave_float32_are_refused(method: str, largest: float, tmp_path: Path) -> None:
    """By imatrix, not a number's square would weigh columns, every comparison fails, and most weights become zero."""
    shape = Shape(vocab_size=259, max_seq_len=256)
    weights = make.random_weights(shape)
    weights["layers.0.attn_norm"] = np.full_like(weights["layers.0.attn_norm"], largest)
    make.write_hf_folder(tmp_path / "hf", shape, weights, dtype="F32")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(byte_tokenizer())
    with pytest.raises(QuantizeError, match=r"layers\.0\.wq: its inputs in calibration are not finite, or too large"):
        convert(tmp_path / "hf", tmp_path / "model", **options(method=method))
    assert names(tmp_path) == ["hf"]


def test_every_sum_is_checked() -> None:
    some = np.ones((8, 8), np.float32)
    fine = Statistics(2, np.ones(8), some, some, some)
    fine.check("w")
    for name in ("square_sums", "gram", "drift", "ahead"):
        bad = getattr(fine, name).copy()
        bad[3] = np.nan
        spoilt: dict[str, Any] = {name: bad}
        with pytest.raises(QuantizeError, match="w: its inputs in calibration are not finite"):
            replace(fine, **spoilt).check("w")


def test_without_the_extension(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.kernels.extension", lambda: None)
    with pytest.raises(QuantizeError, match=r"pyllama\._C must be built"):
        convert(source, tmp_path / "model", **options())
    assert names(tmp_path) == []


def test_a_model_that_is_repacked_needs_no_texts(tmp_path: Path) -> None:
    shape = Shape()
    gguf = make.write_gguf(tmp_path / "m.gguf", shape, make.random_weights(shape), "Q4_0")
    out = convert(gguf, tmp_path / "model", method="imatrix")
    assert json.loads((out / "config.json").read_text())["quantization"]["method"] == "repack"


def test_every_method_says_what_it_needs() -> None:
    assert {row.needs for row in METHODS.values()} <= {"", "squares", "gram"}
