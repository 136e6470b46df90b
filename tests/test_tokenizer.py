"""Tokenizers of every kind against the libraries they stand on, and against golden ids of the demo model.

Live comparison on 10,000 strings with real vocabularies is in tests/oracles/test_tokenizer_reference.py.
"""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError
from pyllama.tokenizer import Tokenizer
from quantize.readers.byte_level_bpe import PRE_TOKENIZERS
from quantize.readers.gguf_file import read_gguf
from quantize.readers.gguf_vocab import tokenizer_files

from .helpers_tokenizer import (
    SPECIAL,
    bpe_metadata,
    sentencepiece_metadata,
    train_bpe,
    train_sentencepiece,
    write_folder,
)
from .make_golden_tokenizer import GOLDEN
from .make_strings import strings

STRINGS = strings(1200, seed=7)
CONTROL_TEXTS = ["<s>a</s>", "</s>", "x<unk>y", "[INST] hi [/INST]", "a [INST]b", "<s>", " </s> "]


class Bpe:
    """A trained byte-level vocabulary and ours made of it."""

    def __init__(self, folder: Path, pre: str = "smollm") -> None:
        self.reference = train_bpe(pre)
        self.metadata = bpe_metadata(self.reference, pre)
        self.tokenizer = Tokenizer.from_folder(write_folder(folder, tokenizer_files(self.metadata)))


class Spm:
    """A trained sentencepiece model, ours opened from it and ours made of its GGUF metadata."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.proto = train_sentencepiece(**options)
        self.reference = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        self.direct = Tokenizer.from_folder(
            write_folder(folder / "direct", {"tokenizer.model": self.proto, "tokenizer_config.json": SPM_CONFIG})
        )
        self.metadata = sentencepiece_metadata(self.proto)
        self.metadata["tokenizer.ggml.add_space_prefix"] = options.get("add_dummy_prefix", True)
        self.tokenizer = Tokenizer.from_folder(write_folder(folder / "gguf", tokenizer_files(self.metadata)))


SPM_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Bpe:
    return Bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Spm:
    return Spm(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def demo(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    files = tokenizer_files(read_gguf(demo_gguf).metadata)
    return Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("demo"), files))


@pytest.fixture(scope="module")
def vocabularies(bpe: Bpe, spm: Spm, demo: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """One of every kind of decoder."""
    more = [sentencepiece_json({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False})]
    more.append(sentencepiece_json(LLAMA_DECODER))
    opened = [open_json(tmp_path_factory.mktemp("json"), document) for document in more]
    return [bpe.tokenizer, spm.tokenizer, demo, *opened]


LLAMA_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def sentencepiece_json(decoder: dict[str, Any] | None) -> dict[str, Any]:
    """A small tokenizer.json in the manner of Llama 2's."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁",
        "▁a",
        "▁▁b",
        "a",
        "b",
        "é",
    ]
    special = [
        {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i in range(3)
    ]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [["▁", "a"]]}
    model |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def open_json(folder: Path, document: dict[str, Any], **files: dict[str, Any]) -> Tokenizer:
    named = {f"{name}.json": content for name, content in files.items()}
    return Tokenizer.from_folder(write_folder(folder, {"tokenizer.json": document, **named}))


# ---------------------------------------------------------------------------------------------------------- encoding


def test_demo_ids_are_huggingface_ids(demo: Tokenizer) -> None:
    golden = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    assert len(golden) >= 800
    for text, ids, decoded in golden:
        assert demo.encode(text, parse_special=True) == ids, text
        assert demo.decode(ids, skip_special=False) == decoded
        if not demo.control_spans(text):
            assert demo.encode(text) == ids, text


