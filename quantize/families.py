"""Families of models as data: what a checkpoint calls its tensors and its config's fields, and our names for them.

To add a Llama-like family, add an entry to FAMILIES; what it needs beyond names is named there too: fused tensors,
scales, windows, optional tensors. fields.py reads the values, binding.py the tensors. No file is opened here; what a
file's own keys mean beyond this table is the reader's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyllama.common.errors import ModelFormatError
from pyllama.common.model_folder import BIASES, HEAD_NORMS
from pyllama.common.reader import shown

from .fields import Fields, Window, window_of_all, window_of_some


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint. Names hold `{i}` for the layer.

    keys: canonical config field -> the source's key; also what fields.py makes canonical fields of: embedding_scale,
    attention_scale, residual_scale, logits_divisor, sliding_window, attention_bias (a switch for biases of q, k and v).
    layer, outer: canonical tensor -> the source's name. fused: parts that lie below one another in one tensor there,
    which `layer` names for each of them. optional: parts beyond a plain Llama's that such a model always has.
    interleaved: rotary pairs are neighbouring rows, to be put into Hugging Face's order.
    ignored: tensors that carry nothing (patterns). zero_only: tensors accepted only when they are all zero.
    defaults: what the source's own software assumes for a key that is absent.
    window: finds the sliding window and its layers, given the canonical config so far.
    rope_types: other names of kinds of rope scaling.
    """

    architecture: str
    container: str
    model_type: str
    keys: Mapping[str, str]
    layer: Mapping[str, str]
    outer: Mapping[str, str]
    fused: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ()
    interleaved: bool = False
    ignored: tuple[str, ...] = ()
    zero_only: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window: Callable[[Family, Fields, Mapping[str, Any]], Window] | None = None
    rope_types: Mapping[str, str] = field(default_factory=dict)


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
_HF_ZERO = tuple(
    "model.layers.{i}." + name + "_proj.bias"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
)
_HF_WINDOW = {"sliding_window": "sliding_window"}
_HF_BIAS = {"attention_bias": "attention_bias"}
_HF_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS = _HF_DEFAULTS | {
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QKV, _GATE_UP = "model.layers.{i}.self_attn.qkv_proj.weight", "model.layers.{i}.mlp.gate_up_proj.weight"
# GGUF names are the same for all architectures, keys but for their prefix.
_GGUF_KEYS = {
    "dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "attention_scale": "attention.scale",
    "sliding_window": "attention.sliding_window",
}
_GGUF_LAYER = {
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
}
_GGUF_OUTER = {"tok_embeddings": "token_embd.weight", "norm": "output_norm.weight", "output": "output.weight"}
_GGUF_ZERO = ("attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
# Its reader makes rope_scaling of the factors.
_GGUF_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def _gguf(
    architecture: str, *, keys: Mapping[str, str] | None = None, layer: Mapping[str, str] | None = None, **more: Any
) -> Family:
    """A family of GGUF files. `keys`: beyond the usual ones, without the prefix. `layer`: other names of tensors."""
    return Family(
        architecture=architecture,
        container="gguf",
        model_type=architecture,
        keys={field: f"{architecture}.{key}" for field, key in (_GGUF_KEYS | dict(keys or {})).items()},
        layer=_GGUF_LAYER | dict(layer or {}),
        outer=_GGUF_OUTER,
        ignored=("blk.{i}.attn_rot_embd.weight", *_GGUF_ROPE),
        zero_only=tuple("blk.{i}." + name for name in _GGUF_ZERO),
        defaults={f"{architecture}.rope.freq_base": 10000.0},
        window=window_of_all,
        **more,
    )


FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",  # TinyLlama, Yi and SmolLM2 too
        container="safetensors",
        model_type="llama",
        keys=_HF_KEYS | _HF_BIAS,
        layer=_HF_LAYER,
        outer=_HF_OUTER,
        ignored=_HF_IGNORED,
        zero_only=_HF_ZERO,
        defaults=_HF_DEFAULTS | {"max_position_embeddings": 2048},
    ),
    Family(
        architecture="MistralForCausalLM",
        container="safetensors",
        model_type="mistral",
        keys=_HF_KEYS | _HF_WINDOW,
        layer=_HF_LAYER,
        outer=_HF_OUTER,
        ignored=_HF_IGNORED,
        zero_only=_HF_ZERO,
        defaults=_HF_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        window=window_of_all,
    ),
    Family(
        architecture="Qwen2ForCausalLM",  # Qwen2.5 too
        container="safetensors",
        model_type="qwen2",
        keys=_HF_KEYS | _HF_WINDOW,
        layer=_HF_LAYER,
        outer=_HF_OUTER,
        optional=BIASES,
        ignored=_HF_IGNORED,
        zero_only=_HF_ZERO,
        defaults=_QWEN_DEFAULTS,
        window=window_of_some,
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        container="safetensors",
        model_type="qwen3",
        keys=_HF_KEYS | _HF_WINDOW | _HF_BIAS,
        layer=_HF_LAYER
        | {
            "q_norm": "model.layers.{i}.self_attn.q_norm.weight",
            "k_norm": "model.layers.{i}.self_attn.k_norm.weight",
        },
        outer=_HF_OUTER,
        optional=HEAD_NORMS,
        ignored=_HF_IGNORED,
        zero_only=_HF_ZERO,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        window=window_of_some,
    ),
    Family(
        architecture="GraniteForCausalLM",
        container="safetensors",
        model_type="granite",
        keys=_HF_KEYS
        | _HF_BIAS
        | {
            "embedding_scale": "embedding_multiplier",
            "attention_scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logits_divisor": "logits_scaling",
        },
        layer=_HF_LAYER,
        outer=_HF_OUTER,
        ignored=_HF_IGNORED,
        zero_only=_HF_ZERO,
        defaults=_HF_DEFAULTS
        | {"max_position_embeddings": 2048}
        | dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
    ),
    Family(
        architecture="Phi3ForCausalLM",
        container="safetensors",
        model_type="phi3",
        keys=_HF_KEYS | _HF_WINDOW,
        layer=_HF_LAYER | dict.fromkeys(("wq", "wk", "wv"), _QKV) | dict.fromkeys(("w_gate", "w_up"), _GATE_UP),
        outer=_HF_OUTER,
        fused=(("wq", "wk", "wv"), ("w_gate", "w_up")),
        ignored=_HF_IGNORED,
        zero_only=_HF_ZERO,
        defaults=_HF_DEFAULTS
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "eos_token_id": 32000,
        },
        window=window_of_all,
        rope_types={"su": "longrope", "yarn": "longrope"},  # names of earlier versions
    ),
    _gguf("llama", interleaved=True),  # LLaMA, Mistral, TinyLlama, Yi, SmolLM2
    _gguf("mistral3", interleaved=True),  # Mistral Small as newer converters write it
    _gguf("qwen2", optional=BIASES),  # Qwen2.5 too
    _gguf(
        "qwen3",
        layer={"q_norm": "blk.{i}.attn_q_norm.weight", "k_norm": "blk.{i}.attn_k_norm.weight"},
        optional=HEAD_NORMS,
    ),
    _gguf(
        "granite",
        interleaved=True,
        keys={
            "embedding_scale": "embedding_scale",
            "residual_scale": "residual_scale",
            "logits_divisor": "logit_scale",
        },
    ),
    _gguf(
        "phi3",
        layer=dict.fromkeys(("wq", "wk", "wv"), "blk.{i}.attn_qkv.weight")
        | dict.fromkeys(("w_gate", "w_up"), "blk.{i}.ffn_up.weight"),
        fused=(("wq", "wk", "wv"), ("w_gate", "w_up")),
    ),
    Family(
        architecture="llama",
        container="meta",
        model_type="llama",
        keys={name: name for name in _HF_KEYS} | _HF_WINDOW,  # readers/meta.py fills in what params.json leaves out
        layer={
            "attn_norm": "layers.{i}.attention_norm.weight",
            "wq": "layers.{i}.attention.wq.weight",
            "wk": "layers.{i}.attention.wk.weight",
            "wv": "layers.{i}.attention.wv.weight",
            "wo": "layers.{i}.attention.wo.weight",
            "mlp_norm": "layers.{i}.ffn_norm.weight",
            "w_gate": "layers.{i}.feed_forward.w1.weight",
            "w_up": "layers.{i}.feed_forward.w3.weight",
            "w_down": "layers.{i}.feed_forward.w2.weight",
        },
        outer={"tok_embeddings": "tok_embeddings.weight", "norm": "norm.weight", "output": "output.weight"},
        interleaved=True,
        ignored=("rope.freqs", "layers.{i}.attention.inner_attention.rope.freqs"),
        defaults={"norm_eps": 1e-5, "rope_theta": 10000.0},
        window=window_of_all,  # Mistral 7B v0.1
    ),
)


