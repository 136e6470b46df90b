"""Checks a model folder from the first byte to the last: config, metadata, shapes, checksums, values and padding.

Opening a model checks everything but the payloads (pyllama/common/model_folder.py); this reads those, too. Nothing is
written or repaired. Whether the model is any good is not decided here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import TensorSpec, check_finite, check_permutation, pack, unpack
from pyllama.common.model_folder import StoredTensor, metadata_sha256, read_model_folder
from pyllama.common.reader import BoundedFile, Bytes, shown
from pyllama.common.safetensors import SafetensorsFile

from .writer import GENERATION_FILE, TOKENIZER_FILES

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Verified:
    """What a sound folder holds."""

    n_tensors: int
    n_weights: int
    payload_bytes: int


def verify(path: str | os.PathLike[str], *, progress: Callable[[int, int, str], None] | None = None) -> Verified:
    """Reads the whole folder and compares everything that can be compared.

    progress(done, total, name) is called with bytes. Raises ModelFormatError that names the first tensor (or file) that
    is not as it was written: a missing checksum, a flipped bit, a value that is not finite, padding that is not zero.
    """
    folder = read_model_folder(path)
    for file in {id(tensor.file): tensor.file for tensor in folder.tensors.values()}.values():
        _verify_metadata(folder.path, file)
    _verify_listing(folder.path, {key for tensor in folder.tensors.values() for key in tensor.file.metadata})
    total = sum(tensor.spec.payload_bytes for tensor in folder.tensors.values())
    done = 0
    for name, tensor in folder.tensors.items():
        _verify_tensor(tensor)
        done += tensor.spec.payload_bytes
        if progress is not None:
            progress(done, total, name)
    return Verified(len(folder.tensors), sum(t.spec.n_weights for t in folder.tensors.values()), total)


def _verify_metadata(folder: Path, file: SafetensorsFile) -> None:
    """The metadata's own checksum, then those of the folder's other files."""
    path, metadata = file.file.path, file.metadata
    if metadata.get("sha256") != metadata_sha256(metadata):
        raise ModelFormatError(
            f"{path}: the header's checksum differs from its metadata; the file was damaged or changed"
        )
    for key, expected in metadata.items():
        name = key[len("sha256.") :]
        if not key.startswith("sha256."):
            continue
        if "/" in name or "\\" in name or name in (".", ".."):
            raise ModelFormatError(f"{path}: a checksum for {shown(name)}, which is no name of a file beside it")
        with BoundedFile(folder / name) as other:
            found = _sha256(other.map(0, other.size))
        if found != expected:
            raise ModelFormatError(
                f"{folder / name}: sha256 is {found}, expected {expected}; the file was damaged or changed since"
            )


def _verify_listing(folder: Path, keys: set[str]) -> None:
    """No file that opening the model would read is without a checksum."""
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        if os.path.lexists(folder / name) and f"sha256.{name}" not in keys:
            raise ModelFormatError(f"{folder / name}: has no checksum; it was put there after the conversion")


def _verify_tensor(tensor: StoredTensor) -> None:
    path, spec = tensor.file.file.path, tensor.spec
    if tensor.sha256 is None:
        raise ModelFormatError(f"{path}: {spec.name}: has no checksum in its metadata; convert the model again")
    payload = tensor.payload()
    found = _sha256(payload)
    if found != tensor.sha256:
        raise ModelFormatError(
            f"{path}: {spec.name}: sha256 of its payload is {found}, its metadata says {tensor.sha256}; "
            "the file was damaged or changed, convert the model again"
        )
    _verify_values(spec, payload, str(path))


def _verify_values(spec: TensorSpec, payload: Bytes, where: str) -> None:
    try:
        packed = unpack(spec, payload)
        check_finite(spec, packed)
        check_permutation(spec, packed)
    except ModelFormatError as error:
        raise ModelFormatError(f"{where}: {error}") from None
    if not np.array_equal(pack(spec, packed), payload):
        raise ModelFormatError(f"{where}: {spec.name}: padding is not zero; the file was not written by quantize")


def _sha256(payload: Bytes) -> str:
    digest = hashlib.sha256()
    for start in range(0, payload.size, _CHUNK_BYTES):
        digest.update(payload[start : start + _CHUNK_BYTES].data)
    return digest.hexdigest()
