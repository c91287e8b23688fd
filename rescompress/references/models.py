"""Build the model that a reference names."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from rescompress.errors import InputError, RescompressError, one_line
from rescompress.references.wanted import Wanted

LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers", "mmseg": "mmseg"}
"""What stands before the colon: the library. Any other word there is a module of the user's."""


def split(reference: str) -> tuple[str, str]:
    """Return the source and the name in a reference, timm being the source where none is given.

    Raises:
        InputError: there is no name.
    """
    source, colon, name = reference.partition(":")
    if not colon:
        source, name = "timm", source
    if not name:
        raise InputError(f"the model {reference!r} has no name; for example timm:resnet50")
    return source, name


def build_model(reference: str, wanted: Wanted) -> nn.Module:
    """Build a model by its reference.

    Args:
        reference: timm:resnet50 (the prefix may be left out), torchvision:vit_b_16, hf:DIRECTORY_OR_ID, mmseg:CONFIG.py
            or package.module:factory.
        wanted: how.

    Raises:
        NoWeightsError: pretrained weights are wanted and cannot be had.
        InputError: there is no such model, or it cannot be built so.
    """
    source, name = split(reference)
    build = _builder(source)
    try:
        return build(name, replace(wanted, options=copy.deepcopy(wanted.options)))
    except RescompressError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{source}:{name} needs {error.name}, which is not installed") from error
    except Exception as error:  # each library checks its arguments in its own way
        raise InputError(f"cannot build {source}:{name}: {type(error).__name__}: {one_line(error)}") from error


def _builder(source: str) -> Callable[[str, Wanted], nn.Module]:
    if source not in LIBRARIES:
        from rescompress.references import _factory

        return lambda name, wanted: _factory.build(source, name, wanted, LIBRARIES)
    library = LIBRARIES[source]
    try:
        importlib.import_module(library)
        build: Callable[[str, Wanted], nn.Module] = importlib.import_module(f"rescompress.references._{library}").build
    except ModuleNotFoundError as error:
        raise InputError(f"{library} is not installed; pip install 'rescompress[{source}]'") from error
    except ImportError as error:  # mmseg needs OpenCV, and OpenCV a library of the system
        hint = "; on Debian: apt-get install libgl1" if "libGL" in str(error) else ""
        raise InputError(f"{library} cannot be imported: {one_line(error)}{hint}") from error
    return build
