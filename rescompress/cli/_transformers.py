"""How models of Hugging Face see photographs, and what their classes are called."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from rescompress.cli.images import IMAGENET_MEAN, IMAGENET_STD, Transform, View, plain_preprocessing, plain_transform
from rescompress.inputs import default_input
from rescompress.references import download

_hf: Any = transformers  # half of it has no types


def view(name: str, model: nn.Module, size: tuple[int, int] | None) -> View:
    """Return what the processor saved beside the model does, at another size if asked for."""
    with download.hub_or_cache(name):
        settings = _processor(name)
    height, width = size or _size(settings) or default_input(model).shape[-2:]
    transform, preprocessing = _preprocessing(settings, (height, width))
    config: Any = model.config
    names = getattr(config, "id2label", None) or {}
    return View(
        input_size=(height, width),
        transform=transform,
        preprocessing=preprocessing,
        # Other models give something else than one score for each class.
        labels=tuple(map(str, (names[index] for index in sorted(names))))
        if "ForImageClassification" in type(model).__name__
        else None,
    )


def _processor(name: str) -> dict[str, Any]:
    """Return what preprocessor_config.json says; nothing where there is none."""
    try:
        settings, _ = _hf.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) of the images that the processor makes, None where it does not fix one."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size")
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, Mapping) and "height" in size and "width" in size:
        return (int(size["height"]), int(size["width"]))
    if isinstance(size, Mapping) and "shortest_edge" in size and settings.get("crop_pct"):  # ConvNeXt's crop
        return (int(size["shortest_edge"]), int(size["shortest_edge"]))
    return None


def _preprocessing(settings: Mapping[str, Any], size: tuple[int, int]) -> tuple[Transform, dict[str, Any]]:
    """Return the processor's steps as a transform, and what they are for the header of a file."""
    if not settings:
        return plain_transform(size), plain_preprocessing()
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean = tuple(settings.get("image_mean") or IMAGENET_MEAN)
        std = tuple(settings.get("image_std") or IMAGENET_STD)
    crops = bool(settings.get("do_center_crop")) or "crop_pct" in settings
    described = {"mean": list(mean), "std": list(std)}
    if crops:
        return plain_transform(size, mean, std), plain_preprocessing() | described
    resample = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))

    def squash(image: Image.Image) -> Tensor:
        image = image.resize((size[1], size[0]), resample)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1)
        return (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    return squash, described | {"interpolation": resample.name.lower(), "crop_pct": 1.0, "crop_mode": "squash"}
