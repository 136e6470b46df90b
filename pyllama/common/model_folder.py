"""The model folder's two core files: config.json, and the tensors in model*.safetensors (docs/FORMAT.md).

Reading checks everything that a forward pass relies on: numbers of the config, each tensor's metadata, size and place,
and that the tensors are those that the architecture needs. Payloads are mapped, not copied and not decoded; checksums
are read but compared only by quantize/verify.py. Writing here means building bytes in memory (`config_bytes`,
`header_bytes`); quantize/writer.py puts them on the disk. Tokenizer files are none of its business.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelFormatError
from .formats import ALIGN, VERSION, TensorSpec, parse_metadata, round_up
from .reader import Bytes, read_json, shown
from .safetensors import SafetensorsFile, read_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ARCHITECTURES = ("llama",)
NO_CHECKSUM = "0" * 64  # stands in the header until the payload is written

NO_TOKEN = (-1, 0xFFFFFFFF)  # how some tools write "none": also as all ones of an unsigned number
_MAX_LAYERS = 10_000
MAX_VOCAB = (1 << 20) - 1  # the engine's own limit: sums of so many weights of tokens fit 64 bits
_MAX_SIDE = 1 << 26  # the engine's own limit: far beyond any model, and products of two fit 64 bits
_SIZES = ("dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_seq_len")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of an opened model folder: what it is, its checksum if it has one, and the file that holds it."""

    spec: TensorSpec
    sha256: str | None
    file: SafetensorsFile

    def payload(self) -> Bytes:
        """uint8 [spec.payload_bytes], 64-byte aligned, read-only, mapped."""
        return self.file.data(self.spec.name)


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder; tensors in the order of `expected_tensors`."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """True if `path` is a folder whose config.json says that it is one of ours; never raises."""
    try:
        return read_json(Path(path) / CONFIG_FILE).get("format") == "pyllama"
    except ModelFormatError:
        return False


def read_model_folder(path: str | os.PathLike[str], *, use_mmap: bool = True) -> ModelFolder:
    """Opens a folder that `quantize` wrote and checks config, metadata and sizes; payloads are not looked at.

    Raises ModelFormatError naming the file or tensor, what was found and what was expected.
    """
    folder = Path(path)
    config = read_config(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelFormatError(f"{folder}: no model*.safetensors; the folder is incomplete, convert it again")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_tensors(file, use_mmap=use_mmap).items():
            if name in tensors:
                raise ModelFormatError(
                    f"{file}: {name} is also in {tensors[name].file.file.path}; one of them is left over"
                )
            tensors[name] = tensor
    check_tensors(config, {name: tensor.spec.shape for name, tensor in tensors.items()}, str(folder))
    return ModelFolder(folder, config, {name: tensors[name] for name in expected_tensors(config) if name in tensors})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, checked. Raises ModelFormatError."""
    path = folder / CONFIG_FILE
    config = read_json(path)
    if config.get("format") != "pyllama":
        raise ModelFormatError(
            f"{path}: format {shown(config.get('format'))}, expected 'pyllama'; convert it by `quantize`"
        )
    if config.get("version") != int(VERSION):
        raise ModelFormatError(
            f"{path}: version {shown(config.get('version'))}, this build reads {VERSION}; convert the model again"
        )
    check_config(config, str(path))
    return config


def read_tensors(path: Path, *, use_mmap: bool = True) -> dict[str, StoredTensor]:
    """The tensors of one file with their metadata. Raises ModelFormatError."""
    file = read_safetensors(path, use_mmap=use_mmap)
    if file.metadata.get("format") != "pyllama" or file.metadata.get("version") != VERSION:
        found = f"format {shown(file.metadata.get('format'))}, version {shown(file.metadata.get('version'))}"
        raise ModelFormatError(f"{path}: {found}, expected 'pyllama', {VERSION!r}; convert the model again")
    described = {key[len("tensor.") :] for key in file.metadata if key.startswith("tensor.")}
    if described != file.tensors.keys():
        name = min(described ^ file.tensors.keys())
        raise ModelFormatError(
            f"{path}: {shown(name)} has {'metadata but no data' if name in described else 'no metadata'}"
        )
    return {name: _stored(file, path, name) for name in file.tensors}