def test_demo_special_tokens(demo: Tokenizer) -> None:
    assert (demo.vocab_size, demo.bos_id, demo.eos_ids) == (49152, 1, (2,))
    assert (demo.bos_token, demo.eos_token, demo.id_to_piece(0)) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert demo.control_ids == frozenset(range(17))
    assert demo.encode("<|im_end|>", parse_special=True) == [2]
    plain = demo.encode("<|im_end|>")
    assert 2 not in plain and demo.decode(plain) == "<|im_end|>"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_bpe_ids_are_those_of_the_vocabulary_it_was_made_of(pre: str, tmp_path: Path) -> None:
    ours = Bpe(tmp_path, pre)
    for text in [*STRINGS, *(f"a{token} 12 {token}" for token in SPECIAL)]:
        assert ours.tokenizer.encode(text, parse_special=True) == ours.reference.encode(text).ids, text


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"byte_fallback": False}, {"user_defined_symbols": ["<think>", "ab", "é"]}],
    ids=["llama", "no-prefix", "no-bytes", "user-defined"],
)
def test_gguf_sentencepiece_ids_are_those_of_the_model_it_was_made_of(options: dict[str, Any], tmp_path: Path) -> None:
    spm = Spm(tmp_path, **options)
    if "user_defined_symbols" in options:
        spm.metadata = sentencepiece_metadata(spm.proto, tuple(options["user_defined_symbols"]))
        spm.tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "again", tokenizer_files(spm.metadata)))
    for text in [*STRINGS, "<think>x</think>", "a <think>", "       x", *CONTROL_TEXTS]:
        ids = [1, *spm.reference.encode(text)]
        assert spm.tokenizer.encode(text) == ids, text
        assert spm.direct.encode(text) == ids, text


def test_sentencepiece_control_tokens_are_parsed_when_asked(spm: Spm) -> None:
    encode, piece = spm.reference.encode, spm.reference.piece_to_id
    for ours in (spm.direct, spm.tokenizer):
        ids = ours.encode("[INST] hi [/INST]a</s>", add_special=False, parse_special=True)
        assert ids == [piece("[INST]"), *encode(" hi "), piece("[/INST]"), *encode("a"), 2]


def test_sentencepiece_without_legacy_puts_a_blank_only_in_front_of_the_text(spm: Spm, tmp_path: Path) -> None:
    files = {"tokenizer.model": spm.proto, "tokenizer_config.json": {**SPM_CONFIG, "legacy": False}}
    ours = Tokenizer.from_folder(write_folder(tmp_path, files))
    ids = ours.encode("a</s>b", parse_special=True)
    assert ids == [1, *spm.reference.encode("a"), 2, spm.reference.piece_to_id("b")]
    assert ours.decode(ids, skip_special=False) == "<s> a</s>b"
    assert ours.decode(ids) == "ab"


@given(st.lists(st.sampled_from([*SPECIAL, "<|", "|>", " ", "a", "1", "é", "[", "INST", "im_end"]), max_size=12))
def test_user_text_never_becomes_a_control_token(bpe: Bpe, spm: Spm, parts: list[str]) -> None:
    text = "".join(parts)
    assert not bpe.tokenizer.control_ids.intersection(bpe.tokenizer.encode(text, add_special=False))
    assert bpe.tokenizer.decode(bpe.tokenizer.encode(text)) == text
    assert not spm.tokenizer.control_ids.intersection(spm.tokenizer.encode(text, add_special=False))


def test_a_token_that_only_looks_like_a_control_token_is_treated_as_one(tmp_path: Path) -> None:
    reference = train_bpe("gpt-2")
    document = json.loads(reference.to_str())
    for token in document["added_tokens"]:
        token["special"] = False
    ours = open_json(tmp_path, document)
    assert 1 in ours.encode("<|im_start|>", parse_special=True)
    assert 1 not in ours.encode("<|im_start|>")
    assert 3 in ours.encode("[INST]")  # an added token that is neither special nor written like one is ordinary text


def test_special_tokens_that_only_the_config_names(tmp_path: Path) -> None:
    document = sentencepiece_json(LLAMA_DECODER)
    document["added_tokens"] = []
    ours = open_json(tmp_path, document, tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    assert ours.encode("a</s>", add_special=False, parse_special=True)[-1] == 2
    assert 2 not in ours.encode("a</s>")
    assert ours.decode([1, 262, 2]) == ours.decode([262])


@given(st.lists(st.sampled_from([*SPECIAL, "a", " ", "1", "<|", "Ġ"]), max_size=10), st.data())
def test_chosen_spans_alone_become_control_tokens(bpe: Bpe, spm: Spm, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    for ours in (bpe.tokenizer, spm.tokenizer):
        spans = ours.control_spans(text)
        assert ours.encode_around(text, spans) == ours.encode(text, add_special=False, parse_special=True)
        assert ours.encode_around(text, []) == ours.encode(text, add_special=False)
        chosen = [span for span in spans if data.draw(st.booleans())]
        ids = ours.encode_around(text, chosen)
        assert [i for i in ids if i in ours.control_ids] == [
            i for start, end in chosen for i in ours.encode(text[start:end], add_special=False, parse_special=True)
        ]


def test_texts_that_are_no_texts_are_refused(bpe: Bpe, spm: Spm) -> None:
    for ours in (bpe.tokenizer, spm.tokenizer):
        with pytest.raises(ValueError, match="expected a string to tokenize, got bytes"):
            ours.encode(b"a")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at position 2"):
            ours.encode("ab\ud83d")


def test_threads_may_share_a_tokenizer(bpe: Bpe, tmp_path: Path) -> None:
    texts = [f"a {token} b {n}" for n in range(50) for token in SPECIAL]
    expected = [bpe.tokenizer.encode(text) for text in texts]
    fresh = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_files(bpe.metadata)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.encode, texts)) == expected


