"""What kind of vocabulary a model has and how many tokens it holds, from its files' bytes; for `pyllama info`.

Only looks: no tokenizer is made, so what a file means for encoding stays with hf.py and spm.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..common.errors import ModelFormatError

FILES = ("tokenizer.json", "tokenizer.model")  # the first that is there counts, as for Tokenizer


def vocabulary_kind(files: Mapping[str, bytes], where: str) -> dict[str, Any] | None:
    """{"file", "kind", "n_tokens"} of the vocabulary among `files` (name -> bytes); None if there is none.

    kind: "byte-level BPE", "BPE", "Unigram", "WordLevel", "WordPiece", or "SentencePiece". Raises ModelFormatError.
    """
    name = next((name for name in FILES if name in files), None)
    if name is None:
        return None
    kind, n_tokens = (_of_json if name == FILES[0] else _of_proto)(files[name], f"{where}: {name}")
    return {"file": name, "kind": kind, "n_tokens": n_tokens}


def _of_json(raw: bytes, where: str) -> tuple[str, int]:
    # Not by common.reader: vocabularies may repeat a key, which the library that reads them allows.
    try:
        found = json.loads(raw.decode("utf-8", "replace"))
        model = found["model"]
        kind = str(model.get("type", "BPE"))[:32]
        vocab = model["vocab"]
        if kind == "Unigram":
            ids = set(range(len(vocab)))
        else:
            ids = set(vocab.values())
        ids |= {token["id"] for token in found.get("added_tokens") or []}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelFormatError(f"{where}: is no tokenizer: {type(error).__name__}: {error}") from None
    parts = json.dumps([found.get("pre_tokenizer"), found.get("decoder")])
    return ("byte-level BPE" if kind == "BPE" and '"ByteLevel"' in parts else kind), len(ids)


def _of_proto(raw: bytes, where: str) -> tuple[str, int]:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor()
        if not raw or not processor.LoadFromSerializedProto(raw):
            raise RuntimeError("empty or refused")
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelFormatError(f"{where}: the sentencepiece library cannot open it: {error}") from None
    return "SentencePiece", int(processor.GetPieceSize())
