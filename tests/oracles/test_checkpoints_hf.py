"""Every family from Hugging Face folders: small random checkpoints that transformers writes, logits against it.

As f32, so that what differs is the order of float32 sums and the cache's halves (test_logits_transformers tells why
1e-3 holds both), and through the default q8 by the divergence of distributions. The cells of docs/CHECKPOINTS.md
name these tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pyllama import LLM
from quantize import convert

from .helpers_transformers import LLAMA3, Logits, kl_per_token, ratio, reference_logits, write_tokenizer

TOLERANCE = 1e-3
MEAN_KL = 0.003  # of q8: int8 weights and activations, 32 to a scale
N_TOK = 150

PLAIN: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.7 * i for i in range(8)],
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}


@dataclass(frozen=True)
class Case:
    """A model of transformers' `kind`. old: keys of config.json to be written as transformers 4 had them, after the
    model was made; a value of `...` removes a key."""

    kind: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    old: dict[str, Any] = field(default_factory=dict)
    n_tok: int = N_TOK

    def config(self) -> Any:
        rope = {"rope_theta": 1e4, "rope_type": "default"} | self.changes.get("rope_parameters", {})
        sizes = PLAIN | self.changes | {"rope_parameters": rope}
        return CONFIG_MAPPING[self.kind](**sizes, attn_implementation="eager")


CASES = [
    Case("llama", "llama1", {"num_key_value_heads": 6, "rms_norm_eps": 1e-6}),
    Case("llama", "llama2 as transformers 4 wrote it", old={"rope_theta": 1e4, "rope_scaling": None, "head_dim": ...}),
    Case("llama", "llama3", {"rope_parameters": {"rope_theta": 5e5}}),
    Case("llama", "llama3.1", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    Case("llama", "llama3.2", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "tie_word_embeddings": True}),
    Case("llama", "linear", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    Case("llama", "dynamic within", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    Case(
        "llama",
        "dynamic beyond",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 100},
    ),
    Case("llama", "yarn", {"rope_parameters": YARN}),
    Case("llama", "smollm2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}}),
    Case("llama", "tinyllama", {"num_key_value_heads": 2}),
    Case("llama", "yi", {"rope_parameters": {"rope_theta": 5e6}}),
    Case("llama", "attention bias", {"attention_bias": True}),
    Case("mistral", "window", {"sliding_window": 40}),
    Case("mistral", "window of another head_dim", {"sliding_window": 70, "head_dim": 24}),
    Case("mistral", "no window", {"sliding_window": None}),
    Case("qwen2", "plain", {"rope_parameters": {"rope_theta": 1e6}}),
    Case("qwen2", "tied", {"tie_word_embeddings": True}),
    Case("qwen2", "window of some", {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}),
    Case(
        "qwen2",
        "window as transformers 4 wrote it",
        old={"use_sliding_window": False, "sliding_window": 33, "layer_types": ..., "max_window_layers": 1},
    ),
    Case("qwen2", "yarn", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    Case("qwen3", "plain", {"head_dim": 32}),
    Case("qwen3", "tied", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    Case(
        "qwen3",
        "window of some",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
    Case("granite", "scales", GRANITE),
    Case("granite", "tied", GRANITE | {"tie_word_embeddings": True, "attention_bias": True}),
    Case("phi3", "plain"),
    Case("phi3", "window", {"sliding_window": 50}),
    Case("phi3", "longrope short", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 200}),
    Case("phi3", "longrope long", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    Case(
        "phi3",
        "su as its first version wrote it",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        old={"rope_scaling": {**LONGROPE, "type": "su", "rope_type": ...}, "rope_theta": 1e4, "rope_parameters": ...},
    ),
]


# A case of each family, the one with most of what is its own.
OF_FAMILY = {
    "llama": "llama3.2",
    "mistral": "window",
    "qwen2": "yarn",
    "qwen3": "plain",
    "granite": "scales",
    "phi3": "longrope long",
}


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in CASES if case.kind == kind]


def random_model(case: Case, seed: int) -> PreTrainedModel:
    """float32; products keep the size of their input, norms and biases are not left at 1 and 0.

    An embedding that is the head too is as small as a head, and scales of the family's own are taken out of the weights
    that they belong to, so that each layer counts for something in the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(case.config(), attn_implementation="eager").eval()
    config = model.config
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 2:
            plain = "embed" in name and not config.tie_word_embeddings
            noise *= 1.0 if plain else weight.shape[1] ** -0.5
            if plain:
                noise /= getattr(config, "embedding_multiplier", 1.0)
            if "lm_head" in name:
                noise *= getattr(config, "logits_scaling", 1.0)
        elif name.endswith("o_proj.bias"):
            noise.zero_()
        elif name.endswith("bias"):
            noise *= 0.5
        else:
            noise = 1.0 + 0.3 * noise
        weight.copy_(noise)
    return model


