"""The one hierarchy of exceptions. Bad arguments are ValueError; all about models and machines is one of these.

Also what is said of a path that is not there, which both commands say.
"""

import re
from pathlib import Path


class PyllamaError(Exception):
    """Base of every error that pyllama and quantize raise on purpose."""


class ModelFormatError(PyllamaError):
    """A model or checkpoint that does not hold together; the message names the file, what was found and expected.

    Names, keys and libraries' words come from that file: what does not print on one line is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ContextLengthError(PyllamaError):
    """A prompt, or prompt and reply, longer than the context; nothing is truncated silently."""


class DeviceError(PyllamaError):
    """A device that was asked for and cannot be had, with the reason."""


class QuantizeError(PyllamaError):
    """A conversion that could not be carried out; nothing is left at the output path."""


def not_found(name: str, expected: str) -> str:
    """What to say of a path where nothing is; of what looks like a name on the hub, how to fetch it."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.exists():
        return (
            f"{name}: no such file or folder; it looks like a hub's name: `pyllama download {name}` fetches it, and"
            " models are opened from local files only"
        )
    return f"{name}: no such file or folder; expected {expected}"


def printable(text: str) -> str:
    """`text` with line ends, control characters and the like escaped; a terminal shows it as it is."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
