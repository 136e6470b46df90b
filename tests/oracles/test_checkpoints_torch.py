"""PyTorch checkpoints that torch itself wrote: Meta's folders against Meta's own model, Hugging Face's .bin files.

The model is the reference code in llama-models, unchanged; the library for many GPUs that it imports (fairscale) is
replaced by plain layers, since one GPU's part is then the whole. LLaMA 1 and 2 differ from 3 in numbers only, and in
that their embeddings are cut along the columns. Tolerances are those of test_checkpoints_hf.py.
"""

from __future__ import annotations

import base64
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyllama import LLM
from quantize import convert
from quantize.readers import open_source
from quantize.readers.torch_file import read_torch

from ..helpers_tokenizer import train_sentencepiece
from .helpers_transformers import ratio, reference_logits, write_tokenizer
from .test_checkpoints_hf import CASES as HF_CASES
from .test_checkpoints_hf import TOLERANCE, random_model

N_TOK = 150
VOCAB = 960
LLAMA_1 = {"dim": 96, "n_layers": 3, "n_heads": 6, "multiple_of": 32, "norm_eps": 1e-6, "vocab_size": -1}
LLAMA_2 = LLAMA_1 | {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}
LLAMA_3 = LLAMA_2 | {"rope_theta": 500000.0, "vocab_size": VOCAB}
LLAMA_3_1 = LLAMA_3 | {"use_scaled_rope": True}
CASES = {
    "llama1": (LLAMA_1, 1),
    "llama1 in two files": (LLAMA_1, 2),
    "llama2": (LLAMA_2, 1),
    "llama2 in two files": (LLAMA_2, 2),
    "llama3": (LLAMA_3, 1),
    "llama3.1": (LLAMA_3_1, 1),
    "llama3.1 in two files": (LLAMA_3_1, 2),
    # The reference has 8 for all; Meta says 32 for these, which is what a file that says nothing gets.
    "llama3.2": (LLAMA_3_1 | {"rope_scaling_factor": 8.0}, 1),
}


