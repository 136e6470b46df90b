"""What a GGUF file says about its model: metadata → our config, tensors by canonical name.

The container is gguf_file.py's affair, names and keys of each architecture stand in families.py, the vocabulary is
gguf_vocab.py's. Metadata that mean another computation than ours are errors that name the key.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from pyllama.common.errors import ModelFormatError
from pyllama.common.model_folder import BIASES, OPTIONAL
from pyllama.common.reader import BoundedFile, shown

from ..binding import bind
from ..families import Family, find_family
from ..fields import Fields, base_config, check_rope_scaling, tensor_factors
from .gguf_file import GgufFile
from .gguf_split import read_gguf_parts
from .gguf_vocab import end_of_turn_ids
from .source import Source

LONG_SHORT = ("rope_factors_long.weight", "rope_factors_short.weight")
ROPE_TENSORS = (*LONG_SHORT, "rope_freqs.weight")

# Keys, without the architecture's prefix, of computations that are not ours: all of them off in a file that is read.
_OTHERS = (
    "expert_count",
    "use_parallel_residual",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.output_scale",
    "attention.sliding_window_pattern",
    "attention.temperature_scale",
    "rope.dimension_sections",
    "rope.scaling.yarn_log_multiplier",
)
# Where a number of 0 means "none".
_OPTIONAL_KEYS = ("attention_scale", "embedding_scale", "residual_scale", "logits_divisor", "sliding_window")


def open_gguf(path: str | Path) -> Source:
    """A GGUF file as a Source. Raises ModelFormatError for a damaged file or a model that this version cannot run."""
    gguf = read_gguf_parts(path)
    where, metadata = str(path), gguf.metadata
    fields = Fields(metadata, where)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        fields.fail("general.architecture", f"found {shown(architecture)}, expected text")
    family = find_family("gguf", architecture, None, where)
    fields = Fields(_tidied(metadata, family, where), where, family.defaults)
    _refuse_others(fields, family)
    config = base_config(family, fields, _vocab_size(fields, gguf, family))
    _check_repetitions(fields, family, config)
    config["rope_scaling"] = _Rope(fields, gguf, family, config).scaling()
    config["tied_embeddings"] = family.outer["output"] not in gguf.tensors
    config["bos_token_id"] = fields.token("tokenizer.ggml.bos_token_id", config["vocab_size"])
    ends = [fields.token(f"tokenizer.ggml.{end}_token_id", config["vocab_size"]) for end in ("eos", "eot", "eom")]
    named = [end for end in ends if end is not None]
    config["eos_token_ids"] = list(dict.fromkeys(named + end_of_turn_ids(metadata, config["vocab_size"])))
    here = {part for part in OPTIONAL & family.layer.keys() if family.layer[part].format(i=0) in gguf.tensors}
    optional = here.union(family.optional, BIASES if here & set(BIASES) else ())
    factors = tensor_factors(family, fields)
    tensors = bind(family, config, gguf.tensors, where, optional=optional, factors=factors)
    identity = _identity(gguf.files)
    return Source("gguf", config, tensors, {}, identity, lambda: _tokenizer_files(metadata, where), architecture)


def _tidied(metadata: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Metadata in which a dimension given layer by layer is one number, if all layers agree, and "none" is absent."""
    out = dict(metadata)
    for name in ("hidden_dim", "n_heads", "n_kv_heads"):
        key = family.keys[name]
        value = out.get(key)
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise ModelFormatError(f"{where}: {key}: differs between layers, which is not supported")
            out[key] = value[0]
    for name in _OPTIONAL_KEYS:
        if name in family.keys and out.get(family.keys[name]) == 0:
            del out[family.keys[name]]
    return out


