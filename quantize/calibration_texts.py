"""The token ids that calibration runs through a model: our own mix, a file of the user's, or the model's own words.

A stream of ids is cut into texts of 512 tokens, each opened as the tokenizer opens a text; of a long stream texts are
taken evenly from all of it. The same source, name and number of tokens always give the same ids. What is done with them
is calibration.py's affair.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import QuantizeError
from pyllama.common.model_folder import CONFIG_FILE, config_bytes
from pyllama.common.reader import BoundedFile

DEFAULT_TOKENS = 16384
TEXT_TOKENS = 512
MIX, SELF = "mix", "self"

_MIX_FILE = "calibration.txt"
_RANDOM_SHARE = 8  # of the mix, one text in so many is of random tokens
_WHOLE_BYTES = 1 << 20  # at least; a file up to this size is read whole, of a larger one as much in so many windows
_BYTES_PER_TOKEN, _WINDOWS = 16, 64

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """What a plan says of calibration. name: `mix`, `self`, or a file's path; tokens: about how many."""

    name: str = MIX
    tokens: int = DEFAULT_TOKENS


@dataclass(frozen=True)
class Texts:
    """Texts as token ids, and where they come from (never a path)."""

    name: str
    ids: tuple[Ids, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(ids) for ids in self.ids]

    def record(self) -> dict[str, Any]:
        """For the model's config.json: where the texts come from, how many tokens, and a digest of their ids."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
        return {"name": self.name, "tokens": sum(self.lengths), "sha256": digest.hexdigest()}


def read_texts(
    wish: Calibration,
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    where: str,
    sample: Callable[[Path], Path],
    place: Path,
) -> Texts:
    """The texts of a calibration for the model with these tokenizer files and this config.

    where: what messages call the source. sample: converts the source into a folder that is given, for `self`: beside
    `place`, the output, and named after it, so that the next run removes what a killed one has left.
    Raises QuantizeError where there is nothing to make texts of.
    """
    tokenizer = _tokenizer(files, config, where)
    length = min(TEXT_TOKENS, config["max_seq_len"])
    opening = tokenizer.encode("", add_special=True) if tokenizer.bos_id is not None else []
    opening = opening[:1] if opening[:1] == [tokenizer.bos_id] and length > 1 else []
    n_texts = -(-wish.tokens // length)
    if wish.name == SELF:
        return Texts(SELF, _sampled(sample, place, opening, n_texts, length, where))
    if wish.name == MIX:
        documents = package_files("quantize").joinpath("data", _MIX_FILE).read_text("utf-8").split("\f\n")
        texts = _cut(_stream(tokenizer, documents), opening, n_texts - n_texts // _RANDOM_SHARE, length)
        n_random = min(n_texts // _RANDOM_SHARE, len(texts) // (_RANDOM_SHARE - 1))
        texts = (*texts, *_random(tokenizer, opening, n_random, length, config["vocab_size"]))
        return _checked(Texts(MIX, texts), config, where)
    path = Path(wish.name)
    texts = _cut(_stream(tokenizer, _read_file(path, wish.tokens)), opening, n_texts, length)
    if not texts:
        raise QuantizeError(f"{path}: has no text to calibrate with")
    return _checked(Texts(path.name, texts), config, where)


def _checked(texts: Texts, config: Mapping[str, Any], where: str) -> Texts:
    """The texts, whose ids all have an embedding."""
    largest, n = max((int(ids.max()) for ids in texts.ids), default=0), config["vocab_size"]
    if largest >= n:
        raise QuantizeError(
            f"{where}: its tokenizer gives token {largest}, and the model has {n}; is it the right tokenizer? "
            "Else use --method rtn"
        )
    return texts


def _tokenizer(files: Mapping[str, bytes], config: Mapping[str, Any], where: str) -> Any:
    from pyllama.tokenizer import VOCABULARIES, Tokenizer

    if not any(name in files for name in VOCABULARIES):
        raise QuantizeError(f"{where}: has no tokenizer, and calibration runs texts; use --method rtn")
    try:
        return Tokenizer.from_files({**files, CONFIG_FILE: config_bytes(config)}, where)
    except ImportError as error:
        raise QuantizeError(f"calibration runs texts: {error}; use --method rtn") from None


def _stream(tokenizer: Any, documents: Iterable[str]) -> Ids:
    """All documents' ids, one behind the other."""
    ids = [np.array(tokenizer.encode(document, add_special=False), dtype=np.int64) for document in documents]
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


def _cut(stream: Ids, opening: Sequence[int], n_texts: int, length: int) -> tuple[Ids, ...]:
    """At most `n_texts` texts of `length` tokens, from all over the stream; a short stream is one short text."""
    room = max(1, length - len(opening))
    if not len(stream) or not n_texts:
        return ()
    whole = max(1, len(stream) // room)
    n = min(n_texts, whole)
    starts = [i * whole // n * room for i in range(n)]
    return tuple(np.concatenate([np.array(opening, np.int64), stream[at : at + room]]) for at in starts)


def _random(tokenizer: Any, opening: Sequence[int], n_texts: int, length: int, vocab_size: int) -> list[Ids]:
    """Tokens drawn evenly from those that have a text: what rare tokens do to a layer, no prose shows."""
    known = min(vocab_size, tokenizer.vocab_size)
    usable = [i for i in range(known) if i not in tokenizer.control_ids and tokenizer.token_bytes(i)]
    rng = np.random.Generator(np.random.PCG64(6))
    room = max(1, length - len(opening))
    drawn = [rng.integers(0, len(usable), room) for _ in range(n_texts)]
    return [np.concatenate([np.array(opening, np.int64), np.array(usable, np.int64)[at]]) for at in drawn]


def _read_file(path: Path, tokens: int) -> list[str]:
    """The text of a file, or pieces from all over it if it is large; bytes that are no UTF-8 become U+FFFD."""
    most = max(_WHOLE_BYTES, tokens * _BYTES_PER_TOKEN)
    with BoundedFile(path) as file:
        if file.size <= most:
            raw = [file.read_at(0, file.size)]
        else:
            window = most // _WINDOWS
            raw = [file.read_at(i * (file.size - window) // (_WINDOWS - 1), window) for i in range(_WINDOWS)]
    return [piece.decode("utf-8", errors="replace") for piece in raw if piece]


def _sampled(
    sample: Callable[[Path], Path], place: Path, opening: Sequence[int], n_texts: int, length: int, where: str
) -> tuple[Ids, ...]:
    """What the model says by itself, at temperature 1 and with fixed seeds, from its opening token or any token."""
    try:
        from pyllama import LLM
    except ImportError as error:
        raise QuantizeError(f"{where}: the model cannot be sampled from: {error}") from None
    folder = sample(place.with_name(f".{place.name}.self"))
    try:
        with LLM(folder, n_ctx=length) as llm:
            first = np.random.Generator(np.random.PCG64(6)).integers(0, llm.tokenizer.vocab_size, n_texts)
            prompts = [list(opening) or [int(token)] for token in first]
            if length <= len(prompts[0]):
                return tuple(np.array(prompt, np.int64) for prompt in prompts)
            neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
            choices = [
                _params(seed=seed, temperature=1.0, max_tokens=length - len(prompts[0]), ignore_eos=True, **neutral)
                for seed in range(n_texts)
            ]
            outputs = llm.generate(prompts, choices)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tuple(
        np.array([*prompt, *output.token_ids], np.int64) for prompt, output in zip(prompts, outputs, strict=True)
    )


def _params(**fields: Any) -> Any:
    from pyllama import SamplingParams

    return SamplingParams(**fields)
