"""The command line's frame: the parser, exit codes, errors as one line.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 error, 2 wrong usage, 130 Ctrl-C.
PYLLAMA_DEBUG=1 shows the traceback of an error. What a command does is in its own file.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import bench, chat, doctor, download, generate, info, plan
from .options import UsageError
from .terminal import safe

_EPILOG = """\
MODEL is a model folder, a .gguf file, a Hugging Face folder, a folder of Meta's (params.json and
consolidated.NN.pth), or "demo" (also when left out).
exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted by Ctrl-C
environment: PYLLAMA_ISA chooses the kernels (see `pyllama doctor`), PYLLAMA_DEBUG=1 shows tracebacks,
XDG_CACHE_HOME and XDG_STATE_HOME move converted models and the chat's history
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line."""
    parser = argparse.ArgumentParser(
        prog="pyllama",
        description="Run LLaMA models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pyllama {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (chat, generate, bench, info, plan, download, doctor):
        module.add_parser(commands)
    return parser


def _version() -> str:
    from .. import __version__

    return __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    _mend_streams()
    try:
        parser = build_parser()
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help(sys.stderr)
            return 2
        return _run(arguments)
    except SystemExit as leave:  # argparse: 0 after --help, 2 for wrong usage
        return leave.code if isinstance(leave.code, int) else 2


def _mend_streams() -> None:
    """What the caller has closed is empty and swallows everything; what an encoding cannot say is escaped, not an
    error in the middle of a reply."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # open until the end
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(arguments: argparse.Namespace) -> int:
    from ..common.errors import PyllamaError

    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe left (`| head`); keep the interpreter from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PyllamaError, ValueError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("PYLLAMA_DEBUG", "0") not in ("", "0"):
            raise
        print(f"pyllama: {safe(_one_line(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if str(error) else ''}{error}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{Path(os.fsdecode(error.filename))}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