def _refuse_others(fields: Fields, family: Family) -> None:
    """Refuses what shares an architecture's name but computes something else."""
    for key in (f"{family.architecture}.{other}" for other in _OTHERS):
        value = fields.get(key)
        if value:
            found = f"a list of {len(value)}" if isinstance(value, list) else shown(value)
            fields.fail(key, f"found {found}, only 0 is supported in this version")
    causal = f"{family.architecture}.attention.causal"
    if fields.get(causal) not in (None, True):
        fields.fail(causal, f"found {shown(fields.get(causal))}, only true is supported")
    # There, and only there, the key says whether there are rotary positions at all.
    rotary = "granite.rope.scaling.finetuned"
    if family.architecture == "granite" and fields.get(rotary) not in (None, True):
        fields.fail(
            rotary, f"found {shown(fields.get(rotary))}, which means no rotary positions; only true is supported"
        )


def _check_repetitions(fields: Fields, family: Family, config: dict[str, Any]) -> None:
    """Fields that repeat what the config already says must agree with it; the usual scale in float32 is the usual."""
    head_dim = config["head_dim"]
    for key in (f"{family.architecture}.{name}" for name in ("attention.value_length", "rope.dimension_count")):
        if fields.integer(key, 1, 1 << 20, head_dim) != head_dim:
            fields.fail(key, f"found {fields.get(key)}, expected the head's {head_dim}; other sizes are not supported")
    if math.isclose(config.get("attention_scale", 0.0), head_dim**-0.5, rel_tol=1e-6):
        del config["attention_scale"]


