"""Reads Meta's own layout of LLaMA 1, 2 and 3: params.json and consolidated.NN.pth, one file for each of their GPUs.

Every file holds a part of each matrix, cut along its rows or its columns, and a copy of each norm. The parts are put
together here, without copying (source.Joined); that they are the right ones is checked first. params.json leaves much
unsaid (the context, the scaling of 3.2, whether the head is the embedding): what is concluded, and from what, stands at
the functions below. The files themselves are torch_file.py's affair, Llama 3's vocabulary tiktoken_vocab.py's.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyllama.common.errors import ModelFormatError
from pyllama.common.named_templates import NAMED_TEMPLATES
from pyllama.common.reader import BoundedFile, read_bytes, read_json, shown

from ..binding import bind
from ..families import find_family
from ..fields import LIMITS, Fields, base_config
from .safetensors_folder import TOKENIZER_FILES, tokenizer_files
from .source import Joined, Rows, Source, identity_of, name_of, same_numbers
from .tiktoken_vocab import BEGIN, TiktokenVocabulary, is_tiktoken
from .torch_file import archive_name, read_torch

SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
PARAMS = "params.json"
VOCABULARY, HF_VOCABULARY, TEMPLATE = "tokenizer.model", "tokenizer.json", "chat_template.jinja"
MAX_VOCABULARY_BYTES = 1 << 24

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# Which axis each matrix of a layer is cut along, between several files.
_AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}
_MATRIX = re.compile(r"layers\.\d+\.(?:attention|feed_forward)\.(\w+)\.weight")
# How far copies of a norm may differ, of its largest number, before the files are said to be of different models.
_NORM_TOLERANCE = 0.01
# What params.json may ask for that this version cannot compute.
_UNKNOWN = ("quantization_args", "lora_args", "moe_args", "moe", "vision_model", "use_qk_norm")


def open_meta(folder: Path) -> Source:
    """A folder with params.json and consolidated.NN.pth as a Source.

    Raises ModelFormatError for a shard that is missing, stands twice or in another's place, for damage, and for a model
    that this version cannot run.
    """
    params_path = folder / PARAMS
    if not params_path.exists():
        raise ModelFormatError(f"{params_path}: is missing; Meta's consolidated.NN.pth need it")
    paths = _shard_paths(folder)
    params = read_json(params_path)
    shards = [read_torch(path) for path in paths]
    _check_numbers(paths, shards, params, str(params_path))
    stored = _join(paths, shards, params)
    tied = _is_tied(stored, bool(params.get("use_scaled_rope")))
    if tied:
        stored.pop(HEAD, None)
    family = find_family("meta", "llama", None, str(params_path))
    config = _config(params, stored, tied, str(params_path))
    tensors = bind(family, config, stored, str(folder))
    tokenizer = _Tokenizer(folder, config["vocab_size"], calls_tools=config["rope_scaling"] is not None)
    config["bos_token_id"], config["eos_token_ids"] = tokenizer.begin_and_ends()
    used = [params_path, *paths, *tokenizer.paths]
    identity = identity_of("meta", _model_name(folder), used)
    return Source("meta", config, tensors, {}, identity, tokenizer.files, "llama")


# -------------------------------------------------------------------------------------------------------- the shards


def _shard_paths(folder: Path) -> list[Path]:
    """consolidated.00.pth and so on, none left out."""
    numbers = sorted(int(match[1]) for entry in folder.iterdir() if (match := SHARD.fullmatch(entry.name)))
    for expected, number in enumerate(numbers):
        if number != expected:
            missing = folder / f"consolidated.{expected:02d}.pth"
            raise ModelFormatError(f"{missing}: is missing, though consolidated.{number:02d}.pth is there")
    return [folder / f"consolidated.{number:02d}.pth" for number in numbers]


def _check_numbers(paths: Sequence[Path], shards: Sequence[Mapping[str, Rows]], params: Any, where: str) -> None:
    """Raises unless these are all the shards of one model, each once and in its place."""
    name = "layers.0.attention.wq.weight"
    first = shards[0].get(name)
    fields = Fields(params, where)
    n_heads = fields.integer("n_heads", 1, LIMITS["n_heads"])
    head_dim = max(1, fields.integer("dim", 1, LIMITS["dim"]) // n_heads)
    rows = n_heads * fields.integer("head_dim", 1, LIMITS["head_dim"], head_dim)
    if first is not None and not first.trouble and rows % first.shape[0] == 0 and rows // first.shape[0] != len(paths):
        count = rows // first.shape[0]
        told = f"tensor {name} has {first.shape[0]} of {rows} rows in {paths[0].name}, so there are {count} files"
        if count > len(paths):
            raise ModelFormatError(f"{paths[0].parent / f'consolidated.{len(paths):02d}.pth'}: is missing: {told}")
        raise ModelFormatError(f"{paths[count]}: does not belong to this model: {told}")
    prints = [_fingerprint(shard) for shard in shards]
    for i, print_ in enumerate(prints):
        if prints.index(print_) != i:
            raise ModelFormatError(
                f"{paths[i]}: holds what {paths[prints.index(print_)].name} holds ({name} and the others); one file"
                " stands there twice, fetch it again"
            )
    _check_order(paths, name)


def _fingerprint(shard: Mapping[str, Rows]) -> bytes:
    """Of the first row of each matrix of the first layer: parts of one model differ there."""
    digest = hashlib.sha256()
    for name, rows in shard.items():
        if name.startswith("layers.0.") and _MATRIX.fullmatch(name) and not rows.trouble:
            digest.update(f"{name} {rows.shape}".encode() + rows.read(np.arange(1)).tobytes())
            rows.release()
    return digest.digest()


def _check_order(paths: Sequence[Path], name: str) -> None:
    """torch.save puts the name of the file into the file; names that are all there in another order tell of a swap."""
    found = [archive_name(path) for path in paths]
    stems = [path.name.removesuffix(".pth") for path in paths]
    if sorted(found) == sorted(stems) and found != stems:
        i = next(i for i, (here, there) in enumerate(zip(stems, found, strict=True)) if here != there)
        raise ModelFormatError(
            f"{paths[i]}: was saved as {found[i]}.pth; files are swapped, and the parts of {name} would be joined in"
            " the wrong order"
        )


def _join(paths: Sequence[Path], shards: Sequence[Mapping[str, Rows]], params: Mapping[str, Any]) -> dict[str, Rows]:
    """The whole tensors of the model, by Meta's names."""
    if len(shards) == 1:
        return dict(shards[0])
    for path, shard in zip(paths, shards, strict=True):
        for here, there, there_path in ((shards[0], shard, path), (shard, shards[0], paths[0])):
            name = next((name for name in here if name not in there), None)
            if name is not None:
                raise ModelFormatError(f"{there_path}: tensor {shown(name)} is missing, other shards have it")
    joined: dict[str, Rows] = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        axis = _axis(name, parts[0], params)
        joined[name] = _one_copy(name, parts) if axis is None else Joined(name, parts, axis)
    return joined


