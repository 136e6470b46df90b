"""Small random Llamas made and run by transformers, saved as the folders that users have; distances between logits.

Everything here is the reference's side. Nothing imports the engine.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

Logits = NDArray[np.float32]

# The values of Llama 3.1, shrunk so that 200 positions reach all three kinds of rotary pairs.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """A random Llama; `rope` and `other` are laid over LlamaConfig's arguments. `stored`: the type on the disk."""

    name: str
    dim: int = 96
    hidden_dim: int = 177
    n_heads: int = 6
    n_kv_heads: int = 3
    head_dim: int = 16
    rope: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    stored: str = "float32"
    max_shard_size: str = "1GB"
    other: dict[str, Any] = field(default_factory=dict)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.dim,
            intermediate_size=self.hidden_dim,
            num_hidden_layers=3,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            vocab_size=131,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4} | self.rope,
            tie_word_embeddings=self.tied,
            attn_implementation="eager",
            **self.other,
        )


def random_llama(case: Case, seed: int = 0) -> LlamaForCausalLM:
    """A float32 model whose weights survive being stored as `case.stored`; norms and biases are not left at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(case.config()).eval()
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 2:
            # Products keep the size of their input. (Half as much again, and the layers amplify whatever reaches them:
            # then the float16 cache alone is worth 2e-3 of the largest logit, also when all else is float64.)
            noise *= 1.0 if "embed" in name else weight.shape[1] ** -0.5
        elif name.endswith("o_proj.bias"):
            noise.zero_()  # attention_bias gives it one, which our reader accepts only when it does nothing
        elif name.endswith("bias"):
            noise *= 0.5
        else:
            noise = 1.0 + 0.3 * noise
        weight.copy_(noise.to(getattr(torch, case.stored)).float())
    return model


def save_hf_folder(model: LlamaForCausalLM, case: Case, folder: Path) -> Path:
    """What transformers writes, in the stored type and with a word-level tokenizer beside it; `model` is left alone."""
    # A copy, as the change of type would round the rotary frequencies for good.
    copy.deepcopy(model).to(getattr(torch, case.stored)).save_pretrained(folder, max_shard_size=case.max_shard_size)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level tokenizer.json."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"▁w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))


def load_gguf(path: Path) -> LlamaForCausalLM:
    """transformers' own import of a GGUF file, float32, eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference_logits(model: LlamaForCausalLM, ids: list[int]) -> Logits:
    """float32 [len(ids), vocab_size]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def ratio(ours: Logits, reference: Logits) -> float:
    """max|Δ| / max|logit|: what the tolerance of 1e-3 is about."""
    assert ours.shape == reference.shape and ours.dtype == np.float32
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def kl_per_token(reference: Logits, ours: Logits) -> NDArray[np.float64]:
    """KL(reference ‖ ours) of each position's distribution, in nats."""
    p = torch.log_softmax(torch.from_numpy(reference).double(), -1)
    q = torch.log_softmax(torch.from_numpy(ours).double(), -1)
    return (p.exp() * (p - q)).sum(-1).numpy()
