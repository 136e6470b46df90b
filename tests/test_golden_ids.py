"""Token ids kept beside a converted model: made at conversion, compared at opening, for every kind of vocabulary."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pyllama.common.errors import ModelFormatError
from pyllama.open import load_folder
from pyllama.tokenizer import Tokenizer
from pyllama.tokenizer.golden import GOLDEN_FILE, TEXTS, check_golden_ids
from quantize import convert, verify
from quantize.golden import golden_files
from quantize.readers.gguf_vocab import tokenizer_files
from tests import make_sources as make
from tests.helpers_tokenizer import bpe_metadata, sentencepiece_metadata, train_bpe, train_sentencepiece, write_folder

SHAPE = make.Shape(vocab_size=900)


@pytest.fixture(scope="module")
def bpe() -> dict[str, bytes]:
    return tokenizer_files(bpe_metadata(train_bpe("llama3"), "llama3"))


@pytest.fixture(scope="module")
def spm() -> dict[str, bytes]:
    return tokenizer_files(sentencepiece_metadata(train_sentencepiece(900)))


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_ids_are_those_of_the_opened_folder(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """What conversion says from files in memory is what the folder says, config.json's part in it included."""
    files = request.getfixturevalue(kind)
    config = SHAPE.config()
    made = golden_files(files, config, "source")
    folder = write_folder(tmp_path / "model", {**files, **made, "config.json": config})
    tokenizer = Tokenizer.from_folder(folder)
    document = json.loads(made[GOLDEN_FILE])
    assert tuple(document["texts"]) == TEXTS and len(TEXTS) >= 24 and len(set(TEXTS)) == len(TEXTS)
    assert document["ids"] == [tokenizer.encode(text, parse_special=True) for text in TEXTS]
    check_golden_ids(tokenizer, folder)


def test_a_converted_model_is_checked_when_it_is_opened(tmp_path: Path, bpe: dict[str, bytes]) -> None:
    source = make.write_hf_folder(tmp_path / "hf", SHAPE, make.random_weights(SHAPE))
    write_folder(source, dict(bpe))
    out = convert(source, tmp_path / "out", format="q8")
    verify(out)
    load_folder(out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    kept = tokenizer["pre_tokenizer"]
    tokenizer["pre_tokenizer"] = json.loads(train_bpe("gpt-2").to_str())["pre_tokenizer"]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelFormatError, match="does not give the ids that the model was converted with") as caught:
        load_folder(out)
    assert "golden_ids.json" in str(caught.value) and "convert the model again" in str(caught.value)
    tokenizer["pre_tokenizer"] = kept
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    load_folder(out)
    (out / GOLDEN_FILE).unlink()  # a folder of before
    load_folder(out)


def test_a_tokenizer_that_cannot_be_opened_stops_the_conversion(tmp_path: Path) -> None:
    source = make.write_hf_folder(tmp_path / "hf", SHAPE, make.random_weights(SHAPE))
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelFormatError, match="the tokenizers library cannot open it"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_without_a_library_nothing_is_kept(bpe: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith("pyllama.tokenizer.hf"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert golden_files(bpe, SHAPE.config(), "source") == {}
    assert golden_files({"chat_template.jinja": b"x"}, SHAPE.config(), "source") == {}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "expected two lists"),
        ({"texts": ["a"], "ids": []}, "expected two lists"),
        ({"texts": [], "ids": []}, "expected two lists"),
        ({"texts": "a", "ids": [[1]]}, "expected two lists"),
        ({"texts": ["a"] * 2000, "ids": [[1]] * 2000}, "at most 1000"),
        ({"texts": [3], "ids": [[1]]}, "expected a string to tokenize"),
        ({"texts": ["\ud800"], "ids": [[1]]}, "half of a surrogate pair"),
        ({"texts": ["a"], "ids": [["1"]]}, "does not give the ids"),
        ({"texts": ["a"], "ids": [None]}, "does not give the ids"),
    ],
)
def test_damaged_golden_ids(tmp_path: Path, bpe: dict[str, bytes], document: Any, message: str) -> None:
    tokenizer = Tokenizer.from_files({**bpe, "config.json": json.dumps(SHAPE.config()).encode()}, "model")
    write_folder(tmp_path, {GOLDEN_FILE: document})
    with pytest.raises(ModelFormatError, match=message) as caught:
        check_golden_ids(tokenizer, tmp_path)
    assert "golden_ids.json" in str(caught.value) and str(caught.value).isprintable()


def test_files_in_memory_are_bounded_as_files_are(bpe: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllama.tokenizer.VOCABULARY_LIMIT_BYTES", 10)
    with pytest.raises(ModelFormatError, match=r"tokenizer.json: vocabulary of \d+ bytes, at most 10 are allowed"):
        Tokenizer.from_files(bpe, "model")
