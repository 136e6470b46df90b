"""Vocabularies in GGUF metadata: each defect is one clear error, and settings reach the folder's files.

That the made tokenizers give the right ids is in test_tokenizer.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyllama.common.errors import ModelFormatError
from pyllama.tokenizer import Tokenizer
from quantize.readers.gguf_vocab import end_token_ids, tokenizer_files

from .helpers_tokenizer import write_folder

BPE_METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
SPM_METADATA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "a", "b"],
    "tokenizer.ggml.token_type": [2, 1, 1],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
}


@pytest.mark.parametrize("metadata", [BPE_METADATA, SPM_METADATA], ids=["bpe", "spm"])
def test_the_smallest_vocabularies_open(metadata: dict[str, Any], tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_files(metadata)))
    assert ours.decode(ours.encode("ab")) == "ab"


@pytest.mark.parametrize(
    ("base", "key", "value", "message"),
    [
        (BPE_METADATA, "model", None, "model is missing"),
        (BPE_METADATA, "model", "bert", "is 'bert', expected gpt2"),
        (BPE_METADATA, "model", 7, "is 7, expected gpt2"),
        (BPE_METADATA, "pre", None, "pre is missing"),
        (BPE_METADATA, "pre", "deepseek-llm", "'deepseek-llm', a rule for cutting words that is not known"),
        (BPE_METADATA, "pre", ["gpt-2"], "a rule for cutting words that is not known"),
        (BPE_METADATA, "tokens", None, "expected a list of strings"),
        (BPE_METADATA, "tokens", [], "expected a list of strings"),
        (BPE_METADATA, "tokens", "abcd", "expected a list of strings"),
        (BPE_METADATA, "tokens", ["a", "b", 3, "<x>"], r"tokens\[2\]: expected a string"),
        (BPE_METADATA, "tokens", ["a", "b", "", "<x>"], r"tokens\[2\]: expected a string"),
        (BPE_METADATA, "tokens", ["a", "b", "ab", "x" * 70000], r"tokens\[3\]: expected a string"),
        (BPE_METADATA, "tokens", ["a", "b", "ab", "\ud800"], r"tokens\[3\]: not valid UTF-8"),
        (BPE_METADATA, "tokens", ["a", "b", "ab", "a"], "'a' stands at 0 and at 3"),
        (BPE_METADATA, "token_type", [1, 1, 1], "expected 4 numbers, one per token, found 3"),
        (BPE_METADATA, "token_type", 5, "expected 4 numbers, one per token, found int"),
        (BPE_METADATA, "token_type", [1, 1, 1, 7], r"token_type\[3\]: expected 1 to 6, found 7"),
        (BPE_METADATA, "token_type", [1, 1, 1, "3"], r"token_type\[3\]: expected 1 to 6"),
        (BPE_METADATA, "merges", None, "merges: expected a list"),
        (BPE_METADATA, "merges", [["a", "b"]], r"merges\[0\]: expected two tokens"),
        (BPE_METADATA, "merges", ["ab"], r"merges\[0\]: expected two tokens"),
        (BPE_METADATA, "merges", ["a b c"], r"merges\[0\]: expected two tokens"),
        (BPE_METADATA, "merges", ["a "], r"merges\[0\]: expected two tokens"),
        (BPE_METADATA, "merges", ["a b", "b a"], r"merges\[1\]: 'b a' needs 'ba', which is no token"),
        (BPE_METADATA, "merges", ["a c"], r"merges\[0\]: 'a c' needs 'c', which is no token"),
        (BPE_METADATA, "eos_token_id", 4, "expected an id from 0 to 3, found 4"),
        (BPE_METADATA, "bos_token_id", -2, "expected an id from 0 to 3, found -2"),
        (BPE_METADATA, "padding_token_id", "1", "expected an id from 0 to 3"),
        (BPE_METADATA, "unknown_token_id", True, "expected an id from 0 to 3"),
        (BPE_METADATA, "add_bos_token", 1, "expected true or false, found 1"),
        (SPM_METADATA, "scores", None, "expected 3 numbers, one per token, found NoneType"),
        (SPM_METADATA, "scores", [0.0, 1.0], "expected 3 numbers, one per token, found 2"),
        (SPM_METADATA, "scores", [0.0, float("nan"), 1.0], r"scores\[1\]: expected a number of 32 bits"),
        (SPM_METADATA, "scores", [0.0, 1e300, 1.0], r"scores\[1\]: expected a number of 32 bits"),
        (SPM_METADATA, "scores", [0.0, "1", 1.0], r"scores\[1\]: expected a number of 32 bits"),
        (SPM_METADATA, "token_type", None, "expected 3 numbers"),
        (SPM_METADATA, "token_type", [1, 1, 1], "no token is marked as unknown"),
        (SPM_METADATA, "token_type", [2, 2, 1], "2 tokens are marked as unknown"),
        (SPM_METADATA, "token_type", [2, 6, 1], "1 byte tokens"),
        (SPM_METADATA, "tokens", ["<unk>", "a", "a"], "'a' stands at 1 and at 2"),
        (SPM_METADATA, "add_space_prefix", "no", "expected true or false"),
        (SPM_METADATA, "precompiled_charsmap", [1, 2, 3], "its own normalization table, which is not supported"),
    ],
)
def test_hostile_metadata(base: dict[str, Any], key: str, value: Any, message: str) -> None:
    metadata = {**base, f"tokenizer.ggml.{key}": value}
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ModelFormatError, match=message):
        tokenizer_files(metadata)


def test_byte_tokens_must_be_the_256_bytes() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(255)), "<0xff>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2] + [6] * 256,
        "tokenizer.ggml.scores": [0.0] * 257,
    }
    with pytest.raises(ModelFormatError, match="<0xF"):
        tokenizer_files(metadata)


def test_an_unknown_token_that_the_file_only_names_is_marked(tmp_path: Path) -> None:
    metadata = {**SPM_METADATA, "tokenizer.ggml.token_type": [1, 1, 1], "tokenizer.ggml.unknown_token_id": 0}
    ours = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_files(metadata)))
    assert ours.encode("c", add_special=False)[-1] == 0


@pytest.mark.parametrize("template", [5, "x" * (2 << 20)])
def test_a_chat_template_must_be_a_text_of_sane_size(template: Any) -> None:
    with pytest.raises(ModelFormatError, match="chat_template: expected a string of at most"):
        tokenizer_files({**BPE_METADATA, "tokenizer.chat_template": template})


def test_settings_of_a_gguf_reach_the_folder() -> None:
    metadata = {**BPE_METADATA, "tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"}
    metadata |= {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 2,
    }
    config = json.loads(tokenizer_files(metadata)["tokenizer_config.json"])
    assert config["bos_token"] == config["eos_token"] == "<x>" and config["pad_token"] is None
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert config["chat_template"] == [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    assert (
        json.loads(tokenizer_files({**metadata, "tokenizer.ggml.bos_token_id": 2**32 - 1})["tokenizer_config.json"])[
            "bos_token"
        ]
        is None
    )


def test_phi3s_control_tokens_take_the_line_end_behind_them() -> None:
    tokens, types = ["<unk>", "<s>", "a", "<|user|>", "<|endoftext|>"], [2, 3, 1, 3, 3]
    metadata = {**SPM_METADATA, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    metadata |= {"tokenizer.ggml.scores": [0.0] * 5, "general.architecture": "phi3"}
    config = json.loads(tokenizer_files(metadata)["tokenizer_config.json"])
    assert config["added_tokens_decoder"] == {"3": {"content": "<|user|>", "special": True, "rstrip": True}}
    llama = json.loads(tokenizer_files({**metadata, "general.architecture": "llama"})["tokenizer_config.json"])
    assert "added_tokens_decoder" not in llama


def test_ids_that_end_a_text() -> None:
    assert end_token_ids(BPE_METADATA) == [3]
    assert end_token_ids({**BPE_METADATA, "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 3}) == [3, 2]
