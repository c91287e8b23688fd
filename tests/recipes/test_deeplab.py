"""DeepLabV3+ compressed at 1/2: the recipe and mmengine's runner begin with the same loss."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning")
try:
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS
    from mmengine.runner import Runner
except ImportError as missing:  # OpenCV without the system's libGL raises it, too
    pytest.skip(f"mmseg cannot be imported: {missing}", allow_module_level=True)

import numpy as np
from PIL import Image

import rescompress as rc
from rescompress.lightning import Segmenter
from rescompress.references._mmseg import read_config
from tests.families.test_mmseg import runner_config
from tests.lightning import layouts

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "seeded")]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes/configs/cityscapes/deeplabv3plus_r50_stem_1_2.yaml"
SIZE = (64, 128)


@pytest.fixture
def first_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Segmenter's first step begins with, random numbers included, and the loss that it gives."""
    seen: dict[str, Any] = {}
    step = Segmenter.training_step

    def watched(self: Segmenter, batch: Any, batch_idx: int) -> torch.Tensor:
        assert not seen, "one step is enough"
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        seen.update(module=self, batch=batch, weights=weights, random=torch.get_rng_state())
        loss = step(self, batch, batch_idx)
        seen["loss"] = float(loss)
        return loss

    monkeypatch.setattr(Segmenter, "training_step", watched)
    return seen


def write_cityscapes(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write crops (B, H, W, 3) and their train ids (B, H, W) into Cityscapes' folders."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        for kind, ending, pixels in (
            ("leftImg8bit", "leftImg8bit", image),
            ("gtFine", "gtFine_labelTrainIds", label),
        ):
            file = root / kind / "train/ulm" / f"ulm_{index:06d}_000019_{ending}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)


def test_the_recipe_and_mmengines_runner_begin_with_the_same_loss(
    first_step: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is on in both, and draws the same."""
    root = layouts.cityscapes(tmp_path / "data", size=(96, 192))
    sizes = [f"--data.{name}=[64,128]" for name in ("train_size", "test_size")]
    options = ["--data.full_size=[96,192]", "--model.input_size=[64,128]", *sizes, "--model.pretrained=false"]
    options += [f"--data.root={root}", "--data.workers=0", "--trainer.fast_dev_run=1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes/cityscapes.py"), "fit", f"--config={CONFIG}", *options])
    runpy.run_path(sys.argv[0], run_name="__main__")

    spec = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]["spec"]
    module, (images, labels, _) = first_step["module"], first_step["batch"]
    assert rc.spec_of(module.model) == rc.Spec.from_dict(spec)
    assert images.shape == (2, 3, *SIZE)
    # The runner's data preprocessor normalises by itself: it is given the pixels from before.
    data = module.trainer.datamodule
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    pixels = ((images * std + mean) * 255).round()
    write_cityscapes(tmp_path / "crops", pixels.permute(0, 2, 3, 1).numpy(), labels.numpy())
    torch.save({"state_dict": first_step["weights"]}, tmp_path / "first.pth")

    runner = run_mmengine(module.hparams["model"].removeprefix("mmseg:"), spec, tmp_path, first_step["random"])

    assert rc.spec_of(runner.model) == rc.spec_of(module.model)
    assert FirstLoss.seen == pytest.approx([first_step["loss"]], rel=1e-5)


@HOOKS.register_module(force=True)
class FirstLoss(Hook):
    """Let the runner's step draw the same random numbers, and keep what it gave."""

    random: torch.Tensor
    seen: list[float] = []  # noqa: RUF012

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        torch.set_rng_state(self.random)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seen.append(float(outputs["loss"]))


def run_mmengine(name: str, spec: dict[str, Any], folder: Path, random: torch.Tensor) -> Runner:
    """Train the mmseg config of a recipe for one iteration, compressed, on the images in folder/crops."""
    FirstLoss.random, FirstLoss.seen = random, []
    shipped = read_config(name)
    model = {**shipped.model, "type": "Compressed", "spec": spec, "pretrained": None}
    model["data_preprocessor"]["size"] = SIZE
    config = runner_config(
        folder / "crops",
        folder / "work",
        model,
        optim_wrapper=shipped.optim_wrapper,
        load_from=str(folder / "first.pth"),
        custom_hooks=[{"type": "FirstLoss"}],
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": 1},
        val_dataloader=None,
        val_evaluator=None,
        val_cfg=None,
    )
    config.dump(folder / "config.py")  # from a file, as mmengine's tools read it: that is what imports what it names
    runner = Runner.from_cfg(Config.fromfile(folder / "config.py"))
    runner.train()
    return runner
