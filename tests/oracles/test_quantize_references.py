"""What comes out of `convert`, against reference libraries: the gguf package's numbers, transformers' state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama.common.formats import dequantize, unpack
from pyllama.common.model_folder import read_model_folder
from quantize import convert
from tests.make_sources import gguf_name, hf_name


def values(tensor: Any) -> NDArray[np.float32]:
    return dequantize(tensor.spec, unpack(tensor.spec, tensor.payload()))


def halves_first(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF keeps rotary pairs side by side; Hugging Face the first numbers of all pairs, then the second ones."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)


def test_demo_model_has_the_numbers_that_gguf_reads(demo_gguf: Path, demo_model: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = read_model_folder(demo_model)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(demo_gguf).tensors}
    assert len(theirs) == len(folder.tensors) == 272
    for name, tensor in folder.tensors.items():
        source = theirs[gguf_name(name)]
        expected = gguf.dequantize(source.data, source.tensor_type)
        part = name.rsplit(".", 1)[-1]
        if part in ("wq", "wk"):
            expected = halves_first(expected, folder.config["n_heads" if part == "wq" else "n_kv_heads"])
        np.testing.assert_array_equal(values(tensor), expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_has_the_numbers_of_its_state_dict(dtype: str, tied: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=101,
        tie_word_embeddings=tied,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)
            if "o_proj" in name:  # ours has none; a zero one is dropped by the reader
                torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    folder = read_model_folder(convert(tmp_path / "hf", tmp_path / "out", format="f32"))
    state = model.state_dict()
    assert len(folder.tensors) == len(state) - tied - 3  # lm_head, and one bias of o_proj in each layer
    for name, tensor in folder.tensors.items():
        np.testing.assert_array_equal(values(tensor), state[hf_name(name)].float().numpy(), err_msg=name)
