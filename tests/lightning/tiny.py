"""Data that are made in memory, behind the DataModule that the real ones derive from; and a recipe over them."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from rescompress.lightning import Classifier, main
from rescompress.lightning.data._base import ImageData
from rescompress.lightning.data._loader import Loaded
from rescompress.lightning.data._order import uniform

TINY = "tests.lightning.tiny:tiny_net"


def tiny_net(
    num_classes: int, in_chans: int = 3, width: int = 4, dropout: float = 0.0, norm: bool = True, dense: bool = False
) -> nn.Module:
    """A factory for references; its stem can be resized."""
    layers = [
        nn.Conv2d(in_chans, width, 3, 2, 1),
        nn.BatchNorm2d(width) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.Dropout(dropout),
    ]
    if dense:
        return nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class Stopped(RuntimeError):
    pass


class Stop(Callback):
    """End the run as a kill does, once.

    Args:
        at: number of steps after which it ends.
        marker: file that says that it has happened.
        where: "step", or "validation" after that step.
        kill: name of the signal that the process gets; else it is an error.
    """

    def __init__(self, at: int, marker: str, where: str = "step", kill: str | None = None) -> None:
        self.at, self.marker, self.where, self.kill = at, Path(marker), where, kill

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.stop(trainer, "step")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.stop(trainer, "validation")

    def stop(self, trainer: Trainer, where: str) -> None:
        if where == self.where and trainer.global_step == self.at and not self.marker.exists():
            self.marker.touch()
            if self.kill is None:
                raise Stopped
            os.kill(os.getpid(), signal.Signals[self.kill])


class Ranks(Callback):
    """Write the weights that each rank ends with into a file of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(dict(pl_module.named_parameters()), self.folder / f"rank{trainer.global_rank}.pt")


class TinySource:
    """Squares whose brightness tells their class, under noise."""

    def __init__(self, length: int, size: tuple[int, int], classes: int, channels: int, dense: bool) -> None:
        self.size, self.classes, self.channels, self.dense = size, classes, channels, dense
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, keys: list[Any]) -> Loaded:
        indices = torch.tensor([key[0] for key, _ in keys])
        draws = torch.tensor([key[1] for key, _ in keys])
        labels = indices % self.classes
        shape = (len(keys), self.channels, *self.size)
        noise = uniform(indices, self.channels * self.size[0] * self.size[1]).reshape(shape)
        images = (noise * 60 + labels[:, None, None, None] * 120 / self.classes).to(torch.uint8)
        if self.dense:
            labels = labels[:, None, None].repeat(1, *self.size)
            labels[:, :2] = 255
        return Loaded(images, labels, tuple(f"image{index}.png" for index in indices.tolist()), draws)


class Tiny(ImageData):
    """A few images of each split.

    Args:
        train_size: of the images in training.
        test_size: and in validation and test.
        classes: how many.
        length: of the training split; the others have half of it.
        channels: of the images.
        dense: labels for each pixel instead of each image.
        poison: this training image holds NaN.
        mislabel: this training image has a label of no class.
        batch_size: on each device.
        seed: of the order and of the noise of augmentation.
    """

    def __init__(
        self,
        train_size: int = 32,
        test_size: int = 32,
        classes: int = 4,
        length: int = 32,
        channels: int = 3,
        dense: bool = False,
        poison: int | None = None,
        mislabel: int | None = None,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        flat = (0.5,) * channels
        super().__init__(
            train_size=train_size, test_size=test_size, batch_size=batch_size, workers=0, seed=seed, mean=flat, std=flat
        )
        self.length, self.dense, self.channels, self.poison, self.mislabel = length, dense, channels, poison, mislabel
        self.num_classes = classes
        self.class_names = tuple(f"class{index}" for index in range(classes))

    def setup(self, stage: str | None = None) -> None:
        pass

    def source(self, split: str, sizes: list[tuple[int, int]], training: bool) -> TinySource:
        length = self.length if split == "train" else self.length // 2
        return TinySource(length, sizes[0], self.num_classes, self.channels, self.dense)

    def augment(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Shift each image by a few columns that its own seed draws."""
        shifts = (uniform(draws, 1)[:, 0] * 8).long().tolist()
        return torch.stack([image.roll(shift, -1) for image, shift in zip(images, shifts, strict=True)])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if f"image{self.poison}.png" in batch.names:
            batch.images[batch.names.index(f"image{self.poison}.png")] = torch.nan
        if f"image{self.mislabel}.png" in batch.names:
            batch.labels[batch.names.index(f"image{self.mislabel}.png")] = self.num_classes
        return batch


if __name__ == "__main__":  # python tests/lightning/tiny.py fit --config ...
    # Some installed package may be called tests; what configs name is in this file.
    sys.modules["tests.lightning.tiny"] = sys.modules["__main__"]
    main(Classifier, Tiny)
