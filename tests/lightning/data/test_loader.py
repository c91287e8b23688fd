"""Under Lightning: a run that was interrupted anywhere sees what the uninterrupted one would have; sizes, precision."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rescompress.errors import InputError, RescompressWarning
from rescompress.lightning.batches import Batch
from rescompress.lightning.data import ImageData
from rescompress.lightning.data._loader import CorruptFiles, EpochLoader, Loaded
from rescompress.lightning.resolution import SizeSchedule
from tests.lightning.data.modules import MODULES

pytestmark = pytest.mark.usefixtures("one_thread")


class Seen(LightningModule):
    """Notes the batches that it is trained and validated on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[str, ...], float]] = []
        self.validated: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.global_step, batch.names, float(batch.images.double().sum())))
        self.dtypes.add(batch.images.dtype)
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.extend(batch.names)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saves(Callback):
    """Writes a checkpoint after every step and every epoch, where ModelCheckpoint does; without a state of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"end-step={trainer.global_step}.ckpt")


def fit(data: ImageData, root: Path, ckpt_path: Path | None = None, **options: Any) -> Seen:
    model = Seen()
    given = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    options["enable_checkpointing"] = False
    trainer = Trainer(default_root_dir=root, enable_model_summary=False, **(given | options))
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return model


@pytest.mark.parametrize("name", ["fashion_mnist", "shards", "folders"])
def test_a_run_resumed_from_any_checkpoint_sees_the_rest(name: str, tmp_path: Path) -> None:
    model = fit(MODULES[name](tmp_path / "data"), tmp_path, callbacks=[Saves(tmp_path / "saved")])
    whole = model.seen
    assert len(model.validated) > len(set(model.validated)) > 0
    steps = len(whole) // 2

    for stem, done in [
        ("step=2", 2),
        (f"step={steps}", steps),
        (f"end-step={steps}", steps),
        (f"step={steps + 1}", steps + 1),
    ]:
        data = MODULES[name](tmp_path / stem)
        resumed = fit(data, tmp_path, tmp_path / "saved" / f"{stem}.ckpt").seen
        # Lightning's warning of loaders that cannot be resumed would be an error here.
        assert resumed == whole[done:], stem


def test_a_run_limited_in_steps_resumes_alike(tmp_path: Path) -> None:
    options = {"max_epochs": -1, "limit_train_batches": 5}
    whole = fit(
        MODULES["medmnist"](tmp_path / "a"), tmp_path, callbacks=[Saves(tmp_path / "saved")], max_steps=12, **options
    ).seen

    assert len(whole) == 12
    assert [names for _, names, _ in whole[:5]] != [names for _, names, _ in whole[5:10]]
    for done in (5, 7):
        data = MODULES["medmnist"](tmp_path / f"b{done}")
        resumed = fit(data, tmp_path, tmp_path / "saved" / f"step={done}.ckpt", max_steps=12, **options).seen
        assert resumed == whole[done:]


def test_a_checkpoint_from_within_a_step_repeats_its_batch(tmp_path: Path) -> None:
    class Stops(Seen):
        def on_after_backward(self) -> None:
            if self.global_step == 3 and not torch.is_inference_mode_enabled():
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")
                raise RuntimeError("killed")

    whole = fit(MODULES["fashion_mnist"](tmp_path / "a"), tmp_path).seen
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(Stops(), datamodule=MODULES["fashion_mnist"](tmp_path / "b"))

    resumed = fit(MODULES["fashion_mnist"](tmp_path / "c"), tmp_path, tmp_path / "within.ckpt").seen
    assert resumed == whole[3:]


def test_workers_end_with_the_training(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    data = MODULES["folders"](tmp_path / "a", workers=1)
    model = fit(data, tmp_path, max_epochs=1)

    assert len(model.seen) == 6
    assert len(set(model.validated)) == 12
    assert set(multiprocessing.active_children()) <= before


def test_the_images_have_the_precision_of_the_model(tmp_path: Path) -> None:
    model = fit(MODULES["fashion_mnist"](tmp_path / "a"), tmp_path, precision="bf16-true", max_steps=1)

    assert model.dtypes == {torch.bfloat16}


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="overfit"):
        seen = fit(MODULES["fashion_mnist"](tmp_path / "a"), tmp_path, overfit_batches=2).seen

    assert [names for _, names, _ in seen[:2]] == [names for _, names, _ in seen[2:]]


def test_a_schedule_sets_size_and_batch_size_and_is_resumed(tmp_path: Path) -> None:
    def sized(root: Path) -> ImageData:
        data = MODULES["folders"](root)
        data.size_schedule = SizeSchedule(sizes=(16, 8), mode="mixed", level="batch_size")
        data.setup()
        return data

    data = sized(tmp_path / "a")
    whole = list(data.batches())
    loader = sized(tmp_path / "b").train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 1, "shares": [1, 4]})

    assert {(len(batch.images), batch.images.shape[-1]) for batch in whole} == {(4, 16), (16, 8)}
    assert data.train_sizes == [(16, 16), (8, 8)]
    assert [batch.names for batch in loader] == [batch.names for batch in whole[1:]]


def test_a_schedule_sets_the_size_of_arrays_on_the_device(tmp_path: Path) -> None:
    data = MODULES["fashion_mnist"](tmp_path / "a")
    data.size_schedule = SizeSchedule(sizes=(28, 14), mode="mixed", level="batch_size")

    found = {(len(batch.images), batch.images.shape[-1]) for batch in data.batches()}

    assert found == {(4, 28), (16, 14)}


def test_a_stream_has_the_size_of_the_batch_number(tmp_path: Path) -> None:
    data = MODULES["shards"](tmp_path / "a")
    schedule = SizeSchedule(sizes=(16, 8), mode="mixed", level="learning_rate")
    data.size_schedule = schedule
    data.setup()
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 2, "batches": 3, "shares": [1, 4]})

    sides = [data.on_after_batch_transfer(batch, 0).images.shape[-1] for batch in loader]

    assert sides == [schedule.size_at(2 * 8 + number, 2) for number in range(3, 8)]
    assert set(sides) == {8, 16}


def test_a_stream_refuses_batches_of_several_sizes(tmp_path: Path) -> None:
    data = MODULES["shards"](tmp_path / "a")
    data.size_schedule = SizeSchedule(sizes=(16, 8), mode="mixed", level="batch_size")

    with pytest.raises(InputError, match="level to learning_rate"):
        next(data.batches())


def test_mixing_makes_weights_of_labels_and_repeats_alike(tmp_path: Path) -> None:
    data = MODULES["fashion_mnist"](tmp_path / "a", mixup=0.4, cutmix=1.0)
    plain = next(MODULES["fashion_mnist"](tmp_path / "b").batches())

    first, again = next(data.batches()), next(data.batches())

    assert first.labels.shape == (4, 10)
    torch.testing.assert_close(first.labels.sum(1), torch.ones(4))
    torch.testing.assert_close(first.images, again.images, rtol=0, atol=0)
    assert not torch.equal(first.images, plain.images)
    assert next(data.batches("val")).labels.dtype == torch.int64


def test_another_number_of_processes_is_told_on_resuming(tmp_path: Path) -> None:
    loader = MODULES["fashion_mnist"](tmp_path / "a").train_dataloader()

    with pytest.warns(RescompressWarning, match=r"interrupted on 2 process\(es\) with batches of 4"):
        loader.load_state_dict({"epoch": 0, "batches": 2, "shares": [2, 4]})


def test_lists_that_pinning_made_are_tuples_again() -> None:
    class Start:
        def begin(self, epoch: int, skip: int) -> None:
            pass

    pinned = Loaded(torch.zeros(1, 1, 2, 2), torch.zeros(1), ["a"], size=[4, 4], broken=[["b", "bad"]])  # type: ignore[arg-type]
    corrupt = CorruptFiles("skip", "train")
    loader = EpochLoader([pinned, pinned], Start(), 3, corrupt)  # type: ignore[arg-type]

    batch = next(iter(loader))

    assert (batch.names, batch.size, batch.broken) == (("a",), (4, 4), (("b", "bad"),))


def test_corrupt_files_are_told_once_with_the_last_batch() -> None:
    class Start:
        def begin(self, epoch: int, skip: int) -> None:
            pass

    batch = Loaded(torch.zeros(1, 1, 2, 2), torch.zeros(1), ("a",), broken=(("b.png", "cut short"),))
    corrupt = CorruptFiles("skip", "train")
    loader = EpochLoader([batch, batch], Start(), 2, corrupt)  # type: ignore[arg-type]

    with pytest.warns(RescompressWarning, match=r"^1 file\(s\) of train could not be read and were skipped: b.png$"):
        iterator = iter(loader)
        next(iterator), next(iterator)
    assert corrupt.found == {"b.png": "cut short"}
    list(loader)  # no second warning, which would be an error