def _stored(file: SafetensorsFile, path: Path, name: str) -> StoredTensor:
    text = file.metadata[f"tensor.{name}"]
    try:
        spec = TensorSpec.from_metadata(name, text)
    except ModelFormatError as error:
        raise ModelFormatError(f"{path}: {error}") from None
    info = file.tensors[name]
    if info.dtype != "U8" or info.shape != (spec.payload_bytes,):
        raise ModelFormatError(
            f"{path}: {name}: payload {info.dtype} {list(info.shape)}, expected U8 [{spec.payload_bytes}] "
            f"for {spec.format} {list(spec.shape)}"
        )
    if info.start % ALIGN:
        raise ModelFormatError(f"{path}: {name}: payload starts at byte {info.start}, expected a multiple of {ALIGN}")
    sha256 = parse_metadata(name, text).get("sha256")
    if sha256 is not None and not isinstance(sha256, str):
        raise ModelFormatError(f"{path}: {name}: sha256 {shown(sha256)}, expected 64 hexadecimal digits")
    return StoredTensor(spec, sha256, file)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelFormatError unless the architecture's numbers are there and fit together. Unknown keys are fine."""

    def fail(key: str, expected: str) -> None:
        raise ModelFormatError(f"{where}: {key} is {shown(config.get(key))}, expected {expected}")

    if config.get("architecture") not in ARCHITECTURES:
        fail("architecture", " or ".join(ARCHITECTURES))
    for key in (*_SIZES, "n_layers"):
        largest = {"n_layers": _MAX_LAYERS, "vocab_size": MAX_VOCAB}.get(key, _MAX_SIDE)
        if type(config.get(key)) is not int or not 0 < config[key] <= largest:
            fail(key, f"an integer of 1 to {largest}")
    if config["n_heads"] % config["n_kv_heads"]:
        fail("n_kv_heads", f"a divisor of n_heads, which is {config['n_heads']}")
    if config["head_dim"] % 2:
        fail("head_dim", "an even number")
    if config["n_heads"] * config["head_dim"] > _MAX_SIDE:
        fail("n_heads", f"n_heads · head_dim of at most {_MAX_SIDE}")
    for key in ("norm_eps", "rope_theta"):
        if not _is_positive(config.get(key)):
            fail(key, "a positive number")
    if config["rope_theta"] < 1:  # pairs would turn faster and faster, beyond what float32 holds
        fail("rope_theta", "at least 1")
    if not isinstance(config.get("tied_embeddings"), bool):
        fail("tied_embeddings", "true or false")
    for key in ("embedding_scale", "attention_scale"):
        scale = config.get(key)
        if scale is not None and not _is_positive(scale):
            fail(key, "a positive number, or null")
    _check_window(config, fail)
    scaling = config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        fail("rope_scaling", "null or an object")
    if scaling and scaling.get("rope_type") == "yarn" and config["rope_theta"] == 1:
        fail("rope_theta", "more than 1 with rope_scaling of type yarn")
    for key in ("source", "quantization"):  # information only, but shown to people
        about = config.get(key)
        if about is None:
            continue
        if not isinstance(about, dict) or not all(isinstance(about.get(k, ""), str) for k in ("name", "kind")):
            fail(key, "null or an object whose name and kind are text")
    _check_token_ids(config, where)


def _is_positive(number: Any) -> bool:
    return not isinstance(number, bool) and isinstance(number, (int, float)) and 0 < number < 1e38


def _check_window(config: Mapping[str, Any], fail: Callable[[str, str], None]) -> None:
    window, layers, n_layers = config.get("sliding_window"), config.get("sliding_layers"), config["n_layers"]
    if window is not None and (type(window) is not int or not 0 < window <= _MAX_SIDE):
        fail("sliding_window", f"an integer of 1 to {_MAX_SIDE}, or null")
    if layers is None:
        return
    if not isinstance(layers, list) or any(type(layer) is not int or not 0 <= layer < n_layers for layer in layers):
        fail("sliding_layers", f"a list of layer numbers below n_layers, which is {n_layers}, or null")


def _check_token_ids(config: Mapping[str, Any], where: str) -> None:
    ids = config.get("eos_token_ids", [])
    if not isinstance(ids, list):
        raise ModelFormatError(f"{where}: eos_token_ids is {shown(ids)}, expected a list of token ids")
    bos = config.get("bos_token_id")
    for token in ids + ([] if bos is None else [bos]):
        if type(token) is not int or not 0 <= token < config["vocab_size"]:
            raise ModelFormatError(
                f"{where}: token id {shown(token)}, expected an integer below vocab_size {config['vocab_size']}"
            )


