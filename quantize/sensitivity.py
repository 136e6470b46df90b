"""What a format of each matrix costs: the divergence that it would add to the model's next token, and its bytes.

KL ≈ Σ a·e over the matrices: e is the squared error of a matrix's product, E‖(W − Q)x‖² with columns of x taken as
uncorrelated; a, how much of that error reaches the next token, is measured. Matrices of one kind in neighbouring layers
are perturbed together, by twice what four bits do to them, and the hidden states so disturbed go on from there to the
logits beside the undisturbed ones. All disturbed streams move through the layers at once, so each layer is read once
and held alone, its other matrices in 8 bits. Decides nothing: allocate.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import CODEBOOKS, FORMATS, TILE_ROWS, TensorSpec, dense, dequantize, pack, unpack

from . import kernels
from .calibration import (
    ATTENTION,
    MATRICES,
    MLP,
    Floats,
    HiddenStates,
    engine_weight,
    gather,
)
from .calibration_texts import Texts
from .methods import METHODS, Statistics
from .readers import Source, SourceTensor

# What a matrix may become, each better than the one before it where it is larger.
CHOICES = tuple(
    (format, group)
    for format, groups in (("q4nl", (128, 64, 32)), ("q5nl", (128, 64, 32)), ("q6", (64, 32)), ("q8", (128, 32)))
    for group in groups
)
Choice = tuple[str, int]
Payload = NDArray[np.uint8]
Report = Callable[[int, int, str], None]  # done, total, what

_PROBE: Choice = ("q4nl", 32)  # what matrices are perturbed by
_AMPLIFIED = 2.0  # its error by so much: well above what rounding activations to int8 does by chance
_DEPTHS = 8  # groups of neighbouring layers, at most
_SAMPLED_WEIGHTS = 1 << 20  # of a matrix, in whole tiles of rows from all over it, for the errors of its choices
_LOGIT_ROWS = 64
_NUDGE = 1e-3  # of the hidden states: rounds activations elsewhere, and does little else
_CHANCE = "chance"  # the role of a stream that is only nudged
_LEAST_SHARE = 0.2  # of a stream's divergence that is its own, however much chance would explain


@dataclass
class Costs:
    """Of one matrix, by choice: its bytes and the divergence (nats) that it adds, as `imatrix` would quantize it."""

    n_bytes: dict[Choice, int]
    kl: dict[Choice, float]


@dataclass
class _Stream:
    """Hidden states that some matrices have disturbed."""

    role: str
    layers: range
    states: HiddenStates
    error: float = 0.0  # Σ e of what disturbs it


@dataclass
class _Errors:
    """e of every choice of a matrix, and which stream tells its a."""

    by_choice: dict[Choice, float]
    stream: tuple[str, int]  # role, first layer
    n_bytes: dict[Choice, int] = field(default_factory=dict)


def spec_of(name: str, shape: tuple[int, ...], choice: Choice) -> TensorSpec:
    """That of a matrix as this choice."""
    format, group = choice
    offset = "f16" if FORMATS[format].has_offset else ""
    return TensorSpec(name, format, shape, group=group, offset=offset, codebook=CODEBOOKS.get(format, ()))


def bytes_held(source: Source, tokens: int) -> int:
    """What measuring keeps in memory at most, with some slack for what numpy takes in between."""
    config = source.config
    streams = 1 + (len(MATRICES) + 1) * min(_DEPTHS, config["n_layers"]) + 1
    q_dim = config["n_heads"] * config["head_dim"]
    layer = sum(
        tensor.shape[0] * tensor.shape[-1] for name, tensor in source.tensors.items() if name.startswith("layers.0.")
    )
    head = config["vocab_size"] * config["dim"]
    widest: int = max(config["dim"], q_dim, config["hidden_dim"])
    states = 4 * tokens * (2 * streams * config["dim"] + 3 * q_dim + 5 * config["hidden_dim"])
    logits = 6 * 4 * _LOGIT_ROWS * config["vocab_size"]
    needed: int = states + max(6 * layer + 5 * 4 * widest * widest, 4 * 4 * head + logits) + (64 << 20)
    return needed


@dataclass(frozen=True)
class Yardstick:
    """What a model makes of some texts, kept to hold a quantized model against it. hidden: float32 [n, dim], normed."""

    texts: Texts
    hidden: Floats


def measured_costs(
    source: Source, texts: Texts, held_out: Texts, threads: int, progress: Report | None = None
) -> tuple[dict[str, Costs], Yardstick]:
    """The costs of every matrix of a model, by canonical name, measured on texts; and what it makes of others."""
    return _Measurement(source, texts, held_out, threads, progress).run()


def divergence(
    source: Source, yardstick: Yardstick, specs: Sequence[TensorSpec], payload: Callable[[str], bytes], threads: int
) -> float:
    """Mean KL divergence of the next token (nats) of the model with these tensors from its source, over the yardstick's
    texts. payload: that of a tensor. One layer is held at a time; the head's input is not rounded."""
    known = {spec.name: spec for spec in specs}

    def stored(name: str) -> Payload:
        return np.frombuffer(payload(name), np.uint8)

    def numbers(name: str) -> Floats:
        return dequantize(known[name], unpack(known[name], stored(name)))

    ids = np.concatenate(yardstick.texts.ids)
    scale = np.float32(source.config.get("embedding_scale") or 1)
    x = numbers("tok_embeddings")[ids] * scale
    states = HiddenStates(source.config, x, yardstick.texts.lengths, threads)
    for layer in range(source.config["n_layers"]):
        names = {role: f"layers.{layer}.{role}" for role in (*ATTENTION, *MLP, "wo", "w_down")}
        _pass(
            states,
            layer,
            {role: engine_weight(known[name], stored(name)) for role, name in names.items() if name in known},
        )
    hidden = np.concatenate(list(states.normed(engine_weight(known["norm"], stored("norm")))))
    name = "tok_embeddings" if source.config["tied_embeddings"] else "output"
    head, original, total = numbers(name), source.tensors[name].read(), 0.0
    for first in range(0, len(hidden), _LOGIT_ROWS):
        rows = slice(first, first + _LOGIT_ROWS)
        expected = _log_softmax(yardstick.hidden[rows] @ original.T)
        total += _kl(np.exp(expected), expected, hidden[rows] @ head.T)
    return max(total / len(hidden), 0.0)


