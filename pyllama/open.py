"""From a path or name to an opened model: our folder is mapped, a foreign checkpoint is converted once into the cache.

The only file of the package that knows `quantize`, and it imports it when a foreign checkpoint is opened, not before.
Nothing here runs a model; checking files is common/model_folder.py's work.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common.errors import ModelFormatError, PyllamaError, not_found
from .common.formats import FORMATS, VERSION, TensorSpec
from .common.model_folder import ModelFolder, is_model_folder, read_model_folder
from .common.reader import parse_json, read_bytes, read_json
from .common.rope import inv_freq
from .demo import demo_source
from .native import load_native

DEMO = "demo"
SETTLE_S = 0.1
_KNOWN = f'a model folder, a .gguf file, a Hugging Face folder, a folder of Meta\'s, or "{DEMO}"'


@dataclass(frozen=True)
class OpenedModel:
    """A model ready for the engine. `weights` are `_C.Weight`s that keep their mapped files alive.

    `chat_template` is None for a model that has none; `generation_config` is {} without that file.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, Any]
    tokenizer: Any
    chat_template: Any
    generation_config: dict[str, Any]

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a reply; the tokenizer knows those of its files and of generation_config.json."""
        return frozenset(self.config["eos_token_ids"]) | frozenset(self.tokenizer.eos_ids)

    @property
    def step_weights(self) -> list[Any]:
        """The weights that a step reads: all of them, but of embeddings only those that are the head too."""
        skipped = () if self.config["tied_embeddings"] else ("tok_embeddings",)
        return [weight for name, weight in self.weights.items() if name not in skipped]

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return sum(weight.nbytes for weight in self.step_weights)

    @property
    def specs(self) -> list[TensorSpec]:
        """What each of the weights is."""
        return [spec_of(weight) for weight in self.weights.values()]

    def native_config(self, n_ctx: int) -> dict[str, Any]:
        """The config in the engine's words, for contexts of at most `n_ctx` tokens."""
        frequencies, factor = inv_freq(self.config, n_ctx)
        return self.config | {"max_seq_len": n_ctx, "rope_inv_freq": frequencies, "rope_attention_factor": factor}


def open_model(path: str | os.PathLike[str], *, mmap: bool = True, format: str | None = None) -> OpenedModel:
    """Opens a model folder, a checkpoint (.gguf file, Hugging Face or Meta folder, weight file in one), or "demo".

    `mmap=False` reads the weights into memory. `format` is what a foreign checkpoint is converted to; by default f16
    and bf16 become q8, and what already lies on one of our grids is repacked (docs/GGUF.md). Raises FileNotFoundError,
    ModelFormatError, QuantizeError; ValueError for a bad `format`.
    """
    return load_folder(locate(path, format=format), mmap=mmap)


def locate(path: str | os.PathLike[str], *, format: str | None = None) -> Path:
    """The model folder that `path` means, converting a foreign checkpoint into the cache if it is not there yet."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {' '.join(FORMATS)}")
    source = source_path(path)
    if not is_model_folder(source):
        return _converted(source, format)
    if format is not None:
        raise ValueError(f"format={format!r}: {source} is converted already; give the checkpoint it was made from")
    return source


def source_path(path: str | os.PathLike[str]) -> Path:
    """The file or folder that a path or "demo" means. Raises FileNotFoundError, ValueError for an empty one."""
    name = os.fspath(path)
    if not name:
        raise ValueError("the model's path is empty")
    source = demo_source() if name == DEMO else Path(name)
    with suppress(RuntimeError):  # "~nobody": a name like any other
        source = source.expanduser()
    if not source.exists():
        raise FileNotFoundError(not_found(name, _KNOWN))
    return source


# -------------------------------------------------------------------------------- our own folder


def load_folder(path: Path, *, mmap: bool = True, settle_s: float = SETTLE_S) -> OpenedModel:
    """Opens a folder that `quantize` wrote. Raises ModelFormatError.

    `settle_s`: what `settle` may take of the opening; what is left in small pages waits for the next one.
    """
    from .chat_template import ChatTemplate
    from .tokenizer import Tokenizer
    from .tokenizer.golden import check_golden_ids

    folder = read_model_folder(path, use_mmap=mmap)
    tokenizer = Tokenizer.from_folder(path)
    check_golden_ids(tokenizer, path)
    weights = _native_weights(folder)
    settle(folder, settle_s)
    return OpenedModel(
        path=path,
        config=folder.config,
        weights=weights,
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_folder(path),
        generation_config=read_generation_config(path),
    )


def read_generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json of a folder, {} without it. Raises ModelFormatError."""
    file = path / "generation_config.json"
    return read_json(file) if file.exists() else {}


def native_weight(spec: Any, payload: Any) -> Any:
    """A `_C.Weight` over a payload in tiles. `spec`: common.formats.TensorSpec."""
    return load_native().Weight(**spec.arguments, data=payload)


def spec_of(weight: Any) -> TensorSpec:
    """What a `_C.Weight` is."""
    return TensorSpec(
        weight.name,
        weight.format,
        weight.shape,
        group=weight.group,
        scale=weight.scale,
        offset=weight.offset,
        codebook=weight.codebook,
        input_order=weight.input_order,
    )


def settle(folder: ModelFolder, seconds: float) -> None:
    """Has the system keep the folder's mapped weights in huge pages, from which a token reads them faster.

    Copying a file, among others, leaves it in small ones. Stops after about `seconds`; does nothing where the system
    or the file system cannot (docs/KERNELS.md says what it takes).
    """
    end = time.monotonic() + seconds
    for file in {id(tensor.file): tensor.file.file for tensor in folder.tensors.values()}.values():
        mapped = file.mapped()
        if mapped is not None:
            load_native().settle_in_huge_pages(*mapped, max(0.0, end - time.monotonic()))


