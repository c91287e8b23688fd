"""The callbacks on the package's own module and data: sizes, teacher, statistics and costs, also over a resume."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
from lightning.pytorch import Callback, Trainer

import rescompress as rc
from rescompress.lightning import Classifier, CostMonitor, Distill, FashionMNIST, Recalibrate, ResolutionSchedule
from rescompress.lightning.checkpoints import LastCheckpoint, load_model
from rescompress.measure import count_macs
from tests.lightning.layouts import fashion_mnist
from tests.lightning.tiny import TINY, Stopped

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "seeded")]


class Watch(Callback):
    """Notes the sizes of the batches, and ends the run after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.shapes: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.shapes.append((batch.images.shape[-1], len(batch.images)))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.stop_after:
            raise Stopped


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fashion_mnist(tmp_path_factory.mktemp("data"), train=68, test=8)


def data(root: Path, **options: Any) -> FashionMNIST:
    return FashionMNIST(str(root), val_images=20, batch_size=4, channels=3, mean=[0.3], std=[0.3], **options)


def module(spec: Any = None, **options: Any) -> Classifier:
    return Classifier(TINY, num_classes=10, input_size=28, spec=spec, **options)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    last = LastCheckpoint(str(folder), every_n_train_steps=3)
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=[*callbacks, last],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"max_epochs": 3} | options,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return state


HALF = {"steps": [{"kind": "stem_resize", "scale": 0.5}]}


@pytest.mark.parametrize(("mode", "level"), [("mixed", "learning_rate"), ("progressive", "batch_size")])
def test_an_interrupted_run_sees_the_same_sizes_and_ends_at_the_same_weights(
    root: Path, tmp_path: Path, mode: str, level: str
) -> None:
    def fit(folder: str, stop_after: int | None = None, **options: Any) -> list[tuple[int, int]]:
        watch = Watch(stop_after)
        callbacks = [ResolutionSchedule([14, 21, 28], mode, level), CostMonitor(), watch]
        trainer(tmp_path / folder, *callbacks).fit(module(), data(root), **options)
        return watch.shapes

    whole = fit("whole")
    per_epoch = len(whole) // 3
    with pytest.raises(Stopped):
        fit("broken", stop_after=per_epoch + 1)
    last = tmp_path / "broken" / "last.ckpt"
    rest = fit("broken", ckpt_path=last, weights_only=True)
    assert rest == whole[-len(rest) :]
    torch.testing.assert_close(weights(tmp_path / "broken"), weights(tmp_path / "whole"), rtol=0, atol=0)
    # Sizes, and as many images as make the same pixels.
    counts = {14: 16, 21: 7, 28: 4} if level == "batch_size" else dict.fromkeys((14, 21, 28), 4)
    assert all(count == counts[size] for size, count in whole)
    sizes = [size for size, _ in whole]
    if mode == "progressive":
        assert sizes == [14] * per_epoch + [21] * per_epoch + [28] * per_epoch
    else:
        assert set(sizes) == {14, 21, 28}
    costs = (tmp_path / "broken" / "cost.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in costs[1:]] == ["0", "1", "2"]


def test_the_costs_are_those_of_the_compressed_model(root: Path, tmp_path: Path) -> None:
    trained, monitor = module(HALF), CostMonitor()
    trainer(tmp_path, monitor, max_epochs=1).fit(trained, data(root))
    assert monitor.rows[0]["macs"] == count_macs(trained.model, torch.zeros(1, 3, 28, 28)).macs
    assert monitor.rows[0]["macs"] < count_macs(trained.original(), torch.zeros(1, 3, 28, 28)).macs
    assert monitor.rows[0]["images"] == 48


def test_the_teacher_comes_from_a_checkpoint_of_the_original(root: Path, tmp_path: Path) -> None:
    trainer(tmp_path / "original", max_epochs=1).fit(module(), data(root))
    path = tmp_path / "original" / "last.ckpt"
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            found["teacher"] = copy.deepcopy(pl_module.distiller.teacher)

    student = module(HALF, initial_weights=str(path))
    trainer(tmp_path / "student", Distill(str(path)), Look(), max_epochs=1).fit(student, data(root))
    torch.testing.assert_close(found["teacher"].state_dict(), load_model(path).state_dict(), rtol=0, atol=0)
    assert not any("teacher" in name for name in weights(tmp_path / "student"))


def test_what_is_recalibrated_at_the_end_is_in_the_last_checkpoint(root: Path, tmp_path: Path) -> None:
    trained, read = module(HALF), data(root)
    trainer(tmp_path, Recalibrate(batches=5), max_epochs=1).fit(trained, read)
    plain = [
        read.on_after_batch_transfer(loaded, 0).images
        for loaded, _ in zip(read.plain_train_dataloader((28, 28)), range(5), strict=False)
    ]
    expected = rc.recalibrate(copy.deepcopy(trained.model), plain).state_dict()
    saved = {name.removeprefix("model."): value for name, value in weights(tmp_path).items() if "running" in name}
    assert saved
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name])


def test_each_test_size_is_scored_with_its_own_statistics(root: Path, tmp_path: Path) -> None:
    trained = module()
    before = copy.deepcopy(trained.state_dict())
    run = trainer(tmp_path, Recalibrate(per_test_size=True))
    run.test(trained, data(root, test_sizes=[14, 28]), verbose=False)
    assert {"test/accuracy@14", "test/accuracy@28"} <= set(run.callback_metrics)
    torch.testing.assert_close(trained.state_dict(), before, rtol=0, atol=0)


def test_the_copy_in_low_bits_is_made_with_the_statistics_of_each_test_size(root: Path, tmp_path: Path) -> None:
    images = data(root, test_sizes=[14, 28])
    model = module(deploy={"steps": [{"kind": "quantize", "scheme": "w8"}]}, options={"width": 16})
    run = trainer(tmp_path, Recalibrate(batches=2, at_end=False, per_test_size=True), max_epochs=1)
    run.fit(model, datamodule=images)
    trained = copy.deepcopy(model.model)

    with model.deployed():
        found = run.test(model, datamodule=images, verbose=False)

    for size, scores in zip((14, 28), found, strict=True):
        loader = images.plain_train_dataloader((size, size))
        shown = [images.on_after_batch_transfer(batch, 0) for _, batch in zip(range(2), loader, strict=False)]
        fitted = rc.recalibrate(copy.deepcopy(trained), [(batch.images,) for batch in shown]).eval()
        expected = rc.compress(fitted, model.deploy, example_input=model.example)
        losses = [
            torch.nn.functional.cross_entropy(expected(batch.images), batch.labels, reduction="sum")
            for batch in data(root, test_size=size).batches("test")
        ]
        torch.testing.assert_close(scores[f"deployed/loss@{size}"], float(sum(losses)) / 8, rtol=1e-4, atol=1e-5)
