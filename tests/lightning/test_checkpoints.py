"""Checkpoints rebuild the compressed model, say how it was compressed, and survive a full disk."""

import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress.compress import record_of
from rescompress.errors import CheckpointError, InputError, RescompressWarning, SpecError

pytest.importorskip("lightning")
pytest.importorskip("timm")

import timm
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from rescompress.lightning import (
    AtomicCheckpoints,
    Classifier,
    LastCheckpoint,
    SpecInCheckpoint,
    compress_as_saved,
    load_model,
)
from rescompress.lightning.checkpoints import record_in, spec_in
from tests.lightning.tiny import TINY, Stop, Stopped, Tiny, tiny_net

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("one_thread", "seeded")]

HALF = {"schema": 1, "steps": [{"kind": "stem_resize", "scale": 0.5}]}
THREE_QUARTERS = {"steps": [{"kind": "stem_resize", "scale": 0.75}]}


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": 1}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), plugins=[AtomicCheckpoints()], **{**quiet, **options})


def trained(folder: Path, **options: Any) -> Classifier:
    module = Classifier("timm:test_resnet", **{"num_classes": 4, "input_size": 32, "spec": HALF, **options})
    trainer(LastCheckpoint(str(folder)), limit_train_batches=2, limit_val_batches=0).fit(module, datamodule=Tiny())
    return module


def test_a_module_made_by_hand_comes_back(tmp_path: Path) -> None:
    """Its loss, optimizer and the file of its first weights are objects and places that a checkpoint cannot hold."""
    (tmp_path / "half.yaml").write_text(rc.Spec.from_dict(HALF).to_yaml())
    original = Classifier("timm:test_resnet", num_classes=4, seed=3)
    torch.save(original.model.state_dict(), tmp_path / "first.pt")
    module = trained(
        tmp_path,
        spec=str(tmp_path / "half.yaml"),
        initial_weights=str(tmp_path / "first.pt"),
        loss=nn.CrossEntropyLoss(weight=torch.ones(4)),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01),
    )
    for name in ("half.yaml", "first.pt"):
        (tmp_path / name).unlink()

    path = tmp_path / "last.ckpt"
    torch.load(path, weights_only=True)  # nothing in it but data
    loaded = Classifier.load_from_checkpoint(path)

    assert rc.spec_of(loaded.model) == rc.spec_of(module.model)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded.model.eval()(images), module.model.eval()(images), rtol=0, atol=0)
    torch.testing.assert_close(load_model(path)(images), module.model(images), rtol=0, atol=0)
    assert loaded.hparams["spec"] == HALF
    assert "optimizer" not in loaded.hparams
    with pytest.raises(InputError, match=r"there is no weights file .*first\.pt"):
        loaded.original()  # never other ones in silence


def test_the_spec_can_be_read_without_the_model(tmp_path: Path) -> None:
    trained(tmp_path)
    assert spec_in(tmp_path / "last.ckpt") == rc.Spec.from_dict(HALF)
    with pytest.raises(SpecError, match="no compressed module 'backbone'; it has model"):
        spec_in(tmp_path / "last.ckpt", "backbone")


def test_another_spec_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(InputError, match=r"another compression: model was compressed by .*0\.5.*and is .*0\.75"):
        Classifier.load_from_checkpoint(tmp_path / "last.ckpt", spec=THREE_QUARTERS)
    with pytest.raises(InputError, match="and is not compressed now"):
        Classifier.load_from_checkpoint(tmp_path / "last.ckpt", spec=None)


class Foreign(LightningModule):
    """Somebody's own module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch.images), batch.labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_module_of_your_own_has_its_spec_in_the_checkpoint(tmp_path: Path) -> None:
    example = torch.rand(1, 3, 32, 32)
    small = rc.compress(tiny_net(4).eval(), scale=0.5, example_input=example)
    callbacks = (LastCheckpoint(str(tmp_path)), SpecInCheckpoint())
    trainer(*callbacks, limit_train_batches=2).fit(Foreign(small), datamodule=Tiny())
    path = tmp_path / "last.ckpt"
    assert spec_in(path, "net") == rc.spec_of(small)

    other = Foreign(rc.compress(tiny_net(4).eval(), scale=0.75, example_input=example))
    with pytest.raises(InputError, match="another compression: net was compressed"):
        trainer(SpecInCheckpoint(), max_epochs=2, enable_checkpointing=False).fit(
            other, datamodule=Tiny(), ckpt_path=path
        )
    with pytest.raises(InputError, match=r"no checkpoint of Classifier or Segmenter; load it by .*Foreign\.load_from"):
        load_model(path)


class Aware(Foreign):
    """One that is built around a plain model."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        compress_as_saved(self, checkpoint)


