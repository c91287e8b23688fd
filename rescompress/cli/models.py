"""Turn what the user calls a model into a model with weights, its preprocessing and its class names."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rescompress.cli import console
from rescompress.cli.images import Transform, plain_preprocessing, plain_transform
from rescompress.cli.weights import load_weights
from rescompress.errors import InputError, did_you_mean, one_line
from rescompress.inputs import default_args, default_input

_SOURCES = ("timm", "torchvision", "hf", "mmseg")

MEANINGLESS = "weights are random and predictions mean nothing"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for.

    Attributes:
        reference: such as "timm:resnet50"
        weights: file of a local state dict
        random: whether not even to try to download weights
        input_size: (height, width) of the image, if not the model's own
        num_classes: of the head, if not the model's own
    """

    reference: str
    weights: str | None = None
    random: bool = False
    input_size: tuple[int, int] | None = None
    num_classes: int | None = None

    @property
    def wants_pretrained(self) -> bool:
        """Whether pretrained weights are to be downloaded."""
        return not self.random and self.weights is None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
        reference: what the user called it, with its prefix
        model: in evaluation mode
        input_size: (height, width) of the image that it is given
        transform: makes the model's input, without its batch dimension, from a photograph
        preprocessing: what transform does, for the header of a file
        labels: class names; None where not known
        weights: "pretrained", "random", "as built" (by the user's own code) or the name of the file
    """

    reference: str
    model: nn.Module
    input_size: tuple[int, int]
    transform: Transform
    preprocessing: dict[str, Any] | None
    labels: tuple[str, ...] | None
    weights: str

    @property
    def has_meaning(self) -> bool:
        """Whether predictions mean anything."""
        return self.weights != "random"

    @property
    def takes_list(self) -> bool:
        """Whether the model is a detector, which takes a list of images of any size."""
        return isinstance(default_args(self.model)[0][0], list)

    def call(self, images: Tensor) -> Any:
        """Return images as the model takes them.

        Shape:
            - Input: (B, C, H, W)
            - Output: the same, or for a detector a tuple of one list of B images (C, H, W)
        """
        return (list(images),) if self.takes_list else images


Provider = Callable[[str, Request], Loaded]


def load_model(request: Request) -> Loaded:
    """Build the model; says in one line if its weights are random.

    Raises:
        InputError: there is no such model, it cannot be built so, or the weights file does not fit.
    """
    source, colon, name = request.reference.partition(":")
    if not colon:
        source, name = "timm", source
    if not name:
        raise InputError(f"the model {request.reference!r} has no name; for example timm:resnet50")
    provider = _provider(source, name)
    # The same random weights on every run, so that runs can be compared.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = provider(name, request)
    if request.weights is not None:
        load_weights(loaded.model, request.weights)
    loaded.model.eval()
    return loaded


def _provider(source: str, name: str) -> Provider:
    if source == "timm":
        return _optional("timm", "timm")
    if source == "torchvision":
        return _optional("torchvision", "torchvision")
    if source == "hf":
        return _optional("transformers", "hf")
    if source == "mmseg":
        return _optional("mmseg", "mmseg")
    return lambda factory, request: _from_factory(source, factory, request)


def _optional(library: str, extra: str) -> Provider:
    try:
        importlib.import_module(library)
        provider: Provider = importlib.import_module(f"rescompress.cli._{library}").load
    except ModuleNotFoundError as error:
        raise InputError(f"{library} is not installed; pip install 'rescompress[{extra}]'") from error
    except ImportError as error:  # mmseg needs OpenCV, and OpenCV a library of the system
        hint = "; on Debian: apt-get install libgl1" if "libGL" in str(error) else ""
        raise InputError(f"{library} cannot be imported: {one_line(error)}{hint}") from error
    return provider


def _from_factory(module_name: str, attribute: str, request: Request) -> Loaded:
    """Call package.module:factory, as `python -m` would find it: from the current folder, too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            hint = nearest(module_name, _SOURCES) or f"; known: {', '.join(_SOURCES)}, or package.module:factory"
            raise InputError(f"unknown model source {module_name!r}{hint}") from error
        raise InputError(f"cannot import {module_name}: {error}") from error
    except Exception as error:  # the user's own code runs here
        raise InputError(f"cannot import {module_name}: {type(error).__name__}: {one_line(error)}") from error
    if not hasattr(module, attribute):
        raise InputError(f"{module_name} has no {attribute!r}{nearest(attribute, vars(module))}")
    made = getattr(module, attribute)
    if not isinstance(made, nn.Module):
        options = {} if request.num_classes is None else {"num_classes": request.num_classes}
        try:
            made = made(**options)
        except Exception as error:
            raise InputError(f"{module_name}:{attribute} failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{module_name}:{attribute} gives a {type(made).__name__}, not an nn.Module")
    size = request.input_size or tuple(int(side) for side in default_input(made).shape[-2:])
    return Loaded(
        reference=request.reference,
        model=made,
        input_size=(size[0], size[1]),
        transform=plain_transform((size[0], size[1])),
        preprocessing=plain_preprocessing(),
        labels=None,
        weights=request.weights or "as built",
    )


def say_random(reference: str, reason: str | None) -> None:
    """Say in one line that the weights are random."""
    if reason is None:
        console.note(f"{reference}: {MEANINGLESS}")
    else:
        console.warning(f"no pretrained weights for {reference} ({reason}): {MEANINGLESS}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?", or nothing where no name is near: the full list would fill the screen."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; did you mean") else ""


def build(reference: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Call a library's constructor.

    Raises:
        InputError: it fails.
    """
    try:
        return make()
    except Exception as error:  # each model checks its arguments in its own way
        raise InputError(f"cannot build {reference}: {type(error).__name__}: {one_line(error)}") from error