# Near relatives whose computation has parts that the engine lacks, by architecture and, where that is not given, by
# model_type; GGUF has names of its own for some.
_EXPERTS = "it is a mixture of experts"
_GEMMA = "its norms and activation are others than a Llama's"
_NO_ROTATION = "some of its layers have no rotary positions (no_rope_layers)"
_PICTURES = "it reads pictures too, in layers that the engine lacks"
NOT_YET = {
    "SmolLM3ForCausalLM": _NO_ROTATION,
    "MixtralForCausalLM": _EXPERTS,
    "PhiMoEForCausalLM": _EXPERTS,
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "GraniteMoeForCausalLM": _EXPERTS,
    "Llama4ForConditionalGeneration": _EXPERTS,
    "Llama4ForCausalLM": _EXPERTS,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "MllamaForConditionalGeneration": _PICTURES,
    "PhiForCausalLM": "its layers are built otherwise",
    "smollm3": _NO_ROTATION,
    "mixtral": _EXPERTS,
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen2moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "qwen3moe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "llama4": _EXPERTS,
    "mllama": _PICTURES,
    "granitehybrid": "some of its layers have no attention",
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": "its layers are built otherwise",
    "phi2": "its layers are built otherwise",
    "clip": "it is the image part of another model, which has a file of its own",
}


def find_family(container: str, architecture: str | None, model_type: str | None, where: str) -> Family:
    """The family of a checkpoint that names its architecture, or else its model_type; ModelFormatError if unknown.

    Upper and lower case are one: the first conversions of LLaMA say LLaMAForCausalLM.
    """
    known = [family for family in FAMILIES if family.container == container]
    for family in known:
        if architecture is None:
            if family.model_type == model_type:
                return family
        elif family.architecture.lower() == architecture.lower():
            return family
    names = ", ".join(family.architecture for family in known)
    named = architecture if architecture is not None else model_type
    claimed, reason = shown(named), NOT_YET.get(named) if isinstance(named, str) else None
    why = f": {reason}" if reason else ""
    raise ModelFormatError(f"{where}: architecture {claimed} is not supported{why}; this version knows {names}")
