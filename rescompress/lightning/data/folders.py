"""ImageNet, or any other data set, as folders of images named by their classes.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", https://arxiv.org/abs/1409.0575
"""

from collections import Counter
from pathlib import Path
from typing import Any

from rescompress.errors import InputError
from rescompress.lightning.data._base import Size
from rescompress.lightning.data._images import ImageFiles
from rescompress.lightning.data._photos import PhotoData
from rescompress.lightning.data.check import Check, check_count, existing_folder, wrong_layout

TREE = """
ROOT/
    train/
        n01440764/            one folder for each class, alike in train and val
            n01440764_10026.JPEG
            ...
        n01443537/
        ...
    val/
        n01440764/
            ILSVRC2012_val_00000293.JPEG
            ...
"""


class ImageFolders(PhotoData):
    """Images in ROOT/train/CLASS/ and ROOT/val/CLASS/; tested on val, since ImageNet's test labels are not public.

    Args:
        root: folder that holds train and val.
        num_classes: expected; those that are found by default.
        options: those of `PhotoData` and `ImageData`.
    """

    def __init__(self, root: str, *, num_classes: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = root
        self._expected = num_classes
        self._listed: dict[str, tuple[list[str], list[int]]] = {}

    def check(self) -> Check:
        folder = existing_folder(self.root, "images", TREE)
        self.class_names = tuple(_class_folders(folder / "train"))
        self.num_classes = len(self.class_names)
        lacks = []
        counts = {}
        for split in ("train", "val"):
            classes = _class_folders(folder / split)
            unknown = sorted(set(classes) - set(self.class_names))
            if unknown:
                raise wrong_layout(f"{folder / split} has classes that train has not: {_some(unknown)}", TREE)
            if len(classes) < self.num_classes:
                lacking = sorted(set(self.class_names) - set(classes))
                lacks.append(f"{folder / split} has no images of {len(lacking)} classes of train: {_some(lacking)}")
            counts[split] = self._list(folder, split, classes)
        check_count(str(folder), self.num_classes, self._expected)
        return Check(name="Image folders", root=str(folder), splits=counts, lacks=tuple(lacks))

    def _list(self, folder: Path, split: str, classes: list[str]) -> dict[str, int]:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        of_class = {name: number for number, name in enumerate(self.class_names) if name in set(classes)}
        found = make_dataset(str(folder / split), of_class, IMG_EXTENSIONS, allow_empty=True)
        labels = [label for _, label in found]
        images = Counter(labels)
        empty = [name for name, label in of_class.items() if not images[label]]
        if empty:
            raise wrong_layout(
                f"{len(empty)} class folder(s) in {folder / split} hold no images: {_some(empty)}; fill or remove them",
                TREE,
            )
        # Relative to the root, they are the same on every machine.
        above = len(str(folder)) + 1
        self._listed[split] = [path[above:] for path, _ in found], labels
        return {name: images[label] for name, label in of_class.items()}

    def listed(self, split: str) -> tuple[list[str], list[int]]:
        """Return the files of a split, relative to the root, and their classes, once `setup` has found them."""
        return self._listed["train" if split == "train" else "val"]

    def holds_jpeg(self) -> bool:
        return all(path.lower().endswith((".jpg", ".jpeg")) for paths, _ in self._listed.values() for path in paths)

    def source(self, split: str, sizes: list[Size], training: bool) -> ImageFiles:
        paths, labels = self.listed(split)
        return ImageFiles(
            Path(self.root).expanduser(),
            paths,
            labels,
            self.transforms(sizes, training),
            sizes,
            training=training,
            corrupt=self.corrupt,
            encoded=self.on_device,
        )


def _class_folders(folder: Path) -> list[str]:
    """Return the names of the classes, sorted.

    Raises:
        InputError: there is no folder, or none in it.
    """
    classes = []
    if folder.is_dir():
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    tars = [] if classes else [*folder.glob("*.tar"), *folder.parent.glob(f"*{folder.name}*.tar")]
    if tars:
        raise InputError(
            f"{folder.parent} holds tar files of {folder.name}, such as {tars[0].name}, and no class folders: shards "
            f"are read by ImageShards, and `python scripts/prepare_imagenet.py {folder.parent} --index` writes the "
            "_info.json that they need; archives of images must be unpacked"
        )
    if not folder.is_dir():
        raise wrong_layout(f"{folder} does not exist", TREE)
    if not classes:
        loose = sum(1 for entry in folder.iterdir() if entry.is_file())
        what = f"holds {loose} files and no class folders: the labels are missing" if loose else "is empty"
        raise wrong_layout(f"{folder} {what}", TREE)
    return classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