# Shape of each tensor in fields of the canonical config; a product joins two of them.
LAYER_SHAPES = {
    "attn_norm": ("dim",),
    "wq": ("n_heads*head_dim", "dim"),
    "wk": ("n_kv_heads*head_dim", "dim"),
    "wv": ("n_kv_heads*head_dim", "dim"),
    "bq": ("n_heads*head_dim",),
    "bk": ("n_kv_heads*head_dim",),
    "bv": ("n_kv_heads*head_dim",),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "wo": ("dim", "n_heads*head_dim"),
    "mlp_norm": ("dim",),
    "w_gate": ("hidden_dim", "dim"),
    "w_up": ("hidden_dim", "dim"),
    "w_down": ("dim", "hidden_dim"),
}
OUTER_SHAPES = {"tok_embeddings": ("vocab_size", "dim"), "norm": ("dim",), "output": ("vocab_size", "dim")}
BIASES = ("bq", "bk", "bv")
HEAD_NORMS = ("q_norm", "k_norm")
OPTIONAL = frozenset(BIASES + HEAD_NORMS)  # all layers have one of these, or none


def shape_of(config: Mapping[str, Any], sides: Iterable[str]) -> tuple[int, ...]:
    """The shape that a row of LAYER_SHAPES or OUTER_SHAPES means in this config."""
    return tuple(math.prod(config[name] for name in side.split("*")) for side in sides)


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that a model of this (checked) config has or may have, in the order of use."""
    layer = {name: shape_of(config, sides) for name, sides in LAYER_SHAPES.items()}
    outer = {name: shape_of(config, sides) for name, sides in OUTER_SHAPES.items()}
    shapes = {"tok_embeddings": outer["tok_embeddings"]}
    for i in range(config["n_layers"]):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["norm"] = outer["norm"]
    if not config["tied_embeddings"]:
        shapes["output"] = outer["output"]
    return shapes


def is_optional(name: str) -> bool:
    """True for tensors that a model may lack: biases, and norms of q and k."""
    return name.rsplit(".", 1)[-1] in OPTIONAL


def check_tensors(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ModelFormatError for the first tensor that is missing, of another shape than the config says, or extra."""
    expected = expected_tensors(config)
    for name, shape in expected.items():
        if name not in shapes:
            part = name.rsplit(".", 1)[-1]
            if part in HEAD_NORMS and any(other.endswith("." + part) for other in shapes):
                raise ModelFormatError(f"{where}: tensor {name} {list(shape)} is missing, but other layers have theirs")
            if is_optional(name):
                continue
            raise ModelFormatError(f"{where}: tensor {name} {list(shape)} is missing; the checkpoint is incomplete")
        if tuple(shapes[name]) != shape:
            part = name.rsplit(".", 1)[-1]
            sides = OUTER_SHAPES[name] if name in OUTER_SHAPES else LAYER_SHAPES[part]
            hint = ", ".join(dict.fromkeys("*".join(sides).split("*")))
            raise ModelFormatError(
                f"{where}: {name}: shape {list(shapes[name])}, expected {list(shape)}; check {hint} in the config"
            )
    extra = sorted(shapes.keys() - expected.keys())
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        why = "; the config says that embeddings are tied" if extra[0] == "output" else ""
        raise ModelFormatError(
            f"{where}: tensor {shown(extra[0])}{more} has no place in a {config['architecture']} model{why}"
        )


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The bytes of config.json."""
    return (json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def header_bytes(
    specs: Iterable[TensorSpec], checksums: Mapping[str, str] | None = None, files: Mapping[str, str] | None = None
) -> bytes:
    """The start of a safetensors file that holds these payloads one after the other: length, JSON, spaces.

    checksums: sha256 of each tensor's payload; zeros stand in their place until they are known, so that the header has
    its final length before. files: sha256 of the folder's other files. The result's length is a multiple of 64.
    """
    metadata = {"format": "pyllama", "version": VERSION}
    metadata.update({f"sha256.{name}": sha256 for name, sha256 in (files or {}).items()})
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for spec in specs:
        if spec.name in header:
            raise ModelFormatError(f"{spec.name}: given twice")
        metadata[f"tensor.{spec.name}"] = spec.to_metadata((checksums or {}).get(spec.name, NO_CHECKSUM))
        end = start + spec.payload_bytes
        header[spec.name] = {"dtype": "U8", "shape": [spec.payload_bytes], "data_offsets": [start, end]}
        start = end
    metadata["sha256"] = metadata_sha256(metadata)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = round_up(8 + len(text), ALIGN) - 8
    return struct.pack("<Q", length) + text.ljust(length)


def metadata_sha256(metadata: Mapping[str, str]) -> str:
    """What `"sha256"` in `__metadata__` must be: over all other keys and values."""
    lines = (f"{key}\n{value}\n" for key, value in sorted(metadata.items()) if key != "sha256")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
