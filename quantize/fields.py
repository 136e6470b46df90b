"""What the fields of a checkpoint's config mean: untrusted values read with ranges, and the canonical config from them.

`Fields` checks one value at a time, `base_config` makes the canonical config of what a family's `keys` name, with the
scales of families that have some folded where they vanish. Which keys those are is families.py's table; files and
tensors are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from pyllama.common.errors import ModelFormatError
from pyllama.common.model_folder import NO_TOKEN
from pyllama.common.reader import shown

if TYPE_CHECKING:
    from .families import Family

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
        """A token id, or None when absent, null or one of NO_TOKEN."""
        value = self.get(key)
        return None if value is None or value in NO_TOKEN else self.integer(key, 0, vocab_size - 1)

    def tokens(self, key: str, vocab_size: int) -> list[int]:
        """A token id or a list of them, as a list without duplicates and without what means none."""
        value = self.get(key)
        if not isinstance(value, list):
            one = self.token(key, vocab_size)
            return [] if one is None else [one]
        ids = [v for v in value if v is not None and v not in NO_TOKEN]
        if len(value) > 1024 or any(type(v) is not int or not 0 <= v < vocab_size for v in ids):
            self.fail(key, f"found {shown(value)}, expected token ids of 0 to {vocab_size - 1}")
        return list(dict.fromkeys(ids))


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
    config = {
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
    return config | _scales(family, fields, config) | _windows(family, fields, config)


# -------------------------------------------------------------------------------- scales


def _scales(family: Family, fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scales that the engine knows, and norm_eps, of a family that multiplies more than a Llama does.

    Where each layer adds r · f(norm(x)) to x, the engine computes y = x / r, to which f(norm(r · y)) is added: the
    embedding is divided by r, and norm(r · y) is norm(y) with epsilon / r². The last norm undoes it all.
    """
    residual = _scale(family, fields, "residual_scale", 1.0)
    usual = config["head_dim"] ** -0.5
    embedding = _scale(family, fields, "embedding_scale", 1.0) / residual
    attention = _scale(family, fields, "attention_scale", usual)
    found: dict[str, Any] = {"norm_eps": config["norm_eps"] / residual**2}
    if embedding != 1.0:
        found["embedding_scale"] = embedding
    if attention != usual:
        found["attention_scale"] = attention
    return found


def tensor_factors(family: Family, fields: Fields) -> dict[str, float]:
    """Canonical tensor -> the number that it must be multiplied by: dividing the logits is dividing the last norm."""
    divisor = _scale(family, fields, "logits_divisor", 1.0)
    return {} if divisor == 1.0 else {"norm": 1.0 / divisor}


def _scale(family: Family, fields: Fields, role: str, default: float) -> float:
    key = family.keys.get(role)
    return default if key is None else fields.number(key, 1e-6, 1e6, default)


# -------------------------------------------------------------------------------- sliding windows

LAYER_TYPES = ("full_attention", "sliding_attention")  # Hugging Face's names
Window = tuple[int | None, list[int]]  # how many keys a token sees, itself included; in which layers


