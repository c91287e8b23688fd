"""Images and labels of Cityscapes, read and transformed by mmseg, as whole batches by key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rescompress.errors import one_line
from rescompress.lightning.data._base import Size
from rescompress.lightning.data._images import UNREADABLE, decode, gathered, readable
from rescompress.lightning.data._loader import Loaded
from rescompress.lightning.data._order import drawn
from rescompress.recover.batches import IGNORED

LABEL_IDS = "_gtFine_labelIds.png"
EVALUATED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label ids of the 19 classes, in the order of their train ids; all others are ignored."""


def _reader() -> Any:
    """Return mmseg's pipeline that reads an image and its labels."""
    from mmcv.transforms import Compose, LoadImageFromFile
    from mmseg.datasets.transforms import LoadAnnotations

    return Compose([LoadImageFromFile(), LoadAnnotations(reduce_zero_label=None), classes_of_ids])


def unchanged(results: dict[str, Any]) -> dict[str, Any]:
    """Stand for a pipeline in evaluation: the resize is left to the device."""
    return results


def classes_of_ids(results: dict[str, Any]) -> dict[str, Any]:
    """Make classes (train ids) of label ids, where the file holds these; a step of a pipeline."""
    if results["seg_map_path"].endswith(LABEL_IDS):
        table = np.full(256, IGNORED, dtype=np.uint8)
        table[list(EVALUATED_IDS)] = np.arange(len(EVALUATED_IDS))
        results["gt_seg_map"] = table[results["gt_seg_map"]]
    return results


def _why_unreadable(file: Path) -> str | None:
    """Return what Pillow finds wrong with an image, in words that mmcv's decoders lack; None for nothing."""
    try:
        decode(file.read_bytes())
    except UNREADABLE as error:
        return one_line(error)
    return None


class CityscapesImages:
    """mmseg's data set as whole batches by key.

    Args:
        data: mmseg's.
        transforms: one pipeline for each size, of what was read.
        size: that images are brought to on the device.
        training: whether the samples get random numbers.
        corrupt: "stop" or "skip".
    """

    def __init__(self, data: Any, transforms: Sequence[Any], size: Size | None, training: bool, corrupt: str) -> None:
        self.data = data
        self.read = _reader()
        self.transforms = tuple(transforms)
        self.size = size
        self.training = training
        self.corrupt = corrupt

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, keys: list[tuple[tuple[int, int], int]]) -> Loaded:
        broken: list[tuple[str, str]] = []
        transform = self.transforms[keys[0][1]]
        images: list[Tensor] = []
        labels: list[Tensor] = []
        names: list[str] = []
        draws: list[int] = []
        options: Any = {"training": self.training, "corrupt": self.corrupt}
        for result, index, draw in readable(keys, len(self), self._read, self._name, broken, **options):
            with drawn(draw):
                result = transform(result)
            # mmcv reads blue first.
            images.append(torch.from_numpy(result["img"][..., ::-1].transpose(2, 0, 1).copy()))
            labels.append(torch.from_numpy(result["gt_seg_map"].copy()))
            names.append(self._name(index))
            draws.append(draw)
        together = torch.stack(labels) if labels else torch.empty(0)
        return gathered(images, together, names, draws if self.training else None, self.size, broken)

    def _read(self, index: int, draw: int) -> dict[str, Any]:
        files = self.data.get_data_info(index)
        image, labels = Path(files["img_path"]), Path(files["seg_map_path"])
        try:
            found: dict[str, Any] = self.read(files)
        # mmcv fails in as many ways as it has decoders: None for an image, an assertion, errors of OpenCV.
        except Exception as error:
            reason = _why_unreadable(labels)
            reason = _why_unreadable(image) or (reason and f"its labels, {labels.name}: {reason}") or one_line(error)
            raise OSError(reason) from error
        return found

    def _name(self, index: int) -> str:
        return Path(self.data.get_data_info(index)["img_path"]).name