def _axis(name: str, part: Rows, params: Mapping[str, Any]) -> int | None:
    """The axis that a tensor is cut along, None for one of which every shard has a copy.

    Embeddings are cut along the columns in LLaMA 1 and 2 and along the vocabulary in 3: a part's width tells.
    """
    if name == EMBEDDING and len(part.shape) == 2:
        return 0 if part.shape[1] == params["dim"] else 1
    if name == HEAD:
        return 0
    match = _MATRIX.fullmatch(name)
    return _AXES.get(match[1]) if match else None


def _one_copy(name: str, parts: Sequence[Rows]) -> Rows:
    """The first shard's copy of a norm, if the others have the same."""
    first = parts[0]
    if len(first.shape) != 1 or first.trouble:
        return first
    index = np.arange(first.shape[0])
    values = first.read(index)
    first.release()
    for part in parts[1:]:
        if part.shape != first.shape or part.trouble:
            raise ModelFormatError(
                f"{part.where}: tensor {shown(name)} is {part.type_name} {list(part.shape)}, but {first.type_name}"
                f" {list(first.shape)} in {first.where}"
            )
        with np.errstate(all="ignore"):
            furthest = np.abs(part.read(index) - values).max()
            part.release()
            far = not furthest <= _NORM_TOLERANCE * np.abs(values).max()
        if far and np.isfinite(values).all():
            raise ModelFormatError(
                f"{part.where}: tensor {shown(name)} differs from that of {Path(first.where).name}; the files are of"
                " different models"
            )
    return first


