"""MedMNIST: standardised biomedical images at four sizes, PathMNIST (tissue of the colon, nine classes) first.

Yang et al., "MedMNIST v2", https://arxiv.org/abs/2110.14795; the files are those of the package `medmnist`.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rescompress.errors import InputError, did_you_mean
from rescompress.files import whole
from rescompress.lightning.data._arrays import ArrayData, ArraySource, checked_labels, class_counts
from rescompress.lightning.data._base import Size
from rescompress.lightning.data.check import Check, existing_folder, wrong_layout

SIZES = (28, 64, 128, 224)
SPLITS = ("train", "val", "test")
TREE = """
ROOT/                      (python -m medmnist download --root=ROOT --size={side} fetches all sets at this size)
    {name}.npz          28 x 28
    {name}_64.npz       64 x 64
    {name}_128.npz
    {name}_224.npz
    {name}_224/         optional: the arrays of that file as .npy, read without loading them whole
        train_images.npy   (python scripts/prepare_medical.py ROOT --name {name} --sizes 224 --unpack makes them)
        ...
"""


class MedMNIST(ArrayData):
    """One of the 2D sets of MedMNIST, trained and tested at sizes of your choice.

    Images of 28, 64, 128 and 224 pixels come from the file of that size, others from the next larger file, and are
    resized on the device. With a ResolutionSchedule the file is that of its largest size.

    Args:
        root: folder of the npz files.
        name: of the set, "pathmnist" for example.
        train_size: of the images that the model is trained on.
        test_size: of those that it is validated and tested on.
        source_size: read all images from the file of this size, whatever the sizes are.
        padding: training images are shifted by up to this number of pixels of the file.
        flip: training images are mirrored: "none", "horizontal" or "both".
        channels: of the model's input; 3 by default, as the images of one channel are repeated.
        options: those of `ArrayData` and `ImageData`.
    """

    def __init__(
        self,
        root: str,
        name: str = "pathmnist",
        *,
        train_size: int | Size = 28,
        test_size: int | Size = 28,
        source_size: int | None = None,
        padding: int = 2,
        flip: str = "both",
        channels: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(
            train_size=train_size, test_size=test_size, padding=padding, flip=flip, channels=channels, **options
        )
        self.root = root
        self.name = name
        if source_size is not None and source_size not in SIZES:
            raise InputError(f"source_size must be one of {', '.join(map(str, SIZES))}, got {source_size}")
        self.source_size = source_size
        info = known_sets()
        if name not in info:
            raise InputError(f"MedMNIST has no 2D set {name!r}{did_you_mean(name, info)}")
        self.info: dict[str, Any] = info[name]
        self.class_names = tuple(str(label) for label in self.info["label"].values())
        self.num_classes = len(self.class_names)
        if self.info["n_channels"] == 3 and channels == 1:
            raise InputError(f"the images of {name} have three channels; set channels to 3")

    @property
    def several_labels(self) -> bool:
        """Whether an image can have several labels at once; they are then weights (B, classes), 0 or 1."""
        return "multi-label" in str(self.info["task"])

    def check(self) -> Check:
        folder = existing_folder(self.root, "MedMNIST", self._tree(self._source(self.train_sizes)))
        for split, sizes in (
            ("train", self.train_sizes),
            *(("test", [(side, side)]) for side in self.test_sizes or ()),
        ):
            self._check_images(split, self._source(sizes))
        side = self._source([self.test_size])
        self._check_images("test", side)
        counts = {split: class_counts(self._labels(split, side), self.class_names) for split in SPLITS}
        notes = []
        for split in SPLITS:
            expected, found = self.info["n_samples"][split], len(self._labels(split, side))
            images = self._shape(f"{split}_images", side)[0]
            if images != found:
                raise InputError(
                    f"{self._file(side)} holds {images} images and {found} labels of {split}; download it again"
                )
            if found != expected:
                notes.append(f"{split}: {found:,} images, where the published set has {expected:,}")
        return Check(name=f"MedMNIST {self.name} ({side} pixels)", root=str(folder), splits=counts, notes=tuple(notes))

    def source(self, split: str, sizes: list[Size], training: bool) -> ArraySource:
        side = self._source(sizes)
        self._check_images(split, side)  # a schedule may have brought in another file since the check
        images = torch.from_numpy(self._array(f"{split}_images", side))
        images = images[..., None] if images.ndim == 3 else images
        return ArraySource(images, self._labels(split, side), f"{self._file(side).name}/{split}", sizes, training)

    def _source(self, sizes: list[Size]) -> int:
        """Return the size of the file that images of these sizes are read from."""
        largest = max(side for size in sizes for side in size)
        return self.source_size or next((side for side in SIZES if side >= largest), SIZES[-1])

    def _file(self, side: int) -> Path:
        return Path(self.root).expanduser() / f"{self.name}{'' if side == 28 else f'_{side}'}.npz"

    def _unpacked(self, side: int) -> Path:
        return self._file(side).with_suffix("")

    def _check_images(self, split: str, side: int) -> None:
        """Read the header of an array of images, not the array.

        Raises:
            InputError: they are not what their file's name says.
        """
        shape = self._shape(f"{split}_images", side)
        expected = (side, side) if self.info["n_channels"] == 1 else (side, side, 3)
        if shape[1:] != expected:
            raise InputError(
                f"the {split} images in {self._file(side)} are of shape {shape[1:]} and should be {expected}; "
                f"the file is not {self.name} at {side} pixels"
            )

    def _labels(self, split: str, side: int) -> Tensor:
        labels = torch.from_numpy(self._array(f"{split}_labels", side).astype(np.int64))
        if self.several_labels:
            return labels.float()
        return checked_labels(labels.reshape(-1), self.class_names, f"{self._file(side)} ({split})")

    def _array(self, key: str, side: int) -> "np.ndarray[Any, Any]":
        packed, unpacked = self._file(side), self._unpacked(side) / f"{key}.npy"
        try:
            if unpacked.exists():
                # Copy on write: torch warns of arrays that cannot be written to.
                return np.asarray(np.load(unpacked, mmap_mode="c"))
            with np.load(packed) as arrays:
                return np.asarray(arrays[key])
        except FileNotFoundError as error:
            raise self._missing(side) from error
        except KeyError as error:
            raise InputError(f"{packed} has no array {key!r}: no file of MedMNIST, or labels are missing") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{packed} cannot be read: {error}; download it again") from error

    def _shape(self, key: str, side: int) -> tuple[int, ...]:
        if (self._unpacked(side) / f"{key}.npy").exists():
            return tuple(self._array(key, side).shape)
        try:
            with zipfile.ZipFile(self._file(side)) as archive, archive.open(f"{key}.npy") as file:
                np.lib.format.read_magic(file)
                return tuple(np.lib.format.read_array_header_1_0(file)[0])
        except FileNotFoundError as error:
            raise self._missing(side) from error
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{self._file(side)} cannot be read: {error}; download it again") from error

    def _missing(self, side: int) -> InputError:
        link = self.info.get("url" if side == 28 else f"url_{side}", "")
        return wrong_layout(f"{self._file(side)} does not exist (it is at {link})", self._tree(side))

    def _tree(self, side: int) -> str:
        """Return the expected layout, with how to get the files of a size."""
        return TREE.format(name=self.name, side=side)

    def unpack(self, side: int) -> Path:
        """Write the arrays of a file as .npy beside it, so that they need not fit in memory; return the folder.

        Raises:
            WriteError: the disk is full, or the folder cannot be written.
        """
        folder = self._unpacked(side)
        for split in SPLITS:
            for key in (f"{split}_labels", f"{split}_images"):
                array = self._array(key, side)
                with whole(folder / f"{key}.npy") as part, part.open("wb") as file:
                    np.save(file, array)
        return folder


def known_sets() -> dict[str, dict[str, Any]]:
    """Return what the package says of its 2D sets, by name.

    Raises:
        InputError: it is not installed.
    """
    try:
        from medmnist.info import INFO
    except ImportError as error:
        raise InputError(f"MedMNIST needs its package ({error}); pip install 'rescompress[data]'") from error
    return {name: info for name, info in INFO.items() if not name.endswith("3d")}