def _vocab_size(fields: Fields, gguf: GgufFile, family: Family) -> int | None:
    """The number of the vocabulary's tokens where one is given; else the config's, else the embedding's rows."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is not None:
        if not isinstance(tokens, list) or not tokens:
            fields.fail("tokenizer.ggml.tokens", "expected a list of strings with at least one")
        return len(tokens)
    embedding = gguf.tensors.get(family.outer["tok_embeddings"])
    return embedding.shape[0] if fields.get(family.keys["vocab_size"]) is None and embedding else None


class _Rope:
    """rope_scaling in Hugging Face's words, or rope_type "factors": frequency i is divided by factors[i].

    What a file gives is a type with its numbers, or tensors with a divisor for each pair: one for all contexts
    (Llama 3.1), or one for short and one for long ones (Phi-3).
    """

    def __init__(self, fields: Fields, gguf: GgufFile, family: Family, config: dict[str, Any]) -> None:
        self.fields, self.tensors, self.config = fields, gguf.tensors, config
        self.prefix = f"{family.architecture}.rope.scaling."
        self.kind = fields.get(self.prefix + "type")
        if self.kind not in (None, "none", "linear", "yarn", "longrope"):
            known = "this version knows none, linear, yarn and longrope"
            fields.fail(self.prefix + "type", f"found {shown(self.kind)}, {known}")
        old = f"{family.architecture}.rope.scale_linear"
        self.factor = self._number("factor", 0.0) or fields.number(old, 0.0, 1e6, 0.0) or 1.0

    def scaling(self) -> dict[str, Any] | None:
        """The canonical rope_scaling, None for plain RoPE."""
        tensors = [name for name in ROPE_TENSORS if name in self.tensors]
        if self.kind == "longrope" or tensors == list(LONG_SHORT):
            return self._checked(self._longrope(tensors))
        if len(tensors) > 1 or (tensors and tensors[0] in LONG_SHORT):
            wanted = f"{' and '.join(LONG_SHORT)}, or rope_freqs.weight alone"
            self.fields.fail(self.prefix + "type", f"found the tensors {' and '.join(tensors)}, expected {wanted}")
        if self.kind == "yarn":
            if tensors:
                self.fields.fail(self.prefix + "type", f"yarn together with the tensor {tensors[0]} is not supported")
            return self._checked(self._yarn())
        if self._number("attn_factor", 1.0) != 1.0:
            self.fields.fail(self.prefix + "attn_factor", "found without yarn or longrope, which is not supported")
        linear = self.factor if self.kind != "none" else 1.0
        if tensors:
            factors = [value * linear for value in self._divisors(tensors[0])]
            return None if all(value == 1.0 for value in factors) else {"rope_type": "factors", "factors": factors}
        return self._checked({"rope_type": "linear", "factor": linear}) if linear != 1.0 else None

    def _number(self, key: str, default: float) -> float:
        return self.fields.number(self.prefix + key, 0.0, 1e6, default)

    def _checked(self, scaling: dict[str, Any]) -> dict[str, Any] | None:
        return check_rope_scaling(scaling, f"{self.fields.where}: {self.prefix[:-1]}")

    def _original(self) -> int | None:
        key = self.prefix + "original_context_length"
        return None if self.fields.get(key) is None else self.fields.integer(key, 1, 1 << 26)

    def _longrope(self, tensors: list[str]) -> dict[str, Any]:
        if tensors != list(LONG_SHORT):
            self.fields.fail(
                self.prefix + "type", f"longrope needs the tensors {' and '.join(LONG_SHORT)}, and no other"
            )
        if self.kind not in (None, "none", "longrope") or self.factor != 1.0:
            found = f"found {shown(self.kind)}, factor {self.factor:g}"
            self.fields.fail(self.prefix + "type", f"{found}, which together with {tensors[0]} is not supported")
        original = self._original() or self.config["max_seq_len"]
        out: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": original}
        out["factor"] = self.config["max_seq_len"] / original
        if self.fields.get(self.prefix + "attn_factor") is not None:
            out["attention_factor"] = self._number("attn_factor", 1.0)
        long, short = (self._divisors(name) for name in LONG_SHORT)
        return {**out, "short_factor": short, "long_factor": long}

    def _yarn(self) -> dict[str, Any]:
        out: dict[str, Any] = {"rope_type": "yarn", "factor": self.factor}
        original = self._original()
        if original is not None:
            out["original_max_position_embeddings"] = original
        # yarn_attn_factor is where converters put Hugging Face's attention_factor, which replaces YaRN's own factor;
        # attn_factor multiplies whichever of both holds.
        extra = self._number("attn_factor", 1.0)
        own = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0
        given = self.fields.get(self.prefix + "yarn_attn_factor") is not None
        if given:
            own = self.fields.number(self.prefix + "yarn_attn_factor", 1e-6, 1e6)
        if given or extra != 1.0:
            out["attention_factor"] = extra * own
        names = {
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        for ours, theirs in names.items():
            if self.fields.get(self.prefix + theirs) is not None:
                out[ours] = self.fields.number(self.prefix + theirs, 1e-6, 1e6)
        if self.fields.number(self.prefix + "yarn_ext_factor", -1.0, 1.0, 1.0) not in (-1.0, 1.0):
            found = self.fields.get(self.prefix + "yarn_ext_factor")
            self.fields.fail(self.prefix + "yarn_ext_factor", f"found {found}, only 1 is supported")
        return out

    def _divisors(self, name: str) -> list[float]:
        """The numbers of a tensor of factors, one for each pair."""
        stored, pairs = self.tensors[name], self.config["head_dim"] // 2
        if stored.type_name != "F32" or stored.shape != (pairs,):
            raise ModelFormatError(
                f"{stored.where}: tensor {name} is {stored.type_name} {list(stored.shape)}, expected F32 [{pairs}]"
            )
        values = stored.data().view("<f4").astype(np.float64)
        if not np.all(np.isfinite(values) & (values > 0)):
            raise ModelFormatError(f"{stored.where}: tensor {name} holds factors that are not finite and positive")
        return [float(value) for value in values]


def _identity(files: tuple[BoundedFile, ...]) -> dict[str, Any]:
    """The same from whichever part of a split model was named."""
    head = hashlib.sha256()
    for file in files:
        head.update(file.read_at(0, min(file.size, 1 << 20)))
        head.update(str(file.size).encode())
    return {
        "kind": "gguf",
        # a link's own name: in a download cache, its target's is a hash
        "name": os.path.basename(os.path.abspath(files[0].path)),
        "size_bytes": sum(file.size for file in files),
        "mtime_ns": max(file.mtime_ns for file in files),
        "sha256_head": head.hexdigest(),
    }


def _tokenizer_files(metadata: dict[str, Any], where: str) -> dict[str, bytes]:
    from .gguf_vocab import tokenizer_files

    try:
        return tokenizer_files(metadata)
    except ModelFormatError as error:  # it knows no file
        raise ModelFormatError(f"{where}: {error}") from None
