"""Models of torchvision: `torchvision:vit_b_16`."""

import inspect
from typing import Any

from torch import nn
from torchvision import models
from torchvision.transforms.functional import InterpolationMode

from rescompress.cli import download
from rescompress.cli.images import plain_preprocessing, plain_transform
from rescompress.cli.models import Loaded, Request, build, nearest, say_random
from rescompress.errors import InputError, one_line
from rescompress.inputs import default_args

_NO_IMAGES = {"video": "clips of video (B, C, T, H, W)", "optical_flow": "pairs of images"}
"""Parts of torchvision.models whose networks take something else than images."""


def load(name: str, request: Request) -> Loaded:
    """Build a model by its name in torchvision.models.

    Raises:
        InputError: torchvision has no such model, or cannot build it so.
    """
    reference = f"torchvision:{name}"
    names = models.list_models()
    if name not in names:
        raise InputError(f"unknown model {name!r}: torchvision has none of this name{nearest(name, names)}")
    builder = models.get_model_builder(name)
    for kind, takes_what in _NO_IMAGES.items():
        if builder.__module__.startswith(f"torchvision.models.{kind}."):
            raise InputError(f"{reference} takes {takes_what}; the command line compresses networks of single images")
    # A quantized_ name builds the network in floating point, and the integers of its own weights do not fit into that.
    default = models.get_model_weights(name.removeprefix("quantized_")).DEFAULT
    options: dict[str, Any] = {}
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    if request.input_size is not None and name.startswith("vit_"):
        if request.input_size[0] != request.input_size[1]:
            raise InputError(f"{reference} takes square images only, got {request.input_size}")
        options["image_size"] = request.input_size[0]

    # Models of detection and segmentation would download a backbone of their own accord.
    takes = inspect.signature(builder).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}

    weights, reason = "random", None
    if request.wants_pretrained:
        reason = _obstacle(default.url, options)
    if request.wants_pretrained and reason is None:
        try:
            model = models.get_model(name, weights=default, **backbone)
            weights = "pretrained"
        except Exception as error:  # a download fails in many ways, and none of them ends the run
            reason = f"the download failed: {one_line(error, 120)}"
    if weights == "random":
        model = build(reference, lambda: models.get_model(name, weights=None, **backbone, **options))
        if request.weights is None:
            say_random(reference, reason)

    transform, preprocessing, own_size = _transform(default, request.input_size, model)
    categories = default.meta.get("categories")
    return Loaded(
        reference=reference,
        model=model,
        input_size=request.input_size or own_size,
        transform=transform,
        preprocessing=preprocessing,
        labels=tuple(categories) if categories else None,
        weights=request.weights or weights,
    )


def _obstacle(url: str, options: dict[str, Any]) -> str | None:
    if options:
        return f"torchvision has none for another {' and '.join(options)}"
    if download.in_torch_cache(url) or download.reachable(url):
        return None
    return f"{download.host_of(url)} cannot be reached"


def _transform(
    weights: Any, size: tuple[int, int] | None, model: nn.Module
) -> tuple[Any, dict[str, Any], tuple[int, int]]:
    """Return the transform that the weights were made for, at another size if asked for."""
    preset = weights.transforms()
    args, _ = default_args(model)
    if isinstance(args[0], list):  # a detector normalises its images itself
        height, width = size or args[0][0].shape[-2:]
        plain = (0.0,) * 3, (1.0,) * 3
        described = plain_preprocessing() | {"mean": list(plain[0]), "std": list(plain[1])}
        return plain_transform((height, width), *plain), described, (height, width)
    if not hasattr(preset, "crop_size"):  # a segmentation model: its images have no fixed size
        own = size or (224, 224)
        return plain_transform(own), plain_preprocessing(), own
    side = preset.crop_size[0]
    crop = side / preset.resize_size[0]
    if size is not None and size != (side, side):
        # The crop keeps its share of the image.
        preset.crop_size, preset.resize_size = list(size), [max(round(edge / crop) for edge in size)]
    return (
        preset,
        {
            "mean": list(preset.mean),
            "std": list(preset.std),
            "interpolation": InterpolationMode(preset.interpolation).value,
            "crop_pct": crop,
            "crop_mode": "center",
        },
        (side, side),
    )
