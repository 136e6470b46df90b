"""`pyllama generate`: continues a prompt; text as it comes, or one JSON object when it is done."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from .options import UsageError, add_model, add_sampling, open_llm, sampling_options
from .terminal import json_text, safe

if TYPE_CHECKING:
    from ..outputs import RequestOutput


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    add_model(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help='the prompt; "-" reads it from stdin')
    parser.add_argument("--json", action="store_true", help="one JSON object with text, tokens, usage, timings, seed")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, and the N likeliest")
    add_sampling(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs goes with --json, which alone shows them")
    options = sampling_options(arguments, "logprobs")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with open_llm(arguments) as llm:
        if arguments.json:
            output = llm.generate(prompt, **options)
            print(json_text(output_record(output)))
            return 0
        to_people = sys.stdout.isatty()  # a file or a pipe gets the text as it is
        try:
            for piece in llm.stream(prompt, **options):
                print(safe(piece.text) if to_people else piece.text, end="", flush=True)
        finally:
            print()  # also where Ctrl-C stops it: what is said next begins a line
    return 0


def output_record(output: RequestOutput) -> dict[str, Any]:
    """A RequestOutput as plain JSON values."""
    record = dataclasses.asdict(output)
    record["usage"]["total_tokens"] = output.usage.total_tokens
    record["timings"] |= {
        "prompt_tok_per_s": output.timings.prompt_tok_per_s,
        "decode_tok_per_s": output.timings.decode_tok_per_s,
    }
    return record