@pytest.fixture(scope="module")
def meta() -> Any:
    """llama_models.llama3.model and its arguments, with plain layers."""

    class Linear(torch.nn.Linear):
        def __init__(self, n_in: int, n_out: int, bias: bool = True, **_: Any) -> None:
            super().__init__(n_in, n_out, bias=bias)

    class Embedding(torch.nn.Embedding):
        def __init__(self, n: int, dim: int, **_: Any) -> None:
            super().__init__(n, dim)

    parallel = "fairscale.nn.model_parallel"
    parts: dict[str, dict[str, Any]] = {
        "fairscale": {},
        "fairscale.nn": {},
        parallel: {},
        f"{parallel}.initialize": {"get_model_parallel_world_size": lambda: 1},
        f"{parallel}.layers": {
            "ColumnParallelLinear": Linear,
            "RowParallelLinear": Linear,
            "VocabParallelEmbedding": Embedding,
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in parts.items():
            module = types.ModuleType(name)
            module.__dict__.update(contents)
            patch.setitem(sys.modules, name, module)
        for name, module in list(sys.modules.items()):
            if "." in name and name in parts:
                setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
        return importlib.import_module("llama_models.llama3.model")


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_sentencepiece(900)


def reference(meta: Any, params: dict[str, Any], tied: bool) -> Any:
    """A random model of Meta's whose products keep the size of their input, its norms not 1."""
    settings = {"rope_theta": 10000.0, **params, "vocab_size": VOCAB, "max_batch_size": 1, "max_seq_len": 256}
    model = meta.Transformer(meta.ModelArgs(**settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(1.0 + 0.3 * noise)
        else:
            is_lookup = "embed" in name and not tied
            weight.copy_(noise if is_lookup else noise * weight.shape[1] ** -0.5)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model


ROWS = ("wq", "wk", "wv", "w1", "w3", "output")


def write_shards(folder: Path, state: dict[str, torch.Tensor], n: int, *, along_vocabulary: bool) -> None:
    """What each of `n` GPUs would hold, written by torch.save."""
    for i in range(n):
        part = {}
        for name, weight in state.items():
            kind = name.split(".")[-2]
            axis = 0 if kind in ROWS or (kind == "tok_embeddings" and along_vocabulary) else 1
            part[name] = weight if weight.ndim == 1 else weight.chunk(n, axis)[i].clone()
        if n == 1:
            part = dict(state)  # as it is: the head of a tied model shares the embedding's storage
        part["rope.freqs"] = torch.ones(8)
        torch.save(part, folder / f"consolidated.{i:02d}.pth")


def write_ranks(path: Path) -> None:
    """A tokenizer.model as Llama 3's: the bytes, then joined ones."""
    tokens = [bytes([byte]) for byte in range(256)] + [bytes([97 + i, 97 + i]) for i in range(20)]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


@pytest.mark.parametrize("name", CASES)
def test_metas_folders(meta: Any, sentencepiece_model: bytes, tmp_path: Path, name: str) -> None:
    params, n = CASES[name]
    tied = name == "llama3.2"
    model = reference(meta, params, tied)
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    is_third = name.startswith("llama3")
    write_shards(folder, model.state_dict(), n, along_vocabulary=is_third)
    if is_third:
        write_ranks(folder / "tokenizer.model")
    else:
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    ids = np.random.default_rng(5).integers(0, VOCAB, N_TOK).tolist()
    expected = model(torch.tensor([ids]), 0)[0].numpy()
    with LLM(convert(folder, tmp_path / "out", format="f32"), n_ctx=256) as llm:
        assert ratio(llm.logits(ids), expected) < TOLERANCE
        assert llm.generate("aab", max_tokens=3).usage.completion_tokens > 0
    config = open_source(folder).config
    assert config["tied_embeddings"] == tied
    if tied:
        (folder / "params.json").write_text(json.dumps(LLAMA_3_1))
        assert open_source(folder).config["rope_scaling"]["factor"] == 32.0


def test_the_scaling_of_3_1_matters_in_that_test(meta: Any) -> None:
    ids = torch.tensor([np.random.default_rng(5).integers(0, VOCAB, N_TOK).tolist()])
    scaled, plain = (reference(meta, params, False)(ids, 0)[0].numpy() for params in (LLAMA_3_1, LLAMA_3))
    assert ratio(scaled, plain) > 10 * TOLERANCE


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["llama3.2", "attention bias"])
def test_hugging_face_folders_of_bin_files(tmp_path: Path, name: str, shards: int) -> None:
    case = next(case for case in HF_CASES if case.kind == "llama" and case.name == name)
    model = random_model(case, 0)
    folder = tmp_path / "hf"
    model.config.save_pretrained(folder)
    write_tokenizer(folder, model.config.vocab_size)
    state = model.state_dict()
    names = list(state)
    index = {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {key: state[key] for key in names[i::shards]}
        torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, N_TOK).tolist()
    with LLM(convert(folder, tmp_path / "out", format="f32")) as llm:
        assert ratio(llm.logits(ids), reference_logits(model, ids)) < TOLERANCE


def test_what_torch_writes_is_read_back(tmp_path: Path) -> None:
    """Every type, windows, parameters and shared storages, with each of torch.save's settings; never by torch."""
    big = torch.randn(10, 6)
    state = {
        "whole": torch.randn(3, 5),
        "double": torch.randn(4, 6, dtype=torch.float64).t(),
        "bfloat16": torch.randn(7).bfloat16(),
        "half": torch.nn.Parameter(torch.randn(2, 2).half()),
        "rows": big[2:5],
        "columns": big[:, 1:3],
        "column": big.T[2],
        "linear": torch.nn.Linear(4, 3).state_dict()["weight"],
    }
    path = tmp_path / "state.pth"
    crc = torch.serialization.get_crc32_options()
    try:
        for computes_crc in (True, False):
            torch.serialization.set_crc32_options(computes_crc)
            torch.save(state, path)
            found = read_torch(path)
            for name, tensor in state.items():
                values = found[name].read(np.arange(tensor.shape[0]))
                assert np.array_equal(values, tensor.detach().float().numpy()), name
    finally:
        torch.serialization.set_crc32_options(crc)
