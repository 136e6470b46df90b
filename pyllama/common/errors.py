"""The one hierarchy of exceptions. Bad arguments are ValueError; all about models and machines is one of these."""


class PyllamaError(Exception):
    """Base of every error that pyllama and quantize raise on purpose."""


class ModelFormatError(PyllamaError):
    """A model or checkpoint that does not hold together; the message names the file, what was found and expected."""


class ContextLengthError(PyllamaError):
    """A prompt, or prompt and reply, longer than the context; nothing is truncated silently."""


class DeviceError(PyllamaError):
    """A device that was asked for and cannot be had, with the reason."""


class QuantizeError(PyllamaError):
    """A conversion that could not be carried out; nothing is left at the output path."""