def _pass(states: HiddenStates, layer: int, weights: Mapping[str, Any]) -> None:
    """Hidden states through a layer."""
    states.attend(layer, {role: weights[role] for role in ATTENTION if role in weights})
    states.add(weights["wo"])
    states.feed({role: weights[role] for role in MLP})
    states.add(weights["w_down"])


class _Measurement:
    def __init__(self, source: Source, texts: Texts, held_out: Texts, threads: int, progress: Report | None) -> None:
        self._source, self._config, self._threads, self._progress = source, source.config, threads, progress
        self._tied = bool(self._config["tied_embeddings"])
        self._errors: dict[str, _Errors] = {}
        self._streams: list[_Stream] = []
        self._depths = {depth.start: depth for depth in _depths(self._config["n_layers"])}
        ids, where = np.unique(np.concatenate(texts.ids), return_inverse=True)
        embedding, scale = source.tensors["tok_embeddings"], np.float32(self._config.get("embedding_scale") or 1)
        rows = np.concatenate([embedding.read(ids[at : at + 2048]) for at in range(0, len(ids), 2048)])

        def states(rows: Floats) -> HiddenStates:
            return HiddenStates(self._config, rows[where] * scale, texts.lengths, threads)

        self._base = states(rows)
        self._texts = held_out
        self._held_out = HiddenStates(
            self._config, embedding.read(np.concatenate(held_out.ids)) * scale, held_out.lengths, threads
        )
        rough, error = _probed("tok_embeddings", rows, None)
        self._embedded = _Stream("tok_embeddings", range(0), states(rough), error * embedding.shape[0] / len(rows))
        self._streams.append(self._embedded)

    def run(self) -> tuple[dict[str, Costs], Yardstick]:
        n_layers = self._config["n_layers"]
        for layer in range(n_layers):
            if self._progress is not None:
                self._progress(layer, n_layers, f"layers.{layer}")
            if layer in self._depths:
                depth = self._depths[layer]
                self._streams += [_Stream(role, depth, self._base.copy()) for role in MATRICES]
                self._streams.append(_Stream(_CHANCE, depth, self._nudged(layer)))
            self._through(layer)
        norm = self._norm()
        kl = self._divergences(norm)
        found = {}
        for name, errors in self._errors.items():
            a = kl[errors.stream]
            found[name] = Costs(errors.n_bytes, {choice: a * e for choice, e in errors.by_choice.items()})
        return found, Yardstick(self._texts, np.concatenate(list(self._held_out.normed(norm))))

    def _norm(self) -> Any:
        spec = TensorSpec("norm", "f32", self._source.tensors["norm"].shape)
        return engine_weight(spec, pack(spec, dense(spec, self._source.tensors["norm"].read())))

    def _nudged(self, layer: int) -> HiddenStates:
        states, rng = self._base.copy(), np.random.Generator(np.random.PCG64(layer))
        states.x *= 1 + np.float32(_NUDGE) * rng.standard_normal(states.x.shape, np.float32)
        return states

    def _through(self, layer: int) -> None:
        """All streams through a layer."""
        tensors = {
            role: self._source.tensors.get(f"layers.{layer}.{role}") for role in (*ATTENTION, *MLP, "wo", "w_down")
        }
        kept = {role: tensor for role, tensor in tensors.items() if tensor is not None}
        weights = {role: _engine_weight(role, tensor) for role, tensor in kept.items()}
        active = [stream for stream in self._streams if layer in stream.layers]
        rough: dict[str, Any] = {}

        def look(role: str, inputs: Iterator[Floats], statistics: list[Statistics]) -> None:
            """A matrix's errors under its input, and it perturbed."""
            if not statistics:
                statistics.append(gather(inputs, kept[role].shape[1]))
            values = kept[role].read()
            stream = next(stream for stream in active if stream.role == role)
            self._add_errors(f"layers.{layer}.{role}", values, statistics[0], (role, stream.layers.start))
            perturbed, error = _probed(role, values, statistics[0])
            stream.error += error
            spec = TensorSpec(role, "f32", values.shape)
            rough[role] = engine_weight(spec, pack(spec, dense(spec, perturbed)))

        def stage(norm: str, roles: tuple[str, ...]) -> None:
            statistics: list[Statistics] = []
            for role in roles:
                look(role, self._base.normed(weights[norm]), statistics)

        stage("attn_norm", ("wq", "wk", "wv"))
        self._base.attend(layer, {role: weights[role] for role in ATTENTION if role in weights})
        look("wo", self._base.inner(), [])
        self._base.add(weights["wo"])
        stage("mlp_norm", ("w_gate", "w_up"))
        self._base.feed({role: weights[role] for role in MLP})
        look("w_down", self._base.inner(), [])
        self._base.add(weights["w_down"])
        for stream in self._streams:
            mine = dict(weights)
            if stream.role in rough and stream in active:
                mine[stream.role] = rough[stream.role]
            _pass(stream.states, layer, mine)
        _pass(self._held_out, layer, weights)

    def _add_errors(self, name: str, values: Floats, statistics: Statistics | None, stream: tuple[str, int]) -> None:
        rows = _sampled_rows(values.shape)
        sample, share = values[rows], values.shape[0] / len(rows)
        errors = _Errors({}, stream)
        for choice in CHOICES:
            spec = spec_of(name, values.shape, choice)
            errors.by_choice[choice] = share * _error(sample, _quantized(spec, sample, statistics), statistics)
            errors.n_bytes[choice] = spec.payload_bytes
        self._errors[name] = errors

    def _divergences(self, norm: Any) -> dict[tuple[str, int], float]:
        """Of every stream, its divergence over the error that made it."""
        name = "tok_embeddings" if self._tied else "output"
        head = self._source.tensors[name].read()
        statistics = gather(self._base.normed(norm), head.shape[1])
        rough, error = _probed(name, head, statistics)
        self._add_errors(name, head, statistics, ("head", 0))
        if not self._tied:
            self._add_errors(
                "tok_embeddings", self._source.tensors["tok_embeddings"].read(), None, ("tok_embeddings", 0)
            )
        totals = np.zeros(len(self._streams) + 1)
        normed = [
            np.concatenate(list(states.normed(norm))) for states in (self._base, *(s.states for s in self._streams))
        ]
        n = len(normed[0])
        for first in range(0, n, _LOGIT_ROWS):
            rows = slice(first, first + _LOGIT_ROWS)
            expected = _log_softmax(normed[0][rows] @ head.T)
            p = np.exp(expected)
            for i, x in enumerate(normed[1:]):
                matrix = rough if self._tied and i == 0 else head
                totals[i] += _kl(p, expected, x[rows] @ matrix.T)
            totals[-1] += _kl(p, expected, normed[0][rows] @ rough.T)
        if self._tied:  # one matrix at both ends of the model
            totals[-1] = totals[0]
        chance = {s.layers.start: t for s, t in zip(self._streams, totals, strict=False) if s.role == _CHANCE}
        out: dict[tuple[str, int], float] = {}
        for stream, total in zip(self._streams, totals, strict=False):
            if stream.error:
                own = max(total - chance.get(stream.layers.start, 0.0), _LEAST_SHARE * total)
                out[stream.role, stream.layers.start] = own / n / stream.error
        out["head", 0] = totals[-1] / n / error if error else 0.0
        return out


