"""Gives a checkpoint's tensors our names: exactly the model's tensors, each with the shape that the config demands.

What the source calls them is families.py's table. What lies in one tensor there is cut, what is stored interleaved is
put in order, what a family multiplies is multiplied. Nothing is read here but what must be zero.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.model_folder import LAYER_SHAPES, OPTIONAL, OUTER_SHAPES, shape_of
from pyllama.common.reader import shown

from .readers.source import Rows, Scaled, Slice, SourceTensor, Stored, is_zero

if TYPE_CHECKING:
    from .families import Family

# What RoPE turns, and the field that says how many heads lie in it; a norm's weight serves them all.
ROTATED = {"wq": "n_heads", "bq": "n_heads", "wk": "n_kv_heads", "bk": "n_kv_heads", "q_norm": "", "k_norm": ""}


def bind(
    family: Family,
    config: Mapping[str, Any],
    stored: Stored,
    where: str,
    *,
    optional: Collection[str] = (),
    factors: Mapping[str, float] | None = None,
) -> dict[str, SourceTensor]:
    """Canonical names for exactly the model's tensors: [N, K] matrices and [N] vectors, in the forward pass's order.

    optional: which of OPTIONAL the model has. factors: canonical name -> number that the tensor is multiplied by.
    Raises ModelFormatError for a tensor that is missing, has another shape, or that this family does not have.
    """
    left = dict(stored)
    out: dict[str, SourceTensor] = {}

    def take(source_name: str, name: str, shape: tuple[int, ...], sides: Sequence[str]) -> Rows:
        tensor = left.pop(source_name, None)
        if tensor is None:
            raise ModelFormatError(f"{where}: tensor {source_name} ({name}) is missing{_alike(source_name, left)}")
        if tensor.shape != shape:
            _wrong_shape(family, tensor, name, shape, sides, where)
        return tensor

    def add(name: str, part: str, rows: Rows) -> None:
        order = None
        if family.interleaved and part in ROTATED:
            heads = config[ROTATED[part]] if ROTATED[part] else 1
            order = halves_first(heads, config["head_dim"])
        factor = (factors or {}).get(name)
        out[name] = SourceTensor(name, rows if factor is None else Scaled(rows, factor), order)

    def outer(name: str) -> None:
        sides = OUTER_SHAPES[name]
        add(name, name, take(family.outer[name], name, shape_of(config, sides), sides))

    def layer(i: int) -> None:
        parts = [part for part in LAYER_SHAPES if part in family.layer and (part not in OPTIONAL or part in optional)]
        rows: dict[str, Rows] = {}
        for part in parts:
            if part in rows:
                continue
            fused = next((group for group in family.fused if part in group), (part,))
            names, sides = ", ".join(fused), [side for one in fused for side in LAYER_SHAPES[one]]
            shapes = [shape_of(config, LAYER_SHAPES[one]) for one in fused]
            shape = (sum(one[0] for one in shapes), *shapes[0][1:])
            whole = take(family.layer[part].format(i=i), f"layers.{i}.{names}", shape, sides)
            first = 0
            for one, (n, *_) in zip(fused, shapes, strict=True):
                rows[one] = whole if len(fused) == 1 else Slice(whole.name, whole, first, n)
                first += n
        for part in parts:
            add(f"layers.{i}.{part}", part, rows[part])

    outer("tok_embeddings")
    for i in range(config["n_layers"]):
        layer(i)
    outer("norm")
    if not config["tied_embeddings"]:
        outer("output")
    _check_rest(family, left, where)
    return out


def halves_first(heads: int, head_dim: int) -> NDArray[np.intp]:
    """For each row in Hugging Face's order, its row where rotary pairs are neighbours.

    Row (head, half, j) comes from row (head, 2 j + half): there, pair j of a head is rows 2 j and 2 j + 1.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return np.ascontiguousarray(rows.transpose(0, 2, 1).reshape(-1))


def _alike(wanted: str, names: Iterable[str]) -> str:
    """Of a missing tensor: what a file saved from another class of the same model has in its place."""
    found = next((name for name in names if name.endswith("." + wanted) or wanted.endswith("." + name)), None)
    return "" if found is None else f"; it is there as {shown(found)}; was another class of the model saved?"


def _wrong_shape(
    family: Family, tensor: Rows, name: str, shape: tuple[int, ...], sides: Sequence[str], where: str
) -> NoReturn:
    names = dict.fromkeys(part for side in sides for part in side.split("*"))
    raise ModelFormatError(
        f"{where}: tensor {tensor.name} ({name}): shape {list(tensor.shape)}, expected {list(shape)};"
        f" check {', '.join(family.keys[part] for part in names)}"
    )


def _check_rest(family: Family, left: dict[str, Rows], where: str) -> None:
    """Refuses tensors that are neither ignored nor, where they must be, all zero."""
    ignored, zero_only = _matcher(family.ignored), _matcher(family.zero_only)
    extra = {name: tensor for name, tensor in left.items() if not ignored.fullmatch(name)}
    strange = [name for name in extra if not zero_only.fullmatch(name)]
    if strange:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise ModelFormatError(
            f"{where}: tensor {shown(strange[0])}{more} does not belong to a {family.architecture} model"
        )
    for name, tensor in extra.items():
        tensor.check()
        if not is_zero(tensor):
            raise ModelFormatError(
                f"{where}: tensor {name} is not zero; the engine has biases of q, k and v only, and those where the"
                " config says so"
            )


def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    if not patterns:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(pattern).replace(re.escape("{i}"), r"\d{1,4}") for pattern in patterns))
