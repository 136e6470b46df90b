"""Families of models as data: what a checkpoint calls its tensors and its config's fields, and our names for them.

To add a Llama-like family, add an entry to FAMILIES. `Fields` reads untrusted config values with ranges, `base_config`
makes the canonical config, `bind` checks that exactly the expected tensors are there and gives them canonical names.
No file is opened here; what a file's own keys mean beyond this table is the reader's affair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import shown

from .readers.source import Rows, SourceTensor, Stored, is_zero

# Largest values that a config may claim; far above any model of this kind, far below what would overflow anything.
LIMITS = {
    "dim": 1 << 17,
    "hidden_dim": 1 << 20,
    "n_layers": 1 << 10,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "head_dim": 1 << 11,
    "vocab_size": 1 << 22,
    "max_seq_len": 1 << 26,
}

# Shape of each tensor in fields of the canonical config; a product joins two of them.
LAYER_SHAPES = {
    "attn_norm": ("dim",),
    "wq": ("n_heads*head_dim", "dim"),
    "wk": ("n_kv_heads*head_dim", "dim"),
    "wv": ("n_kv_heads*head_dim", "dim"),
    "bq": ("n_heads*head_dim",),
    "bk": ("n_kv_heads*head_dim",),
    "bv": ("n_kv_heads*head_dim",),
    "wo": ("dim", "n_heads*head_dim"),
    "mlp_norm": ("dim",),
    "w_gate": ("hidden_dim", "dim"),
    "w_up": ("hidden_dim", "dim"),
    "w_down": ("dim", "hidden_dim"),
}
OUTER_SHAPES = {"tok_embeddings": ("vocab_size", "dim"), "norm": ("dim",), "output": ("vocab_size", "dim")}
BIASES = ("bq", "bk", "bv")
ROTATED = {"wq": "n_heads", "bq": "n_heads", "wk": "n_kv_heads", "bk": "n_kv_heads"}


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint. Names hold `{i}` for the layer.

    keys: canonical config field -> the source's key. layer, outer: canonical tensor -> the source's name.
    interleaved: rotary pairs are neighbouring rows, to be put into Hugging Face's order.
    ignored: tensors that carry nothing (patterns). zero_only: tensors accepted only when they are all zero.
    defaults: what the source's own software assumes for a key that is absent.
    """

    architecture: str
    container: str
    model_type: str
    keys: Mapping[str, str]
    layer: Mapping[str, str]
    outer: Mapping[str, str]
    interleaved: bool = False
    ignored: tuple[str, ...] = ()
    zero_only: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_HF_KEYS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_HF_LAYER = {
    "attn_norm": "model.layers.{i}.input_layernorm.weight",
    "wq": "model.layers.{i}.self_attn.q_proj.weight",
    "wk": "model.layers.{i}.self_attn.k_proj.weight",
    "wv": "model.layers.{i}.self_attn.v_proj.weight",
    "bq": "model.layers.{i}.self_attn.q_proj.bias",
    "bk": "model.layers.{i}.self_attn.k_proj.bias",
    "bv": "model.layers.{i}.self_attn.v_proj.bias",
    "wo": "model.layers.{i}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "w_gate": "model.layers.{i}.mlp.gate_proj.weight",
    "w_up": "model.layers.{i}.mlp.up_proj.weight",
    "w_down": "model.layers.{i}.mlp.down_proj.weight",
}
_HF_OUTER = {"tok_embeddings": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
_HF_IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
_HF_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GGUF_ZERO = ("attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")

FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",
        container="safetensors",
        model_type="llama",
        keys=_HF_KEYS,
        layer=_HF_LAYER,
        outer=_HF_OUTER,
        ignored=_HF_IGNORED,
        zero_only=("model.layers.{i}.self_attn.o_proj.bias",),
        defaults={**_HF_DEFAULTS, "sliding_window": None},
    ),
    Family(
        architecture="MistralForCausalLM",
        container="safetensors",
        model_type="mistral",
        keys=_HF_KEYS,
        layer=_HF_LAYER,
        outer=_HF_OUTER,
        ignored=_HF_IGNORED,
        defaults={**_HF_DEFAULTS, "sliding_window": 4096},
    ),
    Family(
        architecture="llama",
        container="gguf",
        model_type="llama",
        keys={
            "dim": "llama.embedding_length",
            "hidden_dim": "llama.feed_forward_length",
            "n_layers": "llama.block_count",
            "n_heads": "llama.attention.head_count",
            "n_kv_heads": "llama.attention.head_count_kv",
            "head_dim": "llama.attention.key_length",
            "vocab_size": "llama.vocab_size",
            "max_seq_len": "llama.context_length",
            "norm_eps": "llama.attention.layer_norm_rms_epsilon",
            "rope_theta": "llama.rope.freq_base",
        },
        layer={
            "attn_norm": "blk.{i}.attn_norm.weight",
            "wq": "blk.{i}.attn_q.weight",
            "wk": "blk.{i}.attn_k.weight",
            "wv": "blk.{i}.attn_v.weight",
            "bq": "blk.{i}.attn_q.bias",
            "bk": "blk.{i}.attn_k.bias",
            "bv": "blk.{i}.attn_v.bias",
            "wo": "blk.{i}.attn_output.weight",
            "mlp_norm": "blk.{i}.ffn_norm.weight",
            "w_gate": "blk.{i}.ffn_gate.weight",
            "w_up": "blk.{i}.ffn_up.weight",
            "w_down": "blk.{i}.ffn_down.weight",
        },
        outer={"tok_embeddings": "token_embd.weight", "norm": "output_norm.weight", "output": "output.weight"},
        interleaved=True,
        ignored=(
            "blk.{i}.attn_rot_embd.weight",
            "rope_freqs.weight",
        ),  # rope_freqs: its reader makes rope_scaling of it
        zero_only=tuple("blk.{i}." + name for name in _GGUF_ZERO),
        defaults={"llama.rope.freq_base": 10000.0},
    ),
)


