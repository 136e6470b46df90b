"""A process that holds one engine with one model, and the pipe to it: both ends.

One JSON object per line: {"do": "time" | "logits" | "probe", ...} in, an object out. While one process works the others
wait in a read, so that nobody's threads disturb the others'. What is timed lies in side_ours.py and side_peer.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.rows import Work  # noqa: E402


class WorkerError(Exception):
    """A process that ended, or said why it cannot do what was asked."""


class Worker:
    """The other end: starts the process, asks, waits."""

    def __init__(self, python: str, side: str, words: list[str], environment: dict[str, str]) -> None:
        paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self._side = side
        self._process = subprocess.Popen(
            [python, str(HERE / "workers.py"), side, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths} | environment,
        )
        try:
            hello = self._read()
        except BaseException:
            self.close()
            raise
        self.info: dict[str, Any] = hello["info"]
        self.settings: list[str] = hello["settings"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._obituary(self._process.wait()))
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise WorkerError(str(found["error"]))
        return found

    def _obituary(self, status: int) -> str:
        hint = "; see above"
        if self._side == "peer" and -status in (signal.SIGSEGV, signal.SIGILL):
            hint = ": built for instructions that this machine only claims to run? See benchmarks/README.md"
        return f"the process of '{self._side}' ended with status {status}{hint}"

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._obituary(self._process.wait())) from None
        return self._read()

    def time(self, setting: str, work: Work) -> float:
        """Seconds of the work."""
        return float(self.ask("time", setting=setting, work=asdict(work))["seconds"])

    def close(self) -> None:
        """Ends the process, which ends by itself when its input does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def run_start(python: str, side: str, words: list[str], environment: dict[str, str]) -> dict[str, float]:
    """One fresh process that opens a model, makes one token and says how long it took."""
    worker = Worker(python, side, [*words, "--start"], environment)
    worker.close()
    return worker.info


def serve(side: Any, requests: Any, reply: Any) -> None:
    """Answers requests until the pipe closes."""
    reply({"info": side.info(), "settings": list(side.settings)})
    for line in requests:
        request = json.loads(line)
        if request["do"] == "probe":
            reply({"value": side.probe(request["what"])})
        elif request["do"] == "logits":
            reply({"logits": side.logits(request["setting"], request["tokens"])})
        else:
            reply({"seconds": side.time(request["setting"], Work(**request["work"]))})


def main() -> None:
    parser = argparse.ArgumentParser(description="one side of compare.py; started by it")
    parser.add_argument("side", choices=("ours", "peer"))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-dtype", default="f16", help="ours")
    parser.add_argument("--variant", default="repacked", help="peer")
    parser.add_argument("--start", action="store_true", help="time one start instead of serving")
    arguments = parser.parse_args()
    # Whatever a library prints on stdout must not end up between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    if arguments.side == "ours":
        from benchmarks import side_ours

        if arguments.start:
            reply({"info": side_ours.start(arguments.model, arguments.threads), "settings": []})
            return
        try:
            side: Any = side_ours.Ours(arguments.model, arguments.threads, arguments.kv_dtype)
        except side_ours.UnavailableError as error:
            reply({"error": str(error)})
            return
    else:
        from benchmarks import side_peer

        if arguments.start:
            reply({"info": side_peer.start(arguments.model, arguments.threads, arguments.variant), "settings": []})
            return
        side = side_peer.LlamaCpp(arguments.model, arguments.threads, arguments.variant)
    serve(side, sys.stdin, reply)


if __name__ == "__main__":
    main()
