"""Calibration: texts go through a model layer by layer while it is quantized, and each product's input is summed up.

True-sequential: a matrix is quantized under statistics of the input that the quantized matrices before it make, in the
arithmetic of the engine (`_C.convert.attention` and its siblings). Held are the residual stream of all texts, what one
product reads of it, and one layer. Finished tensors of a conversion that goes on are read back and run again, so that
the bytes are the same. Which texts is calibration_texts.py's affair, what becomes of statistics methods/'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import QuantizeError
from pyllama.common.formats import ALIGN, TensorSpec, aligned_zeros, dense, dequantize, pack
from pyllama.common.model_folder import expected_tensors
from pyllama.common.rope import inv_freq

from . import kernels
from .calibration_texts import TEXT_TOKENS, Texts
from .methods import METHODS, Statistics

if TYPE_CHECKING:
    from .convert import Plan, Planned

Floats = NDArray[np.float32]
Payload = NDArray[np.uint8]
Block = tuple["Planned", slice, Payload]
# Blocks of some tensors, converted under statistics of their common input.
Convert = Callable[[Sequence["Planned"], Statistics | None], Generator[Block, None, None]]

# The matrices of a layer by the input that they share, in the order in which inputs come.
_STAGES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w_gate": 2, "w_up": 2, "w_down": 3}
_ADDED = (1, 3)  # stages whose product is added to the residual stream
MATRICES = tuple(_STAGES)
ATTENTION = ("attn_norm", "wq", "wk", "wv", "bq", "bk", "bv", "q_norm", "k_norm")
MLP = ("mlp_norm", "w_gate", "w_up")
_CHUNK_TOK = 2048  # about, in whole texts: between two chunks Ctrl-C is heard
_SUM_ROWS = 256


def in_order(config: Mapping[str, Any], items: Sequence[Planned]) -> tuple[Planned, ...]:
    """Tensors in the order in which their statistics come: a matrix that is embedding and head in one is last."""
    place = {name: at for at, name in enumerate(expected_tensors(config))}
    if config["tied_embeddings"]:
        place["tok_embeddings"] = len(place)
    return tuple(sorted(items, key=lambda item: place[item.spec.name]))


def bytes_needed(plan: Plan) -> int:
    """What calibration keeps in memory at most, beside the blocks that are being converted; 0 for a plan without."""
    if plan.calibration is None:
        return 0
    config, gram = plan.source.config, METHODS[plan.method].needs == "gram"
    q_dim = config["n_heads"] * config["head_dim"]
    widest: int = max(config["dim"], q_dim, config["hidden_dim"])
    texts = (plan.calibration.tokens + TEXT_TOKENS) * 4
    layers: dict[int, int] = {}  # whose formats may differ
    for item in plan.tensors:
        at = _layer_of(item.spec.name)
        if at is not None:
            layers[at] = layers.get(at, 0) + item.spec.payload_bytes
    layer = max(layers.values(), default=0)
    # The sums and a chunk's share of them, and what a method makes of them, some of it in float64.
    sums = 4 * widest * widest * 12 if gram else 0
    if gram:  # the original model's stream and a layer of its own
        texts *= 2
        layer += 4 * sum(item.spec.n_weights for item in plan.tensors if item.spec.name.startswith("layers.0."))
    step = 4 * TEXT_TOKENS * (4 * config["dim"] + 3 * q_dim + 5 * config["hidden_dim"])
    needed: int = texts * (config["dim"] + widest) + 4 * _CHUNK_TOK * 2 * widest + 2 * layer + sums + step
    return needed


def gather(
    rows: Iterable[Floats], width: int, exact: Iterable[Floats] | None = None, ahead: Iterable[Floats] | None = None
) -> Statistics:
    """Statistics of an input that comes in pieces [n, width].

    exact: the same pieces as the original model has them, where a method needs products too; ahead: by how much its
    residual stream differs, pieces [n, N], where the product is added to that.
    """
    n, squares = 0, np.zeros(width)
    gram, drift, lead = (Sum() for _ in range(3))
    none: Iterable[Floats | None] = repeat(None)
    for piece, original, residual in zip(rows, exact or none, ahead or none, strict=False):
        n += len(piece)
        for first in range(0, len(piece), _SUM_ROWS):
            squares += np.square(piece[first : first + _SUM_ROWS], dtype=np.float64).sum(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):  # Statistics.check says it once, and of which tensor
            if original is not None:
                gram.add(piece, piece)
                drift.add(original - piece, piece)
            if residual is not None:
                lead.add(residual, piece)
    return Statistics(n, squares, gram.total, drift.total, lead.total)


class Sum:
    """Σ aᵀ·b over pieces; None before the first."""

    def __init__(self) -> None:
        self.total: Floats | None = None

    def add(self, a: Floats, b: Floats) -> None:
        product = a.T @ b
        if self.total is None:
            self.total = product
        else:
            self.total += product


class HiddenStates:
    """The residual stream of all texts, which moves through the layers part by part."""

    def __init__(self, config: Mapping[str, Any], x: Floats, lengths: Sequence[int], threads: int) -> None:
        frequencies, factor = inv_freq(config, max(lengths))
        self._config = dict(config) | {"rope_inv_freq": frequencies, "rope_attention_factor": factor}
        self._parts, self._threads = _engine().convert, threads
        self.x = x  # [n, dim]
        self._inner = np.empty((0, 0), np.float32)  # what wo or w_down reads, [n, q_dim or hidden_dim]
        self._chunks: list[tuple[slice, list[int]]] = []
        first, pending = 0, list(lengths)
        while pending:
            taken = [pending.pop(0)]
            while pending and sum(taken) + pending[0] <= _CHUNK_TOK:
                taken.append(pending.pop(0))
            self._chunks.append((slice(first, first + sum(taken)), taken))
            first += sum(taken)

    def copy(self) -> HiddenStates:
        """The same states, to go another way."""
        other = copy(self)
        other.x = self.x.copy()
        return other

    def normed(self, norm: Any) -> Iterator[Floats]:
        """x behind a norm, in pieces."""
        for rows, _ in self._chunks:
            yield self._parts.norm(norm, self._config["norm_eps"], self.x[rows], threads=self._threads)

    def inner(self) -> Iterator[Floats]:
        """What the last `attend` or `feed` made, in pieces."""
        for rows, _ in self._chunks:
            yield self._inner[rows]

    def ahead_of(self, other: HiddenStates) -> Iterator[Floats]:
        """By how much x differs from the other's, in pieces."""
        for rows, _ in self._chunks:
            yield self.x[rows] - other.x[rows]

    def attend(self, layer: int, weights: dict[str, Any]) -> None:
        """Attention up to what wo reads."""
        self._inner = np.empty((len(self.x), self._config["n_heads"] * self._config["head_dim"]), np.float32)
        for rows, lengths in self._chunks:
            self._inner[rows] = self._parts.attention(
                self._config, layer, weights, self.x[rows], lengths, threads=self._threads
            )

    def feed(self, weights: dict[str, Any]) -> None:
        """The MLP up to what w_down reads."""
        self._inner = np.empty((len(self.x), self._config["hidden_dim"]), np.float32)
        for rows, _ in self._chunks:
            self._inner[rows] = self._parts.mlp(self._config, weights, self.x[rows], threads=self._threads)

    def add(self, weight: Any) -> None:
        """x += weight · what the last `attend` or `feed` made, which is let go of."""
        for rows, _ in self._chunks:
            self._parts.add_product(weight, self._inner[rows], self.x[rows], threads=self._threads)
        self._inner = np.empty((0, 0), np.float32)


