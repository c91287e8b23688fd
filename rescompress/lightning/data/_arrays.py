"""Data sets that fit in memory as one array: batches by indexing, no worker processes, augmentation on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rescompress.errors import InputError
from rescompress.lightning.data._augment import FLIPS, crop_and_flip
from rescompress.lightning.data._base import ImageData, Size, one_of
from rescompress.lightning.data._loader import Loaded


class ArraySource:
    """Images in memory.

    Args:
        images: all of them.
        labels: their classes.
        names: what precedes the index in a sample's name.
        sizes: that batches are brought to on the device; a key's second part says which.
        training: whether the samples get random numbers.

    Shape:
        - images: (N, H, W, C), uint8, as files of pixels hold them
        - labels: (N,) int64, or (N, classes) float for several labels per image
    """

    def __init__(self, images: Tensor, labels: Tensor, names: str, sizes: Sequence[Size], training: bool) -> None:
        if len(images) != len(labels):
            raise InputError(f"{names} holds {len(images)} images and {len(labels)} labels; read or download it again")
        self.images = images
        self.labels = labels
        self.names = names
        self.sizes = tuple(sizes)
        self.training = training

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[tuple[int, int], int]]) -> Loaded:
        indices = torch.tensor([index for (index, _), _ in keys])
        return Loaded(
            self.images[indices].permute(0, 3, 1, 2).contiguous(),
            self.labels[indices],
            tuple(f"{self.names}/{index}" for (index, _), _ in keys),
            torch.tensor([draw for (_, draw), _ in keys]) if self.training else None,
            self.sizes[keys[0][1]],
        )


class ArrayData(ImageData):
    """DataModules whose images are in memory.

    The augmentation is done at the size that the images have in their file, and the resize to the model's size after
    it, bilinear and antialiased, on the device.

    Args:
        padding: training images are shifted by up to this number of pixels.
        flip: training images are mirrored: "none", "horizontal" or "both" (top and bottom as well).
        channels: of the model's input; images of one channel are repeated.
        workers: 0, since there is nothing to read.
        mean: of the channels, or one for all.
        std: likewise.
        options: those of `ImageData`.
    """

    def __init__(
        self,
        *,
        padding: int = 0,
        flip: str = "none",
        channels: int = 3,
        workers: int = 0,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        **options: Any,
    ) -> None:
        super().__init__(workers=workers, mean=mean, std=std, **options)
        one_of("flip", flip, FLIPS)
        if padding < 0:
            raise InputError(f"padding must be at least 0, got {padding}")
        if channels not in (1, 3):
            raise InputError(f"channels must be 1 or 3, got {channels}")
        self.padding = padding
        self.flip = flip
        self.channels = channels

    def augment(self, images: Tensor, draws: Tensor) -> Tensor:
        if not self.padding and self.flip == "none":
            return images
        return crop_and_flip(images, draws, self.padding, self.flip)


def class_counts(labels: Tensor, class_names: Sequence[str]) -> dict[str, int]:
    """Return the number of images of each class: of labels (N,), or of weights (N, classes)."""
    counts = labels.sum(0) if labels.ndim == 2 else torch.bincount(labels, minlength=len(class_names))
    return {name: int(count) for name, count in zip(class_names, counts.tolist(), strict=True)}


def checked_labels(labels: Tensor, class_names: Sequence[str], where: str) -> Tensor:
    """Return labels that all name a class.

    Raises:
        InputError: some do not.
    """
    if labels.ndim == 1 and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise InputError(
            f"{where} has labels from {int(labels.min())} to {int(labels.max())} and there are {len(class_names)} "
            "classes, numbered from 0; give the right file"
        )
    return labels