VIT = {"num_classes": 4, "img_size": 32}
LARGER_PATCHES = rc.Spec.of(rc.PatchResize(scale=0.5))


def saved(folder: Path, net: nn.Module, *callbacks: Callback, **data: Any) -> Path:
    """Return the checkpoint of one step of a compressed model in somebody's own module."""
    callbacks = (SpecInCheckpoint(), LastCheckpoint(str(folder)), *callbacks)
    trainer(*callbacks, limit_train_batches=1, limit_val_batches=0).fit(Foreign(net), datamodule=Tiny(**data))
    return folder / "last.ckpt"


def test_a_module_built_around_a_plain_model_comes_back_compressed(tmp_path: Path) -> None:
    """Also if its images are neither of the size nor of the channels that an example has by default."""
    small = rc.compress(tiny_net(4, in_chans=1), scale=0.5, example_input=torch.rand(1, 1, 24, 40))
    path = saved(tmp_path, small, channels=1)

    loaded = Aware.load_from_checkpoint(path, net=tiny_net(4, in_chans=1))

    assert rc.spec_of(loaded.net) == rc.spec_of(small)
    assert record_of(loaded.net).anatomy == record_of(small).anatomy
    images = torch.rand(2, 1, 24, 40)
    torch.testing.assert_close(loaded.net.eval()(images), small.eval()(images), rtol=0, atol=0)


def test_a_part_inside_a_compressed_one_is_compressed_before_it() -> None:
    example = torch.rand(1, 3, 32, 32)
    inner = rc.compress(tiny_net(4), scale=0.5, example_input=example)
    small = Foreign(rc.compress(nn.Sequential(inner), rc.InputResize(scale=0.5), example_input=example))
    checkpoint: dict[str, Any] = {}
    record_in(small, checkpoint)
    module = Foreign(nn.Sequential(tiny_net(4)))

    compress_as_saved(module, checkpoint)

    for part in ("net", "net.0"):
        was, now = (record_of(one.get_submodule(part)) for one in (small, module))
        assert (now.spec, now.anatomy) == (was.spec, was.anatomy)


def test_checkpoints_from_before_said_nothing_of_channels() -> None:
    parts = {"net": {"spec": HALF, "input_size": [32, 32]}}
    module = Foreign(tiny_net(4))
    compress_as_saved(module, {"rescompress": {"class": "Foreign", "parts": parts}})
    assert rc.spec_of(module.net) == rc.Spec.from_dict(HALF)


def test_a_module_of_another_spec_or_without_that_part_is_refused(tmp_path: Path) -> None:
    example = torch.rand(1, 3, 32, 32)
    path = saved(tmp_path, rc.compress(tiny_net(4), scale=0.5, example_input=example))
    other = rc.compress(tiny_net(4), scale=0.75, example_input=example)
    with pytest.raises(InputError, match=r"another compression: net was compressed by .*0\.5.*and is .*0\.75"):
        Aware.load_from_checkpoint(path, net=other)
    with pytest.raises(InputError, match=r"net was compressed .*, and is not compressed now"):
        compress_as_saved(nn.Sequential(tiny_net(4)), torch.load(path, weights_only=True))


def test_a_plain_module_goes_on_as_it_was_saved(tmp_path: Path) -> None:
    """Larger patches are other parameters: it is these that the optimizer must hold."""
    plain = timm.create_model("test_vit", **VIT)
    path = saved(tmp_path, rc.compress(plain, LARGER_PATCHES, example_input=torch.rand(1, 3, 32, 32)))
    module = Aware(timm.create_model("test_vit", **VIT))
    run = trainer(SpecInCheckpoint(), max_epochs=2, limit_train_batches=1, limit_val_batches=0)

    run.fit(module, datamodule=Tiny(), ckpt_path=path)

    assert rc.spec_of(module.net) == LARGER_PATCHES
    assert run.global_step == 2
    (optimizer,) = run.optimizers
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert [id(parameter) for parameter in held] == [id(parameter) for parameter in module.parameters()]


class Late(SingleDeviceStrategy):
    """Makes the optimizers before it loads, as FSDP and DeepSpeed do."""

    restore_checkpoint_after_setup = True


