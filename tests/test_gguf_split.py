"""Models in several GGUF files: opened from any part, and each way in which parts do not belong together refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama.common.errors import ModelFormatError
from quantize.readers import open_source
from quantize.readers.gguf_split import part_names
from tests import make_sources as make
from tests.make_sources import Shape

SHAPE = Shape()
WEIGHTS = make.random_weights(SHAPE)


def write_split(folder: Path, parts: int = 3, shape: Shape = SHAPE, **changes: Any) -> list[Path]:
    """A model over several files; the first has the metadata. `changes` are of all parts' split keys."""
    folder.mkdir(exist_ok=True)
    tensors = make.llama_tensors(shape, make.random_weights(shape), "F16")
    paths = [folder / name for name in part_names(f"m-00001-of-{parts:05}.gguf")]
    for number, path in enumerate(paths):
        split = {"split.no": (make.U16, number), "split.count": (make.U16, parts)}
        split |= {"split.tensors.count": (make.I32, len(tensors)), **changes}
        entries = [make.gguf_entry(key, *entry) for key, entry in split.items() if entry is not None]
        if number == 0:
            entries = [*make.llama_entries(shape), *entries]
        path.write_bytes(make.gguf_bytes(entries, tensors[number::parts]))
    return paths


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_opened_from_any_part_and_from_the_folder(tmp_path: Path, parts: int) -> None:
    paths = write_split(tmp_path / "m", parts)
    identities = []
    for path in [*paths, tmp_path / "m"]:
        source = open_source(path)
        assert source.config == SHAPE.config() and source.tensors.keys() == WEIGHTS.keys()
        assert all(np.array_equal(source.tensors[name].read(), values) for name, values in WEIGHTS.items())
        assert "tokenizer.model" in source.tokenizer_files()
        identities.append(source.identity)
    assert all(identity == identities[0] for identity in identities)
    assert identities[0]["size_bytes"] == sum(path.stat().st_size for path in paths)
    assert identities[0]["name"] == f"m-00001-of-{parts:05}.gguf"


def test_metadata_alone_in_the_first_part(tmp_path: Path) -> None:
    """As splitters can write it: the first file holds no tensors."""
    paths = write_split(tmp_path / "m", 2)
    tensors = make.llama_tensors(SHAPE, WEIGHTS, "F16")
    for number, path in enumerate(paths):
        split = [("split.no", number), ("split.count", 2), ("split.tensors.count", len(tensors))]
        entries = [make.gguf_entry(key, make.U32, value) for key, value in split]
        if number == 0:
            entries = [*make.llama_entries(SHAPE), *entries]
        path.write_bytes(make.gguf_bytes(entries, tensors if number else []))
    assert open_source(paths[1]).tensors.keys() == WEIGHTS.keys()


def test_names_of_parts() -> None:
    assert part_names("a-b-00002-of-00003.gguf") == [f"a-b-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in ("a.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-1-of-3.gguf", "a-00001-of-99999.gguf"):
        assert part_names(name) == []


def _remove(paths: list[Path]) -> None:
    paths[2].unlink()


def _swap(paths: list[Path]) -> None:
    second, third = paths[1].read_bytes(), paths[2].read_bytes()
    paths[1].write_bytes(third)
    paths[2].write_bytes(second)


def _copy(paths: list[Path]) -> None:
    paths[2].write_bytes(paths[1].read_bytes())


def _cut(paths: list[Path]) -> None:
    paths[1].write_bytes(paths[1].read_bytes()[:-40])


def _other_model(paths: list[Path]) -> None:
    other = write_split(paths[0].parent / "other", 3, Shape(biases=True))
    paths[1].write_bytes(other[1].read_bytes())


def _same_tensors(paths: list[Path]) -> None:
    """A tensor of part 2 gets the name of one in another part."""
    raw, others = paths[1].read_bytes(), paths[0].read_bytes() + paths[2].read_bytes()
    mine, theirs = (sorted(re.findall(rb"blk\.\d\.attn_[qkv]\.weight", part)) for part in (raw, others))
    paths[1].write_bytes(raw.replace(mine[0], theirs[0]))


def _fewer_tensors(paths: list[Path]) -> None:
    split = [("split.no", 2), ("split.count", 3), ("split.tensors.count", len(WEIGHTS))]
    paths[2].write_bytes(make.gguf_bytes([make.gguf_entry(key, make.U32, value) for key, value in split], []))


def _more_tensors(paths: list[Path]) -> None:
    for path in paths:
        claim = make.gguf_entry("split.tensors.count", make.I32, len(WEIGHTS))
        path.write_bytes(path.read_bytes().replace(claim, claim[:-4] + (20).to_bytes(4, "little")))


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (_remove, r"m-00003-of-00003\.gguf: is missing: part 3 of 3; put all parts of the model into one folder"),
        (_swap, r"m-00002-of-00003\.gguf: says that it is part 3 of 3, expected part 2 of 3; was it renamed or copied"),
        (_copy, r"m-00003-of-00003\.gguf: says that it is part 2 of 3, expected part 3 of 3"),
        (_cut, r"m-00002-of-00003\.gguf: tensor .* claims \d+ bytes at offset"),
        (
            _other_model,
            r"m-00002-of-00003\.gguf: says that the model has 27 tensors, other parts say 21; it",
        ),
        (_same_tensors, r"tensor 'blk\.\d\.attn_[qkv]\.weight' is in .*gguf already"),
        (_more_tensors, r"m-00003-of-00003\.gguf: parts 1 to 3 hold 21 tensors, more than the 20 that the model has"),
        (_fewer_tensors, r"m-00001-of-00003\.gguf: the model's 3 parts hold \d+ tensors, expected 21"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, defect: Callable[[list[Path]], None], message: str) -> None:
    paths = write_split(tmp_path / "m")
    defect(paths)
    for start in (paths[0], tmp_path / "m"):
        with pytest.raises(ModelFormatError, match=message):
            open_source(start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"split.count": (make.U16, 4)},
            r"is part 1 of a model in 4 files, whose names must be like model-00001-of",
        ),
        ({"split.count": (make.U32, 70000)}, r"split\.count: found 70000, expected an integer of 0 to 999"),
        ({"split.count": (make.STRING, "3")}, r"split\.count: found '3', expected an integer"),
        ({"split.count": (make.I32, -3)}, r"split\.count: found -3, expected an integer"),
        ({"split.no": None}, r"split\.no: found None, expected an integer"),
        ({"split.no": (make.BOOL, 1)}, r"split\.no: found True, expected an integer"),
        ({"split.tensors.count": None}, r"split\.tensors\.count: found None"),
        ({"split.tensors.count": (make.I32, 1 << 30)}, r"split\.tensors\.count: found 1073741824, expected"),
    ],
)
def test_bad_claims(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        open_source(write_split(tmp_path / "m", **changes)[0])


def test_a_part_under_another_name(tmp_path: Path) -> None:
    path = write_split(tmp_path / "m")[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFormatError, match=r"model\.gguf: is part 1 of a model in 3 files, whose names must be"):
        open_source(path)
