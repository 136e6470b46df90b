"""What fuzzing found (`make fuzz`), one test per defect: files that once raised something else than ModelFormatError.

Defects that somebody thought of: test_hostile_files.py, test_hostile_models.py, test_hostile_torch.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyllama.chat_template import ChatTemplate
from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import TensorSpec
from pyllama.tokenizer import Tokenizer
from quantize.readers import open_source
from tests import make_sources as make
from tests.helpers_hostile import SMALL, WEIGHTS, refused
from tests.helpers_tokenizer import train_sentencepiece, write_folder


def test_a_key_that_does_not_print(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0, "fac\x1b[31mtor\n": 2.0}
    folder = make.write_hf_folder(tmp_path / "m", SMALL, WEIGHTS, rope_scaling=scaling)
    with pytest.raises(ModelFormatError, match=r"fac\\x1b\[31mtor\\n: is not known") as caught:
        open_source(folder)
    assert str(caught.value).isprintable()


def test_a_librarys_words_that_do_not_print(tmp_path: Path) -> None:
    document = json.loads(make.small_tokenizer_json()) | {"version": "\x1b\n"}
    folder = write_folder(tmp_path / "m", {"tokenizer.json": document})
    refused(Tokenizer.from_folder, folder / ".." / "m", r"tokenizers library cannot open it.*\\x1b\\n")


def test_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    config = {"mask_token": "<\ud800>", "pad_token": "😀"}
    folder = write_folder(
        tmp_path / "m", {"tokenizer.json": make.small_tokenizer_json(), "tokenizer_config.json": config}
    )
    refused(Tokenizer.from_folder, folder, r"tokenizer_config.json: holds half of a surrogate pair")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "😀"}))
    Tokenizer.from_folder(folder)


def test_a_piece_that_is_not_utf8(tmp_path: Path) -> None:
    proto = train_sentencepiece(500).replace(b"<think>", b"<thin\xae>", 1)
    folder = write_folder(tmp_path / "m", {"tokenizer.model": proto})
    refused(Tokenizer.from_folder, folder, r"tokenizer.model: a piece is not valid UTF-8")


def test_a_template_whose_refusal_does_not_print() -> None:
    template = ChatTemplate("{{ raise_exception('\\x1b[31m' ~ 'a' * 9000) }}")
    with pytest.raises(ValueError, match=r"refuses these messages: \\x1b\[31ma") as caught:
        template.render([{"role": "user", "content": "Hi"}])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_template_whose_block_gives_no_text() -> None:
    template = ChatTemplate("{% call(u) dict(a=messages) %}{% endcall %}")
    with pytest.raises(ModelFormatError, match="a block gives a dict"):
        template.render([{"role": "user", "content": "Hi"}])


def test_a_long_list_where_a_number_belongs(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    changes = {"rope_scaling": scaling, "original_max_position_embeddings": ["a" * 50] * 100}
    folder = make.write_hf_folder(tmp_path / "m", SMALL, WEIGHTS, **changes)
    with pytest.raises(ModelFormatError, match="is 32 in rope_scaling, but") as caught:
        open_source(folder)
    assert len(str(caught.value)) < 1000


def test_a_long_list_as_the_name_of_a_format() -> None:
    with pytest.raises(ModelFormatError, match="x: unknown format") as caught:
        TensorSpec.from_metadata("x", json.dumps({"format": ["a" * 50] * 30, "shape": [4]}))
    assert len(str(caught.value)) < 1000


def test_a_template_whose_name_is_a_list(tmp_path: Path) -> None:
    named = [{"name": [], "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = write_folder(tmp_path / "m", {"tokenizer_config.json": {"chat_template": named}})
    with pytest.raises(ModelFormatError, match=r"no template named default, only ..tool_use"):
        ChatTemplate.from_folder(folder)


def test_text_that_a_vocabulary_has_no_token_for(tmp_path: Path) -> None:
    """The library notices a missing unk_token when it is needed."""
    document = json.loads(make.small_tokenizer_json())
    document["model"]["unk_token"] = "<none>"
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "m", {"tokenizer.json": document}))
    with pytest.raises(ModelFormatError, match=r"tokenizer.json: the tokenizers library cannot encode 'b'"):
        tokenizer.encode("b")


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "continuing\\u005fsubword_prefix"])
def test_a_prefix_that_cuts_characters_in_two(tmp_path: Path, key: str) -> None:
    """The library ended the process."""
    document = json.loads(make.small_tokenizer_json())
    document["model"]["vocab"] |= {"é": 4, "]é": 5, "a]é": 6}
    document["model"] |= {"merges": [["a", "é"]], "continuing_subword_prefix": "]"}
    text = json.dumps(document).replace("continuing_subword_prefix", key)
    folder = write_folder(tmp_path / "m", {"tokenizer.json": text})
    with pytest.raises(ModelFormatError, match=r"tokenizer.json: continuing_subword_prefix is set"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text(text.replace('"]"', '""'))
    with pytest.raises(ModelFormatError, match=r"merge|vocabulary"):
        Tokenizer.from_folder(folder)
