"""Every family as GPTQ, AWQ and MLX folders: random codes packed by tests/make_packed.py, logits against transformers.

transformers computes with the values that the codes mean, in float32. We open the folder as f32, where only the order
of sums and the cache's halves differ (test_logits_transformers), and as q4a without loss, where activations are bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from quantize import convert
from tests import make_packed as pack
from tests import make_sources as make

from .helpers_transformers import kl_per_token, ratio, reference_logits, write_tokenizer
from .test_checkpoints_hf import CASES, MEAN_KL, N_TOK, OF_FAMILY, TOLERANCE, Case, our_logits, random_model

Packer = Callable[[str, pack.Matrix], pack.Tensors]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
MLX = {"group_size": 32, "bits": 4}
ZEROS = {"zeros": (7, 9)}
FORMS: dict[str, tuple[Packer, dict[str, Any], dict[str, Any]]] = {
    "gptq": (pack.gptq, {"quantization_config": GPTQ}, ZEROS),
    "gptq act-order": (pack.gptq, {"quantization_config": GPTQ | {"desc_act": True}}, ZEROS | {"act_order": True}),
    "awq": (pack.awq, {"quantization_config": AWQ}, ZEROS),
    "mlx": (pack.mlx, {"quantization": MLX, "quantization_config": MLX}, {}),
}


def save_packed(model: PreTrainedModel, form: str, folder: Path) -> Path:
    """Puts random codes into all projections, of the model as numbers and of the folder as that form packs them."""
    packer, config, random = FORMS[form]
    model.config.save_pretrained(folder)
    tensors: pack.Tensors = {}
    state = model.state_dict()
    for i, (name, values) in enumerate(state.items()):
        if name.endswith("_proj.weight"):
            matrix = pack.random_matrix(tuple(values.shape), i, **random)
            if matrix.minima:  # about as many positive weights as negative ones: others would make layers amplify
                matrix.offsets = (-7.5 * matrix.scales).astype(np.float16).astype(np.float64)
            tensors |= packer(name.removesuffix(".weight"), matrix)
            values.copy_(torch.from_numpy(matrix.values()))
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = ("F32", tuple(values.shape), make.encode_dense(values.numpy(), "F32"))
    (folder / "model.safetensors").write_bytes(make.safetensors_of(tensors))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [type(model).__name__]} | config))
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def check(kind: str, form: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if (case.kind, case.name) == (kind, OF_FAMILY[kind]))
    small: Case = replace(case, changes=case.changes | {"num_hidden_layers": 1})
    model = random_model(small, seed=1)
    source = save_packed(model, form, tmp_path / "source")
    ids = [int(token) for token in np.random.default_rng(2).integers(0, 131, N_TOK)]
    expected = reference_logits(model, ids)
    found = ratio(our_logits(convert(source, tmp_path / "f32", format="f32"), ids), expected)
    repacked = convert(source, tmp_path / "q4a")
    assert json.loads((repacked / "config.json").read_text())["quantization"]["format"] == "q4a"
    divergence = kl_per_token(expected, our_logits(repacked, ids)).mean()
    print(f"{kind} {form}: max|Δ| / max|logit| = {found:.1e}; repacked: mean KL {divergence:.5f} nats")
    assert found <= TOLERANCE
    assert divergence <= MEAN_KL


@pytest.mark.parametrize("form", ["gptq", "gptq act-order"])
@pytest.mark.parametrize("kind", OF_FAMILY)
def test_gptq(tmp_path: Path, kind: str, form: str) -> None:
    check(kind, form, tmp_path)


@pytest.mark.parametrize("kind", OF_FAMILY)
def test_awq(tmp_path: Path, kind: str) -> None:
    check(kind, "awq", tmp_path)


@pytest.mark.parametrize("kind", OF_FAMILY)
def test_mlx(tmp_path: Path, kind: str) -> None:
    check(kind, "mlx", tmp_path)
