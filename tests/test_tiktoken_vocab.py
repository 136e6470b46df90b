"""Llama 3's kind of tokenizer.model: ranks into merges, special tokens, and one test per defect of the file.

Against tiktoken's rule, written down here anew; the real vocabulary is compared in tests/oracles.
"""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama.chat_template import ChatTemplate
from pyllama.common.named_templates import NAMED_TEMPLATES
from pyllama.tokenizer import Tokenizer
from quantize import convert
from quantize.readers import open_source
from quantize.readers.meta import VOCABULARY
from quantize.readers.tiktoken_vocab import MAX_TOKEN_BYTES, TiktokenVocabulary, is_tiktoken
from tests import make_sources as make
from tests.helpers_hostile import refused
from tests.helpers_tokenizer import write_folder
from tests.make_strings import strings
from tests.make_torch import meta_params, meta_shards, write_meta_folder

BYTES = [bytes([byte]) for byte in range(256)]


def ranks_file(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def by_joining(text: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule for one word: whole if it is a token, else join the neighbours of lowest rank, the first."""
    if text in ranks:
        return [ranks[text]]
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(
    st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=25),
    st.lists(st.text("abc", min_size=1, max_size=14), min_size=1, max_size=8),
)
def test_merges_join_as_ranks_do(words: list[str], texts: list[str]) -> None:
    """Also where a token is reached over one of a higher rank, and where joining never reaches it."""
    tokens = BYTES + [word.encode() for word in words]
    vocabulary = TiktokenVocabulary(ranks_file(tokens), len(tokens) + 11, "tokenizer.model", calls_tools=True)
    ours = Tokenizer.from_files(vocabulary.files(), "model")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for text in texts:
        assert ours.encode(text, add_special=False) == by_joining(text.encode(), ranks)


def test_a_folder_of_metas_with_ranks(tmp_path: Path) -> None:
    tokens = BYTES + [b"th", b"the", b" the", "é".encode(), b"\xf0\x9f"]
    shape = make.Shape(vocab_size=len(tokens) + 16)
    params = meta_params(shape, vocab_size=shape.vocab_size, use_scaled_rope=True)
    folder = tmp_path / "Llama3.1-8B-Instruct" / "original"
    folder.parent.mkdir()
    write_meta_folder(folder, params, meta_shards(shape, make.random_weights(shape)))
    (folder / VOCABULARY).write_bytes(ranks_file(tokens))
    config = open_source(folder).config
    begin = len(tokens)
    assert config["bos_token_id"] == begin and config["eos_token_ids"] == [begin + 1, begin + 8, begin + 9]
    out = convert(folder, tmp_path / "out", format="q8")
    ours = Tokenizer.from_folder(out)
    assert ours.bos_id == begin and set(ours.eos_ids) == {begin + 1, begin + 8, begin + 9}
    assert ours.encode("the é", parse_special=True) == [begin, 257, 32, 259]
    assert ours.encode("<|eot_id|>", add_special=False, parse_special=True) == [begin + 9]
    assert ours.encode("<|eot_id|>", add_special=False) == list(b"<|eot_id|>")
    for text in strings(200):
        assert ours.decode(ours.encode(text)) == text
    template = ChatTemplate.from_folder(out)
    assert template is not None
    rendered = template.render([{"role": "user", "content": "Hi"}], True)
    expected = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert rendered == expected + "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("name", "ranks", "template"),
    [
        ("Meta-Llama-3-8B-Instruct", True, "llama-3"),
        ("Meta-Llama-3-8B", True, None),
        ("Llama-Guard-3-8B", True, None),
        ("llama-2-7b-chat", False, "llama-2"),
        ("llama-2-7b", False, None),
        ("CodeLlama-70b-Instruct", False, None),  # which has a format of its own
        ("chat/7B", False, None),
    ],
)
def test_who_chats(name: str, ranks: bool, template: str | None, tmp_path: Path) -> None:
    """Nothing but the name says whether a model was tuned for conversations; a template beside it goes first."""
    shape = make.Shape(vocab_size=300)
    folder = tmp_path / name
    folder.parent.mkdir(exist_ok=True)
    write_meta_folder(folder, meta_params(shape), meta_shards(shape, make.random_weights(shape)))
    (folder / VOCABULARY).write_bytes(ranks_file(BYTES) if ranks else b"\n\x0e\n\x05<unk>")
    source = open_source(folder)
    expected = None if template is None else NAMED_TEMPLATES[template].encode()
    assert source.tokenizer_files().get("chat_template.jinja") == expected
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    again = open_source(folder)
    assert again.tokenizer_files()["chat_template.jinja"] == b"{{ messages }}" and again.identity != source.identity


def test_a_folder_of_metas_with_a_sentencepiece_model_above_it(tmp_path: Path) -> None:
    from tests.helpers_tokenizer import train_sentencepiece

    proto = train_sentencepiece(900)
    shape = make.Shape(vocab_size=900)
    folder = write_meta_folder(tmp_path / "7B", meta_params(shape), meta_shards(shape, make.random_weights(shape)))
    before = open_source(folder)
    assert (before.config["bos_token_id"], before.config["eos_token_ids"], before.tokenizer_files()) == (None, [], {})
    (tmp_path / VOCABULARY).write_bytes(proto)
    source = open_source(folder)
    assert source.identity != before.identity
    assert (source.config["bos_token_id"], source.config["eos_token_ids"]) == (1, [2])
    ours = Tokenizer.from_folder(convert(folder, tmp_path / "out", format="q8"))
    assert (ours.bos_id, ours.eos_ids) == (1, (2,)) and ours.encode("a b")[0] == 1


GOOD = ranks_file(BYTES)
BAD: dict[str, tuple[bytes, str]] = {
    "three words in a line": (GOOD + b"YWI= 256 x\n", r"line 257: expected a token in base64 and its rank"),
    "no rank": (GOOD + b"YWI=\n", r"line 257: expected a token"),
    "a negative rank": (GOOD + b"YWI= -1\n", r"line 257: expected a token"),
    "a huge rank": (GOOD + b"YWI= 99999999999999999999\n", r"line 257: expected a token"),
    "no base64": (GOOD + b"Y!I= 256\n", r"line 257: b'Y!I=' is not base64"),
    "base64 cut off": (GOOD + b"YWI 256\n", r"line 257: b'YWI' is not base64"),
    "an empty token": (GOOD + b"==== 256\n", r"line 257: (a token of 0 bytes|b'====' is not base64)"),
    "a token too long": (
        GOOD + base64.b64encode(b"a" * (MAX_TOKEN_BYTES + 1)) + b" 256\n",
        r"line 257: a token of 257 bytes",
    ),
    "a token twice": (GOOD + b"YQ== 256\n", r"line 257: the token in b'YQ== 256' stands there twice"),
    "a rank twice": (GOOD + b"YWI= 255\n", r"line 257: the rank in b'YWI= 255' stands there twice"),
    "a rank left out": (GOOD + b"YWI= 257\n", r"rank 256 of 257 is missing"),
    "a byte left out": (ranks_file(BYTES[:-1]), r"no token for the single byte 0xff"),
    "nothing": (b"\n\n", r"rank 0 of 0 is missing"),
    "more ranks than ids": (ranks_file([*BYTES, *(b"a%d" % i for i in range(200))]), r"do the files belong together"),
}


@pytest.mark.parametrize("defect", BAD)
def test_bad_ranks(tmp_path: Path, defect: str) -> None:
    content, pattern = BAD[defect]
    path = tmp_path / "tokenizer.model"

    def opened(path: Path) -> Any:
        return TiktokenVocabulary(content, 300, str(path), calls_tools=False)

    refused(opened, path, pattern)


def test_what_is_a_list_of_ranks() -> None:
    assert is_tiktoken(GOOD[:4096]) and is_tiktoken(b"IQ== 0\r\n")
    assert not any(map(is_tiktoken, (b"", b"\n\x0e\n\x05<unk>", b"hello", b"IQ== 0", json.dumps({"a": 1}).encode())))


def test_the_files_are_what_write_folder_takes(tmp_path: Path) -> None:
    vocabulary = TiktokenVocabulary(GOOD, 300, "tokenizer.model", calls_tools=False)
    assert vocabulary.special_id("<|eot_id|>") == 265 and vocabulary.end_ids == [257, 265]
    assert Tokenizer.from_folder(write_folder(tmp_path, dict(vocabulary.files()))).vocab_size == 300
