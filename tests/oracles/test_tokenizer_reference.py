"""Real vocabularies on 10,000 strings (`make check-tokenizers`: 100,000), against the reference implementations.

The demo model's (BPE, from its GGUF): SmolLM2's published tokenizer in transformers, and transformers' own reading of
the GGUF. Mistral's (sentencepiece, shipped with mistral-common): sentencepiece itself, directly and through GGUF
metadata, and transformers. Llama 3's (BPE, shipped with llama-models): tiktoken, and transformers' conversion of the
tiktoken file. Mistral Nemo's (tekken).
"""

from __future__ import annotations

import base64
import importlib.util
import inspect
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from pyllama.tokenizer import Tokenizer
from quantize.readers.byte_level_bpe import PRE_TOKENIZERS
from quantize.readers.gguf_vocab import tokenizer_files

from ..helpers_tokenizer import bpe_metadata, sentencepiece_metadata, train_bpe, write_folder
from ..make_golden_tokenizer import demo_metadata, demo_reference
from ..make_strings import strings

N_STRINGS = int(os.environ.get("PYLLAMA_TOKENIZER_STRINGS", "10000"))  # `make check-tokenizers` takes ten times as many
STRINGS = strings(N_STRINGS)
Encode = Callable[[str], list[int]]


def assert_same(ours: Encode, reference: Encode, texts: Iterable[str]) -> None:
    different = [text for text in texts if ours(text) != reference(text)]
    assert not different, f"{len(different)} differ, first {[ascii(text)[:80] for text in different[:5]]}"


def package_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.fail(f"the package {package} is not installed; run `make test-oracles`")
    return sorted(Path(spec.origin).parent.glob(pattern))[0]


def opened(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_folder(write_folder(folder, tokenizer_files(metadata)))


def test_there_are_as_many_different_strings_as_asked_for() -> None:
    assert len(set(STRINGS)) == len(STRINGS) == N_STRINGS >= 10_000


# ------------------------------------------------------------------------------------------------- the demo model


def test_demo_is_the_published_tokenizer(demo_gguf: Path, tmp_path: Path) -> None:
    metadata = demo_metadata(demo_gguf)
    ours, reference = opened(tmp_path, metadata), demo_reference(metadata)
    texts = [*STRINGS, *(f"{text}<|im_end|>{text}" for text in STRINGS[-500:])]
    assert_same(lambda text: ours.encode(text, parse_special=True), lambda text: reference(text)["input_ids"], texts)
    assert_same(ours.encode, lambda text: reference(text)["input_ids"], STRINGS)
    for text in STRINGS:
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids)


def test_demo_is_what_transformers_reads_except_around_digits(demo_gguf: Path, tmp_path: Path) -> None:
    """transformers 5 leaves the digits step out when it reads a GGUF; without digits there is nothing to leave out."""
    from transformers import AutoTokenizer

    ours = opened(tmp_path, demo_metadata(demo_gguf))
    reference = AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    # Characters that Python's tables lack may be digits in newer ones, such as those of the library.
    texts = [text for text in STRINGS if not any(c.isnumeric() or unicodedata.category(c) == "Cn" for c in text)]
    assert len(texts) > 4000
    assert_same(lambda text: ours.encode(text, parse_special=True), lambda text: reference(text)["input_ids"], texts)


# ------------------------------------------------------------------------------------------ Mistral's sentencepiece


MISTRAL = ["tokenizer.model.v1", "*240216.model.v2", "*240323.model.v3", "*241114.model.v7"]


def mistral_user_defined(proto: bytes) -> tuple[str, ...]:
    """sentencepiece's Python interface does not tell user-defined pieces, so the file is parsed."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    model.ParseFromString(proto)
    return tuple(piece.piece for piece in model.pieces if piece.type == 4)


@pytest.mark.parametrize("pattern", MISTRAL)
def test_sentencepiece_models(pattern: str, tmp_path: Path) -> None:
    proto = package_file("mistral_common", f"data/{pattern}").read_bytes()
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "legacy": True}
    direct = Tokenizer.from_folder(
        write_folder(tmp_path / "direct", {"tokenizer.model": proto, "tokenizer_config.json": settings})
    )
    from_gguf = opened(tmp_path / "gguf", sentencepiece_metadata(proto, mistral_user_defined(proto)))
    for ours in (direct, from_gguf):
        assert_same(ours.encode, lambda text: [1, *reference.encode(text)], STRINGS)
        for text in STRINGS:
            ids = reference.encode(text)
            assert ours.decode(ids) == reference.decode(ids)
    special = [f"<s>{text}</s> {text}" for text in STRINGS[-500:]]
    assert_same(
        lambda text: direct.encode(text, parse_special=True),
        lambda text: from_gguf.encode(text, parse_special=True),
        special,
    )


def test_sentencepiece_is_what_transformers_reads_except_for_runs_of_blanks(tmp_path: Path) -> None:
    """transformers 5 takes the order of this vocabulary for the order of its merges, though runs of blanks have the
    lowest scores, and puts no blank in front of a text that begins with one. sentencepiece, the reference, does
    neither.
    """
    from transformers import AutoTokenizer

    proto = package_file("mistral_common", "data/tokenizer.model.v1").read_bytes()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": True}
    files = {"tokenizer.model": proto, "tokenizer_config.json": settings, "config.json": {"model_type": "llama"}}
    reference = AutoTokenizer.from_pretrained(write_folder(tmp_path, files))
    ours = Tokenizer.from_folder(tmp_path)
    texts = [text for text in STRINGS if not re.search("^[ ▁]|[ ▁]{2}", text)]
    assert len(texts) > 3000
    assert_same(lambda text: ours.encode(text, parse_special=True), lambda text: reference(text)["input_ids"], texts)
    for text in texts:
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_llama2_style_tokenizer_json_is_sentencepiece(tmp_path: Path) -> None:
    """The tokenizer.json that Llama 2 and Mistral were published with: blanks put in by the normalizer, merges by
    score."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    proto = package_file("mistral_common", "data/tokenizer.model.v1").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {piece: processor.get_score(i) for i, piece in enumerate(pieces)})
    reference = Reference(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    reference.decoder = decoders.Sequence(steps)
    reference.add_special_tokens(["<unk>", "<s>", "</s>"])
    ours = Tokenizer.from_folder(write_folder(tmp_path, {"tokenizer.json": reference.to_str()}))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "legacy": True}
    direct = Tokenizer.from_folder(
        write_folder(tmp_path / "model", {"tokenizer.model": proto, "tokenizer_config.json": settings})
    )
    harmless = [text for text in STRINGS if not re.search("<s>|</s>|<unk>", text)]
    for is_parsed, texts in ((False, STRINGS), (True, harmless)):
        assert_same(
            lambda text, p=is_parsed: ours.encode(text, add_special=False, parse_special=p),  # type: ignore[misc]
            processor.encode,
            texts,
        )
    special = [f"<s>{text}</s> {text}" for text in STRINGS]
    assert_same(
        lambda text: ours.encode(text, add_special=False, parse_special=True),
        lambda text: reference.encode(text).ids,
        special,
    )
    assert_same(
        lambda text: ours.encode(text, add_special=False, parse_special=True),
        lambda text: direct.encode(text, add_special=False, parse_special=True),
        special,
    )
    for text in STRINGS:
        ids = processor.encode(text)
        assert ours.decode(ids) == reference.decode(ids) == processor.decode(ids)


