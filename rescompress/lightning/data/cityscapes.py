"""Cityscapes in its own folder layout, 19 classes, evaluated at the full 1024 x 2048; mmseg's data set and transforms.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", https://arxiv.org/abs/1604.01685
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rescompress.errors import InputError
from rescompress.lightning.data._base import ImageData, Size, as_size
from rescompress.lightning.data._cityscapes import LABEL_IDS, CityscapesImages, unchanged
from rescompress.lightning.data._images import IMAGENET_MEAN, IMAGENET_STD
from rescompress.lightning.data.check import Check, existing_folder, wrong_layout
from rescompress.recover.batches import IGNORED

IMAGE = "_leftImg8bit.png"
TRAIN_IDS = "_gtFine_labelTrainIds.png"
SPLITS = {"train": "train", "val": "val", "test": "val"}
TREE = """
ROOT/
    leftImg8bit/
        train/ val/ test/
            aachen/
                aachen_000000_000019_leftImg8bit.png      1024 x 2048
                ...
    gtFine/
        train/ val/
            aachen/
                aachen_000000_000019_gtFine_labelTrainIds.png
                aachen_000000_000019_gtFine_labelIds.png  (is enough: the 19 classes are taken from it)
                ...
"""


class Cityscapes(ImageData):
    """Cityscapes: trained on crops, validated and tested on val (the labels of test are not public).

    Args:
        root: folder of leftImg8bit and gtFine.
        train_size: of the crops.
        test_size: of the images in validation and test; labels keep their size.
        full_size: of the images in the files.
        ratio_range: training images are resized by a factor between these before they are cropped.
        photometric: change brightness, contrast, saturation and hue of training images.
        largest_share: a crop of which one class covers more is drawn again, up to ten times.
        batch_size: of crops.
        test_batch_size: of full images.
        mean: of the channels.
        std: of the channels.
        options: those of `ImageData`.
    """

    def __init__(
        self,
        root: str,
        *,
        train_size: int | Size = (512, 1024),
        test_size: int | Size = (1024, 2048),
        full_size: int | Size = (1024, 2048),
        ratio_range: tuple[float, float] = (0.5, 2.0),
        photometric: bool = True,
        largest_share: float = 0.75,
        batch_size: int = 8,
        test_batch_size: int = 1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **options: Any,
    ) -> None:
        if options.get("test_sizes") is not None:
            raise InputError("Cityscapes is tested at one size; give test_size, (height, width), and leave test_sizes")
        super().__init__(
            train_size=train_size,
            test_size=test_size,
            batch_size=batch_size,
            test_batch_size=test_batch_size,
            mean=mean,
            std=std,
            **options,
        )
        if self.mixup or self.cutmix:
            raise InputError("mixup and cutmix need one class per image; leave them at 0 for Cityscapes")
        if not 0 < ratio_range[0] <= ratio_range[1]:
            raise InputError(f"ratio_range must be (least, largest) factor, got {tuple(ratio_range)}")
        self.root = root
        self.full_size = as_size(full_size, "full_size")
        self.ratio_range = tuple(ratio_range)
        self.photometric = photometric
        self.largest_share = largest_share
        self.class_names = tuple(_mmseg().CityscapesDataset.METAINFO["classes"])
        self.num_classes = len(self.class_names)

    def check(self) -> Check:
        folder = existing_folder(self.root, "Cityscapes", TREE)
        counts, notes = {}, []
        for split in ("train", "val"):
            images = sorted((folder / "leftImg8bit" / split).glob(f"*/*{IMAGE}"))
            if not images:
                raise wrong_layout(f"{folder}/leftImg8bit/{split} holds no images of cities", TREE)
            suffix = self._suffix(split)
            lacking = [image for image in images if not self._label_of(image, split, suffix).is_file()]
            if lacking:
                raise wrong_layout(
                    f"{len(lacking)} of {len(images)} images of {split} have no label file, such as {lacking[0].name}: "
                    f"{self._label_of(lacking[0], split, suffix)} does not exist",
                    TREE,
                )
            if suffix == LABEL_IDS:
                notes.append(f"{split} has label ids only: the classes are taken from them")
            self._check_size(images[0])
            counts[split] = dict(Counter(image.parent.name for image in images))
        return Check(name="Cityscapes", root=str(folder), splits=counts, kind="city", notes=tuple(notes))

    def _check_size(self, image: Path) -> None:
        from PIL import Image

        try:
            with Image.open(image) as opened:
                width, height = opened.size
        except OSError:
            return  # what is done about corrupt files is decided when they are read
        if (height, width) != self.full_size:
            raise InputError(
                f"{image} is of {height} x {width} pixels, and full_size is {self.full_size[0]} x {self.full_size[1]}; "
                "get the full images, or give full_size"
            )

    def _suffix(self, split: str) -> str:
        labels = Path(self.root).expanduser() / "gtFine" / split
        return TRAIN_IDS if next(labels.glob(f"*/*{TRAIN_IDS}"), None) is not None else LABEL_IDS

    def _label_of(self, image: Path, split: str, suffix: str) -> Path:
        name = image.name.removesuffix(IMAGE) + suffix
        return Path(self.root).expanduser() / "gtFine" / split / image.parent.name / name

    def source(self, split: str, sizes: list[Size], training: bool) -> CityscapesImages:
        folder = SPLITS[split]
        data = _mmseg().CityscapesDataset(
            data_root=str(Path(self.root).expanduser()),
            data_prefix={"img_path": f"leftImg8bit/{folder}", "seg_map_path": f"gtFine/{folder}"},
            seg_map_suffix=self._suffix(folder),
        )
        transforms = [self.train_transform(size) if training else unchanged for size in sizes]
        return CityscapesImages(data, transforms, None if training else sizes[0], training, self.corrupt)

    def train_transform(self, size: Size) -> Any:
        """Return mmseg's pipeline that makes a training crop of this size from an image and its labels."""
        from mmcv.transforms import Compose, Pad, RandomFlip, RandomResize
        from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop

        height, width = self.full_size
        grey = tuple(round(255 * value) for value in (self.mean * 3)[-3:][::-1])  # blue first
        steps = [
            RandomResize(scale=(width, height), ratio_range=self.ratio_range, keep_ratio=True),
            RandomCrop(crop_size=size, cat_max_ratio=self.largest_share),
            RandomFlip(prob=0.5),
            *([PhotoMetricDistortion()] if self.photometric else []),
            # A shrunk image may be smaller than the crop; the rest is the mean colour, and ignored.
            Pad(size=(size[1], size[0]), pad_val={"img": grey, "seg": IGNORED}),
        ]
        return Compose(steps)


def _mmseg() -> Any:
    """Return mmseg's data sets.

    Raises:
        InputError: mmseg is not installed.
    """
    try:
        from mmseg import datasets
    except ImportError as error:
        raise InputError(f"Cityscapes needs mmseg ({error}); pip install 'rescompress[mmseg]'") from error
    return datasets