class LayerByLayer:
    """A conversion whose method needs statistics.

    convert: makes blocks of tensors. finished: names of tensors that an earlier run has written; read_back: their
    payloads.
    """

    def __init__(
        self,
        plan: Plan,
        texts: Texts,
        convert: Convert,
        finished: Collection[str],
        read_back: Callable[[str], bytes],
        threads: int,
    ) -> None:
        self._plan, self._convert, self._finished, self._read_back = plan, convert, set(finished), read_back
        self._needs = METHODS[plan.method].needs
        embedding = next(item for item in plan.tensors if item.spec.name == "tok_embeddings")

        def states(of: Planned) -> HiddenStates:
            x = _embedded(of, texts, np.float32(plan.source.config.get("embedding_scale") or 1))
            return HiddenStates(plan.source.config, x, texts.lengths, threads)

        self._states = states(embedding)
        # The original model's, beside it, where a method makes good what quantization did before a matrix.
        self._exact = states(_as_it_is(embedding)) if self._needs == "gram" else None
        self._head = "tok_embeddings" if plan.source.config["tied_embeddings"] else "output"

    def blocks(self) -> Generator[Block, None, None]:
        """All blocks that are not finished, in the plan's order."""
        norm: Any = None
        for layer, group in groupby(self._plan.tensors, lambda item: _layer_of(item.spec.name)):
            if layer is not None:
                yield from self._layer(layer, list(group))
                continue
            for item in group:
                if item.spec.name == "norm":
                    norm = engine_weight(item.spec, (yield from self._whole(item, None)))
                elif item.spec.name not in self._finished:
                    statistics = None
                    if item.spec.name == self._head and self._is_open(item):
                        exact = None if self._exact is None else self._exact.normed(norm)
                        statistics = gather(self._states.normed(norm), item.spec.shape[1], exact)
                        statistics.check(item.spec.name)
                    yield from self._convert([item], statistics)

    def _layer(self, layer: int, items: Sequence[Planned]) -> Generator[Block, None, None]:
        weights: dict[str, Any] = {}
        original = {_role(item): _original_weight(item) for item in items} if self._exact is not None else {}
        stage, statistics = -1, None
        for item in items:
            if _STAGES.get(_role(item), stage) != stage:
                stage = _STAGES[_role(item)]
                inputs = self._advance(self._states, stage, layer, weights)
                exact = None if self._exact is None else self._advance(self._exact, stage, layer, original)
                wanted = any(_STAGES.get(_role(other)) == stage and self._is_open(other) for other in items)
                statistics = gather(inputs, item.spec.shape[1], exact, self._ahead(stage)) if wanted else None
                if statistics is not None:
                    statistics.check(item.spec.name)
            weights[_role(item)] = engine_weight(item.spec, (yield from self._whole(item, statistics)))
        self._states.add(weights["w_down"])
        if self._exact is not None:
            self._exact.add(original["w_down"])

    def _ahead(self, stage: int) -> Iterator[Floats] | None:
        """How far the original's residual stream is from ours, for products that are added to it."""
        return None if self._exact is None or stage not in _ADDED else self._exact.ahead_of(self._states)

    @staticmethod
    def _advance(states: HiddenStates, stage: int, layer: int, weights: dict[str, Any]) -> Iterator[Floats]:
        """Brings hidden states to a stage's input, and gives it."""
        if stage == 0:
            return states.normed(weights["attn_norm"])
        if stage == 1:
            states.attend(layer, _some(weights, ATTENTION))
            return states.inner()
        if stage == 2:
            states.add(weights["wo"])
            return states.normed(weights["mlp_norm"])
        states.feed(_some(weights, MLP))
        return states.inner()

    def _is_open(self, item: Planned) -> bool:
        return item.how == "quantize" and item.spec.name not in self._finished

    def _whole(self, item: Planned, statistics: Statistics | None) -> Generator[Block, None, Payload]:
        """Hands on a tensor's blocks; returns its payload."""
        payload, first = aligned_zeros(item.spec.payload_bytes), 0
        if item.spec.name in self._finished:
            payload[:] = np.frombuffer(self._read_back(item.spec.name), np.uint8)
            return payload
        places = [section.start for section in item.spec.sections]
        for block in self._convert([item], statistics):
            yield block
            _, rows, data = block
            part = (
                item.spec if item.spec.is_vector else replace(item.spec, shape=(rows.stop - first, item.spec.shape[1]))
            )
            for i, section in enumerate(part.sections):
                if section.name == "input_order" and first:  # the whole tensor's in every block
                    continue
                payload[places[i] : places[i] + section.nbytes] = data[section.start : section.start + section.nbytes]
                places[i] += section.nbytes
            first = rows.stop
        return payload


