"""How models of timm see photographs, and what their classes are called."""

from typing import Any

import timm.data
from torch import nn

from rescompress.cli.images import View
from rescompress.errors import InputError

_data: Any = timm.data  # half of it has no types


def view(name: str, model: nn.Module, size: tuple[int, int] | None) -> View:
    """Return what the model's own config says, at another size if asked for.

    Raises:
        InputError: it takes no photographs.
    """
    data = _data.resolve_data_config({}, model=model)
    channels, height, width = data["input_size"]
    if channels != 3:
        raise InputError(f"timm:{name} takes images of {channels} channels; only photographs (3) can be run")
    size = size or (int(height), int(width))
    data["input_size"] = (channels, *size)
    return View(
        input_size=size,
        transform=_data.create_transform(**data),
        preprocessing={
            key: list(value) if isinstance(value, tuple) else value
            for key, value in data.items()
            if key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        },
        labels=_labels(model),
    )


def _labels(model: nn.Module) -> tuple[str, ...] | None:
    subset = _data.infer_imagenet_subset(model)
    if not subset:
        return None
    info = _data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
