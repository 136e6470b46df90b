"""Fetches a model from the Hugging Face hub, when somebody asks for that by name, and at no other time.

Chooses what this version reads from a repository's list of files: weights in one form, config, tokenizer; never code,
and no pickles where safetensors are. Transport, cache and checksums are the library's (`huggingface_hub`, an optional
extra), which is imported here and nowhere else; so is what it keeps of a file whose download was stopped.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .common.errors import PyllamaError

# What describes a model, beside its weights.
ABOUT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "quantize_config.json",
    "adapter_config.json",
)
# Kinds of weights, the best first, and what else each needs. The first that a repository has is taken.
_KINDS = (
    (r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json", ABOUT),
    (r"[\w.+-]+\.gguf", ()),
    (r"[\w.+-]+\.safetensors", ABOUT),
    (r"consolidated\.\d\d\.pth", ("params.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")),
    (r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json", ABOUT),
)
# What the library's errors mean, by the names of their classes; the first that fits.
_REASONS = {
    "GatedRepoError": "is gated: accept its terms on its page there, then log in (`hf auth login`, or HF_TOKEN)",
    "RepositoryNotFoundError": "there is no such repository, or it is private: check the name, or log in"
    " (`hf auth login`, or HF_TOKEN)",
    "RevisionNotFoundError": "has no such branch, tag or commit",
    "ConnectError": "the hub cannot be reached",
    "ConnectionError": "the hub cannot be reached",
}
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Fetched:
    """Where a repository's files lie now. model: what to open, the folder or the one .gguf file in it."""

    folder: Path
    model: Path
    files: tuple[str, ...]
    n_bytes: int
    revision: str


def choose_files(repo: str, names: Iterable[str], include: str | None = None) -> list[str]:
    """Which of a repository's files to fetch; `include`: a pattern for weights, as *Q4_K_M*.gguf.

    Files in folders are left alone: they are other forms of the same model. Raises PyllamaError that says what there
    is, when nothing can be read or a choice among .gguf files is needed.
    """
    here = sorted(name for name in names if re.fullmatch(r"\w[\w.+-]*", name))
    for pattern, about in _KINDS:
        weights = [name for name in here if re.fullmatch(pattern, name)]
        if include is not None:
            weights = [name for name in weights if fnmatchcase(name, include)]
        if not weights:
            continue
        models = {_PART.sub("", name) for name in weights if name.endswith(".gguf")}
        if len(models) > 1:
            some = ", ".join(weights[:12]) + (f" and {len(weights) - 12} more" if len(weights) > 12 else "")
            raise PyllamaError(f"{repo}: holds {len(models)} models; choose by --include PATTERN: {some}")
        if include is not None and pattern.startswith("model"):  # the index belongs to what it indexes
            weights = sorted({*weights, *({"model.safetensors.index.json"} & set(here))})
        weights.sort(key=lambda name: not name.endswith(".json"))  # what is small first, so that it is soon there
        return [name for name in about if name in here] + weights
    wanted = f"no weights that fit {include!r}" if include is not None else "no weights that this version reads"
    raise PyllamaError(f"{repo}: {wanted} among its {len(here)} files (safetensors, GGUF, Meta's or PyTorch's)")


def download(
    repo: str, folder: Path | None = None, *, revision: str | None = None, include: str | None = None, told: Any = None
) -> Fetched:
    """Fetches a repository's files into `folder`, by default into the hub library's own cache.

    revision: a branch, tag or commit; all files come from one commit. told: is called with a line before the first byte
    comes. Raises PyllamaError when the library is not installed, the hub refuses, or nothing there can be read.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ValueError(f"{repo!r}: expected the hub's name of a model, as owner/name")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        raise PyllamaError(
            "downloading needs the package huggingface_hub: pip install huggingface_hub; or fetch the files yourself"
        ) from None
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes: Mapping[str, int] = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except Exception as error:  # whatever that library and those below it raise
        raise _refused(repo, "", error) from error
    files = choose_files(repo, sizes, include)
    n_bytes = sum(sizes[name] for name in files)
    commit = str(info.sha or revision or "main")
    if told is not None:
        n_files = f"{len(files)} file{'s' * (len(files) > 1)}"
        told(f"{repo} at {commit[:12]}: {n_files}, {n_bytes / 1e6:.1f} MB, into {folder or 'the hub cache'}")
    paths = []
    for name in files:
        place = {} if folder is None else {"local_dir": str(folder)}
        try:
            paths.append(Path(hub.hf_hub_download(repo, name, revision=commit, **place)))
        except Exception as error:
            raise _refused(repo, name, error) from error
    home = paths[-1].parent
    lone = [path for path in paths if path.suffix == ".gguf"]
    return Fetched(home, lone[0] if lone else home, tuple(files), n_bytes, commit)


def _refused(repo: str, name: str, error: Exception) -> PyllamaError:
    """What to say when the library gave up; `name`: of the file at work, "" for none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else "no reason given"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    reason = next((_REASONS[kind] for kind in _REASONS if kind in kinds), None)
    if reason is None:
        return PyllamaError(f"{repo}: {f'{name}: ' if name else ''}{type(error).__name__}: {said}")
    return PyllamaError(f"{repo}: {reason}" + (f" ({said})" if reason.endswith("reached") else ""))
