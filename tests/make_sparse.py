"""Checkpoints of any size that take almost no room on the disk: headers as they are, weights as holes of a sparse file.

Each source that quantize reads has a function in SOURCES. Numbers that matter to how much memory a conversion takes
are real (act-order's groups, LoRA's factors, a vocabulary), all others are zeros; nothing is ever held whole. What the
numbers become is other tests' affair: these checkpoints are for how much is resident meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import make_sources as make
from . import make_torch
from .make_sources import Shape

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U32": 4}
_MODULES = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
_MODULES |= {"w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj", "w_down": "mlp.down_proj"}

# Llama 3's 70B, cut to one layer; and with every side an eighth and a fourth of the words.
SEVENTY = Shape(
    dim=8192, hidden_dim=28672, n_layers=1, n_heads=64, n_kv_heads=8, head_dim=128, vocab_size=128256, max_seq_len=8192
)
SCALED = dataclasses.replace(SEVENTY, dim=1024, hidden_dim=3584, n_heads=8, n_kv_heads=1, vocab_size=32064)

Kind = tuple[str, tuple[int, ...]]  # of a tensor: type and shape


def n_bytes(kind: Kind) -> int:
    return _BYTES[kind[0]] * int(np.prod(kind[1]))


# ---- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(path: Path, tensors: Mapping[str, Kind], values: Mapping[str, bytes] | None = None) -> None:
    """Tensors of zeros, but for those whose bytes are in `values`."""
    header, at = {}, 0
    for name, kind in tensors.items():
        header[name] = {"dtype": kind[0], "shape": list(kind[1]), "data_offsets": [at, at + n_bytes(kind)]}
        at += n_bytes(kind)
    head = make.safetensors_bytes(header)
    with path.open("wb") as file:
        file.write(head)
        for name, raw in (values or {}).items():
            file.seek(len(head) + header[name]["data_offsets"][0])
            file.write(raw)
        file.truncate(len(head) + at)


def hf_folder(
    folder: Path, shape: Shape, tensors: Mapping[str, Kind], values: Mapping[str, bytes] | None = None, **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make.hf_config(shape, **config)))
    (folder / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    safetensors(folder / "model.safetensors", tensors, values)
    return folder


def dense(shape: Shape, dtype: str) -> dict[str, Kind]:
    return {make.hf_name(name): (dtype, sides) for name, sides in shape.tensors().items()}


def _plain(dtype: str) -> Callable[[Path, Shape], list[str]]:
    return lambda folder, shape: [str(hf_folder(folder / "hf", shape, dense(shape, dtype)))]


def _packed(shape: Shape, parts: Callable[[int, int], Mapping[str, Kind]], embeddings: bool = False) -> dict[str, Kind]:
    """Tensors of a folder whose projections are packed; `parts` of a matrix [N, K]."""
    out: dict[str, Kind] = {}
    for name, sides in shape.tensors().items():
        module = make.hf_name(name).removesuffix(".weight")
        if len(sides) == 2 and (embeddings or name.startswith("layers.")):
            out |= {f"{module}.{part}": kind for part, kind in parts(*sides).items()}
        else:
            out[f"{module}.weight"] = ("F16", sides)
    return out


def _gptq(folder: Path, shape: Shape, *, act_order: bool = False) -> list[str]:
    group = 128

    def parts(n: int, k: int) -> dict[str, Kind]:
        own: dict[str, Kind] = {"qweight": ("I32", (k // 8, n)), "qzeros": ("I32", (k // group, n // 8))}
        return own | {"scales": ("F16", (k // group, n)), "g_idx": ("I32", (k,))}

    tensors, rng = _packed(shape, parts), np.random.default_rng(0)
    values = {}
    for name, (_, sides) in tensors.items():
        if name.endswith("g_idx"):
            groups = np.arange(sides[0], dtype="<i4") // group
            values[name] = (rng.permutation(groups) if act_order else groups).tobytes()
    method = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order, "sym": False}
    return [str(hf_folder(folder / "gptq", shape, tensors, values, quantization_config=method))]


def _awq(folder: Path, shape: Shape) -> list[str]:
    def parts(n: int, k: int) -> dict[str, Kind]:
        return {
            "qweight": ("I32", (k, n // 8)),
            "qzeros": ("I32", (k // 128, n // 8)),
            "scales": ("F16", (k // 128, n)),
        }

    method = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return [str(hf_folder(folder / "awq", shape, _packed(shape, parts), quantization_config=method))]


def _mlx(folder: Path, shape: Shape, *, bits: int = 4) -> list[str]:
    def parts(n: int, k: int) -> dict[str, Kind]:
        return {
            "weight": ("U32", (n, k * bits // 32)),
            "scales": ("F16", (n, k // 64)),
            "biases": ("F16", (n, k // 64)),
        }

    numbers = {"group_size": 64, "bits": bits}
    tensors = _packed(shape, parts, embeddings=True)
    return [str(hf_folder(folder / "mlx", shape, tensors, quantization=numbers, quantization_config=numbers))]


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def _lora(
    folder: Path, shape: Shape, *, rank: int, dora: bool = False, embeddings: bool = False, base: str = "F16"
) -> list[str]:
    """A base of zeros, and factors that are not, so that DoRA's rows have lengths."""
    source = hf_folder(folder / "hf", shape, dense(shape, base))
    tensors: dict[str, Kind] = {}
    for name, (n, *rest) in shape.tensors().items():
        outer = not name.startswith("layers.")
        if not rest or (outer and not embeddings):
            continue
        module, k = f"base_model.model.{make.hf_name(name).removesuffix('.weight')}", rest[0]
        if name == "tok_embeddings":
            tensors |= {
                f"{module}.lora_embedding_A": ("F16", (rank, n)),
                f"{module}.lora_embedding_B": ("F16", (k, rank)),
            }
            continue
        tensors |= {f"{module}.lora_A.weight": ("F16", (rank, k)), f"{module}.lora_B.weight": ("F16", (n, rank))}
        if dora:
            tensors[f"{module}.lora_magnitude_vector"] = ("F16", (n,))
    one = np.ones(1, "<f2").tobytes()
    adapter = folder / "adapter"
    adapter.mkdir()
    safetensors(
        adapter / "adapter_model.safetensors",
        tensors,
        {name: one * (n_bytes(kind) // 2) for name, kind in tensors.items() if dora or "lora_B" in name},
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "use_dora": dora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return [str(source), "--lora", str(adapter)]


# ---- PyTorch's files -------------------------------------------------------------------------------------------------


def torch_file(
    path: Path,
    tensors: Mapping[str, Kind],
    *,
    archive: str = "archive",
    transposed: Sequence[str] = (),
    first: Mapping[str, bytes] | None = None,
) -> None:
    """What torch.save writes of a state_dict of zeros; `transposed` matrices lie the other way round. first: what some
    tensors begin with."""
    items, sizes = {}, {}
    for i, (name, kind) in enumerate(tensors.items()):
        place = make_torch.storage(str(i), int(np.prod(kind[1])), make_torch._CLASSES[kind[0]])
        strides = (1, kind[1][0]) if name in transposed else None
        items[name], sizes[str(i)] = make_torch.tensor(place, kind[1], strides), n_bytes(kind)
    pickle = make_torch.pickled(make_torch.Call(make_torch.ORDERED_DICT, (), items))
    entries = [make_torch.ZipEntry(f"{archive}/data.pkl".encode(), pickle, size=len(pickle))]
    entries += [
        make_torch.ZipEntry(f"{archive}/data/{key}".encode(), start, size=size, crc=0, zip64=size >= 0xFFFFFFFF)
        for (key, size), start in zip(sizes.items(), ((first or {}).get(name, b"") for name in tensors), strict=True)
    ]
    central = b""
    with path.open("wb") as file:
        for entry in entries:
            at = file.tell()
            entry.zip64 = entry.zip64 or at >= 0xFFFFFFFF
            local, record = make_torch._headers(entry, at, at)
            central += record
            file.write(local + entry.data)
            file.seek((entry.size or 0) - len(entry.data), os.SEEK_CUR)
        start = file.tell()
        end = start + len(central)
        file.write(central)
        n, size = len(entries), len(central)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def _meta(
    folder: Path, shape: Shape, *, dtype: str, n: int = 8, embedding_axis: int = 1, tied: bool = False
) -> list[str]:
    """Meta's folder in `n` files, matrices cut along both axes; the norms' copies are equal, being zeros.

    tied: the head holds what the embedding holds, which takes a look at all of both.
    """
    place = folder / "meta"
    place.mkdir()
    params = make_torch.meta_params(shape, rope_theta=500000.0, vocab_size=shape.vocab_size)
    (place / "params.json").write_text(json.dumps(params))
    (place / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    for i in range(n):
        tensors: dict[str, Kind] = {}
        for name, sides in shape.tensors().items():
            axis = embedding_axis if name == "tok_embeddings" else make_torch._META[name.rsplit(".", 1)[-1]][1]
            cut = list(sides)
            if axis is not None:
                cut[axis] //= n
            tensors[make_torch.meta_name(name)] = (dtype, tuple(cut))
        stem = f"consolidated.{i:02d}"
        mark = {"layers.0.attention.wq.weight": bytes([i + 1])}  # equal files would be one that stands there twice
        mark |= {} if tied else {"output.weight": b"\1"}
        torch_file(place / f"{stem}.pth", tensors, archive=stem, first=mark)
    return [str(place)]


def _bin(folder: Path, shape: Shape, *, transposed: bool = False) -> list[str]:
    place = folder / "bin"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(make.hf_config(shape)))
    (place / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    tensors = dense(shape, "F16")
    turned = [name for name, (_, sides) in tensors.items() if transposed and len(sides) == 2]
    torch_file(place / "pytorch_model.bin", tensors, transposed=turned)
    return [str(place)]


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _gguf(folder: Path, shape: Shape, *, kind: str) -> list[str]:
    """With a vocabulary of the model's size."""
    table, at = [], 0
    for name, sides in shape.tensors().items():
        here = "F32" if len(sides) == 1 else kind
        block, size = make.BLOCKS[here][:2] if here in make.BLOCKS else (1, _BYTES[here])
        table.append(make.GgufTensor(make.gguf_name(name), sides[::-1], make.TYPE_IDS[here], b"", at))
        at += -(-int(np.prod(sides)) // block * size // 32) * 32
    path = folder / "model.gguf"
    path.write_bytes(make.gguf_bytes(make.llama_entries(shape), table))
    os.truncate(path, path.stat().st_size + at)
    return [str(path)]


def _of(function: Callable[..., list[str]], **options: Any) -> Callable[[Path, Shape], list[str]]:
    return lambda folder, shape: function(folder, shape, **options)


# What quantize reads -> writes it for a shape into a folder, and returns SRC and the options that go with it.
SOURCES: dict[str, Callable[[Path, Shape], list[str]]] = {
    "safetensors f16": _plain("F16"),
    "safetensors f32": _plain("F32"),
    "GPTQ": _gptq,
    "GPTQ act-order": _of(_gptq, act_order=True),
    "AWQ": _awq,
    "MLX 4 bits": _mlx,
    "MLX 6 bits": _of(_mlx, bits=6),
    "LoRA r 16": _of(_lora, rank=16),
    "LoRA r 256, embeddings": _of(_lora, rank=256, embeddings=True),
    "DoRA r 256": _of(_lora, rank=256, dora=True),
    "Meta, 8 .pth f16": _of(_meta, dtype="F16"),
    "Meta, 8 .pth bf16, words cut": _of(_meta, dtype="BF16", embedding_axis=0),
    "Meta, 8 .pth f16, tied": _of(_meta, dtype="F16", tied=True, embedding_axis=0),
    ".bin f16": _bin,
    ".bin f16, transposed": _of(_bin, transposed=True),
    "GGUF Q4_K": _of(_gguf, kind="Q4_K"),
    "GGUF Q6_K": _of(_gguf, kind="Q6_K"),
    "GGUF Q3_K": _of(_gguf, kind="Q3_K"),
    "GGUF Q4_0": _of(_gguf, kind="Q4_0"),
    "GGUF Q5_1": _of(_gguf, kind="Q5_1"),
    "GGUF F16": _of(_gguf, kind="F16"),
}
