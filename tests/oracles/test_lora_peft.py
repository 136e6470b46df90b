"""Merged adapters against PEFT's own merge_and_unload, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.lora import merge_adapters
from quantize.readers import open_source

from .. import make_sources as make

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = make.Shape(n_layers=2)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["k_proj", "gate_proj"],
        "rank_pattern": {"layers.1.mlp.gate_proj": 9},
        "alpha_pattern": {"self_attn.k_proj": 3, "model.layers.0.mlp.gate_proj": 5},
    },
    "dora": {"target_modules": ["q_proj", "gate_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged(name: str, tmp_path: Path) -> None:
    weights = make.random_weights(SHAPE)
    folder = make.write_hf_folder(tmp_path / "model", SHAPE, weights)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **ADAPTERS[name]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(1 + torch.rand_like(parameter) / 4)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 8)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    merged = merge_adapters(open_source(folder), [(tmp_path / "adapter", 1.0)])
    changed = 0
    for ours, tensor in merged.tensors.items():
        values = expected[make.hf_name(ours)].numpy()
        # PEFT adds in float32: a dot product of the rank's length, a scaling, a sum, and DoRA's norm and quotient.
        np.testing.assert_allclose(tensor.read(), values, rtol=0, atol=64 * 2**-24 * np.abs(values).max(), err_msg=ours)
        changed += not np.array_equal(tensor.read(), weights[ours])
    assert changed >= 2
