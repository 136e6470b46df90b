"""Options that several commands share: the model, how it is opened, how it samples; and the way to an `LLM`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..llm import LLM

# option, type, metavar, help; the names are those of SamplingParams
_SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("max_tokens", int, "N", "stop after N tokens (default: at the model's end or the context's)"),
    ("temperature", float, "T", "0 takes the likeliest token; higher is more varied"),
    ("top_k", int, "K", "only the K likeliest tokens; 0 for all"),
    ("top_p", float, "P", "only the likeliest tokens that together reach P"),
    ("min_p", float, "P", "only tokens at least P times as likely as the likeliest"),
    ("repetition_penalty", float, "X", "divide the logits of tokens seen before; 1 for none"),
    ("presence_penalty", float, "X", "subtract from the logits of tokens written before"),
    ("frequency_penalty", float, "X", "subtract per time that a token was written"),
    ("seed", int, "N", "same seed, same text (default: random, told with --json)"),
)


class UsageError(ValueError):
    """Options that parse, but cannot be: exit code 2."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options of opening it."""
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help='folder, .gguf file or "demo"')
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one per physical core allowed")
    parser.add_argument("--n-ctx", type=positive, metavar="N", help="tokens of prompt and reply together")
    parser.add_argument("--no-mmap", action="store_true", help="read the weights instead of mapping the file")
    add_placement(parser)
    add_kv_dtype(parser)
    guessing = parser.add_mutually_exclusive_group()
    guessing.add_argument(
        "--speculative", choices=("lookup",), help="guess what repeats the text so far: same replies, often faster"
    )
    guessing.add_argument("--draft", metavar="MODEL", help="a small model with the same vocabulary that guesses ahead")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Where the model runs."""
    parser.add_argument(
        "--device", type=device, default="auto", metavar="NAME", help="auto (for now the CPU), cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--gpu-layers",
        type=gpu_layers,
        default="auto",
        metavar="N",
        help="layers on the CUDA device: auto (as many as fit), all, or the last N; the others run on the CPU",
    )


def device(text: str) -> str:
    """The name of a device, or argparse's error."""
    if text not in ("auto", "cpu"):
        from ..cuda import check_device

        try:
            check_device(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected auto, cpu, cuda or cuda:N") from None
    return text


def gpu_layers(text: str) -> str | int:
    """auto, all, or a number of layers."""
    return text if text in ("auto", "all") else integer(text, 0)


def add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dtype", choices=("f16", "q8"), default="f16", help="what the cache keeps; q8: about half the memory"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The fields of SamplingParams that make sense on a command line."""
    group = parser.add_argument_group("sampling (defaults are the model's own)")
    for name, kind, metavar, text in _SAMPLING:
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the reply before TEXT; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of text")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return integer(text, 1)


def integer(text: str, least: int) -> int:
    """An integer that the engine can take, or argparse's error."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}, below 2**31")
    return value


def sampling_options(arguments: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What was given on the command line, as keyword arguments of SamplingParams; checked before a model is opened.

    `more`: fields that only this command has.
    """
    from ..sampling import ParameterError, SamplingParams

    names = [name for name, *_ in _SAMPLING] + ["stop", *more]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.ignore_eos:
        given["ignore_eos"] = True
    try:
        SamplingParams(**given)
    except ParameterError as error:
        raise UsageError(str(error)) from None
    return given


def open_llm(arguments: argparse.Namespace) -> LLM:
    """The model that the command line names."""
    from ..llm import LLM

    return LLM(
        arguments.model,
        device=arguments.device,
        n_ctx=arguments.n_ctx,
        threads=arguments.threads,
        mmap=not arguments.no_mmap,
        speculative=arguments.speculative,
        draft=arguments.draft,
        kv_dtype=arguments.kv_dtype,
        gpu_layers=arguments.gpu_layers,
    )
