"""Each DataModule on small data, for the promises that all of them make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from rescompress.lightning.data import ELPV, Cityscapes, FashionMNIST, ImageData, ImageFolders, ImageShards, MedMNIST
from tests.lightning import layouts

SIZES = {"train_size": 16, "test_size": 16}
NUMBERS = {"batch_size": 4, "seed": 3}


def folders(root: Path, **options: Any) -> ImageData:
    layouts.image_folders(root)
    return ImageFolders(str(root), **(SIZES | NUMBERS | {"workers": 0, "policy": "rand", "erase": 0.5} | options))


def folders_on_device(root: Path, **options: Any) -> ImageData:
    return folders(root, decode_on="device", **options)


def shards(root: Path, **options: Any) -> ImageData:
    pytest.importorskip("webdataset")
    layouts.shards(root, train=(8, 8, 8, 8))
    given = {"num_classes": 3, "workers": 0, "streams": 4, "buffer": 16}
    return ImageShards(str(root), **(SIZES | NUMBERS | given | options))


def cityscapes(root: Path, **options: Any) -> ImageData:
    pytest.importorskip("mmseg")
    layouts.cityscapes(root, train=8, val=3)
    given = {"train_size": (16, 32), "test_size": (16, 32), "full_size": (32, 64), "batch_size": 2, "workers": 0}
    return Cityscapes(str(root), **(given | {"seed": 3} | options))


def medmnist(root: Path, **options: Any) -> ImageData:
    pytest.importorskip("medmnist")
    layouts.medmnist(root)
    return MedMNIST(str(root), **(SIZES | NUMBERS | options))


def fashion_mnist(root: Path, **options: Any) -> ImageData:
    layouts.fashion_mnist(root)
    return FashionMNIST(str(root), **({"val_images": 10} | SIZES | NUMBERS | options))


def elpv(root: Path, **options: Any) -> ImageData:
    layouts.elpv(root)
    return ELPV(str(root), **(SIZES | NUMBERS | options))


MODULES: dict[str, Callable[..., ImageData]] = {
    "folders": folders,
    "folders_on_device": folders_on_device,
    "shards": shards,
    "cityscapes": cityscapes,
    "medmnist": medmnist,
    "fashion_mnist": fashion_mnist,
    "elpv": elpv,
}
