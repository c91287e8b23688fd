"""The base of the DataModules of photographs: what is done to each image, and whether in workers or on the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rescompress.errors import InputError, one_line
from rescompress.lightning.data._augment import POLICIES, Transform, test_transform, train_transform
from rescompress.lightning.data._base import ImageData, Size, one_of
from rescompress.lightning.data._images import IMAGENET_MEAN, IMAGENET_STD, decode_on, decodes_jpeg
from rescompress.lightning.data._loader import Loaded
from rescompress.lightning.data._order import drawn


class PhotoData(ImageData):
    """DataModules whose images are files of any size: crops of random size in training, the middle in evaluation.

    Args:
        train_size: of the crops.
        test_size: of the images in validation and test.
        scale: least and largest share of an image's area that a crop covers.
        flip: mirror half of the training images.
        policy: further augmentation: "none", "rand" (RandAugment) or "trivial" (TrivialAugment).
        erase: share of the training images in which a rectangle is blanked out.
        crop_ratio: in evaluation, share of the image's shorter side that is seen.
        interpolation: "bilinear" or "bicubic".
        decode_on: "workers", or the "device": workers then only read, and decoding and the augmentation of each image
            happen where the model runs; "auto" is the device where that is a GPU which decodes JPEG and the images are
            JPEG by their names. How the two compare in speed has not been measured on a GPU.
        mean: of the channels.
        std: of the channels.
        options: those of `ImageData`.
    """

    def __init__(
        self,
        *,
        train_size: int | Size = 224,
        test_size: int | Size = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        policy: str = "none",
        erase: float = 0.0,
        crop_ratio: float = 0.875,
        interpolation: str = "bilinear",
        decode_on: str = "auto",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **options: Any,
    ) -> None:
        super().__init__(train_size=train_size, test_size=test_size, mean=mean, std=std, **options)
        one_of("policy", policy, POLICIES)
        one_of("interpolation", interpolation, ("bilinear", "bicubic"))
        one_of("decode_on", decode_on, ("auto", "workers", "device"))
        if not 0 < crop_ratio <= 1:
            raise InputError(f"crop_ratio must be in (0, 1], got {crop_ratio}")
        if not 0 < scale[0] <= scale[1]:
            raise InputError(f"scale must be (least, largest) share of the image's area, got {tuple(scale)}")
        self.decode_on = decode_on
        self._decodes: bool | None = None
        self._training: dict[str, Any] = {
            "scale": tuple(scale),
            "flip": flip,
            "policy": policy,
            "erase": erase,
            "mean": self.mean,
        }
        self._testing = {"crop_ratio": crop_ratio}
        self._interpolation = interpolation
        self._made: dict[tuple[Size, bool], Transform] = {}

    def train_transform(self, size: Size) -> Transform:
        """Return the transform of a training image to this size."""
        return train_transform(size, interpolation=self._interpolation, **self._training)

    def test_transform(self, size: Size) -> Transform:
        """Return the transform of an image in evaluation to this size."""
        return test_transform(size, interpolation=self._interpolation, **self._testing)

    def transforms(self, sizes: Sequence[Size], training: bool) -> list[Transform]:
        """Return the transforms to these sizes."""
        make: Callable[[Size], Transform] = self.train_transform if training else self.test_transform
        return [make(size) for size in sizes]

    @property
    def on_device(self) -> bool:
        """Whether the workers only read."""
        if self.decode_on != "auto":
            return self.decode_on == "device"
        if self._decodes is None:
            device = None if self.trainer is None else self.trainer.strategy.root_device
            self._decodes = device is not None and device.type == "cuda" and self.holds_jpeg() and decodes_jpeg(device)
        return self._decodes

    def holds_jpeg(self) -> bool:
        """Whether the images are JPEG by their names: a GPU's decoder refuses a batch with any other in it."""
        return False

    def decode(self, batch: Loaded) -> Loaded:
        training = batch.draws is not None
        size = batch.size or self.test_size
        if (size, training) not in self._made:
            self._made[size, training] = self.transforms([size], training)[0]
        transform = self._made[size, training]
        seeds = [0] * len(batch.names) if batch.draws is None else batch.draws.tolist()
        images: list[Tensor | None] = []
        for name, decoded, seed in zip(
            batch.names, decode_on(batch.images.files, batch.labels.device), seeds, strict=True
        ):
            if isinstance(decoded, Exception):
                self._corrupt("train" if training else "evaluation").note(((name, one_line(decoded)),))
                images.append(None)
                continue
            with drawn(seed):
                images.append(transform(decoded))
        return _without_gaps(batch, images, training)


def _without_gaps(batch: Loaded, images: list[Tensor | None], training: bool) -> Loaded:
    """Put the next readable image of the batch in the place of a broken one; in evaluation leave it out."""
    readable = [number for number, image in enumerate(images) if image is not None]
    if not readable:
        raise InputError(
            f"none of the files of a batch can be decoded: {', '.join(batch.names[:10])}; mend the data, or set "
            "decode_on: workers, which skips whole batches"
        )
    taken = readable
    if training:
        following = {number: n for n in reversed(readable) for number in range(n + 1)}
        taken = [following.get(number, readable[0]) for number in range(len(images))]
    return batch._replace(
        images=torch.stack([image for n in taken if (image := images[n]) is not None]),
        labels=batch.labels[taken],
        names=tuple(batch.names[n] for n in taken),
        draws=None if batch.draws is None else batch.draws[taken],
        size=None,
    )