def _native_weights(folder: ModelFolder) -> dict[str, Any]:
    return {name: native_weight(tensor.spec, tensor.payload()) for name, tensor in folder.tensors.items()}


# -------------------------------------------------------------------------------- looking without opening


@dataclass(frozen=True)
class Description:
    """What a model is, from its headers. For a foreign checkpoint: what it would be converted to.

    architecture: the source's name for it. stored: what lies there, type -> [tensors, weights, bytes].
    conversion: what would be done, in words; None for a folder of ours. vocabulary: see tokenizer/kind.py.
    """

    path: Path
    foreign: bool
    architecture: str
    config: dict[str, Any]
    specs: tuple[TensorSpec, ...]
    stored: dict[str, list[int]]
    conversion: str | None
    vocabulary: dict[str, Any] | None
    has_chat_template: bool


def describe_model(path: str | os.PathLike[str]) -> Description:
    """Describes what `path` means without reading weights or converting anything. Raises as `open_model` does."""
    source = source_path(path)
    return _describe_folder(source) if is_model_folder(source) else _describe_checkpoint(source)


def _describe_folder(path: Path) -> Description:
    from .chat_template import ChatTemplate
    from .tokenizer.kind import FILES, vocabulary_kind
    from .tokenizer.special import VOCABULARY_LIMIT_BYTES

    folder = read_model_folder(path)
    specs = tuple(tensor.spec for tensor in folder.tensors.values())
    stored: dict[str, list[int]] = {}
    for spec in specs:
        name = f"{spec.format} g{spec.group}" if spec.group else spec.format
        _count(stored, name, spec.n_weights, spec.payload_bytes)
    files = {name: read_bytes(path / name, VOCABULARY_LIMIT_BYTES) for name in FILES if (path / name).is_file()}
    return Description(
        path=path,
        foreign=False,
        architecture=folder.config["architecture"],
        config=folder.config,
        specs=specs,
        stored=stored,
        conversion=None,
        vocabulary=vocabulary_kind(files, str(path)),
        has_chat_template=ChatTemplate.from_folder(path) is not None,
    )


def _describe_checkpoint(path: Path) -> Description:
    from quantize import make_plan
    from quantize.readers import open_source

    from .tokenizer.kind import vocabulary_kind

    opened = open_source(path)
    plan = make_plan(opened)
    stored: dict[str, list[int]] = {}
    for item in plan.tensors:
        _count(stored, item.source.dtype, item.spec.n_weights, item.source.n_bytes)
    made = opened.tokenizer_files()
    where = f"{path}: tokenizer_config.json"
    has_template = "chat_template.jinja" in made or bool(
        parse_json(made.get("tokenizer_config.json", b"{}"), where).get("chat_template")
    )
    return Description(
        path=path,
        foreign=True,
        architecture=opened.architecture or plan.config()["architecture"],
        config=plan.config(),
        specs=tuple(item.spec for item in plan.tensors),
        stored=stored,
        conversion=plan.in_words(),
        vocabulary=vocabulary_kind(made, str(path)),
        has_chat_template=has_template,
    )


def _count(stored: dict[str, list[int]], name: str, n_weights: int, n_bytes: int) -> None:
    row = stored.setdefault(name, [0, 0, 0])
    row[0], row[1], row[2] = row[0] + 1, row[1] + n_weights, row[2] + n_bytes


# -------------------------------------------------------------------------------- foreign checkpoints


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/pyllama, by default ~/.cache/pyllama."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "pyllama"
    except RuntimeError:
        raise PyllamaError("there is no home folder for converted models; set XDG_CACHE_HOME") from None


def _converted(source: Path, format: str | None) -> Path:
    """The cached conversion of a foreign checkpoint, made now if it is not there."""
    from quantize import make_plan, write_plan
    from quantize.readers import open_source

    from .tokenizer import NO_VOCABULARY, VOCABULARIES

    opened = open_source(source)
    key = json.dumps([opened.identity, VERSION, format], sort_keys=True)
    stem = re.sub(r"[^\w.-]+", "_", str(opened.identity["name"]).removesuffix(".gguf"))[:80]
    target = cache_folder() / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if is_model_folder(target):
        return target
    lock = target.with_name(target.name + ".lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise PyllamaError(
            f"{target.parent}: the folder for converted models cannot be made or written to ({error.strerror}); "
            "set XDG_CACHE_HOME, or convert with `quantize` and open the result"
        ) from None
    with _locked(lock):
        if not is_model_folder(target):  # another process may have made it while we waited
            if not any(name in opened.tokenizer_files() for name in VOCABULARIES):
                raise ModelFormatError(f"{source}: {NO_VOCABULARY}")
            plan = make_plan(opened, format=format)
            print(f"converting {source} once: {plan.change}, into {target}", file=sys.stderr, flush=True)
            if target.exists():  # the cache is ours: what is no model in it is the rest of something that broke
                shutil.rmtree(target)
            write_plan(plan, target, progress=_show_progress if sys.stderr.isatty() else None)
    return target


def _show_progress(progress: Any) -> None:
    print(f"\r{100 * progress.done // progress.total:3d} %", end="", file=sys.stderr, flush=True)
    if progress.done == progress.total:
        print("\r     \r", end="", file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, where system and file system have such; elsewhere one of two may be refused."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        with suppress(OSError):  # some networks' file systems have none
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    # the lock's file stays: removing it would let two waiters hold locks on two different files