def save(model: PreTrainedModel, case: Case, folder: Path) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config.vocab_size)
    if case.old:
        path = folder / "config.json"
        written = json.loads(path.read_text())
        for key, value in case.old.items():
            if isinstance(value, dict):
                value = {inner: it for inner, it in value.items() if it is not ...}
            written[key] = value
        written = {key: value for key, value in written.items() if value is not ...}
        path.write_text(json.dumps(written))
    return folder


def our_logits(folder: Path, ids: list[int]) -> Logits:
    with LLM(folder, n_ctx=len(ids)) as llm:  # scalings that depend on the length take it from here
        return llm.logits(ids)


def check(case: Case, tmp_path: Path) -> None:
    seed = CASES.index(case)
    model = random_model(case, seed)
    source = save(model, case, tmp_path / "hf")
    ids = [int(token) for token in np.random.default_rng(seed).integers(0, 131, case.n_tok)]
    expected = reference_logits(model, ids)
    found = ratio(our_logits(convert(source, tmp_path / "f32", format="f32"), ids), expected)
    divergence = kl_per_token(expected, our_logits(convert(source, tmp_path / "q8"), ids)).mean()
    print(f"{case.kind} {case.name}: max|Δ| / max|logit| = {found:.1e}; q8: mean KL {divergence:.5f} nats")
    assert found <= TOLERANCE
    assert divergence <= MEAN_KL


@pytest.mark.parametrize("case", of_kind("llama"))
def test_llama(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", of_kind("mistral"))
def test_mistral(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", of_kind("qwen2"))
def test_qwen2(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", of_kind("qwen3"))
def test_qwen3(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", of_kind("granite"))
def test_granite(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", of_kind("phi3"))
def test_phi3(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("kind", OF_FAMILY)
def test_pytorch_bin(tmp_path: Path, kind: str) -> None:
    """A case of each family in pytorch_model.bin, as torch.save writes it."""
    case = next(case for case in CASES if (case.kind, case.name) == (kind, OF_FAMILY[kind]))
    model = random_model(case, seed=4)
    folder = save(model, case, tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    ids = [int(token) for token in np.random.default_rng(3).integers(0, 131, N_TOK)]
    found = ratio(our_logits(convert(folder, tmp_path / "f32", format="f32"), ids), reference_logits(model, ids))
    print(f"{kind} {case.name} in PyTorch's file: max|Δ| / max|logit| = {found:.1e}")
    assert found <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("mistral", "window", {"sliding_window": 41}),
        ("qwen2", "window of some", {"max_window_layers": 2}),
        ("qwen3", "plain", {"rms_norm_eps": 0.1}),
        ("granite", "scales", {"embedding_multiplier": 11.0}),
        ("granite", "scales", {"attention_multiplier": 0.1}),
        ("granite", "scales", {"residual_multiplier": 0.25}),
        ("granite", "scales", {"logits_scaling": 9.0}),
        ("phi3", "longrope short", {"original_max_position_embeddings": 149}),
        ("llama", "dynamic beyond", {"max_position_embeddings": 110}),
    ],
)
def test_the_reference_tells_settings_apart(kind: str, name: str, change: dict[str, Any]) -> None:
    """The comparisons above have teeth: a little of each setting is far more than they tolerate."""
    case = next(case for case in CASES if (case.kind, case.name) == (kind, name))
    other = random_model(replace(case, changes=case.changes | change), 0)
    model = random_model(case, 0)
    other.load_state_dict(model.state_dict())
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 131, N_TOK)]
    assert ratio(reference_logits(other, ids), reference_logits(model, ids)) > 10 * TOLERANCE
