"""Opens a checkpoint of any kind that this version reads; what the path is decides, not an option.

Readers check everything before they hand over a Source: bounds, names, shapes, config. Weights are read later, one
tensor at a time. Nothing is converted or written here.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from pyllama.common.errors import ModelFormatError, not_found
from pyllama.common.reader import BoundedFile, recorded_files, shown

from .gguf_split import part_names
from .source import Source, SourceTensor

_ADAPTER = "adapter_model.safetensors"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint: a .gguf file, a Hugging Face folder (safetensors or PyTorch files) or a weight file in it,
    a folder of Meta's (params.json, consolidated.NN.pth), or a folder with one model in .gguf files.

    One of several files of a model means the whole model. Raises ModelFormatError that names the path and says what was
    found and what can be read.
    """
    if not os.fspath(path):
        raise ModelFormatError("the checkpoint's path is empty; expected a .gguf file, a Hugging Face folder or Meta's")
    path = Path(path)
    if not os.path.lexists(path):  # also a path with a NUL in it
        raise ModelFormatError(not_found(os.fspath(path), "a .gguf file, a Hugging Face folder or Meta's"))
    with recorded_files() as files:
        source = _open_folder(path) if path.is_dir() else _open_file(path)
    return replace(source, files=tuple(files))


def _open_file(path: Path) -> Source:
    with BoundedFile(path) as file:
        magic = file.read_at(0, min(file.size, 4))
    if not magic:
        raise ModelFormatError(f"{path}: is empty; expected a .gguf, .safetensors, .pth or .bin file")
    if magic in (b"GGUF", b"FUGG") or path.suffix == ".gguf":
        from .gguf import open_gguf

        return open_gguf(path)
    if path.suffix == ".safetensors":
        if path.name == _ADAPTER:
            _refuse_adapter(path.parent)
        return _open_one_of_hugging_face(path)
    if path.suffix == ".json":
        raise ModelFormatError(f"{path}: describes a model; name the folder that holds it, {path.parent}")
    if path.suffix in _TORCH_SUFFIXES or magic[:2] == b"PK":
        return _open_torch(path)
    raise ModelFormatError(f"{path}: starts with {shown(magic)}; expected a .gguf, .safetensors, .pth or .bin file")


def _open_torch(path: Path) -> Source:
    """One of Meta's files means all of them; another is a Hugging Face folder's if a config.json lies beside it."""
    from .meta import PARAMS, SHARD, open_meta

    if SHARD.fullmatch(path.name) and (path.parent / PARAMS).exists():
        return open_meta(path.parent)
    if not (path.parent / "config.json").exists():
        raise ModelFormatError(
            f"{path}: is a PyTorch checkpoint without a description; expected config.json (Hugging Face) or, for"
            f" consolidated.NN.pth, {PARAMS} (Meta) beside it"
        )
    return _open_one_of_hugging_face(path)


def _open_one_of_hugging_face(path: Path) -> Source:
    """A shard means the folder that it belongs to."""
    from .hf_weights import is_shard
    from .safetensors_folder import open_safetensors

    return open_safetensors(path.parent, single=None if is_shard(path) else path)


def _refuse_adapter(folder: Path) -> NoReturn:
    raise ModelFormatError(
        f"{folder}: holds a LoRA adapter, not a model; `quantize BASE -o OUT --lora {folder}` merges it into its base"
    )


def _open_folder(path: Path) -> Source:
    from .meta import SHARD, open_meta

    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be listed: {error.strerror}") from None
    if not names:
        raise ModelFormatError(f"{path}: is an empty folder; expected config.json and *.safetensors, or one .gguf file")
    ggufs = [name for name in names if name.endswith(".gguf")]
    safetensors = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    if ggufs and not safetensors and (len(ggufs) == 1 or set(ggufs) <= set(part_names(ggufs[0]))):
        return _open_file(path / ggufs[0])
    if ggufs and not safetensors:
        raise ModelFormatError(f"{path}: holds {len(ggufs)} .gguf files; name one of them: {', '.join(ggufs[:8])}")
    if not safetensors and any(SHARD.fullmatch(name) for name in names):
        return open_meta(path)
    if safetensors == [_ADAPTER] or ("adapter_config.json" in names and "config.json" not in names):
        _refuse_adapter(path)
    if "config.json" not in names:
        raise ModelFormatError(
            f"{path}: holds no config.json; expected a Hugging Face folder, Meta's params.json and consolidated.NN.pth,"
            " or one .gguf file"
        )
    from .safetensors_folder import open_safetensors

    return open_safetensors(path)


__all__ = ["Source", "SourceTensor", "open_source"]
