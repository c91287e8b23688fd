"""Segmenter: losses of mmseg's and other models, and IoU over all pixels at the size of the labels."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rescompress as rc

pytest.importorskip("lightning")
try:
    import mmseg.models
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS, init_default_scope
    from mmengine.runner import Runner
except ImportError as missing:  # OpenCV without the system's libGL raises it, too
    pytest.skip(f"mmseg cannot be imported: {missing}", allow_module_level=True)

import numpy as np
from lightning.pytorch import Trainer
from PIL import Image

from rescompress.lightning import Segmenter
from rescompress.lightning.batches import Batch
from rescompress.lightning.segmenter import PixelCounts
from tests.families.test_mmseg import runner_config, tiny_fcn
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


def cityscapes(folder: Path, size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for index in range(2):
            for kind, ending, top in (("leftImg8bit", "leftImg8bit", 255), ("gtFine", "gtFine_labelTrainIds", 19)):
                target = folder / kind / part / "ulm"
                target.mkdir(parents=True, exist_ok=True)
                shape = (*size, 3) if kind == "leftImg8bit" else size
                pixels = random.integers(0, top, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"ulm_{index:06d}_000019_{ending}.png")


class Images(Tiny):
    """The same images, as the runner's preprocessor normalises them."""

    def __init__(self, folder: Path, mean: Any, std: Any) -> None:
        super().__init__(classes=19)
        self.folder, self.norm = folder, (torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None])

    def train_dataloader(self) -> Any:
        paths = sorted((self.folder / "leftImg8bit" / "train").glob("*/*.png"))
        images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
        masks = sorted((self.folder / "gtFine" / "train").glob("*/*.png"))
        labels = torch.stack([torch.from_numpy(np.array(Image.open(path))).long() for path in masks])
        batch = Batch((images - self.norm[0]) / self.norm[1], labels, tuple(path.name for path in paths))
        return torch.utils.data.DataLoader([batch], batch_size=None)


@HOOKS.register_module(force=True)
class FirstLoss(Hook):
    """Keep what the runner's first step gave."""

    seen: dict[str, float] = {}  # noqa: RUF012

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seen.setdefault("loss", float(outputs["loss"]))


def test_the_first_loss_of_deeplabv3plus_is_that_of_mmengines_runner(tmp_path: Path) -> None:
    init_default_scope("mmseg")
    name = "deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024"
    size = (64, 128)
    module = Segmenter(
        f"mmseg:{name}",
        num_classes=19,
        input_size=size,
        spec=HALF,
        options={"decode_head": {"dropout_ratio": 0.0}, "auxiliary_head": {"dropout_ratio": 0.0}},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01),
    )
    torch.save({"state_dict": module.original().state_dict()}, tmp_path / "first.pth")
    cityscapes(tmp_path, size)

    whole = Config.fromfile(Path(mmseg.__file__).parent / ".mim/configs/deeplabv3plus" / f"{name}.py").model
    whole.pretrained = None
    whole.backbone.norm_cfg = whole.decode_head.norm_cfg = whole.auxiliary_head.norm_cfg = {"type": "BN"}
    whole.decode_head.dropout_ratio = whole.auxiliary_head.dropout_ratio = 0.0
    whole.data_preprocessor.size = size
    FirstLoss.seen.clear()
    config = runner_config(
        tmp_path,
        tmp_path / "work",
        {**whole, "type": "Compressed", "scale": 0.5},
        load_from=str(tmp_path / "first.pth"),
        custom_hooks=[{"type": "FirstLoss"}],
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": 1, "val_interval": 10},
    )
    config.dump(tmp_path / "config.py")  # from a file, as mmengine's tools read it: that is what imports what it names
    Runner.from_cfg(Config.fromfile(tmp_path / "config.py")).train()

    preprocessor = whole.data_preprocessor
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=Images(tmp_path, preprocessor.mean, preprocessor.std))
    assert rc.spec_of(module.model) == rc.Spec.of(rc.StemResize(scale=0.5))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(FirstLoss.seen["loss"], rel=1e-5)