def find_family(container: str, architecture: str | None, model_type: str | None, where: str) -> Family:
    """The family of a checkpoint that names its architecture, or else its model_type; ModelFormatError if unknown."""
    known = [family for family in FAMILIES if family.container == container]
    for family in known:
        if family.architecture == architecture or (architecture is None and family.model_type == model_type):
            return family
    names = ", ".join(family.architecture for family in known)
    claimed = shown(architecture if architecture is not None else model_type)
    raise ModelFormatError(f"{where}: architecture {claimed} is not supported; this version knows {names}")


class Fields:
    """Typed, range-checked access to an untrusted mapping; each error names `where` and the key."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values = values
        self.where = where
        self.defaults = defaults or {}

    def fail(self, key: str, message: str) -> NoReturn:
        raise ModelFormatError(f"{self.where}: {key}: {message}")

    def get(self, key: str) -> Any:
        """The value, the family's default when the key is absent, or None."""
        return self.values[key] if key in self.values else self.defaults.get(key)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in low…high; an absent or null key takes `default`, and is an error without one."""
        value = self.get(key)
        if value is None:
            if default is None:
                self.fail(key, f"missing, expected an integer of {low} to {high}")
            value = default
        if type(value) is not int or not low <= value <= high:
            self.fail(key, f"found {shown(value)}, expected an integer of {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in low…high, as float."""
        value = self.get(key)
        if value is None:
            value = default
        wanted = f"expected a number of {low:g} to {high:g}"
        if value is None:
            self.fail(key, f"missing, {wanted}")
        if type(value) not in (int, float) or not low <= value <= high:  # a NaN fails the comparison
            self.fail(key, f"found {shown(value)}, {wanted}")
        return float(value)

    def flag(self, key: str) -> bool:
        """A boolean; absent or null means False."""
        value = self.get(key)
        if value is not None and type(value) is not bool:
            self.fail(key, f"found {shown(value)}, expected true or false")
        return bool(value)

    def token(self, key: str, vocab_size: int) -> int | None:
        """A token id, or None when absent, null or -1 (which some tools write for "none")."""
        value = self.get(key)
        return None if value is None or value == -1 else self.integer(key, 0, vocab_size - 1)

    def tokens(self, key: str, vocab_size: int) -> list[int]:
        """A token id or a list of them, as a list without duplicates."""
        value = self.get(key)
        if not isinstance(value, list):
            one = self.token(key, vocab_size)
            return [] if one is None else [one]
        if len(value) > 1024 or any(type(v) is not int or not 0 <= v < vocab_size for v in value):
            self.fail(key, f"found {shown(value)}, expected token ids of 0 to {vocab_size - 1}")
        return list(dict.fromkeys(value))


