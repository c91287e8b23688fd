"""Every error and warning that rescompress raises: each message gives the cause, the value and the remedy."""

import difflib
from collections.abc import Iterable


class RescompressError(Exception):
    """Base of all errors of this package; catch it to catch them all."""


class SpecError(RescompressError, ValueError):
    """A spec, or one option of a step, is wrong or cannot be carried out on this model."""


class UnsupportedModelError(RescompressError, TypeError):
    """No family describes the model, or a method cannot be applied to it without changing what it computes."""


class SmallerGridError(UnsupportedModelError):
    """A model does not run on the smaller grid that was asked for; on another one it might."""


class InputError(RescompressError, ValueError):
    """A file or value that the user gave (image, weights, model name) is missing, damaged or of the wrong kind."""


class NoWeightsError(InputError):
    """The pretrained weights of a model cannot be had; without them it can be built."""


class MeasureError(RescompressError, RuntimeError):
    """A cost could not be measured."""


class ExportError(RescompressError, RuntimeError):
    """A model could not be written, or the written file does not compute what the model computes."""


class CheckpointError(RescompressError, RuntimeError):
    """A checkpoint of a training run could not be written."""


class WriteError(RescompressError, OSError):
    """A file could not be written; the one from before, if there was one, is still there whole."""


class RescompressWarning(UserWarning):
    """Something was done otherwise than asked, and the message says what."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return what an error says as one line of at most `limit` characters; its class where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the nearest known name, or a list of all names when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    # A prefix is a likelier slip than a typo: 'after' for 'after_block'.
    longer = [known_name for known_name in names if known_name.startswith(str(name))]
    if longer:
        return f"; did you mean {longer[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
