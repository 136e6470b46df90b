"""Hugging Face's config.json as the canonical config: field by field, with the defaults of transformers' own classes.

Older files and those of transformers 5 (`rope_parameters`) mean the same here. What would change the computation and is
not known is refused by name. Tensors, tokenizers and other files are none of its business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyllama.common.errors import ModelFormatError
from pyllama.common.model_folder import BIASES
from pyllama.common.reader import shown

from ..families import Family, find_family
from ..fields import LAYER_TYPES, LIMITS, Fields, base_config, check_rope_lists, check_rope_scaling, tensor_factors

# A key that matches speaks of the computation. Unless the family knows it, or it is one of those that change nothing
# beside what is known, its value must be one that changes nothing.
_SPEAKS = re.compile(
    "rope|rotary|nope|multiplier|scal(e|ing)|softcap|window|norm|bias|alibi|expert|moe|mup|layer_types|attn_|attention_"
    "|sinks?$|clip|residual|parallel|layernorm|logit|sparse"
)
_OF_RUNNING = re.compile("dropout|flash|sdpa|loss")  # of training, or of how the same numbers are computed
_CHANGES_NOTHING = {
    "attn_implementation",
    "initializer_range",
    "layer_norm_eps",  # there are no such norms here
    "layer_norm_epsilon",
    "max_window_layers",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rms_norm_eps",
    "sliding_window",  # of a family without windows it is looked at below
    "use_sliding_window",
}
# What is known, and what the engine lacks for it.
_LACKING = {
    "mlp_bias": "the engine has no biases in the MLP",
    "no_rope_layers": "the engine gives every layer rotary positions",
}
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class HfConfig:
    """What a config.json says. optional, factors: as `bind` takes them."""

    family: Family
    config: dict[str, Any]
    optional: frozenset[str]
    factors: dict[str, float]


def read_hf_config(raw: Mapping[str, Any], where: str) -> HfConfig:
    """Checks a parsed config.json. `where`: its path, for messages. Raises ModelFormatError that names the key."""
    names = raw.get("architectures")
    if names is not None and not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ModelFormatError(f"{where}: architectures: found {shown(names)}, expected a list of one name")
    family = find_family("safetensors", names[0] if names else None, raw.get("model_type"), where)
    rope = _rope_parameters(raw.get("rope_parameters"), f"{where}: rope_parameters")
    values = dict(raw)
    if rope.get("rope_theta") is not None:
        values["rope_theta"] = rope["rope_theta"]
    fields = Fields(values, where, family.defaults)
    scaling = _rope_scaling(family, fields, raw.get("rope_scaling"), rope)
    if scaling is not None and scaling["rope_type"] == "dynamic":
        longest = int(scaling["factor"] * scaling[_ORIGINAL])
        values["max_position_embeddings"] = min(max(longest, 1), LIMITS["max_seq_len"])
    config = base_config(family, fields)
    config["rope_scaling"] = scaling
    check_rope_lists(config, f"{where}: rope_scaling")
    _refuse_variants(family, fields, config, rope)
    config["tied_embeddings"] = fields.flag("tie_word_embeddings")
    config["bos_token_id"] = fields.token("bos_token_id", config["vocab_size"])
    config["eos_token_ids"] = fields.tokens("eos_token_id", config["vocab_size"])
    switch = family.keys.get("attention_bias")
    biases = BIASES if switch is not None and fields.flag(switch) else ()
    return HfConfig(family, config, frozenset(family.optional) | frozenset(biases), tensor_factors(family, fields))


def _rope_parameters(rope: Any, where: str) -> dict[str, Any]:
    """transformers 5's object; one that has an object for each kind of layer is read if all of these are the same."""
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise ModelFormatError(f"{where}: found {shown(rope)}, expected an object")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if not nested:
        return rope
    first: dict[str, Any] = rope[nested[0]]
    if len(nested) < len(rope) or not set(nested) <= set(LAYER_TYPES):
        known = " and ".join(LAYER_TYPES)
        raise ModelFormatError(f"{where}: found {shown(list(rope))}, expected either numbers or objects for {known}")
    if any(isinstance(value, dict) for value in first.values()) or any(rope[key] != first for key in nested):
        raise ModelFormatError(f"{where}: differs between {' and '.join(nested)}, which is not supported")
    return first


