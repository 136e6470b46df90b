"""`pyllama plan`: what a model would take of memory, how many of its layers fit a CUDA device, how fast it would be."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from .options import add_kv_dtype, add_placement, positive
from .terminal import json_text, safe

if TYPE_CHECKING:
    from ..plan import Plan, Share
    from ..speeds import Speeds

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a model takes of memory, and how fast it would be",
        description="Show what a model would take of memory and how fast it would be.",
    )
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help='folder, .gguf file or "demo"')
    add_placement(parser)
    parser.add_argument("--n-ctx", type=positive, metavar="N", help="tokens of prompt and reply together")
    add_kv_dtype(parser)
    parser.add_argument(
        "--device-free", type=n_bytes, metavar="SIZE", help="plan for a GPU that is not here with SIZE free, say 24GB"
    )
    parser.add_argument("--no-speed", action="store_true", help="do not predict speeds, which takes two seconds")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    parser.add_argument("--json", action="store_const", const="json", dest="output", help="the same as -o json")
    parser.set_defaults(run=run)


def n_bytes(text: str) -> int:
    """24GB, 512MiB, or a number of bytes."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]i?|)B?", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 24GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def run(arguments: argparse.Namespace) -> int:
    from ..plan import plan_model

    plan = plan_model(
        arguments.model,
        device=arguments.device,
        n_ctx=arguments.n_ctx,
        kv_dtype=arguments.kv_dtype,
        gpu_layers=arguments.gpu_layers,
        device_free=arguments.device_free,
        measure=not arguments.no_speed,
    )
    print(json_text(plan.record(), indent=2) if arguments.output == "json" else safe(markdown(plan)))
    return 0


# row of the table, and where it stands in a Share
_ROWS = (
    ("weights of layers", "layers"),
    ("embedding", "embedding"),
    ("head", "head"),
    ("keys and values", "cache"),
    ("buffers of steps", "buffers"),
    ("more while loading", "upload"),
    ("kept free", "spare"),
)


def markdown(plan: Plan) -> str:
    """The plan for people: a table of megabytes, and what it means."""
    sides: list[tuple[str, Share, int | None]] = [("CPU", plan.on_cpu, plan.cpu_free)]
    if plan.on_device is not None:
        sides.insert(0, (plan.device, plan.on_device, plan.device_free))
    cache = f"{plan.kv_dtype} cache of {plan.cache_bytes_per_tok / 1024:.1f} KiB a token"
    lines = [f"{' '.join(plan.model.split())}: {plan.n_layers} layers, {plan.contexts}, {cache}"]
    if plan.device_name is not None:
        free = "" if plan.device_free is None else f", {plan.device_free / 2**30:.2f} GiB free"
        lines.append(f"{plan.device}: {plan.device_name}{free}")
    lines += ["", "| MiB |" + "".join(f" {name} |" for name, *_ in sides), "|---|" + "---:|" * len(sides)]
    lines.append("| layers |" + "".join(f" {share.n_layers} |" for _, share, _ in sides))
    for title, key in _ROWS:
        values = [getattr(share, key) for _, share, _ in sides]
        if any(values):
            lines.append(f"| {title} |" + "".join(f" {value / 2**20:.1f} |" for value in values))
    lines.append("| together |" + "".join(f" {share.total / 2**20:.1f} |" for _, share, _ in sides))
    known = [free for *_, free in sides]
    if any(free is not None for free in known):
        lines.append("| free now |" + "".join(" ? |" if f is None else f" {f / 2**20:.1f} |" for f in known))
    return "\n".join([*lines, "", *_sentences(plan)])


def _sentences(plan: Plan) -> list[str]:
    said = [" ".join(note.split()) for note in plan.notes]
    if plan.speeds is not None:
        said.append(_speeds(plan, plan.speeds))
    if plan.on_device is None:
        said.append("Everything runs on the CPU; weights are mapped from the file and take memory as they are read.")
    elif not plan.fits or not plan.gpu_layers:
        said.append(f"This does not fit {plan.device}: {plan.advice()}.")
    elif plan.gpu_layers == plan.n_layers:
        said.append(f"All {plan.n_layers} layers go to {plan.device}.")
    else:
        some = f"The last {'one' if plan.gpu_layers == 1 else plan.gpu_layers} of {plan.n_layers} layers"
        said.append(f"{some} and the head go to {plan.device}, the others run on the CPU.")
        if plan.n_ctx_of_all:
            said.append(f"All would fit with --n-ctx {plan.n_ctx_of_all}.")
    return said


def _speeds(plan: Plan, speeds: Speeds) -> str:
    decode = " and ".join(f"{_rounded(speeds.decode_tok_per_s(n))} after {n}" for n in plan.depths)
    return (
        f"Predicted tokens per second: {_rounded(speeds.prompt_tok_per_s)} of a prompt of {speeds.n_prompt},"
        f" decoding {decode} tokens"
        f" ({speeds.threads} threads, {speeds.isa}; rehearsed on {speeds.rehearsed} layers of random weights)."
    )


def _rounded(speed: float) -> str:
    return f"{float(f'{speed:.3g}'):,g}"
