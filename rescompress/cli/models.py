"""Turn what the user calls a model into a model with weights, its preprocessing and its class names."""

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rescompress.cli import console
from rescompress.cli.images import View, plain_preprocessing, plain_transform
from rescompress.errors import NoWeightsError
from rescompress.inputs import default_args, default_input
from rescompress.references.models import LIBRARIES, build_model, split
from rescompress.references.wanted import Wanted
from rescompress.references.weights import load_weights

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


@dataclass(frozen=True, kw_only=True)
class Loaded(View):
    """A model and what belongs to it.

    Attributes:
        reference: what the user called it, with its prefix
        model: in evaluation mode
        weights: "pretrained", "random", "as built" (by the user's own code) or the name of the file
    """

    reference: str
    model: nn.Module
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


def load_model(request: Request) -> Loaded:
    """Build the model; says in one line if its weights are random.

    Raises:
        InputError: there is no such model, it cannot be built so, or the weights file does not fit.
    """
    source, name = split(request.reference)
    reference = f"{source}:{name}"
    if source == "hf":
        _quiet_transformers()
    model, weights = _built(source, reference, request)
    if request.weights is not None:
        load_weights(model, request.weights, "--num-classes ")
    view = _view(source, name, model, request.input_size)
    return Loaded(**vars(view), reference=reference, model=model.eval(), weights=weights)


def _built(source: str, reference: str, request: Request) -> tuple[nn.Module, str]:
    """Return the model and what weights it has; where none can be had, it goes on with random ones."""
    # A transformer of Hugging Face keeps its own size, to which its weights belong: many take images of any.
    size = None if source == "hf" else request.input_size
    wanted = Wanted(num_classes=request.num_classes, input_size=size)
    obstacle = None
    if request.weights is None and not request.random and source in LIBRARIES:
        try:
            return _pretrained(source, reference, wanted), "pretrained"
        except NoWeightsError as error:
            obstacle = str(error)
    model = _same_each_time(reference, wanted)
    if request.weights is not None or source not in LIBRARIES:
        return model, request.weights or "as built"
    if obstacle is None:
        console.note(f"{reference}: {MEANINGLESS}")
    else:
        console.warning(f"{obstacle}: {MEANINGLESS}")
    return model, "random"


def _pretrained(source: str, reference: str, wanted: Wanted) -> nn.Module:
    if source == "mmseg":  # whose configs name weights of the backbone at most
        why = "mmseg's are not downloaded here; give their file with --weights"
        raise NoWeightsError(f"no pretrained weights for {reference} ({why})")
    model: Any = _same_each_time(reference, replace(wanted, pretrained=True))
    if source == "timm" and wanted.num_classes not in (None, model.pretrained_cfg["num_classes"]):
        console.warning(f"the head for {wanted.num_classes} classes is new and random")
    return model  # type: ignore[no-any-return]


def _same_each_time(reference: str, wanted: Wanted) -> nn.Module:
    """Build the model with the same random weights on every run, so that runs can be compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(reference, wanted)


def _quiet_transformers() -> None:
    try:
        import transformers
    except ImportError:  # said when the model is built
        return
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()  # importing transformers undoes what the command line set
    logging.disable_progress_bar()


def _view(source: str, name: str, model: nn.Module, size: tuple[int, int] | None) -> View:
    if source in LIBRARIES:
        view: View = importlib.import_module(f"rescompress.cli._{LIBRARIES[source]}").view(name, model, size)
        return view
    height, width = size or default_input(model).shape[-2:]
    plain = plain_transform((height, width))
    return View(input_size=(height, width), transform=plain, preprocessing=plain_preprocessing())