def _is_tied(stored: Mapping[str, Rows], scaled_rope: bool) -> bool:
    """Whether the head is the embedding, which params.json does not say.

    Meta's Llama 3.2 1B and 3B hold it under both names. A head that is not there at all is the embedding only in
    models as new as those, which the scaling of their rotary positions tells; elsewhere `bind` reports it as missing.
    """
    head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
    if head is None or embedding is None:
        return scaled_rope and embedding is not None
    return head.shape == embedding.shape and head.type_name == embedding.type_name and same_numbers(head, embedding)


# ------------------------------------------------------------------------------------------------------- params.json


def _config(params: Mapping[str, Any], stored: Mapping[str, Rows], tied: bool, where: str) -> dict[str, Any]:
    """The canonical config. What params.json leaves out is concluded from the tensors and the other numbers."""
    family = find_family("meta", "llama", None, where)
    for key in _UNKNOWN:
        if params.get(key) not in (None, False):
            raise ModelFormatError(
                f"{where}: {key}: found {shown(params[key])}, which is not supported in this version"
            )
    fields = Fields(params, where, family.defaults)
    values = dict(params)
    if params.get("vocab_size") in (None, -1) and EMBEDDING in stored:
        stored[EMBEDDING].check()
        values["vocab_size"] = stored[EMBEDDING].shape[0]
    if params.get("hidden_dim") is None:
        values["hidden_dim"] = _hidden_dim(fields)
    if params.get("max_seq_len") is None:
        values["max_seq_len"] = _context(fields, stored)
    config = base_config(family, Fields(values, where, family.defaults))
    config["tied_embeddings"] = tied
    config["rope_scaling"] = _rope_scaling(fields, tied)
    return config


def _hidden_dim(fields: Fields) -> int:
    """Two thirds of 4 · dim, times ffn_dim_multiplier, rounded up to multiple_of; each step cut to an integer."""
    dim = fields.integer("dim", 1, LIMITS["dim"])
    hidden = int(2 * (4 * dim) / 3)
    if fields.get("ffn_dim_multiplier") is not None:
        hidden = int(fields.number("ffn_dim_multiplier", 1e-3, 1e3) * hidden)
    multiple = fields.integer("multiple_of", 1, LIMITS["hidden_dim"])
    return multiple * math.ceil(hidden / multiple)


def _context(fields: Fields, stored: Mapping[str, Rows]) -> int:
    """The context that the model was trained for: by its scaling (3.1 up), its rope base (Code Llama, 3), its window
    (Mistral 7B v0.1), or where its files keep the rotary frequencies: LLaMA 1 in each layer, LLaMA 2 once. Files
    without them are told apart by their epsilon, 1e-6 in all of LLaMA 1 but its largest; LLaMA 2 has both.
    """
    if fields.flag("use_scaled_rope"):
        return 131072
    if fields.get("sliding_window") is not None:
        return 32768
    theta = fields.number("rope_theta", 1.0, 1e12)
    if theta >= 1e6:
        return 16384
    if theta >= 5e5:
        return 8192
    if "layers.0.attention.inner_attention.rope.freqs" in stored:
        return 2048
    if "rope.freqs" in stored:
        return 4096
    is_largest_first = fields.integer("dim", 1, LIMITS["dim"]) >= 8192 and fields.get("n_kv_heads") is None
    return 2048 if fields.number("norm_eps", 1e-12, 1.0) < 9e-6 or is_largest_first else 4096


