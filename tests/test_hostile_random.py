"""Properties: valid files with bytes cut, flipped or moved, and configs with any values load or raise ModelFormatError.

Never another exception, never much memory. Single defects by name: test_hostile_files.py, test_hostile_models.py.
"""

from __future__ import annotations

import contextlib
import json
import struct
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError
from quantize.readers import open_source
from quantize.readers.gguf_split import part_names
from tests import make_sources as make
from tests.helpers_hostile import SMALL, WEIGHTS, little_memory
from tests.make_sources import gguf_bytes
from tests.test_gguf_families import tensors_of

KINDS = {"tok_embeddings": "Q8_0", "layers.0.wq": "Q4_1", "layers.0.wk": "Q4_0", "layers.0.wo": "F16"}
VALID_GGUF = gguf_bytes(
    make.llama_entries(SMALL), make.llama_tensors(SMALL, WEIGHTS, lambda name: KINDS.get(name, "BF16"))
)
VALID_SAFETENSORS = make.safetensors_of(
    {make.hf_name(name): ("F16", values.shape, make.encode_dense(values, "F16")) for name, values in WEIGHTS.items()}
)


def damaged(whole: bytes, header_bytes: int) -> st.SearchStrategy[bytes]:
    """`whole` cut, with bytes flipped (mostly in the header), overwritten by extreme integers, or spliced."""

    def below(n: int) -> st.SearchStrategy[int]:
        return st.integers(0, n - 1).map(lambda i: i * 7919 % n)  # hypothesis prefers small numbers: spread them

    position = st.one_of(below(header_bytes), below(header_bytes), below(len(whole)))
    text = st.sampled_from([b"0", b"9", b"-", b".", b'"', b",", b":", b"[", b"]", b"{", b"}", b"F", b"99999999", b"\\"])
    extreme = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n))
    patch = st.tuples(position, st.one_of(text, st.binary(min_size=1, max_size=4), extreme))

    def apply(patches: list[tuple[int, bytes]], cut: int, moved: tuple[int, int]) -> bytes:
        out = bytearray(whole)
        for at, new in patches:
            out[at : at + len(new)] = new
        if moved[1]:
            del out[moved[0] : moved[0] + moved[1]]
        return bytes(out[:cut])

    moved = st.one_of(st.just((0, 0)), st.tuples(position, st.integers(0, 16)))
    cut = st.one_of(st.just(len(whole)), st.just(len(whole)), below(len(whole) + 1))
    return st.builds(apply, st.lists(patch, max_size=4), cut, moved)


def read_everything(path: Path) -> None:
    source = open_source(path)
    for found in source.tensors.values():
        found.read()
        if found.grid is not None:
            found.read_packed()
    source.tokenizer_files()


def test_what_gets_damaged_is_valid(tmp_path: Path) -> None:
    (tmp_path / "valid.gguf").write_bytes(VALID_GGUF)
    read_everything(tmp_path / "valid.gguf")
    folder = make.write_hf_folder(tmp_path / "valid", SMALL, WEIGHTS)
    (folder / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    read_everything(folder)


@settings(max_examples=400)
@given(content=damaged(VALID_GGUF, 1500))
def test_damaged_gguf(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.unlink(missing_ok=True)  # a new file each time: an old one may still be mapped
    path.write_bytes(content)
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(path)


def k_quants_in_two_parts() -> list[bytes]:
    """A Phi-3 with fused matrices of K-quants and factors for long contexts, over two files."""
    shape = make.Shape(dim=256, hidden_dim=256, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, vocab_size=17)
    tensors = tensors_of("phi3", make.random_weights(shape), shape)
    for tensor, kind in zip([t for t in tensors if len(t.dims) == 2], cycle(["Q4_K", "Q5_K", "IQ4_XS", "Q3_K"])):
        tensor.kind = make.TYPE_IDS[kind]
        tensor.data = make.encode_blocks(np.frombuffer(tensor.data, "<f4").reshape(tensor.dims[::-1]), kind)
    factors = np.linspace(1, 4, 32, dtype="<f4").tobytes()
    tensors += [make.GgufTensor(f"rope_factors_{which}.weight", (32,), 0, factors) for which in ("long", "short")]
    parts = []
    for number in range(2):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        entries = [make.gguf_entry(key, make.U32, value) for key, value in split.items()]
        if number == 0:
            entries = [*make.llama_entries(shape, "phi3"), *entries]
        parts.append(gguf_bytes(entries, tensors[number::2]))
    return parts


PARTS = k_quants_in_two_parts()


def write_parts(folder: Path, parts: list[bytes]) -> Path:
    for name, content in zip(part_names("m-00001-of-00002.gguf"), parts, strict=True):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_gets_damaged_in_two_parts_is_valid(tmp_path: Path) -> None:
    read_everything(write_parts(tmp_path, PARTS))


@settings(max_examples=150)
@given(data=st.data(), number=st.integers(0, 1))
def test_damaged_parts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, number: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-parts"
    folder.mkdir(exist_ok=True)
    parts = list(PARTS)
    parts[number] = data.draw(damaged(parts[number], 1500 if number == 0 else 500))
    write_parts(folder, parts)
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder)


@settings(max_examples=400)
@given(content=damaged(VALID_SAFETENSORS, VALID_SAFETENSORS.index(b"}}") + 2))
def test_damaged_safetensors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        make.write_hf_folder(folder, SMALL, WEIGHTS)
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder)


@settings(max_examples=200)
@given(content=damaged(json.dumps(make.hf_config(SMALL)).encode(), 100))
def test_damaged_config(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-config"
    if not folder.exists():
        make.write_hf_folder(folder, SMALL, WEIGHTS)
    (folder / "config.json").write_bytes(content)
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(data=st.data())
def test_config_values_of_any_type(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-config"
    if not folder.exists():
        make.write_hf_folder(folder, SMALL, WEIGHTS)
    keys = [*make.hf_config(SMALL), "sliding_window", "rope_parameters", "quantization_config", "format"]
    changes = {data.draw(st.sampled_from(keys)): data.draw(json_values) for _ in range(data.draw(st.integers(1, 2)))}
    if data.draw(st.booleans()):
        rope = st.sampled_from(
            ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "partial_rotary_factor"]
        )
        changes["rope_scaling"] = {data.draw(rope): data.draw(json_values), "type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(make.hf_config(SMALL, **changes)))
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder)