# ---------------------------------------------------------------------------------------------------------- decoding


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    decoder = tokenizer.stream(skip_special)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(st.data())
def test_streamed_pieces_are_the_decoded_text(vocabularies: list[Tokenizer], data: st.DataObject) -> None:
    for ours in vocabularies:
        ids = data.draw(st.lists(st.integers(0, min(ours.vocab_size, 400) - 1) | st.integers(0, ours.vocab_size - 1)))
        for skip_special in (True, False):
            pieces = stream(ours, ids, skip_special)
            assert "".join(pieces) == ours.decode(ids, skip_special)
            assert "".join(pieces).encode("utf-8").decode("utf-8") == "".join(pieces)


@given(st.data())
def test_random_ids_decode_as_the_library_does(bpe: Bpe, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, bpe.tokenizer.vocab_size - 1)))
    for skip_special in (True, False):
        assert bpe.tokenizer.decode(ids, skip_special) == bpe.reference.decode(ids, skip_special_tokens=skip_special)


def test_texts_come_back(bpe: Bpe, spm: Spm) -> None:
    for text in STRINGS:
        ids = spm.tokenizer.encode(text)
        assert spm.tokenizer.decode(ids) == text.replace("▁", " ") == spm.reference.decode(ids)
        assert bpe.tokenizer.decode(bpe.tokenizer.encode(text)) == text


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_decoder_is_the_librarys(tmp_path: Path, scheme: str) -> None:
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    document = sentencepiece_json(decoder)
    reference, ours = tokenizers.Tokenizer.from_str(json.dumps(document)), open_json(tmp_path, document)
    blanks = [document["model"]["vocab"][piece] for piece in ("▁", "▁▁", "▁a", "▁▁b", "a", "é")]
    for first in blanks:
        for second in blanks:
            for ids in ([first], [first, second], [1, first, second], [first, 1, second]):
                assert ours.decode(ids) == reference.decode(ids), ids


def test_byte_fallback_decoder_is_the_librarys_for_valid_utf8(tmp_path: Path) -> None:
    document = sentencepiece_json(LLAMA_DECODER)
    reference, ours = tokenizers.Tokenizer.from_str(json.dumps(document)), open_json(tmp_path, document)
    for text in STRINGS:
        ids = reference.encode(text).ids
        assert ours.encode(text, add_special=False, parse_special=True) == ids
        assert ours.decode(ids) == reference.decode(ids)


def test_no_half_character_is_ever_shown(bpe: Bpe, spm: Spm) -> None:
    for ours in (bpe.tokenizer, spm.tokenizer):
        ids = [i for i in range(ours.vocab_size) if ours.token_bytes(i) in (b"\xf0", b"\x9f", b"\x98", b"\x80")]
        order = {ours.token_bytes(i): i for i in ids}
        smile = [order[bytes([byte])] for byte in "😀".encode()]
        assert stream(ours, smile) == ["", "", "", "😀", ""]
        assert stream(ours, smile[:3]) == ["", "", "", "\ufffd"]
        assert stream(ours, [*smile[:2], *smile]) == ["", "", "\ufffd", "", "", "😀", ""]
        assert ours.decode(smile[:3]) == "\ufffd"


def test_the_first_blank_goes_and_no_other(spm: Spm) -> None:
    blank = spm.reference.piece_to_id("▁")
    letter = spm.reference.piece_to_id("a")
    for ids, text in (
        ([blank, letter], "a"),
        ([blank, blank, letter], " a"),
        ([1, blank, letter], "a"),
        ([letter, blank], "a "),
    ):
        assert spm.tokenizer.decode(ids) == text == spm.reference.decode(ids)
    assert stream(spm.tokenizer, [blank, blank, letter]) == ["", " ", "a", ""]


