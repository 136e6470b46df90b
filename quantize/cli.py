"""The `quantize` command: arguments, progress, the closing summary, exit codes.

Results go to stdout, messages and progress to stderr. Expected errors are one line, never a traceback. The work is done
by convert.py and verify.py; nothing here knows weights.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pyllama.common.errors import ModelFormatError, PyllamaError, QuantizeError
from pyllama.common.formats import FORMATS, GROUPS
from pyllama.common.model_folder import read_model_folder

from .calibration_texts import DEFAULT_TOKENS
from .convert import (
    TARGET_FORMAT,
    Plan,
    aimed_at,
    check_request,
    check_target,
    make_plan,
    size_text,
    target_of,
    write_plan,
)
from .lora import merge_adapters
from .methods import METHODS
from .pipeline import parse_size
from .readers import SourceTensor, open_source
from .readers.source import name_of
from .verify import verify
from .writer import check_output

if TYPE_CHECKING:
    from .compare import Comparison

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
_PLAIN_EVERY_S = 5.0

Report = Callable[[int, int, str], None]  # done, total, name

_DESCRIPTION = """\
Converts a LLaMA checkpoint into a model folder that pyllama opens without copying anything.

SRC is a Hugging Face folder (config.json and *.safetensors or pytorch_model*.bin; GPTQ, AWQ and MLX too), a folder of
Meta's (params.json and consolidated.NN.pth) or a .gguf file. Without --format, matrices that are on one of our grids
already come over as they are (GGUF's Q4_0, Q4_1, Q5_0, Q8_0 and IQ4_NL, and what GPTQ, AWQ and MLX have in 4 bits), or
with their scales rounded to 16 bits (GGUF's Q4_K and IQ4_XS), and all others become q8."""

_EPILOG = """\
formats:  f32 f16 bf16   the numbers themselves
          q8             8 bits, a scale per group: all but lossless (8.5 bits per weight in groups of 32)
          q4             4 bits, even steps (4.5)
          q4a            4 bits, a scale and a minimum per group (5.0)
          q4nl           4 bits, steps that grow with the magnitude: the best at its size (4.5)
          q5nl           5 bits, the same (5.5)
          q6             6 bits, even steps (6.5)

examples: quantize SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2     without loss
          quantize Llama-3.2-1B -o llama-1b-q4nl --format q4nl
          quantize Llama-3.2-1B -o llama-1b-mixed --format q4 --tensor-type 'embeddings|output=q8'
          quantize Llama-3.2-1B -o mine --lora adapter            with a LoRA adapter merged
          quantize Llama-3.2-1B -o good --format q4nl --method imatrix
          quantize Llama-3.2-1B -o best --format q4nl --method gptq
          quantize Llama-3.2-1B -o fits --target-size 800MB --method gptq   a format for each matrix
          quantize verify llama-1b-q4nl                           compares every checksum

exit codes: 0 done, 1 failed (OUT is as it was), 2 wrong usage, 130 interrupted by Ctrl-C"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv` (default: the process's arguments) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = {"verify": _run_verify, "compare": _run_compare}.get(arguments[0] if arguments else "", _run_convert)
    try:
        with _terminated_politely():
            return run(arguments)
    except KeyboardInterrupt:
        kept = "--resume goes on from here" if "--resume" in arguments else "nothing was changed"
        return _complain(f"interrupted; {kept}", EXIT_INTERRUPTED)
    except PyllamaError as error:
        return _complain(str(error), EXIT_FAILED)
    except ValueError as error:
        return _complain(str(error), EXIT_USAGE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", EXIT_FAILED)
    except MemoryError:
        return _complain("not enough memory; close other programs, or take smaller pieces by --max-memory", EXIT_FAILED)


def _complain(message: str, code: int) -> int:
    print(f"quantize: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def _terminated_politely() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that the half-written folder is removed."""

    def unwind(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- quantize SRC -o OUT ---------------------------------------------------------------------------------------------


def _convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize",
        usage="quantize SRC -o OUT [options]\n       quantize verify OUT [--json]\n"
        "       quantize compare OUT… --reference SRC [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="Hugging Face folder, Meta's folder or .gguf file")
    add("-o", "--output", metavar="OUT", help="the model folder to make")
    add(
        "--format",
        choices=list(FORMATS),
        metavar="FORMAT",
        help=f"of all matrices: {' '.join(FORMATS)} (default: keep the source's grid if it is one of ours, else q8)",
    )
    add(
        "--group-size",
        type=int,
        choices=GROUPS,
        metavar="32|64|128",
        help="columns that share a scale; small is finer, large is smaller (default: 32)",
    )
    add(
        "--method",
        choices=list(METHODS),
        default="rtn",
        help="how codes are chosen: rtn, round to nearest; imatrix, the same by the errors that a product makes of it; "
        "gptq, slow and best: all weights of a row together. These two need calibration (default: %(default)s)",
    )
    add(
        "--calibration",
        metavar="FILE|self|mix",
        help="what runs through the model for methods that need it: a text file, texts sampled from the model, or a "
        "short mix of our own (default: mix)",
    )
    add(
        "--calibration-tokens", type=int, metavar="N", help=f"about how many tokens of that (default: {DEFAULT_TOKENS})"
    )
    add(
        "--tensor-type",
        action="append",
        default=[],
        type=_tensor_type,
        metavar="REGEX=FORMAT",
        help="another format for matrices in whose name REGEX is found; may be repeated, the last that fits decides",
    )
    aims = parser.add_mutually_exclusive_group()
    aims.add_argument(
        "--target-size",
        type=_memory,
        metavar="SIZE",
        help="instead of --format: a format for each matrix, by what it is measured to cost, such that the model takes "
        "at most SIZE, as 4.0GB; takes minutes",
    )
    aims.add_argument("--target-bpw", type=float, metavar="BITS", help="the same for bits per weight, as 4.4")
    aims.add_argument(
        "--max-kld",
        type=float,
        metavar="NATS",
        help="the same: the smallest model whose divergence from the original is predicted to be at most this, as 0.02",
    )
    add(
        "--lora",
        action="append",
        default=[],
        type=lambda path: (path, 1.0),
        metavar="ADAPTER",
        help="merge a PEFT adapter (a folder with adapter_config.json); may be repeated",
    )
    add("--lora-scale", action=_LoraScale, metavar="FACTOR", help="how much of the adapter before it (default: 1)")
    add(
        "--overwrite",
        action="store_true",
        help="replace OUT if it is a model folder; the old one stays until the new is whole",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with a stopped conversion to OUT, and keep what is done if this one is stopped",
    )
    add(
        "--max-memory",
        type=_memory,
        metavar="SIZE",
        help="most memory that may be resident, as 4GB; less memory means smaller pieces and fewer threads",
    )
    add("--dry-run", action="store_true", help="say what would be done and how large it would be; write nothing")
    add("--json", action="store_true", help="print the summary as one JSON object")
    return parser


def _memory(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tensor_type(text: str) -> tuple[str, str]:
    pattern, separator, format = text.rpartition("=")
    if not separator or not pattern or format not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=FORMAT with a format of {' '.join(FORMATS)}")
    return pattern, format


class _LoraScale(argparse.Action):
    """Gives the --lora before it its factor."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not namespace.lora:
            parser.error("--lora-scale belongs behind the --lora that it is for")
        try:
            factor = float(values)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            parser.error(f"--lora-scale: {values!r} is not a number")
        namespace.lora[-1] = (namespace.lora[-1][0], factor)


def _run_convert(arguments: list[str]) -> int:
    parser = _convert_parser()
    options = parser.parse_args(arguments)
    if not options.output and not options.dry_run:
        src = Path(options.src)
        suggestion = f"{src.stem if src.suffix == '.gguf' else name_of(src)}-{options.format or 'pyllama'}"
        parser.error(f"say where to put the model folder, for example: -o {suggestion}")
    check_request(
        options.format,
        options.group_size,
        options.method,
        options.tensor_type,
        options.calibration,
        options.calibration_tokens,
    )
    target = target_of(options.target_size, options.target_bpw, options.max_kld)
    check_target(target, options.format, options.group_size)
    out = (
        None if options.output is None else check_output(options.output, overwrite=options.overwrite or options.resume)
    )
    started = time.monotonic()
    source = merge_adapters(open_source(options.src), options.lora)
    plan = make_plan(
        source,
        format=options.format if target is None else TARGET_FORMAT,
        group_size=options.group_size,
        method=options.method,
        calibration=options.calibration,
        calibration_tokens=options.calibration_tokens,
        tensor_types=options.tensor_type,
    )
    if target is not None:
        with _progress("measuring costs", "layers") as report:
            plan = aimed_at(
                target,
                plan,
                calibration=options.calibration,
                tensor_types=options.tensor_type,
                max_memory=options.max_memory,
                progress=report,
            )
    _warn_of_second_rounding(plan)
    _warn_of_no_tokenizer(plan)
    if options.dry_run or out is None:
        _print_summary(plan, None, 0.0, options.json)
        return EXIT_OK
    with _progress("converting", "weights") as report:
        write_plan(
            plan,
            out,
            overwrite=options.overwrite,
            resume=options.resume,
            max_memory=options.max_memory,
            progress=lambda p: report(p.done, p.total, p.name),
        )
    _print_summary(plan, out, time.monotonic() - started, options.json)
    return EXIT_OK


def _warn_of_second_rounding(plan: Plan) -> None:
    coarse = [item for item in plan.tensors if item.how == "quantize" and item.spec.info.code_bits < 8]
    again = sorted({item.source.dtype for item in coarse if _is_quantized(item.source)})
    if again:
        print(
            f"quantize: note: {' and '.join(again)} matrices are rounded a second time; "
            "a checkpoint in f16 or bf16 would give a better model",
            file=sys.stderr,
        )


def _warn_of_no_tokenizer(plan: Plan) -> None:
    from pyllama.tokenizer import NO_VOCABULARY, VOCABULARIES

    # a GGUF has its vocabulary in it, and making files of it takes time; one without is refused when it is converted
    if plan.source.kind != "gguf" and not any(name in plan.source.tokenizer_files() for name in VOCABULARIES):
        print(f"quantize: note: {NO_VOCABULARY}, or into OUT afterwards", file=sys.stderr)


def _is_quantized(tensor: SourceTensor) -> bool:
    return tensor.n_bytes * 8 < 16 * math.prod(tensor.shape)


def _print_summary(plan: Plan, out: Path | None, seconds: float, as_json: bool) -> None:
    source_bytes = int(plan.source.identity.get("size_bytes", 0))
    n_bytes = plan.payload_bytes if out is None else sum(file.stat().st_size for file in out.iterdir())
    kinds = _kinds(plan)
    if as_json:
        summary: dict[str, Any] = {
            "output": None if out is None else str(out),
            "dry_run": out is None,
            **plan.config()["quantization"],
            "n_weights": plan.n_weights,
            "source_bytes": source_bytes,
            "output_bytes": n_bytes,
            "seconds": round(seconds, 3),
            "tensors": kinds,
        }
        print(json.dumps(summary))
        return
    for kind in kinds:
        group = f" g{kind['group']}" if kind["group"] else ""
        print(
            f"  {kind['count']:>4} {kind['from']:>6} -> {kind['format'] + group:<9} {_HOW[kind['how']]:<22} "
            f"{size_text(kind['bytes']):>9}  {kind['example']}"
        )
    if plan.target is not None:
        about = plan.config() if out is None else read_model_folder(out).config
        measured = about["quantization"].get("measured_kl")
        found = "" if measured is None else f", on a short text measured {measured:.2g}"
        print(f"for {plan.target.in_words()}: KL divergence predicted {plan.predicted_kl:.2g} nats{found}")
    where = "dry run, nothing written" if out is None else str(out)
    spent = "" if out is None else f" in {seconds:.1f} s"
    bits = f"{plan.source_bytes * 8 / plan.n_weights:.2f} -> {plan.bits_per_weight:.2f} bits per weight"
    print(f"{where}: {size_text(source_bytes)} -> {size_text(n_bytes)}, {bits}{spent}")


_HOW = {
    "repack": "as they are, no loss",
    "round": "codes kept, scales f16",
    "quantize": "quantized",
    "cast": "as numbers",
}


def _kinds(plan: Plan) -> list[dict[str, Any]]:
    """The plan's tensors counted by what becomes of them, the largest share first."""
    kinds: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for item in plan.tensors:
        how = "round" if item.rounds_scales else item.how
        key = (item.source.dtype, item.spec.format, item.spec.group, how)
        fresh = {"from": key[0], "format": key[1], "group": key[2], "how": key[3], "count": 0, "bytes": 0}
        kind = kinds.setdefault(key, {**fresh, "example": item.spec.name})
        kind["count"] += 1
        kind["bytes"] += item.spec.payload_bytes
    return sorted(kinds.values(), key=lambda kind: -int(kind["bytes"]))


# ---- quantize verify OUT ---------------------------------------------------------------------------------------------


def _run_verify(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="quantize verify",
        description="Reads a model folder from the first byte to the last; compares config, shapes, checksums, values. "
        "Exits with 0 if all is as it was written, with 1 and the name of the tensor otherwise.",
    )
    parser.add_argument("folder", metavar="OUT", help="the model folder")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args(arguments[1:])
    if not Path(options.folder).is_dir():
        raise ModelFormatError(f"{options.folder}: no such folder; expected a model folder that `quantize` wrote")
    with _progress("verifying", "bytes") as report:
        found = verify(options.folder, progress=report)
    if options.json:
        result = {"folder": options.folder, "ok": True, "n_tensors": found.n_tensors, "n_weights": found.n_weights}
        print(json.dumps({**result, "payload_bytes": found.payload_bytes}))
    else:
        print(
            f"{options.folder}: {found.n_tensors} tensors, {size_text(found.payload_bytes)}, all as they were written"
        )
    return EXIT_OK


# ---- quantize compare OUT --reference SRC ----------------------------------------------------------------------------


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize compare",
        description="Measures how far model folders are from what they were made of: both read a text, and what they "
        "say of each next token is compared. Small is good: a mean KL divergence of .001 nats is next to nothing, "
        ".01 is hard to notice, .1 is a model that often says something else.",
    )
    add = parser.add_argument
    add("models", metavar="OUT", nargs="+", help="model folders that quantize made")
    add("--reference", metavar="SRC", required=True, help="the checkpoint or model folder that they are compared with")
    add("--text", metavar="FILE", help="a text in UTF-8 (default: a short one that comes with the package)")
    add("--tokens", type=_positive, metavar="N", help="how much of the text is read at most (default: all)")
    add("--json", action="store_true", help="print everything as one JSON list, each tensor's error included")
    add("--svg", metavar="FILE", help="draw the errors by layer, or of several models their divergence by size")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _run_compare(arguments: list[str]) -> int:
    from .compare import EVALUATION_TEXT, compare
    from .plots import svg_of

    options = _compare_parser().parse_args(arguments[1:])
    try:
        text = Path(options.text or EVALUATION_TEXT).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise QuantizeError(f"{options.text}: is no text in UTF-8") from None
    with _progress("comparing", "tokens") as report:
        compared = compare(options.models, options.reference, text, max_tokens=options.tokens, progress=report)
    if options.svg:
        Path(options.svg).write_text(svg_of(compared), encoding="utf-8")
    if options.json:
        print(json.dumps([item.to_json() for item in compared]))
    else:
        _print_compared(compared)
    return EXIT_OK


def _print_compared(compared: Sequence[Comparison]) -> None:
    first = compared[0]
    n, reference = first.divergence.n_tokens, first.divergence.perplexity_reference
    print(f"reference {first.reference}, run as {first.reference_format}; {n} tokens, perplexity {reference:.4g}")
    for item in compared:
        found = item.divergence
        worst = sorted(item.tensors, key=lambda tensor: -tensor.relative)[:3]
        print(f"{item.model}: {size_text(item.payload_bytes)}, {item.bits_per_weight:.3f} bits per weight")
        print(
            f"  KL divergence     {found.kl_mean:.5f}{_error(found.kl_error, 5)} nats; median {found.kl_median:.5f}, "
            f"99 % {found.kl_99:.4f}, 99.9 % {found.kl_999:.4f}"
        )
        print(f"  same likeliest    {found.top1:.2%} of tokens")
        print(f"  perplexity        × {found.perplexity_ratio:.4f}{_error(found.perplexity_ratio_error, 4)}")
        print(f"  RMS of change     {found.rms_dp:.2%} in the probability of the text's own token")
        if worst:
            print("  largest errors    of ‖W‖²: " + ", ".join(f"{t.name} ({t.format}) {t.relative:.2g}" for t in worst))


def _error(value: float, places: int) -> str:
    return "" if math.isnan(value) else f" ± {value:.{places}f}"


# ---- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(what: str, unit: str) -> Iterator[Report]:
    """A bar on a terminal (if tqdm is installed), else a line every few seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        yield _plain_report(what, unit)
        return
    with tqdm(desc=what, unit=f" {unit}", unit_scale=True, file=sys.stderr, leave=False) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


def _plain_report(what: str, unit: str) -> Report:
    started = last = time.monotonic()
    first: int | None = None  # what was done when we began, as --resume may leave something

    def show(done: int, total: int, name: str) -> None:
        nonlocal last, first
        first = done if first is None else first
        now = time.monotonic()
        if now - last >= _PLAIN_EVERY_S:
            last = now
            size = f"{total / 1e6:.0f} M" if total >= 10_000_000 else f"{total:,}"
            left = f", {_time_text((now - started) * (total - done) / (done - first))} left" if done > first else ""
            print(f"{what}: {done / total:4.0%} of {size} {unit}, {name}{left}", file=sys.stderr, flush=True)

    return show


def _time_text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
