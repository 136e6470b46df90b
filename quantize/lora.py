"""LoRA adapters in PEFT's form (adapter_config.json, adapter_model.safetensors), merged while a model is converted.

`merge_adapters` gives a Source whose touched matrices are W + scale · B·A, computed in blocks of rows when somebody
reads them; a merged matrix lies on no grid any more. Modules are found by Hugging Face's names, whatever the source is:
its rows have been put into Hugging Face's order before. What cannot be merged is refused by name.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import parse_json, read_bytes, recorded_files, shown
from pyllama.common.safetensors import read_safetensors

from .readers.hf_weights import safetensors_rows
from .readers.source import DENSE_TYPES, Index, Rows, Source, SourceTensor, StoredTensor, copy_columns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 24
MAX_RANK = 1 << 14
_STEP_NUMBERS = 1 << 18  # of a factor at a time: 2 MiB of float64

_PREFIX = "base_model.model."
# Hugging Face's modules of a layer, and our matrices that lie below each other in each.
_IN_LAYER = {
    "self_attn.q_proj": ("wq",),
    "self_attn.k_proj": ("wk",),
    "self_attn.v_proj": ("wv",),
    "self_attn.qkv_proj": ("wq", "wk", "wv"),
    "self_attn.o_proj": ("wo",),
    "mlp.gate_proj": ("w_gate",),
    "mlp.up_proj": ("w_up",),
    "mlp.gate_up_proj": ("w_gate", "w_up"),
    "mlp.down_proj": ("w_down",),
}
_OUTER = {"model.embed_tokens": "tok_embeddings", "lm_head": "output"}

# Settings under which B·A is not what has to be added, and the values that leave them off.
_MUST_BE_OFF = {
    "alora_invocation_tokens": "an adapter that acts after certain tokens only",
    "fan_in_fan_out": "matrices stored transposed",
    "layer_replication": "layers used several times",
    "lora_bias": "biases beside B",
    "megatron_config": "Megatron's parallel layers",
    "target_parameters": "parameters that are no modules",
    "trainable_token_indices": "single rows of the embedding",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "factors over groups of inputs",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # of B and A; others change the base model too


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a matrix [N, K]: scale · left[N, r] · right[r, K]; with DoRA rows of given lengths."""

    left: StoredTensor  # B [N, r]; of an embedding A [r, N]
    right: StoredTensor  # A [r, K]; of an embedding B [K, r]
    scale: float
    embedding: bool
    lengths: StoredTensor | None  # float [N]: DoRA's magnitudes

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """N, r, r, K, as the two factors have them."""
        (a, b), (c, d) = self.left.shape, self.right.shape
        return (b, a, d, c) if self.embedding else (a, b, c, d)

    def apply(self, values: NDArray[np.float64], index: Index) -> None:
        """Makes `values`, rows `index` before, those of the merged matrix. Source: LoRA, eq. 3; DoRA, eq. 5.

        In steps over rows and columns, so that neither factor is ever held whole. Steps leave the bits as they are,
        but for those of a single row, which would be summed in another order: so it goes twice.
        """
        n_rows = max(2, _STEP_NUMBERS // self.rank)
        n_columns = max(2, _STEP_NUMBERS // self.rank // 2 * 2)
        for top in range(0, len(index), n_rows):
            part = values[top : top + n_rows]
            left = self._left(index[top : top + n_rows])
            left = np.repeat(left, 2, axis=0) if len(left) == 1 else left
            for first in range(0, values.shape[1], n_columns):
                product = left @ self._right(first, min(first + n_columns, values.shape[1]))
                product *= self.scale
                part[:, first : first + n_columns] += product[: len(part)]
        if self.lengths is not None:
            values *= (_row(self.lengths, index) / _lengths(values))[:, None]

    @property
    def rank(self) -> int:
        return self.sides[1]

    def _left(self, index: Index) -> NDArray[np.float64]:
        """Rows `index` of left: float64 [n, r]."""
        return _columns(self.left, index).T if self.embedding else self.left.read(index).astype(np.float64)

    def _right(self, first: int, last: int) -> NDArray[np.float64]:
        """Columns of right: float64 [r, last - first]."""
        index = np.arange(first, last)
        return self.right.read(index).astype(np.float64).T if self.embedding else _columns(self.right, index)


def _columns(tensor: StoredTensor, index: Index) -> NDArray[np.float64]:
    """Columns of a factor that is not to be held whole."""
    if tensor.type is None:
        raise ValueError(f"{tensor.name}: type {tensor.type_name} cannot be read")
    numbers = tensor.data().view(f"V{tensor.type.block_bytes}").reshape(tensor.shape)
    raw = copy_columns(tensor.file, numbers, index)
    return tensor.type.decode(raw.view(np.uint8).reshape(len(raw), -1)).astype(np.float64)


def _lengths(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The length of each row, without another array of the same size."""
    return np.sqrt([np.dot(row, row) for row in values])


def _row(tensor: StoredTensor, index: Index) -> NDArray[np.float64]:
    """Numbers `index` of a vector, whatever its shape says beside them: [N], or [N, 1] and [1, N] of older PEFT."""
    flat = tensor.type.decode(tensor.data().reshape(1, -1)) if tensor.type is not None else np.empty(0)
    return flat.reshape(-1)[index].astype(np.float64)


class Merged(Rows):
    """A tensor with the updates of adapters; `first`: its place in a fused module's rows, for each update."""

    def __init__(self, tensor: SourceTensor, where: str, updates: Sequence[tuple[Update, int]]) -> None:
        self.name = tensor.source_name
        self.type_name = f"{tensor.dtype}+lora"
        self.shape, self.n_bytes = tensor.shape, tensor.n_bytes
        self._tensor, self._where, self._updates = tensor, where, tuple(updates)

    @property
    def where(self) -> str:
        return self._where

    def read(self, index: Index) -> NDArray[np.float32]:
        first, last = int(index[0]), int(index[-1]) + 1  # conversion reads rows in their order
        values = self._tensor.read(slice(first, last))[index - first].astype(np.float64)
        for update, offset in self._updates:
            update.apply(values, index + offset)
        return values.astype(np.float32)

    def release(self) -> None:
        self._tensor.release()
        for update, _ in self._updates:
            update.left.release()
            update.right.release()


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: updates by module, whole tensors by module (modules_to_save), and what it is."""

    path: Path
    updates: Mapping[str, Update]
    whole: Mapping[str, StoredTensor]
    identity: Mapping[str, Any]
    targets: tuple[str, ...]  # () where the config's targets are a pattern or only some layers


def merge_adapters(source: Source, adapters: Sequence[tuple[str | os.PathLike[str], float]]) -> Source:
    """`source` with adapters merged one after the other; each a folder, or its .safetensors file, and a factor.

    Raises ModelFormatError that names the adapter's tensor which is damaged, unknown, or does not fit the model.
    """
    with recorded_files() as files:
        for path, factor in adapters:
            source = _merge(source, open_adapter(path, factor))
    return replace(source, files=(*source.files, *files))


def open_adapter(path: str | os.PathLike[str], factor: float = 1.0) -> Adapter:
    """Reads and checks an adapter. Raises ModelFormatError for what cannot be merged."""
    if not math.isfinite(factor):
        raise ValueError(f"factor {factor} of the adapter {path}, expected a finite number")
    folder = Path(path)
    weights = folder if folder.suffix == ".safetensors" else folder / WEIGHTS
    folder = weights.parent
    for needed in (folder / CONFIG, weights):
        if not needed.exists():
            raise ModelFormatError(f"{needed}: is missing; expected a PEFT adapter, {CONFIG} and {WEIGHTS}")
    description = read_bytes(folder / CONFIG, MAX_CONFIG_BYTES, CONFIG)
    config = _Config(parse_json(description, str(folder / CONFIG)), str(folder / CONFIG))
    file = read_safetensors(weights)
    modules, whole = _sort(safetensors_rows(file), str(weights))
    updates = {module: _update(module, parts, config, factor) for module, parts in modules.items()}
    digest = hashlib.sha256(description)
    digest.update(file.file.read_at(0, min(file.file.size, 1 << 20)))
    name = os.path.basename(os.path.abspath(folder))
    identity = {"name": name, "scale": factor, "size_bytes": file.file.size, "sha256_head": digest.hexdigest()}
    return Adapter(weights, updates, whole, identity, config.targets)


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


class _Config:
    """What adapter_config.json says: how B·A is scaled, module by module."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        if values.get("peft_type") != "LORA":
            self.fail("peft_type", f"found {shown(values.get('peft_type'))}, only 'LORA' can be merged")
        for key, meaning in _MUST_BE_OFF.items():
            if values.get(key) not in (None, False, [], {}):
                self.fail(key, f"found {shown(values[key])}; {meaning} cannot be merged")
        if values.get("bias", "none") != "none":
            self.fail("bias", f"found {shown(values['bias'])}, only 'none' can be merged")
        start = values.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            self.fail(
                "init_lora_weights",
                f"found {shown(start)}: the adapter belongs to a base model that was changed with it; save it with"
                " path_initial_model_for_weight_conversion",
            )
        self.rslora, self.dora = self._flag("use_rslora"), self._flag("use_dora")
        self.rank = self._number(values.get("r"), "r", whole=True)
        self.alpha = self._number(values.get("lora_alpha"), "lora_alpha")
        self.ranks, self.alphas = self._pattern("rank_pattern", whole=True), self._pattern("alpha_pattern")
        self.targets = self._targets()

    def fail(self, key: str, message: str) -> NoReturn:
        raise ModelFormatError(f"{self.where}: {key}: {message}")

    def rank_of(self, module: str) -> int:
        return int(self._of(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        alpha, rank = self._of(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _of(self, pattern: Mapping[str, float], module: str, default: float) -> float:
        for key, value in pattern.items():  # the first that fits decides
            exact = key.startswith("^")
            name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if module == name or (not exact and module.endswith("." + name)):
                return value
        return default

    def _pattern(self, key: str, *, whole: bool = False) -> dict[str, float]:
        pattern = self.values.get(key) or {}
        if not isinstance(pattern, dict) or len(pattern) > 1 << 16:
            self.fail(key, f"found {shown(pattern)}, expected an object of modules")
        for name in pattern:
            if not re.fullmatch(r"\^?(\w|\\?\.)+\$?", name):  # a foreign regular expression may take for ever
                self.fail(key, f"{shown(name)} is a regular expression; only names of modules are understood")
        return {name: self._number(value, f"{key}: {name}", whole=whole) for name, value in pattern.items()}

    def _number(self, value: Any, key: str, *, whole: bool = False) -> float:
        good = type(value) is int or (type(value) is float and not whole)
        if not good or not (1 if whole else -1e6) <= value <= (MAX_RANK if whole else 1e6):
            wanted = f"a whole number of 1 to {MAX_RANK}" if whole else "a number"
            self.fail(key, f"found {shown(value)}, expected {wanted}")
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            self.fail(key, f"found {shown(value)}, expected true or false")
        return bool(value)

    def _targets(self) -> tuple[str, ...]:
        """Names that each module of the model which has them must have an update for."""
        found = self.values.get("target_modules")
        some = any(self.values.get(key) for key in ("layers_to_transform", "exclude_modules"))
        if not isinstance(found, list) or some:
            return ()
        if len(found) > 1 << 10 or not all(isinstance(name, str) for name in found):
            self.fail("target_modules", f"found {shown(found)}, expected at most {1 << 10} names of modules")
        return tuple(found)


# ---- adapter_model.safetensors ---------------------------------------------------------------------------------------

_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "lengths",
    "lora_magnitude_vector.weight": "lengths",
}
# A head or embedding that was trained whole, or the one that an update belongs to, which PEFT saves beside it.
_WHOLE = re.compile("(" + "|".join(map(re.escape, _OUTER)) + r")(?:\.base_layer)?\.weight")
_PART = re.compile(r"(.+)\.(" + "|".join(map(re.escape, sorted(_PARTS, key=len, reverse=True))) + ")")


def _sort(
    stored: Mapping[str, StoredTensor], where: str
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """The tensors by module and part, and those that replace a module's weight."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        inner = name.removeprefix(_PREFIX)
        match = _PART.fullmatch(inner)
        if tensor.type is None or inner == name:
            raise ModelFormatError(
                f"{where}: tensor {shown(name)} has type {tensor.type_name}; expected {_PREFIX}… of type"
                f" {', '.join(DENSE_TYPES)}"
            )
        if match is not None:
            modules.setdefault(match[1], {})[_PARTS[match[2]]] = tensor
        elif (outer := _WHOLE.fullmatch(inner)) is not None:
            whole[outer[1]] = tensor
        else:
            raise ModelFormatError(
                f"{where}: tensor {shown(name)} is no factor of LoRA, nor an embedding or head; it cannot be merged"
            )
    if not modules and not whole:
        raise ModelFormatError(f"{where}: holds no tensors; expected *.lora_A.weight and *.lora_B.weight")
    return modules, whole


def _update(module: str, parts: Mapping[str, StoredTensor], config: _Config, factor: float) -> Update:
    embedding = "embedding_A" in parts or "embedding_B" in parts
    wanted = ["embedding_A", "embedding_B"] if embedding else ["B", "A"]
    wanted += ["lengths"] if config.dora else []
    some = next(iter(parts.values()))
    if sorted(parts) != sorted(wanted):
        raise ModelFormatError(
            f"{some.where}: module {shown(module)} has the parts {', '.join(sorted(parts))}, expected"
            f" {', '.join(sorted(wanted))}"
        )
    if embedding and config.dora:
        raise ModelFormatError(f"{some.where}: module {shown(module)}: DoRA of an embedding cannot be merged")
    left, right = (parts[part] for part in wanted[:2])
    if len(left.shape) != 2 or len(right.shape) != 2:
        raise ModelFormatError(f"{some.where}: module {shown(module)}: factors of LoRA have two sides")
    update = Update(left, right, config.scale_of(module) * factor, embedding, parts.get("lengths"))
    n, r, same, k = update.sides
    if r != same or r != config.rank_of(module):
        raise ModelFormatError(
            f"{some.where}: module {shown(module)}: factors [{n}, {r}] and [{same}, {k}], expected the rank"
            f" {config.rank_of(module)} of {config.where}"
        )
    if update.lengths is not None and math.prod(update.lengths.shape) != n:
        raise ModelFormatError(f"{some.where}: module {shown(module)}: {n} rows, but lengths of another number of rows")
    return update


# ---- merging ---------------------------------------------------------------------------------------------------------


def _merge(source: Source, adapter: Adapter) -> Source:
    updates: dict[str, list[tuple[Update, int]]] = {}
    for module, update in adapter.updates.items():
        _place(source, adapter, module, update, updates)
    _check_targets(source, adapter)
    tensors = dict(source.tensors)
    for module, stored in adapter.whole.items():
        name = _names(source, adapter, module)[0]
        if stored.shape != tensors[name].shape:
            _misfit(adapter, module, list(stored.shape), list(tensors[name].shape))
        tensors[name] = SourceTensor(name, stored)
    for name, of_tensor in updates.items():
        tensors[name] = SourceTensor(name, Merged(tensors[name], str(adapter.path), of_tensor))
    identity = {**source.identity, "lora": [*source.identity.get("lora", []), dict(adapter.identity)]}
    return replace(source, tensors=tensors, identity=identity)


def _place(
    source: Source, adapter: Adapter, module: str, update: Update, updates: dict[str, list[tuple[Update, int]]]
) -> None:
    names = _names(source, adapter, module)
    shapes = [source.tensors[name].shape for name in names]
    n, _, _, k = update.sides
    whole = [sum(shape[0] for shape in shapes), shapes[0][1]]
    if [n, k] != whole or update.embedding != (names[0] == "tok_embeddings"):
        _misfit(adapter, module, [n, k], whole)
    first = 0
    for name, shape in zip(names, shapes, strict=True):
        updates.setdefault(name, []).append((update, first))
        first += shape[0]


def _names(source: Source, adapter: Adapter, module: str) -> tuple[str, ...]:
    """Our matrices of a module, as the model has them."""
    match = re.fullmatch(r"model\.layers\.(\d{1,4})\.(.+)", module)
    names: tuple[str, ...] = ()
    if match is not None:
        names = tuple(f"layers.{int(match[1])}.{part}" for part in _IN_LAYER.get(match[2], ()))
    elif module in _OUTER:
        if source.config["tied_embeddings"]:
            raise ModelFormatError(
                f"{adapter.path}: changes {module}, but the model's head and embedding are one matrix; merge it with"
                " PEFT, which unties them"
            )
        names = (_OUTER[module],)
    if not names or any(name not in source.tensors for name in names):
        raise ModelFormatError(f"{adapter.path}: changes the module {shown(module)}, which the model does not have")
    return names


def _misfit(adapter: Adapter, module: str, found: list[int], expected: list[int]) -> NoReturn:
    raise ModelFormatError(
        f"{adapter.path}: module {shown(module)}: an update of {found}, but the model's matrix has {expected};"
        " the adapter belongs to another model"
    )


def _check_targets(source: Source, adapter: Adapter) -> None:
    """A module that the config names must have an update in every layer; else tensors are missing from the file."""
    touched = adapter.updates.keys()
    for target in adapter.targets:
        for part in _IN_LAYER:
            paths = [f"model.layers.{i}.{part}" for i in range(source.config["n_layers"])]
            meant = [path for path in paths if path == target or path.endswith("." + target)]
            missing = [path for path in meant if path not in touched]
            if missing and len(missing) < len(meant):
                raise ModelFormatError(f"{adapter.path}: has no update of {missing[0]}, though target_modules says so")