def test_parameters_that_an_optimizer_holds_are_left_alone(tmp_path: Path) -> None:
    path = saved(tmp_path, rc.compress(tiny_net(4), scale=0.5, example_input=torch.rand(1, 3, 32, 32)))
    module = Aware(tiny_net(4))
    run = trainer(SpecInCheckpoint(), strategy=Late("cpu"), max_epochs=2)
    with pytest.raises(InputError, match=r"net cannot .*optimizer of this Aware holds .*; compress it in __init__ or"):
        run.fit(module, datamodule=Tiny(), ckpt_path=path)
    with pytest.raises(SpecError, match="has not been compressed"):
        rc.spec_of(module.net)


def test_resumed_without_the_callback_lightning_names_it(tmp_path: Path) -> None:
    small = rc.compress(tiny_net(4), scale=0.5, example_input=torch.rand(1, 3, 32, 32))
    path = saved(tmp_path, small)
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: .*SpecInCheckpoint"):
        trainer(limit_train_batches=1, limit_val_batches=0).fit(Foreign(small), datamodule=Tiny(), ckpt_path=path)


def test_checkpoints_without_a_spec_are_warned_of(tmp_path: Path) -> None:
    small = rc.compress(tiny_net(4), scale=0.5, example_input=torch.rand(1, 3, 32, 32))
    with pytest.warns(RescompressWarning, match="save_weights_only=True do not say how their model was compressed"):
        path = saved(tmp_path, small, ModelCheckpoint(tmp_path, "weights", save_weights_only=True))
    assert "rescompress" not in torch.load(path.with_name("weights.ckpt"), weights_only=True)
    assert "rescompress" in torch.load(path, weights_only=True)


class DiskFull(Callback):
    """From this step on, no file may grow beyond a few bytes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    module = Classifier(TINY, num_classes=4, input_size=32, spec=HALF)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write .*last\.ckpt: File too large; the one from before is st"
        ):
            trainer(DiskFull(3), LastCheckpoint(str(tmp_path), 2)).fit(module, datamodule=Tiny())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert isinstance(load_model(tmp_path / "last.ckpt"), nn.Module)

    # The same command goes on from it.
    run = trainer(LastCheckpoint(str(tmp_path), 2))
    run.fit(module, datamodule=Tiny(), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 8
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


def test_what_is_no_failure_of_the_disk_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle") as raised:
        AtomicCheckpoints().save_checkpoint({"a": lambda: 0}, tmp_path / "a.ckpt")
    assert not isinstance(raised.value, CheckpointError)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(InputError, match=r"a\.ckpt is damaged or no checkpoint"):
        load_model(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="there is no checkpoint"):
        load_model(tmp_path / "b.ckpt")
    torch.save({"a": 1}, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match="no checkpoint of Lightning"):
        load_model(tmp_path / "c.ckpt")


def test_last_is_written_between_epochs_and_at_their_ends(tmp_path: Path) -> None:
    """8 steps an epoch: at 4, and after each epoch with its validation, but not at its last step before that."""
    written: list[int] = []

    class Listed(AtomicCheckpoints):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            written.append(checkpoint["global_step"])
            super().save_checkpoint(checkpoint, path, storage_options)

    module = Classifier(TINY, num_classes=4, input_size=32)
    run = trainer(LastCheckpoint(str(tmp_path), 4), max_epochs=2)
    run.strategy.checkpoint_io = Listed()
    run.fit(module, datamodule=Tiny())
    assert written == [4, 8, 12, 16, 16]
    with pytest.raises(Stopped):
        trainer(Stop(1, str(tmp_path / "m")), LastCheckpoint(str(tmp_path / "n"))).fit(module, datamodule=Tiny())
    assert not (tmp_path / "n").exists()


def test_a_resumed_run_may_write_at_another_interval(tmp_path: Path) -> None:
    module = Classifier(TINY, num_classes=4, input_size=32)
    trainer(LastCheckpoint(str(tmp_path), 2), limit_train_batches=2).fit(module, datamodule=Tiny())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = trainer(LastCheckpoint(str(tmp_path), 3), max_epochs=2)
        run.fit(module, datamodule=Tiny(), ckpt_path=tmp_path / "last.ckpt")
    # Lightning says so of callbacks whose state is in the checkpoint and that it does not find again.
    assert not [one for one in said if "LastCheckpoint" in str(one.message)]
