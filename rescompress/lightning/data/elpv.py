"""ELPV: photographs of solar cells by electroluminescence, labelled with how likely each is defective.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence images",
https://arxiv.org/abs/1807.02894; the data are CC BY-NC-SA, so their package, elpv-dataset, is not installed unasked.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rescompress.errors import InputError, one_line
from rescompress.lightning.data._arrays import ArrayData, ArraySource, class_counts
from rescompress.lightning.data._base import Size, one_of
from rescompress.lightning.data._images import UNREADABLE, pixels
from rescompress.lightning.data._order import mixed
from rescompress.lightning.data.check import Check, existing_folder, wrong_layout

SPLITS = ("train", "val", "test")
CLASSES = {"defect": ("functional", "defective"), "level": ("0", "1/3", "2/3", "1")}
TREE = """
ROOT/                  (pip install elpv-dataset puts it in site-packages/elpv_dataset/data; the data are CC BY-NC-SA)
    labels.csv         one line each: images/cell0001.png  1.0  mono
    images/
        cell0001.png   300 x 300, grey
        ...
"""


class ELPV(ArrayData):
    """ELPV: 2,624 grey images of 300 x 300, of which a tenth is validated on and a quarter tested on.

    The split is the same in every run: by class, a draw that does not depend on `seed`.

    Args:
        root: folder of labels.csv; that of the installed package by default.
        labels: "defect", two classes, or "level", the four probabilities that experts gave.
        train_size: of the images that the model is trained on.
        test_size: of those that it is validated and tested on.
        padding: training images are shifted by up to this number of pixels of the file.
        flip: training images are mirrored: "none", "horizontal" or "both".
        channels: of the model's input.
        options: those of `ArrayData` and `ImageData`.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        labels: str = "defect",
        train_size: int | Size = 150,
        test_size: int | Size = 150,
        padding: int = 8,
        flip: str = "both",
        channels: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            train_size=train_size, test_size=test_size, padding=padding, flip=flip, channels=channels, **options
        )
        one_of("labels", labels, tuple(CLASSES))
        self.root = root if root is not None else _installed()
        self.labels = labels
        self.class_names = CLASSES[labels]
        self.num_classes = len(self.class_names)
        self._rows: tuple[list[str], Tensor] | None = None
        self._images: Tensor | None = None
        self._readable = torch.empty(0, dtype=torch.bool)

    def check(self) -> Check:
        names, labels = self._listed()
        folder = Path(self.root).expanduser()
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise wrong_layout(f"{len(missing)} images of {folder}/labels.csv do not exist, such as {missing[0]}", TREE)
        splits = {split: class_counts(labels[self._part(split)], self.class_names) for split in SPLITS}
        return Check(name="ELPV", root=str(folder), splits=splits)

    def source(self, split: str, sizes: list[Size], training: bool) -> ArraySource:
        labels = self._listed()[1]
        if self._images is None:
            self._images = self._decoded()
        part = self._part(split)
        part = part[self._readable[part]]
        return ArraySource(self._images[part], labels[part], split, sizes, training)

    def _listed(self) -> tuple[list[str], Tensor]:
        """Return the paths and classes in labels.csv."""
        if self._rows is None:
            file = existing_folder(self.root, "ELPV", TREE) / "labels.csv"
            if not file.is_file():
                raise wrong_layout(f"{file} does not exist", TREE)
            try:
                rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
                levels = torch.tensor([round(3 * float(row[1])) for row in rows])
            except (ValueError, OverflowError, IndexError) as error:
                raise wrong_layout(f"{file} cannot be understood ({error}): labels are missing", TREE) from error
            if not rows or not 0 <= int(levels.min()) <= int(levels.max()) <= 3:
                raise wrong_layout(f"{file} has {len(rows)} lines, of which each must hold a chance from 0 to 1", TREE)
            self._rows = [row[0] for row in rows], (levels >= 2).long() if self.labels == "defect" else levels
        return self._rows

    def _part(self, split: str) -> Tensor:
        """Return the indices of a split: of each class the same shares, drawn once for all."""
        labels = self._listed()[1]
        parts = []
        for label in range(self.num_classes):
            of_class = torch.nonzero(labels == label).flatten()
            of_class = of_class[torch.argsort(mixed(0, of_class))]
            tested, validated = round(len(of_class) * 0.25), round(len(of_class) * 0.35)
            borders = {"test": (0, tested), "val": (tested, validated), "train": (validated, len(of_class))}
            parts.append(of_class[slice(*borders[split])])
        return torch.cat(parts).sort().values

    def _decoded(self) -> Tensor:
        """Return all images, (N, H, W, 1), and note which of them could be read."""
        names, _ = self._listed()
        self._readable = torch.ones(len(names), dtype=torch.bool)
        images: Tensor | None = None
        corrupt = self._corrupt("ELPV")
        for number, name in enumerate(names):
            try:
                image = torch.from_numpy(pixels((Path(self.root).expanduser() / name).read_bytes(), "L"))
                if images is None:
                    images = torch.zeros(len(names), *image.shape, dtype=torch.uint8)
                if image.shape != images.shape[1:]:
                    raise ValueError(f"it has {tuple(image.shape)} pixels, the others {tuple(images.shape[1:])}")
                images[number] = image
            except UNREADABLE as error:
                corrupt.note(((name, one_line(error)),))
                self._readable[number] = False
        corrupt.tell()
        if images is None:
            raise InputError(f"none of the images of {self.root}/labels.csv can be read; install elpv-dataset again")
        return images[..., None]


def _installed() -> str:
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise wrong_layout("ELPV is not installed and no root was given", TREE)
    return str(Path(next(iter(found.submodule_search_locations)), "data"))
