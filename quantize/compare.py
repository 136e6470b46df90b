"""How far a quantized model is from its reference: what each says of the next token of a text, and weight by weight.

Both models run in our engine, the reference with its numbers as they are stored, and read the same chunks of a text.
Logits come chunk by chunk and are looked at in blocks of rows, so memory does not grow with the text. Measures are
those in common use (llama.cpp's perplexity tool has them too): Kullback-Leibler divergence of the next token, agreement
of the likeliest one, perplexity with the error of the paired difference. Does not convert, and judges nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import QuantizeError
from pyllama.common.formats import Packed, TensorSpec, dequantize, unpack
from pyllama.common.model_folder import is_model_folder, read_model_folder

from .readers import open_source

CHUNK_TOK = 512
EVALUATION_TEXT = Path(__file__).parent / "data" / "evaluation.txt"

_ROWS = 64  # of logits looked at at once, in float64
_BLOCK_WEIGHTS = 1 << 20
_DENSE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

Report = Callable[[int, int, str], None]  # done, total, what


@dataclass(frozen=True)
class Divergence:
    """Of a model's next-token distributions q from the reference's p, over the tokens of a text, in nats.

    kl: KL(p, q) = Σ p·ln(p/q) per token: its mean with the standard error over chunks, median, 99th and 99.9th
    percentile; kl_chunks: the mean of each chunk, in order, for statistics over pairs of models. top1: share of tokens
    whose likeliest successor is the same. perplexity: of the text under each, their ratio and its standard error, from
    the paired differences of the text's own tokens, by chunk. rms_dp: root of the mean squared difference of the
    probability of the text's own token.
    """

    n_tokens: int
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_999: float
    top1: float
    perplexity_reference: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    rms_dp: float
    kl_chunks: tuple[float, ...] = ()


@dataclass(frozen=True)
class TensorError:
    """‖W − Q‖² / ‖W‖² of a matrix."""

    name: str
    format: str
    relative: float


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference. bits_per_weight: all payloads over all weights."""

    model: str
    reference: str
    reference_format: str  # that the reference ran in
    bits_per_weight: float
    payload_bytes: int
    divergence: Divergence
    tensors: tuple[TensorError, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    models: Sequence[str | os.PathLike[str]],
    reference: str | os.PathLike[str],
    text: str,
    *,
    max_tokens: int | None = None,
    progress: Report | None = None,
) -> list[Comparison]:
    """Compares model folders with the checkpoint (or model folder) that they were made from, over a text.

    The text is cut into chunks of 512 tokens (fewer where a context is shorter), each read from the beginning token on;
    max_tokens: how much of it is read at most. Raises QuantizeError where the models do not share a vocabulary or the
    text is too short, and what opening them raises.
    """
    from pyllama import LLM

    for path in models:
        if not is_model_folder(Path(path)):
            raise QuantizeError(f"{path}: is no model folder that quantize wrote; give the output of a conversion")
    base_format, n_ctx = _as_stored(reference)
    with ExitStack() as opened:
        base = opened.enter_context(LLM(reference, n_ctx=n_ctx, format=base_format))
        others = [opened.enter_context(LLM(path, n_ctx=n_ctx)) for path in models]
        for model in others:
            _check_same_vocabulary(base, model)
        chunks, sums, done = _chunks(base, text, max_tokens), [_Sums() for _ in models], 0
        for chunk in chunks:
            expected = base.logits(chunk)
            for path, model, kept in zip(models, others, sums, strict=True):
                kept.add(expected, model.logits(chunk), chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, sum(map(len, chunks)) * len(models), str(path))
    return [
        _comparison(path, reference, base_format, kept.divergence()) for path, kept in zip(models, sums, strict=True)
    ]


def _comparison(
    model: str | os.PathLike[str], reference: str | os.PathLike[str], format: str | None, divergence: Divergence
) -> Comparison:
    specs = [tensor.spec for tensor in read_model_folder(model).tensors.values()]
    n_bytes = sum(spec.payload_bytes for spec in specs)
    return Comparison(
        model=str(model),
        reference=str(reference),
        reference_format=format or "as it is opened",
        bits_per_weight=n_bytes * 8 / sum(spec.n_weights for spec in specs),
        payload_bytes=n_bytes,
        divergence=divergence,
        tensors=tuple(_tensor_errors(model, reference)),
    )


def _as_stored(reference: str | os.PathLike[str]) -> tuple[str | None, int]:
    """The format in which a reference's numbers are what it stores, None: as it is opened anyway; and the context."""
    from pyllama.open import source_path

    path = source_path(reference)
    if is_model_folder(path):
        return None, min(CHUNK_TOK, read_model_folder(path).config["max_seq_len"])
    source, weights = open_source(path), dict[str, int]()
    for tensor in source.tensors.values():
        if len(tensor.shape) == 2:
            weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.shape[0] * tensor.shape[1]
    most = max(weights, key=lambda kind: weights[kind])
    return _DENSE.get(most, "f32"), min(CHUNK_TOK, source.config["max_seq_len"])


def _chunks(llm: Any, text: str, max_tokens: int | None) -> list[list[int]]:
    """The text's ids in pieces, each behind the token that opens texts, where there is one."""
    ids = llm.tokenizer.encode(text, add_special=False)[:max_tokens]
    opening = llm.tokenizer.encode("")
    size = llm.n_ctx - len(opening)
    chunks = [opening + ids[at : at + size] for at in range(0, len(ids), size)]
    chunks = [chunk for chunk in chunks if len(chunk) > 16 or len(chunks) == 1]  # a short rest says little
    if not chunks or len(chunks[0]) < 3:
        raise QuantizeError("the text has fewer than two tokens; give a longer one with --text")
    return chunks


