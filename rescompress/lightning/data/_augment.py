"""Transforms of one image in the workers, and of a whole batch on its device; torchvision's v2 transforms throughout.

Random numbers come from the seed of each sample, so the same image looks the same in every run of the same epoch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rescompress.errors import InputError
from rescompress.lightning.data._order import drawn, uniform

Transform = Callable[[Tensor], Tensor]
"""From a decoded image, uint8 (3, H, W), to one of the wanted size, uint8."""

POLICIES = ("none", "rand", "trivial")
FLIPS = ("none", "horizontal", "both")


def train_transform(
    size: tuple[int, int],
    *,
    scale: Sequence[float] = (0.08, 1.0),
    flip: bool = True,
    policy: str = "none",
    erase: float = 0.0,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    interpolation: str = "bilinear",
) -> Transform:
    """Return the usual transform of ImageNet training: a crop of random size and place, a flip, a policy, erasing.

    Args:
        size: of the result, (height, width).
        scale: least and largest share of the image's area that a crop covers.
        flip: mirror half of the images.
        policy: "none", "rand" (RandAugment) or "trivial" (TrivialAugment).
        erase: share of the images in which a rectangle is filled with the mean colour.
        mean: that colour, in [0, 1].
        interpolation: "bilinear" or "bicubic".
    """
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(interpolation)
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=tuple(scale), interpolation=mode, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if policy != "none":
        steps.append({"rand": v2.RandAugment, "trivial": v2.TrivialAugmentWide}[policy](interpolation=mode))
    if erase:
        steps.append(v2.RandomErasing(p=erase, value=[round(255 * value) for value in mean]))
    composed: Transform = v2.Compose(steps)
    return composed


def test_transform(size: tuple[int, int], *, crop_ratio: float = 0.875, interpolation: str = "bilinear") -> Transform:
    """Return the usual transform of ImageNet evaluation: the middle of the resized image.

    Args:
        size: of the result, (height, width).
        crop_ratio: the shorter side of the image becomes the larger of the result's divided by it.
        interpolation: "bilinear" or "bicubic".
    """
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(interpolation)
    side = round(max(size) / crop_ratio)
    composed: Transform = v2.Compose([v2.Resize(side, interpolation=mode, antialias=True), v2.CenterCrop(size)])
    return composed


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a batch of floats, bilinear, antialiased.

    Shape:
        - Input: (B, C, h, w)
        - Output: (B, C, *size)
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=list(size), mode="bilinear", antialias=True)


def crop_and_flip(images: Tensor, draws: Tensor, padding: int, flip: str) -> Tensor:
    """Shift each image by up to `padding` pixels, black coming in, and mirror half of them; each by its own numbers.

    Args:
        images: the batch.
        draws: a seed for each image.
        padding: largest shift in either direction.
        flip: "none", "horizontal" or "both" (left and right, and independently top and bottom).

    Shape:
        - images: (B, C, H, W), any dtype
        - draws: (B,)
        - Output: (B, C, H, W)
    """
    batch, channels, height, width = images.shape
    numbers = uniform(draws, 4)
    offsets = (numbers[:, :2] * (2 * padding + 1)).long()
    rows = torch.arange(height, device=images.device).expand(batch, height)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if flip != "none":
        columns = torch.where(numbers[:, 2:3] < 0.5, columns.flip(1), columns)
    if flip == "both":
        rows = torch.where(numbers[:, 3:4] < 0.5, rows.flip(1), rows)
    padded = F.pad(images, (padding,) * 4)
    sample = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def mixed_images(
    images: Tensor, labels: Tensor, draw: int, mixup: float, cutmix: float, classes: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour in the batch, by MixUp or CutMix, and make the labels weights.

    Shape:
        - images: (B, C, H, W)
        - labels: (B,), int64
        - Output: (B, C, H, W) and (B, classes)

    Raises:
        InputError: the labels are not one class for each image.
    """
    from torchvision.transforms import v2

    if labels.ndim != 1 or labels.is_floating_point():
        raise InputError("mixup and cutmix need one class per image; set both to 0 for these data")
    ways = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    ways += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    with drawn(draw):
        mixed: tuple[Tensor, Tensor] = v2.RandomChoice(ways)(images, labels)
    return mixed