@pytest.mark.parametrize("token_id", [-1, 10**9, 2**70])
def test_ids_out_of_range_are_refused(bpe: Bpe, token_id: int) -> None:
    for call in (lambda: bpe.tokenizer.decode([token_id]), lambda: bpe.tokenizer.stream().push(token_id)):
        with pytest.raises(ValueError, match="out of range: the vocabulary has ids 0 to 899"):
            call()
    with pytest.raises(ValueError, match="out of range"):
        bpe.tokenizer.id_to_piece(token_id)
    with pytest.raises(ValueError, match=r"must be an integer, got 1\.5"):
        bpe.tokenizer.decode([1.5])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------ files of the folder


def test_opening_and_closing_tokens_by_the_config(tmp_path: Path) -> None:
    document = sentencepiece_json(LLAMA_DECODER)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    a = open_json(tmp_path / "0", document).encode("a", add_special=False)
    cases = [
        ({}, a),
        ({"add_bos_token": True}, [1, *a]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, *a, 2]),
        ({"add_eos_token": True}, [*a, 2]),
        ({"add_bos_token": False}, a),
    ]
    for number, (flags, expected) in enumerate(cases, 1):
        ours = open_json(tmp_path / str(number), document, tokenizer_config={**named, **flags})
        assert ours.encode("a") == expected
        assert ours.encode("a", add_special=False) == a


def test_the_post_processor_of_the_file_counts_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    document = sentencepiece_json(LLAMA_DECODER)
    first = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    assert open_json(tmp_path / "a", document).encode("a")[0] == 1
    config = {"bos_token": "<s>", "add_bos_token": False}
    assert open_json(tmp_path / "b", document, tokenizer_config=config).encode("a")[0] != 1


def test_several_end_tokens_are_gathered_from_all_files(tmp_path: Path) -> None:
    document = sentencepiece_json(LLAMA_DECODER)
    ours = open_json(
        tmp_path / "a",
        document,
        tokenizer_config={"bos_token": None, "eos_token": "</s>"},
        config={"bos_token_id": 1, "eos_token_ids": [5], "vocab_size": 300},
        generation_config={"eos_token_id": [6, None, -1, 0xFFFFFFFF, 2]},
    )
    assert (ours.eos_ids, ours.bos_id, ours.vocab_size) == ((2, 5, 6), None, 300)
    assert ours.decode([299]) == "" and ours.id_to_piece(299) == ""
    ours = open_json(tmp_path / "b", document, config={"bos_token_id": 1, "eos_token_id": 2})
    assert (ours.eos_ids, ours.bos_id, ours.bos_token, ours.eos_token) == ((2,), 1, "<s>", "</s>")


def test_nothing_is_cut_or_padded(tmp_path: Path) -> None:
    document = sentencepiece_json(LLAMA_DECODER)
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    ours = open_json(tmp_path, document)
    assert len(ours.encode("ababab")) == len(ours.encode("ababab", add_special=False)) > 2
    assert 0 not in ours.encode("a")


def test_added_tokens_behind_a_sentencepiece_vocabulary(spm: Spm, tmp_path: Path) -> None:
    size = spm.reference.vocab_size()
    added = {"added_tokens_decoder": {str(size): {"content": "<|user|>", "special": True}, "1": {"content": "<s>"}}}
    files = {"tokenizer.model": spm.proto, "added_tokens.json": {"<tool>": size + 1}}
    ours = Tokenizer.from_folder(write_folder(tmp_path, {**files, "tokenizer_config.json": {**SPM_CONFIG, **added}}))
    assert ours.vocab_size == size + 2
    ids = ours.encode("<|user|>a<tool>", add_special=False, parse_special=True)
    assert ids == [size, *spm.reference.encode("a"), size + 1]
    assert size not in ours.encode("<|user|>") and size + 1 in ours.encode("a<tool>")
    assert ours.decode([size, size + 1]) == "<tool>"


