"""Segmenter: losses of mmseg's and other models, and IoU over all pixels at the size of the labels."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("lightning")
try:
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
except ImportError as missing:  # OpenCV without the system's libGL raises it, too
    pytest.skip(f"mmseg cannot be imported: {missing}", allow_module_level=True)

from lightning.pytorch import Trainer

from rescompress.lightning import Segmenter
from rescompress.lightning.batches import Batch
from rescompress.lightning.recovery import Distiller
from rescompress.lightning.segmenter import PixelCounts
from rescompress.recover.distillation import Distillation
from tests.families.test_mmseg import tiny_fcn
from tests.lightning.tiny import TINY, Tiny

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "seeded")]

HALF = {"steps": [{"kind": "stem_resize", "scale": 0.5}]}


def trainer(**options: Any) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", **{"max_epochs": 1, **quiet, **options})


def iou_by_hand(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> list[float]:
    seen = labels != 255
    found = []
    for index in range(classes):
        is_so, said_so = (labels == index) & seen, (predicted == index) & seen
        union = int((is_so | said_so).sum())
        found.append(int((is_so & said_so).sum()) / union if union else float("nan"))
    return found


def test_pixels_are_counted_over_all_batches() -> None:
    torch.manual_seed(0)
    counts = PixelCounts(4, ["road", "sky", "car", "never"])
    batches = [(torch.randn(2, 3, 9, 7), torch.randint(0, 3, (2, 9, 7))) for _ in range(3)]
    for logits, labels in batches:
        labels[:, 0] = 255
        counts.update(F.pad(logits, (0, 0, 0, 0, 0, 1), value=-99.0), labels)
    scores = {name: float(value) for name, value in counts.compute().items()}
    predicted = torch.cat([logits for logits, _ in batches]).argmax(1)
    labels = torch.cat([labels for _, labels in batches])
    by_hand = iou_by_hand(predicted, labels, 3)
    assert [scores[f"iou/{name}"] for name in ("road", "sky", "car")] == pytest.approx(by_hand)
    assert scores["iou/never"] != scores["iou/never"]  # neither predicted nor labelled: no part of the mean
    assert scores["miou"] == pytest.approx(sum(by_hand) / 3)
    seen = labels != 255
    assert scores["pixel_accuracy"] == pytest.approx(float((predicted == labels)[seen].float().mean()))


def test_a_model_of_maps_learns_and_is_scored_at_the_size_of_the_labels() -> None:
    module = Segmenter(
        TINY,
        num_classes=3,
        input_size=32,
        options={"dense": True},
        spec=HALF,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.03),
    )
    data = Tiny(classes=3, dense=True, test_size=48, length=48)
    run = trainer(max_epochs=3)
    run.fit(module, datamodule=data)
    (tested,) = run.test(module, datamodule=data, verbose=False)
    assert set(tested) == {"test/loss", "test/miou", "test/pixel_accuracy", *(f"test/iou/class{i}" for i in range(3))}
    batches = list(data.batches("test"))
    maps = torch.cat([module.model.eval()(batch.images) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    assert maps.shape[-2:] != labels.shape[-2:] == (48, 48)
    predicted = F.interpolate(maps, (48, 48), mode="bilinear").argmax(1)
    by_hand = iou_by_hand(predicted, labels, 3)
    assert [tested[f"test/iou/class{index}"] for index in range(3)] == pytest.approx(by_hand, abs=1e-6)
    assert tested["test/miou"] > 0.4


class WithAuxiliary(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, num_classes, 1)

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        made = self.net(images)
        return OrderedDict(out=made, aux=-made)


def test_auxiliary_heads_count_less_and_ignored_pixels_nothing() -> None:
    module = Segmenter(f"{__name__}:WithAuxiliary", num_classes=3)
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    labels[:, :3] = 255
    made = module.model(images)["out"][:, :, 3:]
    expected = F.cross_entropy(made, labels[:, 3:]) + 0.4 * F.cross_entropy(-made, labels[:, 3:])
    torch.testing.assert_close(module.losses(Batch(images, labels, ("a", "b")))["loss"], expected)


def test_a_batch_without_any_label_ends_no_run() -> None:
    class Blank(Tiny):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            batch = super().on_after_batch_transfer(batch, dataloader_idx)
            if self.trainer.training or "image0.png" in batch.names:
                batch.labels.fill_(255)
            return batch

    plain = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0)}
    module = Segmenter(TINY, num_classes=3, input_size=32, options={"dense": True}, **plain)
    before = [parameter.clone() for parameter in module.model.parameters()]
    run = trainer(limit_train_batches=1, limit_val_batches=2, num_sanity_val_steps=0)
    run.fit(module, datamodule=Blank(classes=3, dense=True))
    assert float(run.callback_metrics["train/loss"]) == 0
    torch.testing.assert_close(list(module.model.parameters()), before, rtol=0, atol=0)
    assert 0 < float(run.callback_metrics["val/loss"]) < 10
    assert float(run.callback_metrics["val/miou"]) >= 0


def write_config(path: Path, model: dict[str, Any]) -> str:
    Config({"model": model, "default_scope": "mmseg"}).dump(path)
    return f"mmseg:{path}"


def test_a_segmentor_predicts_as_its_config_says(tmp_path: Path) -> None:
    init_default_scope("mmseg")
    sliding = {"mode": "slide", "crop_size": (64, 64), "stride": (32, 32)}
    reference = write_config(tmp_path / "tiny.py", tiny_fcn(test_cfg=sliding))
    module = Segmenter(reference, num_classes=5, input_size=(64, 64), spec=HALF).eval()
    images, labels = torch.randn(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.int64)
    logits = module.logits(module.model, Batch(images, labels, ("a",)))
    (predicted,) = module.model(images, mode="predict")
    torch.testing.assert_close(logits[0], predicted.seg_logits.data)


def test_a_segmentor_that_is_taught_learns_from_labels_by_cross_entropy_of_its_main_head(tmp_path: Path) -> None:
    """Neither the weight of its config's loss nor its auxiliary head counts, as Distill says."""
    init_default_scope("mmseg")
    head = {**tiny_fcn().decode_head, "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 3.0}}
    config = tiny_fcn(decode_head=head, auxiliary_head={**head, "in_channels": 32, "in_index": 2})
    module = Segmenter(write_config(tmp_path / "tiny.py", config), num_classes=5, input_size=(64, 64)).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    labels[:, :9] = 255

    distiller = Distiller(module.original(), Distillation(label_weight=0.25))
    losses = distiller.losses(module.model, Batch(images, labels, ("a", "b")), module.label_loss)
    losses["loss"].backward()

    expected = F.cross_entropy(F.interpolate(module(images), (64, 64), mode="bilinear"), labels, ignore_index=255)
    torch.testing.assert_close(losses["labels"], expected)
    torch.testing.assert_close(losses["loss"], 0.75 * losses["distillation"] + 0.25 * expected)
    assert all(parameter.grad is None for parameter in module.model.auxiliary_head.parameters())