def _rope_scaling(family: Family, fields: Fields, older: Any, newer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling in `rope_scaling` or in the newer `rope_parameters`, which holds the base too; both must agree."""
    scaling = _one_scaling(family, fields, older, "rope_scaling")
    given = {key: value for key, value in newer.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "rope_type" not in newer and "type" not in newer:
        _refuse_untyped(fields, given, "rope_parameters")
        return scaling
    newer_scaling = _one_scaling(family, fields, given, "rope_parameters")
    if older is not None and scaling != newer_scaling:
        fields.fail("rope_scaling", f"{shown(older)} and rope_parameters {shown(given)} disagree")
    return newer_scaling


def _refuse_untyped(fields: Fields, scaling: Mapping[str, Any], key: str) -> None:
    """Without a type nothing is scaled, so that numbers for it would be lost without a word."""
    for name, value in scaling.items():
        if value is not None:
            fields.fail(key, f"found {shown(name)} without a rope_type; say which scaling is meant, or none")


def _one_scaling(family: Family, fields: Fields, scaling: Any, key: str) -> dict[str, Any] | None:
    """One of the two, checked. What the context was before it was stretched may stand outside of it, or be the
    model's own; a factor may be left to follow from both."""
    where = f"{fields.where}: {key}"
    if isinstance(scaling, dict) and "rope_type" not in scaling and "type" not in scaling:
        _refuse_untyped(fields, scaling, key)
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    kind = family.rope_types.get(kind, kind) if isinstance(kind, str) else None
    if kind not in ("dynamic", "llama3", "yarn", "longrope"):
        return check_rope_scaling(scaling, where, family.rope_types)
    longest = fields.integer("max_position_embeddings", 1, LIMITS["max_seq_len"])
    outside = longest if kind == "dynamic" else fields.get(_ORIGINAL)
    inside = scaling.get(_ORIGINAL)
    if outside is not None and inside is not None and inside != outside and _ORIGINAL not in family.defaults:
        fields.fail(
            _ORIGINAL,
            f"is {shown(inside)} in {key}, but {shown(outside)} otherwise with rope_type {kind}; one is wrong",
        )
    completed = {**scaling, _ORIGINAL: next(n for n in (outside, inside, longest) if n is not None)}
    if kind == "longrope" and completed.get("factor") is None:
        original = Fields(completed, where).integer(_ORIGINAL, 2, LIMITS["max_seq_len"])
        completed["factor"] = longest / original
    return check_rope_scaling(completed, where, family.rope_types)


def _refuse_variants(family: Family, fields: Fields, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Refuses settings that change the computation into one that the engine does not have."""
    if fields.get("hidden_act") != "silu":
        fields.fail("hidden_act", f"found {shown(fields.get('hidden_act'))}, only 'silu' is supported")
    window = fields.get("sliding_window")
    if (
        family.window is None
        and window is not None
        and fields.integer("sliding_window", 1, 1 << 30) < config["max_seq_len"]
    ):
        fields.fail(
            "sliding_window",
            f"found {window}, shorter than max_position_embeddings {config['max_seq_len']};"
            f" a {family.architecture} has no sliding window in this version",
        )
    for owner in (fields, Fields(rope, f"{fields.where}: rope_parameters")):
        if owner.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            owner.fail(
                "partial_rotary_factor",
                f"found {owner.get('partial_rotary_factor')}: rotary positions in a part of each head only, which the"
                " engine does not have; expected 1",
            )
    _refuse_strangers(family, fields)


def _refuse_strangers(family: Family, fields: Fields) -> None:
    """Refuses a key that speaks of the computation and that this family does not have, unless it is switched off."""
    known = _CHANGES_NOTHING | set(family.keys.values()) | family.defaults.keys()
    if family.window is not None:
        known = known | {"layer_types"}
    for key, value in fields.values.items():
        if key in known or key.startswith("_") or _SPEAKS.search(key) is None or _OF_RUNNING.search(key):
            continue
        off = value is None or value is False or value in (0, "", [], {})
        neutral = off or (value == 1 and re.search("multiplier|scal|factor", key) is not None)
        everywhere_full = (
            key == "layer_types" and isinstance(value, list) and set(map(str, value)) == {"full_attention"}
        )
        if not (neutral or everywhere_full):
            why = _LACKING.get(key, f"{family.architecture} is not known to have such a setting")
            fields.fail(key, f"found {shown(value)}; {why}")
