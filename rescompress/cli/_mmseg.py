"""How segmentors of mmseg see photographs."""

from torch import nn

from rescompress.cli.images import View, plain_preprocessing, plain_transform
from rescompress.openmmlab import crop_size
from rescompress.references._mmseg import read_config

_SIZE = (512, 1024)


def view(name: str, model: nn.Module, size: tuple[int, int] | None) -> View:
    """Return what the segmentor's config says, at another size if asked for."""
    config = read_config(name).model
    size = size or crop_size(config) or _SIZE
    described = plain_preprocessing()
    preprocessor = config.get("data_preprocessor") or {}
    if preprocessor.get("mean") is not None and preprocessor.get("std") is not None:
        # mmseg counts pixels from 0 to 255.
        described |= {key: [value / 255 for value in preprocessor[key]] for key in ("mean", "std")}
    transform = plain_transform(size, tuple(described["mean"]), tuple(described["std"]))
    return View(input_size=size, transform=transform, preprocessing=described)