# --------------------------------------------------------------------------------------------- tiktoken's: Llama 3


def alphabet() -> dict[int, str]:
    """GPT-2's characters for bytes, from the reference."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that a rank list stands for: each token cut as far as lower ranks put it together."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def ranks_metadata(ranks: dict[bytes, int], special: dict[str, int], pre: str) -> dict[str, Any]:
    letters = alphabet()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokens = {index: written(token) for token, index in ranks.items()} | {i: text for text, i in special.items()}
    control = set(special.values())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens[i] for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3 if i in control else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [f"{written(a)} {written(b)}" for a, b in merges_of(ranks)],
    }


def test_llama3_is_tiktoken_and_transformers(tmp_path: Path) -> None:
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = package_file("llama_models", "llama3/tokenizer.model")
    lines = [line.split() for line in path.read_text("ascii").splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    source = (path.parent / "tokenizer.py").read_text("utf-8")
    pattern = re.search(r'pat_str = r"""?(.*?)"{1,3}\s', source) or re.search(r'r"(\(\?i:.*)"', source)
    assert pattern, "the package no longer has the pattern in tokenizer.py"
    reference = tiktoken.Encoding("llama3", pat_str=pattern[1], mergeable_ranks=ranks, special_tokens=special)
    metadata = ranks_metadata(ranks, special, "llama-bpe")
    metadata |= {"tokenizer.ggml.bos_token_id": len(ranks), "tokenizer.ggml.eos_token_id": special["<|eot_id|>"]}
    ours = opened(tmp_path, metadata)

    texts = [*STRINGS, *(f"{text}<|eot_id|>{text}" for text in STRINGS[-500:])]
    bos = special["<|begin_of_text|>"]
    assert_same(
        lambda text: ours.encode(text, parse_special=True),
        lambda text: [bos, *reference.encode(text, allowed_special="all")],
        texts,
    )
    assert_same(ours.encode, lambda text: [bos, *reference.encode(text, disallowed_special=())], texts)
    converted = TikTokenConverter(vocab_file=str(path), pattern=pattern[1], extra_special_tokens=names).converted()
    assert_same(
        lambda text: ours.encode(text, add_special=False, parse_special=True),
        lambda text: converted.encode(text, add_special_tokens=False).ids,
        texts,
    )
    assert_same(lambda text: list(ours.decode(ours.encode(text)).encode()), lambda text: list(text.encode()), texts)


def test_tekken_is_tiktoken_by_mistrals_rules(tmp_path: Path) -> None:
    """What mistral-common does: tiktoken with the file's pattern and ranks, ids moved behind the special ones."""
    import tiktoken

    document = json.loads(package_file("mistral_common", "data/tekken_240718.json").read_bytes())
    config = document["config"]
    n_special = config["default_num_special_tokens"]
    entries = document["vocab"][: config["default_vocab_size"] - n_special]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    reference = tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    metadata = ranks_metadata(ranks, {f"<SPECIAL_{i}>": len(ranks) + i for i in range(n_special)}, "tekken")
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        metadata[key] = metadata[key][-n_special:] + metadata[key][:-n_special]
    metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    ours = opened(tmp_path, metadata)
    assert_same(ours.encode, lambda text: [1, *(n_special + i for i in reference.encode(text))], STRINGS)


# ------------------------------------------------------------------------------------ rules that GGUF only names


@pytest.mark.parametrize("pre", ["llama-bpe", "dbrx"])
def test_the_rule_of_cl100k_is_transformers_own(pre: str) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    assert PRE_TOKENIZERS[pre].steps[0]["pattern"]["Regex"] == pattern


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-r1-qwen"])
def test_the_rule_of_qwen2_is_transformers_own(pre: str, tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    metadata = bpe_metadata(train_bpe("qwen2"), pre)
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = Qwen2Tokenizer(vocab=vocab, merges=merges)
    assert_same(opened(tmp_path, metadata).encode, lambda text: reference(text)["input_ids"], STRINGS[:3000])