def test_added_tokens_take_the_blanks_behind_them_when_they_say_so(spm: Spm, tmp_path: Path) -> None:
    """As the tokenizers library does it with `rstrip`, also where more than one line end stands."""
    size = spm.reference.vocab_size()
    tokens = {"<|user|>": True, "<|end|>": False}
    added = {
        str(size + i): {"content": text, "special": True, "rstrip": flag}
        for i, (text, flag) in enumerate(tokens.items())
    }
    config = {**SPM_CONFIG, "added_tokens_decoder": added}
    ours = Tokenizer.from_folder(
        write_folder(tmp_path, {"tokenizer.model": spm.proto, "tokenizer_config.json": config})
    )

    def encode(text: str) -> list[int]:
        return ours.encode(text, add_special=False, parse_special=True)

    assert encode("<|user|>\n \na b<|end|>\n<|user|> ") == encode("<|user|>a b<|end|>") + encode("<|end|>\n")[1:] + [
        size
    ]
    assert encode("<|end|>\na") != encode("<|end|>a") and encode(" a") != encode("a")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": b""}, "tokenizers library cannot open it"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizers library cannot open it"),
        ({"tokenizer.json": "{}"}, "tokenizers library cannot open it"),
        ({"tokenizer.model": b""}, "sentencepiece library cannot open it"),
        ({"tokenizer.model": b"\x0a\xff\xff\xff\xff\xff"}, "sentencepiece library cannot open it"),
        ({"tokenizer.json": sentencepiece_json(None)}, "decoder None is not one"),
        ({"tokenizer.json": sentencepiece_json({"type": "WordPiece", "prefix": "##", "cleanup": True})}, "WordPiece"),
        (
            {"tokenizer.json": sentencepiece_json({"type": "Strip", "content": " ", "start": 0, "stop": 1})},
            "not the usual one of a sentencepiece vocabulary",
        ),
    ],
)
def test_broken_vocabularies(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=message):
        Tokenizer.from_folder(write_folder(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", "{", "not valid JSON"),
        ("tokenizer_config", "[]", "expected an object"),
        ("tokenizer_config", {"bos_token": 5}, "bos_token must be a string"),
        ("tokenizer_config", {"bos_token": "<nope>"}, "bos_token '<nope>' is not in the vocabulary"),
        ("tokenizer_config", {"eos_token": "<nope>"}, "eos_token '<nope>' is not in the vocabulary"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token must be true or false"),
        ("tokenizer_config", {"additional_special_tokens": 3}, "additional_special_tokens must be a list"),
        ("tokenizer_config", {"additional_special_tokens": [3]}, "additional_special_tokens must be a string"),
        ("tokenizer_config", {"added_tokens_decoder": []}, None),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "no id and token"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {}}}, "no id and token"),
        ("tokenizer_config", {"added_tokens_decoder": ["a"]}, "must be an object"),
        ("added_tokens", {"<x>": "7"}, "must have an id"),
        ("added_tokens", {"<x>": -1}, "must have an id"),
        ("config", {"vocab_size": -5}, "vocab_size must be an integer"),
        ("config", {"vocab_size": 10**12}, "vocab_size must be an integer"),
        ("config", {"eos_token_id": "2"}, "eos_token_id must be an integer"),
        ("config", {"eos_token_id": 99999}, "eos_token_id is 99999, but the vocabulary has ids 0 to"),
        ("config", {"bos_token_id": 99999}, "bos_token_id is 99999, but the vocabulary has ids 0 to"),
        ("generation_config", {"eos_token_id": [1, "2"]}, "eos_token_id must be an integer"),
    ],
)
def test_broken_settings(name: str, content: Any, message: str | None, tmp_path: Path) -> None:
    files = {"tokenizer.json": sentencepiece_json(LLAMA_DECODER), f"{name}.json": content}
    if message is None:
        assert Tokenizer.from_folder(write_folder(tmp_path, files)).vocab_size > 0
        return
    with pytest.raises(ModelFormatError, match=message):
        Tokenizer.from_folder(write_folder(tmp_path, files))


def test_added_tokens_must_fit_a_sentencepiece_vocabulary(spm: Spm, tmp_path: Path) -> None:
    for number, (added, message) in enumerate([({"<x>": 5}, "id 5 is"), ({"<x>": 10**6}, "has id 1000000, expected")]):
        files = {"tokenizer.model": spm.proto, "added_tokens.json": added}
        with pytest.raises(ModelFormatError, match=message):
            Tokenizer.from_folder(write_folder(tmp_path / str(number), files))
