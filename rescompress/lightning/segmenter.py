"""Segmenter: train a compressed segmentation model, scored by IoU over all pixels at the size of the labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from rescompress.errors import InputError
from rescompress.lightning._trained import Trained
from rescompress.lightning.batches import Batch
from rescompress.recover.batches import IGNORED

_MMSEG = "mmseg.models.segmentors.base.BaseSegmentor"


class Segmenter(Trained):
    """Trains a segmentation model; the arguments are those of `CompressedModule`.

    Models of mmseg are trained by the losses of their config, unless `Distill` teaches them, and predict as their
    test_cfg says (whole image or sliding window); others give maps of logits, brought up to the size of the labels.
    """

    main_score = "miou"
    ignored = IGNORED

    def make_scores(self) -> Metric:
        """Return counts of pixels by class."""
        data = getattr(self.trainer, "datamodule", None)
        return PixelCounts(self.num_classes, getattr(data, "class_names", None))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of all heads: mmseg's own, or cross entropy at the size of the labels."""
        if is_mmseg(self.model):
            found = self.model(batch.images, _samples(batch), mode="loss")
            parse: Any = self.model.parse_losses
            return {"loss": parse(found)[0]}
        heads = self.heads(self.model(batch.images), 4)
        return {"loss": self.weighed([self.label_loss(one, batch.labels) for one in heads])}

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one head at the size of the labels."""
        return super().label_loss(_at(logits, labels), labels)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of the classes at the size of the labels.

        Shape:
            - Output: (B, classes, H, W)
        """
        if is_mmseg(model) and hasattr(model, "inference"):
            inference: Any = model.inference
            outputs: Any = inference(batch.images, [one.metainfo for one in _samples(batch)])
        else:
            outputs = model(batch.images)
        return _at(self.heads(outputs, 4)[0], batch.labels)


class PixelCounts(Metric):
    """Intersection over union from counts of pixels that are summed over batches and processes, by mmseg's arithmetic.

    Shape:
        - logits: (B, classes, H, W)
        - labels: (B, H, W), 255 is ignored
    """

    full_state_update = False

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_names = class_names or [str(index) for index in range(num_classes)]
        for name in ("intersect", "union", "predicted", "labelled"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count the pixels of a batch, image by image: float32 counts up to 16 million pixels exactly."""
        counts = _iou_metric().intersect_and_union
        for predicted, label in zip(logits.argmax(1), labels, strict=True):
            found = counts(predicted, label, self.num_classes, IGNORED)
            for name, area in zip(("intersect", "union", "predicted", "labelled"), found, strict=True):
                setattr(self, name, getattr(self, name) + area.to(self.device, torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """Return miou, the mean over the classes that occur, pixel_accuracy, and the IoU of each class."""
        areas = [one.cpu() for one in (self.intersect, self.union, self.predicted, self.labelled)]
        found = _iou_metric().total_area_to_metrics(*areas, metrics=["mIoU"])
        iou = torch.as_tensor(found["IoU"])
        scores = {"miou": iou.nanmean(), "pixel_accuracy": torch.as_tensor(found["aAcc"])}
        return scores | {f"iou/{name}": value for name, value in zip(self.class_names, iou, strict=True)}


def is_mmseg(model: nn.Module) -> bool:
    """Whether it is a segmentor of mmseg, which is not imported for this."""
    return _MMSEG in {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits at the size of the labels."""
    size = labels.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _samples(batch: Batch) -> list[Any]:
    """Return the labels as mmseg's models take them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    size = tuple(batch.labels.shape[-2:])
    meta = {"ori_shape": size, "img_shape": size, "pad_shape": size, "padding_size": [0, 0, 0, 0]}
    return [
        SegDataSample(gt_sem_seg=PixelData(data=label[None]), metainfo={**meta, "img_path": name})
        for label, name in zip(batch.labels, batch.names, strict=True)
    ]


def _iou_metric() -> Any:
    try:
        from mmseg.evaluation.metrics import IoUMetric
    except ImportError as error:
        raise InputError(f"mIoU is computed by mmseg; pip install 'rescompress[mmseg]' ({error})") from error
    return IoUMetric