def _role(item: Planned) -> str:
    return item.spec.name.rpartition(".")[2]


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _some(weights: Mapping[str, Any], roles: Sequence[str]) -> dict[str, Any]:
    return {role: weights[role] for role in roles if role in weights}


def _engine() -> Any:
    """pyllama._C. QuantizeError where it is not built: calibration has no second engine."""
    if kernels.extension() is None:
        raise QuantizeError("this method runs texts through the model, for which pyllama._C must be built (make dev)")
    from pyllama import _C

    return _C


def engine_weight(spec: TensorSpec, payload: Payload) -> Any:
    """A tensor as the engine takes it; a payload that does not lie as it wants is copied."""
    if payload.ctypes.data % ALIGN:
        there = aligned_zeros(payload.nbytes)
        there[:] = payload
        payload = there
    return _engine().Weight(**spec.arguments, data=payload)


def _as_it_is(item: Planned) -> Planned:
    """The same tensor, its numbers as the source has them."""
    return replace(item, spec=TensorSpec(item.spec.name, "f32", item.spec.shape), how="cast")


def _original_weight(item: Planned) -> Any:
    spec = _as_it_is(item).spec
    return engine_weight(spec, pack(spec, dense(spec, item.source.read())))


def _embedded(item: Planned, texts: Texts, scale: np.float32) -> Floats:
    """x [n, dim] before the first layer, from embeddings as they will be stored (a tied matrix: as rtn would)."""
    ids, where = np.unique(np.concatenate(texts.ids), return_inverse=True)
    rows = np.empty((len(ids), item.spec.shape[1]), np.float32)
    for first in range(0, len(ids), _CHUNK_TOK):
        rows[first : first + _CHUNK_TOK] = _stored_values(item, ids[first : first + _CHUNK_TOK])
    x: Floats = rows[where]
    x *= scale
    return x


def _stored_values(item: Planned, index: NDArray[np.int64]) -> Floats:
    spec = replace(item.spec, shape=(len(index), item.spec.shape[1]))
    if item.how == "repack":
        return dequantize(spec, item.source.read_packed(index))
    values = item.source.read(index)
    return dequantize(
        spec, METHODS["rtn"].quantize(values, spec, None) if item.how == "quantize" else dense(spec, values)
    )