def _depths(n_layers: int) -> list[range]:
    """The first two layers and the last alone, for they are like no others; those between in groups."""
    if n_layers <= _DEPTHS:
        return [range(i, i + 1) for i in range(n_layers)]
    inner = np.linspace(2, n_layers - 1, _DEPTHS - 2).round().astype(int)
    borders = [0, 1, *inner.tolist(), n_layers]
    return [range(a, b) for a, b in pairwise(borders)]


def _engine_weight(role: str, tensor: SourceTensor) -> Any:
    values = tensor.read()
    if values.ndim == 1:
        spec = TensorSpec(role, "f32", values.shape)
        return engine_weight(spec, pack(spec, dense(spec, values)))
    spec = spec_of(role, values.shape, ("q8", 32))
    return engine_weight(spec, pack(spec, METHODS["rtn"].quantize(values, spec, None), kernels.tiles()))


def _sampled_rows(shape: tuple[int, ...]) -> NDArray[np.int64]:
    n_tiles = -(-shape[0] // TILE_ROWS)
    wanted = max(1, min(n_tiles, _SAMPLED_WEIGHTS // (shape[1] * TILE_ROWS)))
    tiles = np.arange(wanted) * n_tiles // wanted
    rows = (tiles[:, None] * TILE_ROWS + np.arange(TILE_ROWS)).ravel()
    return rows[rows < shape[0]]


def _quantized(spec: TensorSpec, values: Floats, statistics: Statistics | None) -> Floats:
    part = replace(spec, shape=values.shape)
    method = METHODS["rtn" if statistics is None else "imatrix"]
    return dequantize(part, method.quantize(np.ascontiguousarray(values), part, statistics))


def _error(values: Floats, found: Floats, statistics: Statistics | None) -> float:
    squares = np.square(values - found).sum(axis=0, dtype=np.float64)
    return float(squares @ statistics.mean_squares if statistics is not None else squares.sum())


def _probed(name: str, values: Floats, statistics: Statistics | None) -> tuple[Floats, float]:
    """A matrix perturbed, and e of that."""
    found = _quantized(spec_of(name, values.shape, _PROBE), values, statistics)
    return values + np.float32(_AMPLIFIED) * (found - values), _AMPLIFIED**2 * _error(values, found, statistics)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)
    out: Floats = shifted - np.log(total).astype(np.float32)
    return out


def _kl(p: Floats, log_p: Floats, logits: Floats) -> float:
    """Σ over rows of KL(p, softmax(logits))."""
    return float(np.einsum("tv,tv->t", p, log_p - _log_softmax(logits)).sum(dtype=np.float64))
