"""How a reply is sampled: `SamplingParams`, validated when made, and where its defaults come from.

A field left at None means "the model's own choice": the value in generation_config.json if there is one, else the
neutral value of `_NEUTRAL`. `resolve` settles that. What the fields do to the logits is in csrc/model/sampler.cpp,
not here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, SupportsFloat, SupportsIndex

from .common.errors import ModelFormatError

# Values with no effect; used where neither the caller nor the model says anything.
_NEUTRAL: dict[str, float | int] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
# Fields that generation_config.json may set. max_new_tokens is left out: None means until the end or the context's end.
_FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Parts of the public contract that this version does not have; asking for one says so.
_LATER = frozenset(
    [
        *("typical_p", "top_n_sigma", "dry_multiplier", "dry_base", "dry_allowed_length", "xtc_probability"),
        *("xtc_threshold", "banned_strings", "n", "grammar", "json_schema", "regex"),
    ]
)

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 1000


class ParameterError(ValueError, TypeError):
    """A sampling parameter that does not exist or has an impossible value."""


def _fail(name: str, value: object, expected: str) -> NoReturn:
    raise ParameterError(f"{name}={value!r}: expected {expected}")


def _number(name: str, value: object, low: float, high: float, expected: str, *, above_low: bool = False) -> float:
    # numpy's scalars are numbers too; bool is an int by inheritance only
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        _fail(name, value, expected)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an array of several, an integer beyond all floats
        _fail(name, value, expected)
    if not low <= number <= high or (above_low and number == low) or not math.isfinite(number):
        _fail(name, value, expected)
    return number


def _integer(name: str, value: object, low: int, high: int, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        _fail(name, value, expected)
    try:
        number = value.__index__()
    except TypeError:  # an array
        _fail(name, value, expected)
    if not low <= number <= high:
        _fail(name, value, expected)
    return number


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or isinstance(items, bytes):
        _fail(name, value, "a string or a list of strings")
    if not all(isinstance(item, str) and item for item in items):
        _fail(name, value, "strings that are not empty")
    return tuple(items)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        _fail(name, value, "a list of token ids")
    return tuple(_integer(name, item, 0, 2**31 - 1, "token ids, 0 or more") for item in value)


def _bias(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        _fail(name, value, "a dict of token id to number")
    return {
        _integer(name, token, 0, 2**31 - 1, "token ids, 0 or more, as keys"): _number(
            name, bias, -1e4, 1e4, "values of -10000 to 10000"
        )
        for token, bias in value.items()
    }


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        _fail(name, value, "True or False")
    return bool(value)


_RULES: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": lambda n, v: _integer(n, v, 1, 2**31 - 1, "an integer of at least 1, or None for no limit"),
    "temperature": lambda n, v: _number(n, v, 0.0, 1e6, "a number, 0 (greedy) or more"),
    "top_k": lambda n, v: max(0, _integer(n, v, -1, 2**31 - 1, "an integer, 0 or -1 for no limit")),
    "top_p": lambda n, v: _number(n, v, 0.0, 1.0, "a number above 0, up to 1 (no limit)", above_low=True),
    "min_p": lambda n, v: _number(n, v, 0.0, 1.0, "a number of 0 (no limit) to 1"),
    "repetition_penalty": lambda n, v: _number(n, v, 0.0, 1e3, "a number above 0; 1 is none", above_low=True),
    "presence_penalty": lambda n, v: _number(n, v, -2.0, 2.0, "a number of -2 to 2"),
    "frequency_penalty": lambda n, v: _number(n, v, -2.0, 2.0, "a number of -2 to 2"),
    "logit_bias": _bias,
    "logprobs": lambda n, v: _integer(n, v, 0, MAX_LOGPROBS, f"an integer of 0 to {MAX_LOGPROBS}, or None for none"),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "seed": lambda n, v: _integer(n, v, 0, MAX_SEED, "an integer of 0 to 2**64 - 1, or None for a random one"),
    "ignore_eos": _flag,
}


def check_names(names: Sequence[str]) -> None:
    """Raises ParameterError for a name that SamplingParams does not have, with the nearest one that it has."""
    for name in names:
        if name in _RULES:
            continue
        if name in _LATER:
            raise ParameterError(f"sampling parameter {name!r} is not supported by this version")
        near = difflib.get_close_matches(name, _RULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ParameterError(f"unknown sampling parameter {name!r}{hint} (known: {', '.join(_RULES)})")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Frozen; every value is checked, an unknown name raises.

    Fields left at None take the model's own default (generation_config.json), else the value that has no effect;
    `presence_penalty` and `frequency_penalty` have no model default. Raises ValueError (also a TypeError).
    """

    max_tokens: int | None = None  # None: until the model ends or the context is full
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # 0: no limit
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens
    logprobs: int | None = None  # log-probability of each token, and this many of the likeliest; None: none
    stop: str | Sequence[str] | None = None  # the text ends before the first of these
    stop_token_ids: Sequence[int] | None = None
    seed: int | None = None  # None: a random one per request, told in the output
    ignore_eos: bool = False

    if not TYPE_CHECKING:

        def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
            check_names(list(kwargs))
            return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, rule(name, value))
            elif name == "ignore_eos":
                _fail(name, value, "True or False")

    def resolve(self, generation_config: Mapping[str, Any] | None = None) -> SamplingParams:
        """Fills what was left at None: the model's defaults, then neutral values, then a random seed.

        `do_sample: false` in the model's file means temperature 0. Raises ModelFormatError for an impossible value
        there.
        """
        defaults = model_defaults(generation_config)
        changes: dict[str, Any] = {
            name: defaults.get(name, neutral) for name, neutral in _NEUTRAL.items() if getattr(self, name) is None
        }
        if self.seed is None:
            changes["seed"] = secrets.randbits(64)
        return dataclasses.replace(self, **changes)

    def native_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `_C.Sampler`. Only for resolved parameters."""
        arguments = {name: getattr(self, name) for name in _NEUTRAL}
        return arguments | {
            "logit_bias": self.logit_bias or {},
            "logprobs": -1 if self.logprobs is None else self.logprobs,
            "seed": self.seed,
        }


def model_defaults(generation_config: Mapping[str, Any] | None) -> dict[str, float | int]:
    """The sampling defaults that a generation_config.json states. Raises ModelFormatError for an impossible value."""
    config = generation_config or {}
    found: dict[str, float | int] = {}
    for name in _FROM_MODEL:
        value = config.get(name)
        if value is None:
            continue
        try:
            found[name] = _RULES[name](name, value)
        except ParameterError as error:
            raise ModelFormatError(f"generation_config.json: {error}") from None
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def build_params(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """`params` with keyword shortcuts laid over it: `generate(prompt, temperature=0)`."""
    if params is not None and not isinstance(params, SamplingParams):
        raise ParameterError(f"expected SamplingParams, found {type(params).__name__}; pass options by keyword")
    check_names(list(overrides))
    return dataclasses.replace(params or SamplingParams(), **overrides)
