"""`pyllama download`: fetches a model from the hub, and prints where it lies. The only command that opens a socket."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .terminal import json_text, safe


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "download",
        help="fetch a model from the Hugging Face hub",
        description="Fetch what this version reads of a model from the Hugging Face hub, and print where it lies.",
        epilog='pyllama chat "$(pyllama download owner/name)" talks with it. Stopped, the same command fetches the '
        "rest. For gated models log in first (hf auth login), or set HF_TOKEN.",
    )
    parser.add_argument("repo", metavar="REPO", help="the model's name there, as owner/name")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where to (default: the hub's own cache)")
    parser.add_argument("--revision", metavar="NAME", help="a branch, tag or commit")
    parser.add_argument("--include", metavar="PATTERN", help="which weights, say '*Q4_K_M*.gguf'")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..hub import download

    def told(line: str) -> None:
        print(safe(line), file=sys.stderr, flush=True)

    found = download(
        arguments.repo, arguments.output, revision=arguments.revision, include=arguments.include, told=told
    )
    record = {
        "model": str(found.model),
        "folder": str(found.folder),
        "files": list(found.files),
        "n_bytes": found.n_bytes,
        "revision": found.revision,
    }
    print(json_text(record) if arguments.json else safe(str(found.model)))
    return 0
