"""Properties: damaged PyTorch files, pickles of random opcodes, and any values in Meta's params.json load or raise
ModelFormatError. Never another exception, never much memory. Single defects: test_hostile_torch.py.
"""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError
from quantize.readers.torch_file import read_torch
from tests.helpers_hostile import SMALL, WEIGHTS, little_memory
from tests.make_torch import TorchFile, Zip, meta_params, meta_shards, opcodes, torch_file, write_meta_folder
from tests.test_hostile_random import damaged, read_everything

SHARDS = meta_shards(SMALL, WEIGHTS, 1)
SOUND = torch_file(SHARDS[0], "F16", "consolidated.00")
WHOLE = SOUND.bytes()


def folder_with(root: pytest.TempPathFactory, content: bytes) -> Path:
    folder = root.getbasetemp() / "damaged-meta"
    if not folder.exists():
        write_meta_folder(folder, meta_params(SMALL), SHARDS)
    path = folder / "consolidated.00.pth"
    path.unlink()  # a new file each time: an old one may still be mapped
    path.write_bytes(content)
    return folder


def test_what_gets_damaged_is_valid(tmp_path_factory: pytest.TempPathFactory) -> None:
    read_everything(folder_with(tmp_path_factory, WHOLE))


@settings(max_examples=100)
@given(content=st.one_of(damaged(WHOLE, 400), damaged(WHOLE[::-1], 2500).map(lambda reverse: reverse[::-1])))
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """The second kind is damaged at its end, where the directory is."""
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder_with(tmp_path_factory, content))


@settings(max_examples=100)
@given(pickle=damaged(SOUND.pickle, len(SOUND.pickle)))
def test_damaged_pickles(tmp_path_factory: pytest.TempPathFactory, pickle: bytes) -> None:
    content = TorchFile(pickle, SOUND.storages, "consolidated.00").bytes()
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder_with(tmp_path_factory, content))


NUMBERS = st.one_of(st.integers(0, 300), st.sampled_from([-1, 2**31 - 1, 2**62, -(2**63)]))
NAMES = ["torch FloatStorage", "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "os system"]
STEPS = st.one_of(
    st.sampled_from([bytes([code]) for code in b"(N\x88\x89)\x85\x86\x87t]ae}suQRb."]),
    st.sampled_from([f"c{name}\n".replace(" ", "\n").encode() for name in NAMES]),
    st.builds(lambda i: b"q" + bytes([i]), st.integers(0, 5)),
    st.builds(lambda i: b"h" + bytes([i]), st.integers(0, 5)),
    NUMBERS.map(opcodes),
    st.sampled_from(["storage", "0", "cpu", "norm.weight", ""]).map(opcodes),
    st.binary(min_size=1, max_size=3),
)


@settings(max_examples=150)
@given(steps=st.lists(STEPS, max_size=40))
def test_pickles_of_random_opcodes(tmp_path_factory: pytest.TempPathFactory, steps: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pth"
    path.unlink(missing_ok=True)
    path.write_bytes(TorchFile(b"\x80\2" + b"".join(steps) + b".", SOUND.storages).bytes())
    with little_memory(), contextlib.suppress(ModelFormatError):
        for rows in read_torch(path).values():
            assert rows.n_bytes <= 1 << 20


@settings(max_examples=100)
@given(
    at=st.integers(0, 3),
    field=st.sampled_from(["size", "local_size", "offset", "crc", "flags", "method", "disk"]),
    value=st.one_of(st.integers(0, 0xFFFF), st.sampled_from([2**31, 2**32 - 1])),
    zip64=st.booleans(),
)
def test_zips_whose_headers_lie(
    tmp_path_factory: pytest.TempPathFactory, at: int, field: str, value: int, zip64: bool
) -> None:
    entries = TorchFile(SOUND.pickle, SOUND.storages).entries()
    setattr(entries[at], field, value & 0xFFFF if field in ("flags", "method", "disk") else value)
    path = tmp_path_factory.getbasetemp() / "lies.pth"
    path.unlink(missing_ok=True)
    with contextlib.suppress(struct.error):
        path.write_bytes(Zip(entries, zip64).bytes())
        with little_memory(), contextlib.suppress(ModelFormatError):
            read_torch(path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 1 << 40), st.floats(allow_nan=False), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
KEYS = [*meta_params(SMALL), "rope_theta", "use_scaled_rope", "rope_scaling_factor", "hidden_dim", "head_dim", "moe"]


@settings(max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2))
def test_any_values_in_params_json(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    folder = folder_with(tmp_path_factory, WHOLE)
    kept = (folder / "params.json").read_bytes()
    (folder / "params.json").write_text(json.dumps(meta_params(SMALL) | changes))
    try:
        with little_memory(), contextlib.suppress(ModelFormatError):
            read_everything(folder)
    finally:
        (folder / "params.json").write_bytes(kept)


@settings(max_examples=25)
@given(
    shapes=st.dictionaries(
        st.sampled_from([*SHARDS[0]]), st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3
    )
)
def test_shards_of_any_shapes(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]) -> None:
    """Tensors of other shapes, of none too, in one of two files."""
    shards = meta_shards(SMALL, WEIGHTS, 1) * 2
    other = {name: values + 1 for name, values in shards[1].items()}
    other |= {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for pair in ([shards[0], other], [other, shards[0]], [other]):
        folder = tmp_path_factory.getbasetemp() / f"shapes-{len(pair)}"
        for old in folder.glob("*"):
            old.unlink()
        write_meta_folder(folder, meta_params(SMALL), pair)
        with little_memory(), contextlib.suppress(ModelFormatError):
            read_everything(folder)
