"""Small data in the layouts of the real data sets, made of random pictures whose class can be told from their colour.

Each function fills a folder and returns what a DataModule takes as its `root`.
"""

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MEDMNIST_SIZES = (28, 64, 128, 224)
LABEL_IDS = (0, 1, 4, 7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Ids in Cityscapes' labelIds.png: some that are ignored, and all that are evaluated."""


def picture(number: int, label: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return noise around a brightness that depends on the class: (H, W, 3), or (H, W) for one channel; uint8."""
    random = np.random.default_rng([number, label])
    shape = (height, width, channels) if channels > 1 else (height, width)
    return (random.integers(0, 64, shape) + 18 * (label % 10)).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray, kind: str = "JPEG") -> bytes:
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def image_folders(
    root: Path, *, classes: int = 3, train: int = 8, val: int = 4, size: tuple[int, int] = (40, 48)
) -> Path:
    """Make ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG, with `train` and `val` images of each class."""
    for split, images in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(images):
                name = f"n{label:08d}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{label}{number:04d}.JPEG"
                # Sizes differ, as they do in ImageNet.
                shape = size[0] + number % 3, size[1] + label
                (folder / name).write_bytes(encoded(picture(number, label, *shape)))
    return root


def shards(
    root: Path,
    *,
    classes: int = 3,
    train: Sequence[int] = (8, 8, 7, 9),
    val: Sequence[int] = (5, 6),
    size: tuple[int, int] = (40, 48),
) -> Path:
    """Make ROOT/{train,val}/*.tar with these numbers of images, and ROOT/_info.json."""
    info = {}
    for split, lengths in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        names = [f"{split}/imagenet-{split}-{shard:06d}.tar" for shard in range(len(lengths))]
        info[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": list(lengths),
            "num_samples": sum(lengths),
        }
        number = 0
        for name, length in zip(names, lengths, strict=True):
            with tarfile.open(root / name, "w") as archive:
                for _ in range(length):
                    label = number % classes
                    add_to_tar(archive, f"{number:08d}.cls", str(label).encode())
                    add_to_tar(archive, f"{number:08d}.jpg", encoded(picture(number, label, *size)))
                    number += 1
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    return root


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to an open tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def cityscapes(
    root: Path,
    *,
    train: int = 4,
    val: int = 2,
    size: tuple[int, int] = (32, 64),
    train_ids: bool = False,
) -> Path:
    """Make leftImg8bit and gtFine with `train` and `val` images in two cities each, and test without labels.

    Labels are label ids; with `train_ids` there are labelTrainIds.png as well. Each row of a label image has one id,
    and ids follow each other in the order of `LABEL_IDS`.
    """
    cities = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau"), "test": ("berlin",)}
    table = np.full(256, 255, dtype=np.uint8)
    table[[id_ for id_ in LABEL_IDS if id_ >= 7]] = np.arange(19)
    for split, images in (("train", train), ("val", val), ("test", 1)):
        for number in range(images):
            city = cities[split][number % len(cities[split])]
            stem = f"{city}_{number:06d}_000019"
            folder = root / "leftImg8bit" / split / city
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{stem}_leftImg8bit.png").write_bytes(encoded(picture(number, number, *size), "PNG"))
            if split == "test":
                continue
            labels = root / "gtFine" / split / city
            labels.mkdir(parents=True, exist_ok=True)
            rows = np.array([LABEL_IDS[(number + row) % len(LABEL_IDS)] for row in range(size[0])], dtype=np.uint8)
            ids = np.repeat(rows[:, None], size[1], axis=1)
            (labels / f"{stem}_gtFine_labelIds.png").write_bytes(encoded(ids, "PNG"))
            if train_ids:
                (labels / f"{stem}_gtFine_labelTrainIds.png").write_bytes(encoded(table[ids], "PNG"))
    return root


def medmnist(
    root: Path,
    *,
    name: str = "pathmnist",
    sizes: Sequence[int] = (28,),
    classes: int = 9,
    channels: int = 3,
    images: tuple[int, int, int] = (36, 9, 18),
    several_labels: bool = False,
) -> Path:
    """Make NAME.npz, NAME_64.npz, ... with these numbers of images for train, val and test."""
    root.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        arrays = {}
        for split, count in zip(("train", "val", "test"), images, strict=True):
            labels = np.arange(count) % classes
            arrays[f"{split}_images"] = np.stack(
                [picture(number, int(label), size, size, channels) for number, label in enumerate(labels)]
            )
            if several_labels:
                arrays[f"{split}_labels"] = (np.arange(classes)[None] <= labels[:, None]).astype(np.uint8)
            else:
                arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
        np.savez(root / f"{name}{'' if size == 28 else f'_{size}'}.npz", **arrays)
    return root


def fashion_mnist(root: Path, *, train: int = 60, test: int = 20, packed: bool = True) -> Path:
    """Make the four idx files, compressed or not."""
    root.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.stack([picture(number, int(label), 28, 28, 1) for number, label in enumerate(labels)])
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">i4").tobytes()
            content = header + array.tobytes()
            file = root / f"{stem}-{kind}-ubyte"
            if packed:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(content))
            else:
                file.write_bytes(content)
    return root


def elpv(root: Path, *, images: int = 24, size: int = 30) -> Path:
    """Make labels.csv and images/cell0001.png, ..., with the four probabilities in turn."""
    (root / "images").mkdir(parents=True)
    lines = []
    for number in range(images):
        chance = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[number % 4]
        name = f"images/cell{number + 1:04d}.png"
        (root / name).write_bytes(encoded(picture(number, number % 4, size, size, 1), "PNG"))
        lines.append(f"{name}  {chance:<20}{'mono' if number % 2 else 'poly'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root
