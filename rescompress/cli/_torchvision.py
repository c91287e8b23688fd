"""How models of torchvision see photographs, and what their classes are called."""

from torch import nn
from torchvision.transforms.functional import InterpolationMode

from rescompress.cli.images import View, plain_preprocessing, plain_transform
from rescompress.inputs import default_args
from rescompress.references._torchvision import default_weights


def view(name: str, model: nn.Module, size: tuple[int, int] | None) -> View:
    """Return what the model's weights were made for, at another size if asked for."""
    weights = default_weights(name)
    labels = tuple(weights.meta.get("categories") or ()) or None
    preset = weights.transforms()
    args, _ = default_args(model)
    if isinstance(args[0], list):  # a detector normalises its images itself
        height, width = size or args[0][0].shape[-2:]
        plain = (0.0,) * 3, (1.0,) * 3
        described = plain_preprocessing() | {"mean": list(plain[0]), "std": list(plain[1])}
        transform = plain_transform((height, width), *plain)
        return View(input_size=(height, width), transform=transform, preprocessing=described, labels=labels)
    if not hasattr(preset, "crop_size"):  # a segmentation model: its images have no fixed size
        size = size or (224, 224)
        described = plain_preprocessing()
        return View(input_size=size, transform=plain_transform(size), preprocessing=described, labels=labels)
    side = preset.crop_size[0]
    crop = side / preset.resize_size[0]
    size = size or (side, side)
    if size != (side, side):
        # The crop keeps its share of the image.
        preset.crop_size, preset.resize_size = list(size), [max(round(edge / crop) for edge in size)]
    return View(
        input_size=size,
        transform=preset,
        preprocessing={
            "mean": list(preset.mean),
            "std": list(preset.std),
            "interpolation": InterpolationMode(preset.interpolation).value,
            "crop_pct": crop,
            "crop_mode": "center",
        },
        labels=labels,
    )
