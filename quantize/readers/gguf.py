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
from pyllama.common.reader import BoundedFile, shown

from ..binding import BIASES, OPTIONAL, bind
from ..families import Family, find_family
from ..fields import Fields, base_config, check_rope_scaling, tensor_factors
from .gguf_file import GgufFile
from .gguf_split import read_gguf_parts
from .source import Source, StoredTensor


def open_gguf(path: str | Path) -> Source:
    """A GGUF file as a Source. Raises ModelFormatError for a damaged file or a model that this version cannot run."""
    gguf = read_gguf_parts(path)
    where, metadata = str(path), gguf.metadata
    fields = Fields(metadata, where)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        fields.fail("general.architecture", f"found {shown(architecture)}, expected text")
    family = find_family("gguf", architecture, None, where)
    fields = Fields(_uniform(metadata, family, where), where, family.defaults)
    _refuse_variants(fields)
    config = base_config(family, fields, _vocab_size(fields, gguf, family))
    _check_variants(fields, config)
    config["rope_scaling"] = _rope_scaling(fields, gguf, config)
    config["tied_embeddings"] = family.outer["output"] not in gguf.tensors
    config["bos_token_id"] = fields.token("tokenizer.ggml.bos_token_id", config["vocab_size"])
    ends = [fields.token(f"tokenizer.ggml.{end}_token_id", config["vocab_size"]) for end in ("eos", "eot", "eom")]
    config["eos_token_ids"] = list(dict.fromkeys(end for end in ends if end is not None))
    here = {part for part in OPTIONAL & family.layer.keys() if family.layer[part].format(i=0) in gguf.tensors}
    optional = here.union(family.optional, BIASES if here & set(BIASES) else ())
    factors = tensor_factors(family, fields)
    tensors = bind(family, config, gguf.tensors, where, optional=optional, factors=factors)
    return Source("gguf", config, tensors, {}, _identity(gguf.files), lambda: _tokenizer_files(metadata, where))


def _uniform(metadata: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Metadata in which a dimension given layer by layer is one number, as long as all layers agree."""
    out = dict(metadata)
    for name in ("hidden_dim", "n_heads", "n_kv_heads"):
        key = family.keys[name]
        value = out.get(key)
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise ModelFormatError(f"{where}: {key}: differs between layers, which is not supported")
            out[key] = value[0]
    return out


def _refuse_variants(fields: Fields) -> None:
    """Refuses what shares the name "llama" but computes something else."""
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if fields.integer(key, 0, 1 << 32, 0):
            fields.fail(key, f"found {fields.get(key)}, only 0 is supported in this version")
    for key in (
        "llama.attention.clamp_kqv",
        "llama.attention.max_alibi_bias",
        "llama.rope.scaling.yarn_log_multiplier",
    ):
        if fields.number(key, -1e30, 1e30, 0.0):
            fields.fail(key, f"found {fields.get(key)}, only 0 is supported in this version")


def _check_variants(fields: Fields, config: dict[str, Any]) -> None:
    """Fields that repeat what the config already says must agree with it."""
    head_dim = config["head_dim"]
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.integer(key, 1, 1 << 20, head_dim) != head_dim:
            fields.fail(key, f"found {fields.get(key)}, expected the head's {head_dim}; other sizes are not supported")
    scale = fields.number("llama.attention.scale", 0.0, 1e6, 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        fields.fail("llama.attention.scale", f"found {scale}, only 1/sqrt(head_dim) is supported")


def _vocab_size(fields: Fields, gguf: GgufFile, family: Family) -> int | None:
    """The number of the vocabulary's tokens where one is given; else the config's, else the embedding's rows."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is not None:
        if not isinstance(tokens, list) or not tokens:
            fields.fail("tokenizer.ggml.tokens", "expected a list of strings with at least one")
        return len(tokens)
    embedding = gguf.tensors.get(family.outer["tok_embeddings"])
    return embedding.shape[0] if fields.get(family.keys["vocab_size"]) is None and embedding else None


def _rope_scaling(fields: Fields, gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """rope_scaling in Hugging Face's words, or rope_type "factors": frequency i is divided by factors[i]."""
    prefix = "llama.rope.scaling."
    kind = fields.get(prefix + "type")
    factor = (
        fields.number(prefix + "factor", 0.0, 1e6, 0.0)
        or fields.number("llama.rope.scale_linear", 0.0, 1e6, 0.0)
        or 1.0
    )
    if kind not in (None, "none", "linear", "yarn"):
        fields.fail(prefix + "type", f"found {shown(kind)}, this version knows none, linear and yarn")
    factors = gguf.tensors.get("rope_freqs.weight")
    if kind == "yarn":
        if factors is not None:
            fields.fail(prefix + "type", "yarn together with the tensor rope_freqs.weight is not supported")
        return check_rope_scaling(_yarn(fields, prefix, factor), f"{fields.where}: {prefix[:-1]}")
    if fields.number(prefix + "attn_factor", 0.0, 1e6, 1.0) != 1.0:
        fields.fail(prefix + "attn_factor", "found without yarn, which is not supported")
    linear = factor if kind != "none" else 1.0
    if factors is not None:
        return _rope_factors(fields, factors, config["head_dim"] // 2, linear)
    scaling = {"rope_type": "linear", "factor": linear} if linear != 1.0 else None
    return check_rope_scaling(scaling, f"{fields.where}: {prefix[:-1]}")


def _yarn(fields: Fields, prefix: str, factor: float) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if fields.get(prefix + "original_context_length") is not None:
        out["original_max_position_embeddings"] = fields.integer(prefix + "original_context_length", 1, 1 << 26)
    extra = fields.number(prefix + "attn_factor", 1e-6, 1e6, 1.0)
    if extra != 1.0:  # there it multiplies YaRN's own factor, in Hugging Face's config it replaces it
        out["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0)
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if fields.get(prefix + theirs) is not None:
            out[ours] = fields.number(prefix + theirs, 1e-6, 1e6)
    if fields.number(prefix + "yarn_ext_factor", -1.0, 1.0, 1.0) not in (-1.0, 1.0):
        fields.fail(prefix + "yarn_ext_factor", f"found {fields.get(prefix + 'yarn_ext_factor')}, only 1 is supported")
    return out


def _rope_factors(fields: Fields, stored: StoredTensor, pairs: int, linear: float) -> dict[str, Any] | None:
    if stored.type_name != "F32" or stored.shape != (pairs,):
        raise ModelFormatError(
            f"{fields.where}: tensor rope_freqs.weight is {stored.type_name} {list(stored.shape)},"
            f" expected F32 [{pairs}]"
        )
    values = stored.data().view("<f4").astype(np.float64) * linear
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ModelFormatError(
            f"{fields.where}: tensor rope_freqs.weight holds factors that are not finite and positive"
        )
    return None if np.all(values == 1.0) else {"rope_type": "factors", "factors": values.tolist()}


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