def _check_same_vocabulary(base: Any, model: Any) -> None:
    sizes = [llm.config["vocab_size"] for llm in (base, model)]
    probe = "Hello, 世界! def f(x): return 2"
    if sizes[0] != sizes[1] or base.tokenizer.encode(probe) != model.tokenizer.encode(probe):
        raise QuantizeError(f"{model.path}: its vocabulary is another than the reference's ({base.path})")


class _Sums:
    """What is kept of each token: a few numbers."""

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []  # per chunk
        self._p: list[NDArray[np.float64]] = []  # per chunk: ln p of the text's own tokens
        self._q: list[NDArray[np.float64]] = []
        self._same = 0

    def add(self, p_logits: NDArray[np.float32], q_logits: NDArray[np.float32], ids: Sequence[int]) -> None:
        """The logits [n, vocab_size] of both after each of these tokens; what follows the last is not known."""
        kl = np.empty(len(ids) - 1)
        own = np.empty((2, len(ids) - 1))
        for first in range(0, len(ids) - 1, _ROWS):
            rows = slice(first, min(first + _ROWS, len(ids) - 1))
            p, q = _log_softmax(p_logits[rows]), _log_softmax(q_logits[rows])
            # Rounding makes a divergence of nearly nothing slightly negative.
            kl[rows] = np.maximum(np.einsum("tv,tv->t", np.exp(p), p - q), 0)
            self._same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            following = np.asarray(ids[rows.start + 1 : rows.stop + 1])[:, None]
            own[0, rows] = np.take_along_axis(p, following, axis=1)[:, 0]
            own[1, rows] = np.take_along_axis(q, following, axis=1)[:, 0]
        self._kl.append(kl)
        self._p.append(own[0])
        self._q.append(own[1])

    def divergence(self) -> Divergence:
        kl, p, q = (np.concatenate(parts) for parts in (self._kl, self._p, self._q))
        ratio = float(np.exp((p - q).mean()))
        return Divergence(
            n_tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_error=_standard_error(self._kl),
            kl_median=float(np.median(kl)),
            kl_99=float(np.quantile(kl, 0.99)),
            kl_999=float(np.quantile(kl, 0.999)),
            top1=self._same / len(kl),
            perplexity_reference=float(np.exp(-p.mean())),
            perplexity=float(np.exp(-q.mean())),
            perplexity_ratio=ratio,
            perplexity_ratio_error=ratio * _standard_error([a - b for a, b in zip(self._p, self._q, strict=True)]),
            rms_dp=float(np.sqrt(((np.exp(p) - np.exp(q)) ** 2).mean())),
            kl_chunks=tuple(float(chunk.mean()) for chunk in self._kl),
        )


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _standard_error(chunks: Sequence[NDArray[np.float64]]) -> float:
    """Of the mean over all tokens, tokens of one chunk hanging together; nan for a single chunk."""
    if len(chunks) < 2:
        return float("nan")
    sizes = np.array([len(chunk) for chunk in chunks], np.float64)
    mean = sum(float(chunk.sum()) for chunk in chunks) / sizes.sum()
    off = np.array([chunk.sum() for chunk in chunks]) - mean * sizes
    return float(np.sqrt((off * off).sum() * len(chunks) / (len(chunks) - 1)) / sizes.sum())


# ---- weights ---------------------------------------------------------------------------------------------------------


def _tensor_errors(model: str | os.PathLike[str], reference: str | os.PathLike[str]) -> Iterator[TensorError]:
    """Of each matrix that both have, by blocks of rows."""
    from pyllama.open import source_path

    folder, (names, read) = read_model_folder(model), _reader(source_path(reference))
    for name, tensor in folder.tensors.items():
        spec = tensor.spec
        if spec.is_vector or names.get(name) != spec.shape:
            continue
        packed = unpack(spec, tensor.payload())
        off = size = 0.0
        step = max(1, _BLOCK_WEIGHTS // spec.shape[1])
        for first in range(0, spec.shape[0], step):
            rows = slice(first, min(first + step, spec.shape[0]))
            wanted = read(name, rows).astype(np.float64)
            off += float(((wanted - _rows_of(spec, packed, rows)) ** 2).sum())
            size += float((wanted**2).sum())
        yield TensorError(name, _format_name(spec), off / size if size else 0.0)


def _format_name(spec: TensorSpec) -> str:
    return f"{spec.format} g{spec.group}" if spec.group else spec.format


def _rows_of(spec: TensorSpec, packed: Packed, rows: slice) -> NDArray[np.float32]:
    scales, offsets = (None if part is None else part[rows] for part in (packed.scales, packed.offsets))
    part = Packed(packed.codes[rows], scales, offsets, packed.input_order)
    return dequantize(replace(spec, shape=(rows.stop - rows.start, spec.shape[1])), part)


def _reader(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str, slice], NDArray[np.float32]]]:
    """Shapes by canonical name, and what reads rows of a matrix."""
    if not is_model_folder(path):
        tensors = open_source(path).tensors
        return {name: t.shape for name, t in tensors.items()}, lambda name, rows: tensors[name].read(rows)
    stored = read_model_folder(path).tensors
    last: dict[str, Packed] = {}

    def read(name: str, rows: slice) -> NDArray[np.float32]:
        spec = stored[name].spec
        if name not in last:
            last.clear()
            last[name] = unpack(spec, stored[name].payload())
        return _rows_of(spec, last[name], rows)

    return {name: tensor.spec.shape for name, tensor in stored.items()}, read