def _windows(family: Family, fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers`, where they change anything."""
    if family.window is None:
        return {}
    window, layers = family.window(family, fields, config)
    if window is None or window >= config["max_seq_len"] or not layers:
        return {}
    everywhere = len(layers) == config["n_layers"]
    return {"sliding_window": window} | ({} if everywhere else {"sliding_layers": layers})


def window_of_all(family: Family, fields: Fields, config: Mapping[str, Any]) -> Window:
    """One number, for all layers; null or absent for none. `layer_types`, where given, must say the same, unless the
    window holds the whole context, where both kinds are one.
    """
    window, n_layers = _window(family, fields), config["n_layers"]
    expected = LAYER_TYPES[window is not None]
    kinds = _layer_types(fields, n_layers)
    holds_all = window is not None and window >= config["max_seq_len"]
    if kinds is not None and set(kinds) != {expected} and not holds_all:
        fields.fail("layer_types", f"found {shown(kinds)}; with sliding_window {window} all are {expected}")
    return window, list(range(n_layers))


def _window(family: Family, fields: Fields) -> int | None:
    key = family.keys["sliding_window"]
    return None if fields.get(key) is None else fields.integer(key, 1, 1 << 30)


def _layer_types(fields: Fields, n_layers: int) -> list[str] | None:
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in LAYER_TYPES for kind in kinds):
        fields.fail("layer_types", f"found {shown(kinds)}, expected {n_layers} times {' or '.join(LAYER_TYPES)}")
    return kinds


def window_of_some(family: Family, fields: Fields, config: Mapping[str, Any]) -> Window:
    """Only with use_sliding_window; in the layers that `layer_types` names, by default from max_window_layers on."""
    n_layers = config["n_layers"]
    if not fields.flag("use_sliding_window"):
        window, layers = None, list[int]()
    else:
        window = _window(family, fields)
        layers = list(range(fields.integer("max_window_layers", 0, 1 << 30), n_layers))
    kinds = _layer_types(fields, n_layers)
    if kinds is None:
        return window, layers
    layers = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if layers and window is None:
        fields.fail("layer_types", "has layers with sliding_attention, but no sliding window is in use")
    return window, layers


# -------------------------------------------------------------------------------- rotary positions

# What each kind of rope scaling needs: key -> (lowest, highest, required).
_FACTOR = {"factor": (1e-3, 1e6, True)}
ROPE_TYPES: dict[str, dict[str, tuple[float, float, bool]]] = {
    "linear": _FACTOR,
    "dynamic": {**_FACTOR, "original_max_position_embeddings": (1, 1 << 26, True)},
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
    "longrope": {
        "factor": (1e-3, 1e6, False),
        "original_max_position_embeddings": (2, 1 << 26, True),
        "attention_factor": (1e-6, 1e6, False),
    },
}


# Lists of head_dim / 2 divisors, one for each pair. Switches. What says nothing about the computation.
ROPE_LISTS = {"longrope": ("short_factor", "long_factor")}
ROPE_FLAGS = {"yarn": ("truncate",)}
_ROPE_HARMLESS = {"type", "rope_type", "finetuned"} | {key for keys in ROPE_TYPES.values() for key in keys}


def check_rope_scaling(scaling: Any, where: str, aliases: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling, checked, with `rope_type` for the older `type`; None when it changes nothing.

    What another type's key says is left out, as in transformers; a key that no type has is an error. `aliases`: other
    names of types. How long lists must be is for `check_rope_lists`.
    """
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise ModelFormatError(f"{where}: found {shown(scaling)}, expected an object or null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else kind
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ModelFormatError(f"{where}: rope_type {shown(kind)} is not supported; known are {', '.join(ROPE_TYPES)}")
    fields = Fields(scaling, where)
    kept: dict[str, Any] = {"rope_type": kind}
    for key, (low, high, required) in ROPE_TYPES[kind].items():
        if required or fields.get(key) is not None:
            fields.number(key, low, high)
            kept[key] = scaling[key]
    for key in ROPE_FLAGS.get(kind, ()):
        if fields.get(key) is not None:
            kept[key] = fields.flag(key)
    for key in ROPE_LISTS.get(kind, ()):
        kept[key] = _divisors(fields, key)
    strange = scaling.keys() - _ROPE_HARMLESS - kept.keys()
    for key in sorted(strange):
        if scaling[key] is not None:
            fields.fail(key, f"is not known with rope_type {kind}; found {shown(scaling[key])}")
    if kind == "llama3" and kept["low_freq_factor"] >= kept["high_freq_factor"]:
        fields.fail("high_freq_factor", f"found {kept['high_freq_factor']}, expected more than low_freq_factor")
    return kept


def _divisors(fields: Fields, key: str) -> list[float]:
    values = fields.get(key)
    if not isinstance(values, list) or not 0 < len(values) <= LIMITS["head_dim"] // 2:
        fields.fail(key, f"found {shown(values)}, expected a list of head_dim / 2 numbers")
    each = Fields({f"{key}[{i}]": value for i, value in enumerate(values)}, fields.where)
    return [each.number(name, 1e-6, 1e12) for name in each.values]


def check_rope_lists(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelFormatError unless the lists of a canonical config's rope_scaling have a number for each pair."""
    scaling, pairs = config["rope_scaling"] or {}, config["head_dim"] // 2
    for key in ROPE_LISTS.get(scaling.get("rope_type", ""), ()):
        if len(scaling[key]) != pairs:
            raise ModelFormatError(f"{where}: {key}: found {len(scaling[key])} numbers, expected {pairs}, one a pair")