def base_config(family: Family, fields: Fields, vocab_size: int | None = None) -> dict[str, Any]:
    """The dimensions, epsilon and rope base of the canonical config, checked; `vocab_size` if the caller knows it."""

    def size(name: str, default: int | None = None) -> int:
        return fields.integer(family.keys[name], 1, LIMITS[name], default)

    dim, n_heads = size("dim"), size("n_heads")
    n_kv_heads = size("n_kv_heads", n_heads)
    if n_heads % n_kv_heads:
        fields.fail(family.keys["n_kv_heads"], f"found {n_kv_heads}, expected a divisor of the {n_heads} heads")
    if fields.get(family.keys["head_dim"]) is None and dim % n_heads:
        fields.fail(
            family.keys["n_heads"],
            f"{n_heads} heads do not divide {family.keys['dim']} {dim}, and no head_dim is given",
        )
    head_dim = size("head_dim", dim // n_heads)
    if head_dim % 2:
        fields.fail(family.keys["head_dim"], f"found {head_dim}, expected an even number: rotary positions turn pairs")
    return {
        "format": "pyllama",
        "version": 1,
        "architecture": "llama",
        "dim": dim,
        "hidden_dim": size("hidden_dim"),
        "n_layers": size("n_layers"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "vocab_size": size("vocab_size") if vocab_size is None else vocab_size,
        "norm_eps": fields.number(family.keys["norm_eps"], 1e-12, 1.0),
        "rope_theta": fields.number(family.keys["rope_theta"], 1.0, 1e12),
        "rope_scaling": None,
        "max_seq_len": size("max_seq_len"),
        "tied_embeddings": False,
        "bos_token_id": None,
        "eos_token_ids": [],
    }


# What each kind of rope scaling needs: key -> (lowest, highest, required). Other keys are kept as they are.
_FACTOR = {"factor": (1e-3, 1e6, True)}
ROPE_TYPES: dict[str, dict[str, tuple[float, float, bool]]] = {
    "linear": _FACTOR,
    "llama3": {
        **_FACTOR,
        "low_freq_factor": (1e-6, 1e6, True),
        "high_freq_factor": (1e-6, 1e6, True),
        "original_max_position_embeddings": (1, 1 << 26, True),
    },
    "yarn": {
        **_FACTOR,
        "original_max_position_embeddings": (1, 1 << 26, False),
        "attention_factor": (1e-6, 1e6, False),
        "beta_fast": (1e-6, 1e6, False),
        "beta_slow": (1e-6, 1e6, False),
        "mscale": (1e-6, 1e6, False),
        "mscale_all_dim": (1e-6, 1e6, False),
    },
}


def check_rope_scaling(scaling: Any, where: str) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling, checked and with `rope_type` for the older `type`; None when it changes nothing."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise ModelFormatError(f"{where}: found {shown(scaling)}, expected an object or null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ModelFormatError(f"{where}: rope_type {shown(kind)} is not supported; known are {', '.join(ROPE_TYPES)}")
    fields = Fields(scaling, where)
    for key, (low, high, required) in ROPE_TYPES[kind].items():
        if required or fields.get(key) is not None:
            fields.number(key, low, high)
    kept = {key: value for key, value in scaling.items() if key not in ("type", "rope_type") and value is not None}
    if kind == "llama3" and kept["low_freq_factor"] >= kept["high_freq_factor"]:
        fields.fail("high_freq_factor", f"found {kept['high_freq_factor']}, expected more than low_freq_factor")
    for key, value in kept.items():
        if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
            fields.fail(key, f"found {shown(value)}, expected a number, text or boolean")
    return {"rope_type": kind, **kept}


def bind(
    family: Family, config: Mapping[str, Any], stored: Stored, where: str, *, biases: bool
) -> dict[str, SourceTensor]:
    """Canonical names for exactly the model's tensors: [N, K] matrices and [N] vectors, in the forward pass's order.

    Raises ModelFormatError for a tensor that is missing, has another shape, or that this family does not have.
    """
    left = dict(stored)
    out: dict[str, SourceTensor] = {}

    def take(name: str, source_name: str, sides: tuple[str, ...], part: str) -> None:
        tensor = left.pop(source_name, None)
        if tensor is None:
            raise ModelFormatError(f"{where}: tensor {source_name} ({name}) is missing")
        shape = tuple(_side(config, side) for side in sides)
        if tensor.shape != shape:
            _wrong_shape(family, tensor, name, shape, sides, where)
        order = None
        if family.interleaved and part in ROTATED:
            order = halves_first(config[ROTATED[part]], config["head_dim"])
        out[name] = SourceTensor(name, tensor, order)

    take("tok_embeddings", family.outer["tok_embeddings"], OUTER_SHAPES["tok_embeddings"], "")
    for i in range(config["n_layers"]):
        for part, sides in LAYER_SHAPES.items():
            if biases or part not in BIASES:
                take(f"layers.{i}.{part}", family.layer[part].format(i=i), sides, part)
    take("norm", family.outer["norm"], OUTER_SHAPES["norm"], "")
    if not config["tied_embeddings"]:
        take("output", family.outer["output"], OUTER_SHAPES["output"], "")
    _check_rest(family, left, where)
    return out


def halves_first(heads: int, head_dim: int) -> NDArray[np.intp]:
    """For each row in Hugging Face's order, its row where rotary pairs are neighbours.

    Row (head, half, j) comes from row (head, 2 j + half): there, pair j of a head is rows 2 j and 2 j + 1.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return np.ascontiguousarray(rows.transpose(0, 2, 1).reshape(-1))


def _side(config: Mapping[str, Any], side: str) -> int:
    return math.prod(config[name] for name in side.split("*"))


def _wrong_shape(
    family: Family, tensor: Rows, name: str, shape: tuple[int, ...], sides: tuple[str, ...], where: str
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
        if not tensor.supported or not is_zero(tensor):
            raise ModelFormatError(f"{where}: tensor {name} is not zero; a bias there is not supported in this version")


def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    if not patterns:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(pattern).replace(re.escape("{i}"), r"\d{1,4}") for pattern in patterns))
