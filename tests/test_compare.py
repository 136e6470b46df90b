"""`quantize compare` against numbers worked out here in float64, and what it says to requests that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama import LLM
from pyllama.common.errors import QuantizeError
from pyllama.common.formats import dequantize, unpack
from pyllama.common.model_folder import read_model_folder
from quantize import convert
from quantize.cli import main
from quantize.compare import Comparison, Divergence, compare
from quantize.plots import svg_of
from quantize.readers import open_source
from tests import make_sources as make
from tests.make_sources import Shape

SHAPE = Shape(dim=48, hidden_dim=96, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=16, vocab_size=45)
TEXT = "".join(ascii_lowercase[i * i % 26] for i in range(1000))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "source"
    make.write_hf_folder(folder, SHAPE, make.random_weights(SHAPE), dtype="F32")
    tokenizer = json.loads(make.small_tokenizer_json())
    tokenizer["model"]["vocab"] = {letter: i for i, letter in enumerate(["<unk>", "<s>", "</s>", *ascii_lowercase])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return folder


@pytest.fixture(scope="module")
def small(source: Path) -> Path:
    return convert(source, source.parent / "q4", format="q4")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "compare-cache"))


def log_probabilities(model: Path, chunks: list[list[int]], format: str | None = None) -> list[NDArray[np.float64]]:
    with LLM(model, format=format) as llm:
        logits = [llm.logits(chunk)[:-1].astype(np.float64) for chunk in chunks]
    return [x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logits]


def test_the_numbers_are_those_of_their_definitions(source: Path, small: Path) -> None:
    (found,) = compare([small], source, TEXT)
    with LLM(small) as llm:
        ids, opening = llm.tokenizer.encode(TEXT, add_special=False), llm.tokenizer.encode("")
    step = 128 - len(opening)  # 128 is the model's context
    chunks = [opening + ids[at : at + step] for at in range(0, len(ids), step)]
    chunks = [chunk for chunk in chunks if len(chunk) > 16]
    assert len(chunks) > 1  # or there would be no error to compare
    p, q = log_probabilities(source, chunks, "f32"), log_probabilities(small, chunks)
    kl = [(np.exp(a) * (a - b)).sum(axis=1) for a, b in zip(p, q, strict=True)]
    own = [[x[np.arange(len(x)), chunk[1:]] for x, chunk in zip(side, chunks, strict=True)] for side in (p, q)]
    all_kl, all_p, all_q = (np.concatenate(part) for part in (kl, *own))
    divergence = found.divergence
    assert divergence.n_tokens == len(all_kl) == sum(map(len, chunks)) - len(chunks)
    for mine, expected in (
        (divergence.kl_mean, all_kl.mean()),
        (divergence.kl_median, np.median(all_kl)),
        (divergence.kl_99, np.quantile(all_kl, 0.99)),
        (divergence.kl_999, np.quantile(all_kl, 0.999)),
        (divergence.perplexity_reference, np.exp(-all_p.mean())),
        (divergence.perplexity, np.exp(-all_q.mean())),
        (divergence.perplexity_ratio, np.exp((all_p - all_q).mean())),
        (divergence.rms_dp, np.sqrt(((np.exp(all_p) - np.exp(all_q)) ** 2).mean())),
        (divergence.top1, np.mean(np.concatenate(p).argmax(1) == np.concatenate(q).argmax(1))),
    ):
        assert mine == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert divergence.kl_mean > 0
    assert 0 < divergence.kl_error < divergence.kl_mean


def test_an_errors_size_is_that_of_resampled_chunks() -> None:
    from quantize.compare import _standard_error

    rng = np.random.default_rng(3)
    chunks = [rng.normal(rng.normal(), 1, int(rng.integers(50, 80))) for _ in range(60)]
    sums, sizes = np.array([chunk.sum() for chunk in chunks]), np.array([len(chunk) for chunk in chunks])
    drawn = rng.integers(0, 60, (4000, 60))
    bootstrap = (sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)).std()
    assert _standard_error(chunks) == pytest.approx(bootstrap, rel=0.06)
    assert np.isnan(_standard_error(chunks[:1]))


def test_tensors_errors_are_those_of_their_weights(source: Path, small: Path) -> None:
    (found,) = compare([small], source, TEXT, max_tokens=40)
    tensors, stored = open_source(source).tensors, read_model_folder(small).tensors
    assert {error.name for error in found.tensors} == {name for name, t in stored.items() if not t.spec.is_vector}
    for error in found.tensors:
        wanted = tensors[error.name].read().astype(np.float64)
        made = dequantize(stored[error.name].spec, unpack(stored[error.name].spec, stored[error.name].payload()))
        assert error.relative == pytest.approx(((wanted - made) ** 2).sum() / (wanted**2).sum(), rel=1e-9)
        assert 1e-4 < error.relative < 0.05


def test_a_model_does_not_differ_from_itself(small: Path) -> None:
    (found,) = compare([small], small, TEXT, max_tokens=100)
    assert found.divergence.kl_mean == 0
    assert found.divergence.top1 == 1
    assert found.divergence.perplexity_ratio == 1
    assert not any(error.relative for error in found.tensors)


def test_the_command_prints_json_and_draws(
    source: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, other = tmp_path / "text", convert(source, tmp_path / "q8", format="q8")
    text.write_text(TEXT)
    command = ["compare", str(small), str(other), "--reference", str(source), "--text", str(text), "--tokens", "200"]
    assert main([*command, "--json", "--svg", str(tmp_path / "curve.svg")]) == 0
    four, eight = json.loads(capsys.readouterr().out)
    assert eight["divergence"]["kl_mean"] < four["divergence"]["kl_mean"]
    assert eight["bits_per_weight"] > four["bits_per_weight"]
    texts = [element.text for element in ElementTree.parse(tmp_path / "curve.svg").iter() if element.text]
    assert {"q4", "q8", "bits per weight"} <= set(texts)
    assert main([*command[:2], *command[3:], "--svg", str(tmp_path / "layers.svg")]) == 0
    assert "KL divergence" in capsys.readouterr().out
    texts = [element.text for element in ElementTree.parse(tmp_path / "layers.svg").iter() if element.text]
    assert {"wq", "w_down", "layer"} <= set(texts)


def test_requests_that_make_no_sense_are_refused(source: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="fewer than two tokens"):
        compare([small], source, "")
    with pytest.raises(QuantizeError, match="no model folder"):
        compare([source], source, TEXT)
    shape = Shape(dim=48, hidden_dim=96, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=16, vocab_size=46)
    make.write_hf_folder(tmp_path / "other", shape, make.random_weights(shape), dtype="F32")
    (tmp_path / "other" / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    with pytest.raises(QuantizeError, match="another than the reference's"):
        compare([convert(tmp_path / "other", tmp_path / "made")], source, TEXT)


def test_a_text_that_is_none_is_refused(
    source: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    assert main(["compare", str(small), "--reference", str(source), "--text", str(tmp_path / "text")]) == 1
    assert "no text in UTF-8" in capsys.readouterr().err


def test_a_model_without_a_divergence_has_no_place_in_the_picture() -> None:
    def compared(name: str, kl: float) -> Comparison:
        divergence = Divergence(9, kl, *[0.0] * 10)
        return Comparison(name, "r", "f32", 4.5, 100, divergence, ())

    picture = svg_of([compared("sound", 0.1), compared("broken", float("nan")), compared("lost", float("inf"))])
    texts = [element.text for element in ElementTree.fromstring(picture).iter() if element.text]
    assert "sound" in texts and not {"broken", "lost"} & set(texts)
    nothing = svg_of([compared("broken", float("nan"))] * 2)
    assert "nothing to show" in nothing
