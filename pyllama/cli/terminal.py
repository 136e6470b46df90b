"""Where a chat reads and writes: a terminal with history, keys and colour, or plain lines through pipes.

Replies go to stdout, everything else to stderr when stdout is not a terminal. What a model or a file says reaches a
terminal only through `safe` (or `json_text`). Knows nothing about models.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def safe(text: str) -> str:
    """`text` without control characters, but with its line ends and tabs: a terminal shows it and obeys nothing in it.

    Every escape sequence starts with one of these characters, so text may be cleaned piece by piece.
    """
    return _CONTROLS.sub("", text)


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON for stdout, readable, in which control characters are escaped, and all that is not ASCII where
    stdout is not UTF-8: nothing is lost."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=not is_utf8, indent=indent)
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


class Screen:
    """Plain lines: a question per line on stdin (a backslash at its end goes on), replies on stdout."""

    def read(self) -> str | None:
        """The next question, or None at the end of the input."""
        lines: list[str] = []
        for line in sys.stdin:
            line = line.rstrip("\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
        return "\n".join(lines) if lines else None

    def write(self, text: str) -> None:
        """A piece of a reply, at once."""
        print(safe(text), end="", flush=True)

    def end_reply(self) -> None:
        """The reply is over."""
        print(flush=True)

    def note(self, text: str) -> None:
        """Something that is not part of a reply."""
        print(safe(text), file=sys.stderr, flush=True)

    def confirm(self, question: str) -> bool:
        """Nobody is there to ask: the answer is no, and nothing is dropped silently."""
        self.note(f"{question} (no terminal to ask on: no)")
        return False


class Terminal(Screen):
    """A person at a terminal: line editing with history (prompt_toolkit), dimmed notes (rich)."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from rich.console import Console

        path = history_path()
        history = FileHistory(str(path)) if path else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(history=history, key_bindings=_keys(), multiline=True)
        self._console = Console(highlight=False)

    def read(self) -> str | None:
        try:
            return self._session.prompt("> ", prompt_continuation="  ")
        except EOFError:
            return None

    def note(self, text: str) -> None:
        self._console.print(safe(text), style="dim", markup=False, soft_wrap=True)

    def confirm(self, question: str) -> bool:
        from prompt_toolkit import prompt

        try:
            return prompt(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")  # what terminals send for Alt-Enter
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_path() -> Path | None:
    """$XDG_STATE_HOME/pyllama/chat_history, its folder made; None where that cannot be."""
    try:
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(home) / "pyllama" / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):  # RuntimeError: nobody has a home here
        return None
    return path


def make_screen() -> Screen:
    """A terminal when a person is at both ends, otherwise plain lines."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return Terminal()
        except ImportError as error:
            print(f"plain input, because {error.name} is not installed", file=sys.stderr)
            return PlainTerminal()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is no UTF-8 is refused, and the next one read
        sys.stdin.reconfigure(errors="surrogateescape")
    return Screen()


class PlainTerminal(Screen):
    """A person at a terminal without prompt_toolkit or rich."""

    def read(self) -> str | None:
        try:
            text = input("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input("  ")
        except EOFError:
            return None
        return text

    def confirm(self, question: str) -> bool:
        try:
            return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False
