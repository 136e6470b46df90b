"""`pyllama doctor`: prints what pyllama.doctor found. Exit code 1 when pyllama cannot work here."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="what works on this machine", description="Show what works on this machine, and what does not."
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from .. import __version__
    from ..doctor import examine

    findings = examine()
    print(f"{'pyllama':<15} {__version__}")
    for finding in findings:
        mark = {"ok": "", "missing": "[missing] ", "bad": "[BAD] "}[finding.state]
        print(f"{finding.name:<15} {mark}{finding.text}")
    return 1 if any(finding.state == "bad" for finding in findings) else 0
