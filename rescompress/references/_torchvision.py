"""Models of torchvision: `torchvision:vit_b_16`."""

import inspect
from typing import Any

from torch import nn
from torchvision import models

from rescompress.errors import InputError, NoWeightsError, one_line
from rescompress.references import download
from rescompress.references.wanted import Wanted, nearest

_NO_IMAGES = {"video": "clips of video (B, C, T, H, W)", "optical_flow": "pairs of images"}
"""Parts of torchvision.models whose networks take something else than images."""


def build(name: str, wanted: Wanted) -> nn.Module:
    """Build a model by its name in torchvision.models.

    Raises:
        NoWeightsError: its weights cannot be had.
        InputError: torchvision has no such model, or cannot build it so.
    """
    reference = f"torchvision:{name}"
    names = models.list_models()
    if name not in names:
        raise InputError(f"unknown model {name!r}: torchvision has none of this name{nearest(name, names)}")
    builder = models.get_model_builder(name)
    for kind, takes_what in _NO_IMAGES.items():
        if builder.__module__.startswith(f"torchvision.models.{kind}."):
            raise InputError(f"{reference} takes {takes_what}; only networks of single images can be compressed")
    if wanted.channels not in (None, 3):
        raise InputError(f"{reference} takes images of 3 channels, got channels={wanted.channels}; timm's take any")
    options = wanted.options
    if wanted.num_classes is not None:
        options["num_classes"] = wanted.num_classes
    if wanted.input_size is not None and name.startswith("vit_"):
        if wanted.input_size[0] != wanted.input_size[1]:
            raise InputError(f"{reference} takes square images only, got {wanted.input_size}")
        options.setdefault("image_size", wanted.input_size[0])
    # Models of detection and segmentation would download a backbone of their own accord.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    if wanted.pretrained:
        return _pretrained(name, options, backbone)
    return models.get_model(name, weights=None, **(backbone | options))  # type: ignore[no-any-return]


def default_weights(name: str) -> Any:
    """Return torchvision's entry for the weights of a model, with their preprocessing and class names."""
    # A quantized_ name builds the network in floating point, and the integers of its own weights do not fit into that.
    return models.get_model_weights(name.removeprefix("quantized_")).DEFAULT


def _pretrained(name: str, options: dict[str, Any], backbone: dict[str, None]) -> nn.Module:
    weights = default_weights(name)
    if options:
        reason = f"torchvision has none for another {' and '.join(options)}"
    elif not download.in_torch_cache(weights.url) and not download.reachable(weights.url):
        reason = f"{download.host_of(weights.url)} cannot be reached"
    else:
        try:
            return models.get_model(name, weights=weights, **backbone)  # type: ignore[no-any-return]
        except Exception as error:  # a download fails in many ways
            reason = f"the download failed: {one_line(error, 120)}"
    raise NoWeightsError(f"no pretrained weights for torchvision:{name} ({reason})")
