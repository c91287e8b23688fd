"""Fashion-MNIST, 60,000 + 10,000 pictures of clothes, the small real data set on which every idea can be tried.

Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
https://arxiv.org/abs/1708.07747; Debian's package dataset-fashion-mnist holds it.
"""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rescompress.errors import InputError
from rescompress.lightning.data._arrays import ArrayData, ArraySource, checked_labels, class_counts
from rescompress.lightning.data._base import Size
from rescompress.lightning.data.check import Check, existing_folder, wrong_layout

ROOT = "/usr/share/datasets/fashion-mnist"
CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FILES = {"train": "train", "test": "t10k"}
TREE = """
ROOT/                                (Debian: apt-get install dataset-fashion-mnist puts it in
    train-images-idx3-ubyte.gz        /usr/share/datasets/fashion-mnist; the files without .gz do as well)
    train-labels-idx1-ubyte.gz
    t10k-images-idx3-ubyte.gz
    t10k-labels-idx1-ubyte.gz
"""


class FashionMNIST(ArrayData):
    """Fashion-MNIST: 28 x 28, grey, ten classes.

    Args:
        root: folder of the four idx files.
        val_images: the last ones of the training file, which are validated on and not trained on; 0 validates on the
            test images.
        train_images: train on that many only; all by default.
        train_size: of the images that the model is trained on.
        test_size: of those that it is tested on.
        padding: training images are shifted by up to this number of pixels.
        flip: training images are mirrored: "none", "horizontal" or "both".
        channels: 1, or 3 equal ones.
        mean: of the pixels.
        std: likewise.
        options: those of `ImageData`.
    """

    def __init__(
        self,
        root: str = ROOT,
        *,
        val_images: int = 5000,
        train_images: int | None = None,
        train_size: int | Size = 28,
        test_size: int | Size = 28,
        padding: int = 2,
        flip: str = "horizontal",
        channels: int = 1,
        mean: Sequence[float] = (0.286,),
        std: Sequence[float] = (0.353,),
        **options: Any,
    ) -> None:
        super().__init__(
            train_size=train_size,
            test_size=test_size,
            padding=padding,
            flip=flip,
            channels=channels,
            mean=mean,
            std=std,
            **options,
        )
        if val_images < 0 or (train_images is not None and train_images < 1):
            raise InputError(f"val_images must be at least 0 and train_images 1, got {val_images} and {train_images}")
        self.root = root
        self.val_images = val_images
        self.train_images = train_images
        self.class_names = CLASSES
        self.num_classes = len(CLASSES)
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self) -> Check:
        counts = {
            split: class_counts(self._split(split)[1], CLASSES)
            for split in (("train", "val", "test") if self.val_images else ("train", "test"))
        }
        return Check(name="Fashion-MNIST", root=self.root, splits=counts)

    def source(self, split: str, sizes: list[Size], training: bool) -> ArraySource:
        images, labels = self._split(split)
        return ArraySource(images[..., None], labels, split, sizes, training)

    def _split(self, split: str) -> tuple[Tensor, Tensor]:
        if split == "test" or (split == "val" and not self.val_images):
            return self._file("test")
        images, labels = self._file("train")
        if self.val_images >= len(images):
            raise InputError(f"val_images={self.val_images} leaves nothing of {len(images)} images to train on")
        border = len(images) - self.val_images
        part = slice(border, None) if split == "val" else slice(0, min(border, self.train_images or border))
        return images[part], labels[part]

    def _file(self, split: str) -> tuple[Tensor, Tensor]:
        if split not in self._read:
            folder = existing_folder(self.root, "Fashion-MNIST", TREE)
            images = read_idx(folder / f"{FILES[split]}-images-idx3-ubyte", 3)
            labels = read_idx(folder / f"{FILES[split]}-labels-idx1-ubyte", 1).long()
            if len(images) != len(labels):
                raise wrong_layout(f"{folder} holds {len(images)} images and {len(labels)} labels for {split}", TREE)
            self._read[split] = images, checked_labels(labels, CLASSES, f"{folder} ({split})")
        return self._read[split]


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file of bytes in idx format, compressed (the name ending in .gz) or not.

    Shape:
        - Output: as the file says, uint8

    Raises:
        InputError: the file is missing, damaged or another one.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except FileNotFoundError as error:
        raise wrong_layout(f"neither {packed} nor {path.name} exists", TREE) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{packed} cannot be read: {error}; get it again") from error
    # Two zero bytes, the type (8: bytes), the number of dimensions, and each dimension as a big-endian int32.
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], dtype=">i4").astype(np.int64) if len(content) >= header else np.array([0])
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != header + int(shape.prod()):
        raise InputError(f"{path} is no idx file of {dimensions} dimension(s), or is cut short; get it again")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape.tolist()).copy())
