"""Llama 3's tokenizer.model as it is published, against Meta's own tokenizer and chat format (llama-models).

Ids of ordinary strings, of every token's own text, and of tokens put together at random, where what is joined first
counts most.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from llama_models.datatypes import RawMessage
from llama_models.llama3.tokenizer import Tokenizer as MetasTokenizer

from pyllama.chat_template import ChatTemplate, encode_chat
from pyllama.tokenizer import Tokenizer
from pyllama.tokenizer.golden import TEXTS
from quantize.readers.tiktoken_vocab import TiktokenVocabulary, is_tiktoken

from ..helpers_tokenizer import write_folder
from .test_tokenizer_reference import N_STRINGS, STRINGS, assert_same, package_file

PATH = package_file("llama_models", "llama3/tokenizer.model")
RAW = PATH.read_bytes()
VOCABULARY = TiktokenVocabulary(RAW, 128256, str(PATH), calls_tools=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"vocab_size": 128256, "eos_token_ids": VOCABULARY.end_ids}
    return write_folder(tmp_path_factory.mktemp("llama3"), {**VOCABULARY.files(), "config.json": config})


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def reference() -> Any:
    return MetasTokenizer(PATH)


def test_ids_are_metas(ours: Tokenizer, reference: Any) -> None:
    assert is_tiktoken(RAW[:4096])
    special = [f"{text}<|eot_id|>{text}<|start_header_id|>" for text in STRINGS[-500:]]
    assert_same(
        lambda text: ours.encode(text, parse_special=True),
        lambda text: reference.encode(text, bos=True, eos=False, allowed_special="all"),
        [*STRINGS, *special, *TEXTS],
    )
    assert_same(ours.encode, lambda text: reference.encode(text, bos=True, eos=False), [*STRINGS[-2000:], *special])
    for text in STRINGS[-2000:]:
        ids = ours.encode(text)
        assert ours.decode(ids) == text


def test_every_token_and_tokens_put_together(ours: Tokenizer, reference: Any) -> None:
    rng = random.Random(0)
    texts = [token.decode("utf-8", "ignore") for token in VOCABULARY.tokens[:: 10 * 10_000 // N_STRINGS]]
    for _ in range(N_STRINGS // 2):
        joined = b"".join(rng.choices(VOCABULARY.tokens, k=rng.randrange(2, 6)))
        texts.append(joined.decode("utf-8", "ignore"))
        texts.append(joined.decode("utf-8", "replace").replace(" ", ""))
    assert_same(
        lambda text: ours.encode(text, add_special=False),
        lambda text: reference.encode(text, bos=False, eos=False),
        texts,
    )


def test_special_tokens_are_metas(ours: Tokenizer, reference: Any) -> None:
    assert ours.bos_id == reference.bos_id and set(ours.eos_ids) == set(reference.stop_tokens)
    for name, index in reference.special_tokens.items():
        at_the_same_place = VOCABULARY.special[index - len(VOCABULARY.tokens)]
        if "reserved" not in name and name not in ("<|step_id|>", "<|image|>"):  # of 3.2's models for pictures
            assert at_the_same_place == name
    assert len(VOCABULARY.special) == len(reference.special_tokens) == 256
    older = TiktokenVocabulary(RAW, 128256, str(PATH), calls_tools=False)
    assert older.special[:2] == ["<|begin_of_text|>", "<|end_of_text|>"] and older.special[9] == "<|eot_id|>"
    assert older.special[10:12] == ["<|reserved_special_token_5|>", "<|reserved_special_token_6|>"]
    assert older.special[-1] == "<|reserved_special_token_250|>" and older.end_ids == [128001, 128009]


def test_chats_are_metas(ours: Tokenizer, reference: Any, folder: Path) -> None:
    from llama_models.llama3.chat_format import ChatFormat

    begin, end = (VOCABULARY.special[i] for i in (0, 1))
    template = ChatTemplate.named("llama-3", bos_token=begin, eos_token=end)  # trims what people write, as Hugging Face
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello.", "stop_reason": "end_of_turn"},
        {"role": "user", "content": "2+2?"},
    ]
    expected = ChatFormat(reference).encode_dialog_prompt([RawMessage(**message) for message in messages]).tokens
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    assert encode_chat(ours, template, plain) == expected