def _rope_scaling(fields: Fields, tied: bool) -> dict[str, Any] | None:
    """Llama 3.1's scaling. Its factor is 8, and 32 in Llama 3.2 1B and 3B, whose params.json says nothing of it; these
    are the models whose head is the embedding. Files of others may name it.
    """
    if not fields.flag("use_scaled_rope"):
        return None
    key = next((key for key in ("rope_scaling_factor", "rope_scale_factor") if fields.get(key) is not None), None)
    factor = (32.0 if tied else 8.0) if key is None else fields.number(key, 1e-3, 1e6)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": fields.number("rope_high_freq_factor", 1.0 + 1e-6, 1e6, 4.0),
        "original_max_position_embeddings": 8192,
    }


# ---------------------------------------------------------------------------------------------------- the vocabulary


def _find_vocabulary(folder: Path) -> Path | None:
    """tokenizer.model beside the weights, or a folder above, where LLaMA 1 and 2 were fetched to; or Hugging Face's
    tokenizer.json, which others put there."""
    for path in (folder / VOCABULARY, folder / HF_VOCABULARY, Path(os.path.abspath(folder)).parent / VOCABULARY):
        if path.is_file():
            return path
    return None


def _model_name(folder: Path) -> str:
    """The folder's name, or where Meta's files lie within a Hugging Face repository, that one's."""
    here = Path(os.path.abspath(folder))
    return name_of(here.parent if here.name == "original" else here)


class _Tokenizer:
    """What a vocabulary says; read when asked.

    No file of Meta's says whether a model was tuned for conversations, and one that was not must not be taken for one
    that was: it has a chat template only where its name says so, or where somebody put chat_template.jinja beside it.
    """

    def __init__(self, folder: Path, vocab_size: int, *, calls_tools: bool) -> None:
        self._path = path = _find_vocabulary(folder)
        self._name = _model_name(folder)
        self._ranks: TiktokenVocabulary | None = None
        self._template = folder / TEMPLATE
        self.paths = [found for found in (path, self._template) if found is not None and found.is_file()]
        if path is not None and path.name == HF_VOCABULARY:
            self.paths = [path.parent / name for name in TOKENIZER_FILES if (path.parent / name).exists()]
        if path is None or path.name == HF_VOCABULARY:
            return
        with BoundedFile(path) as file:
            start = file.read_at(0, min(file.size, 4096))
        if is_tiktoken(start):
            raw = read_bytes(path, MAX_VOCABULARY_BYTES, "vocabulary")
            self._ranks = TiktokenVocabulary(raw, vocab_size, str(path), calls_tools=calls_tools)

    def begin_and_ends(self) -> tuple[int | None, list[int]]:
        """The id that opens a text and those that end one; Meta's sentencepiece models have 1 and 2. Of Hugging Face's
        the files beside it say them, which the tokenizer reads."""
        if self._path is None or self._path.name == HF_VOCABULARY:
            return None, []
        return (1, [2]) if self._ranks is None else (self._ranks.special_id(BEGIN), self._ranks.end_ids)

    def files(self) -> dict[str, bytes]:
        if self._path is None:
            return {}
        if self._path.name == HF_VOCABULARY:
            return tokenizer_files(self._path.parent)
        if self._ranks is not None:
            files, chat = self._ranks.files(), _CHATS_3
        else:
            vocabulary = read_bytes(self._path, MAX_VOCABULARY_BYTES, "vocabulary")
            files, chat = {VOCABULARY: vocabulary, "tokenizer_config.json": _CONFIG}, _CHATS_2
        if self._template.is_file():
            return files | {TEMPLATE: read_bytes(self._template, TOKENIZER_FILES[TEMPLATE], "chat template")}
        pattern, template = chat
        return files | ({TEMPLATE: NAMED_TEMPLATES[template].encode()} if pattern.search(self._name) else {})


# The blank in front of text behind a control token is Meta's rule, and sentencepiece's own.
_CONFIG = (
    b'{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",'
    b' "add_bos_token": true, "add_eos_token": false, "legacy": true}'
)
# What models tuned for conversations are called, and their template, by the kind of vocabulary.
_CHATS_3 = re.compile("instruct|chat", re.IGNORECASE), "llama-3"
_CHATS_2 = re.compile(r"llama-?2.*chat", re.IGNORECASE), "llama-2"
