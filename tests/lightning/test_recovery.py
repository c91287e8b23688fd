import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import rescompress as rc
from rescompress.errors import InputError, RescompressWarning, SpecError
from rescompress.lightning.recovery import Distill, Distiller, Recalibrate
from rescompress.recover.batches import ModelCall

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Net(nn.Module):
    """The smallest network that all callbacks have something to do in."""

    def __init__(self, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images):
        return self.fc(self.pool(self.conv2(self.bn1(self.conv1(images)).relu()).relu()).flatten(1))


def images(count=16, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator) * 3 + 1


def labelled(**options):
    data = images(**options)
    return DataLoader(TensorDataset(data, torch.arange(len(data)) % 5), batch_size=4)


class Taught(LightningModule):
    """Asks its distiller for the losses, as the contract says."""

    def __init__(self, net=None, scale=None, lr=0.05):
        super().__init__()
        torch.manual_seed(1)
        self.origin = (net or Net(),)  # in a tuple it is no submodule
        self.model = copy.deepcopy(self.origin[0])
        if scale is not None:
            self.model = rc.compress(self.origin[0], scale=scale, example_input=images(2))
        self.distiller = None
        self.lr = lr
        self.found = []

    def original(self):
        return copy.deepcopy(self.origin[0])

    def training_step(self, batch, batch_idx):
        if self.distiller is None:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.teacher = (self.distiller.teacher,)
        losses = self.distiller.losses(self.model, batch)
        self.found.append({name: float(loss.detach()) for name, loss in losses.items()})
        return losses["loss"]

    def validation_step(self, batch, batch_idx):
        self.model(batch[0])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def make_trainer(*callbacks, **options):
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False} | options,
    )


# Distill.


def test_the_loss_is_that_of_distillation_from_the_original():
    module = Taught(scale=0.5, lr=0.0)
    options = {"temperature": 2.0, "features": ["conv2"], "feature_weight": 0.3, "label_weight": 0.25}
    loader = labelled(count=4)
    student, teacher = copy.deepcopy(module.model).train(), module.original().eval()
    make_trainer(Distill(**options)).fit(module, loader)
    (data, labels), options["features"] = next(iter(loader)), ("conv2",)
    expected = rc.Distillation(**options).losses(student, teacher, ModelCall((data,), {}, labels))
    assert set(module.found[0]) == {"loss", "distillation", "features", "labels"}
    for name, loss in expected.items():
        torch.testing.assert_close(torch.tensor(module.found[0][name]), loss.detach())


def test_labels_are_learned_by_the_loss_that_is_given():
    distillation, images = rc.Distillation(label_weight=1.0), torch.rand(2, 3, 8, 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    batch = ModelCall((images,), {}, torch.tensor([1, 4]))

    found = distillation.losses(net, copy.deepcopy(net), batch, nn.CrossEntropyLoss(label_smoothing=0.3))

    expected = nn.functional.cross_entropy(net(images), batch.labels, label_smoothing=0.3)
    torch.testing.assert_close(found["loss"], expected)


def test_the_teacher_is_frozen_and_in_no_state_and_gone_afterwards(tmp_path):
    module = Taught(scale=0.5)
    keys, before = list(module.state_dict()), copy.deepcopy(module.origin[0].state_dict())
    saving = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(Distill(), saving, enable_checkpointing=True, max_epochs=2).fit(module, labelled())
    (teacher,) = module.teacher
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == keys == list(module.state_dict())
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == len(list(module.model.parameters()))
    assert module.distiller is None


def test_the_student_comes_nearer_to_the_teacher():
    module = Taught(scale=0.5)
    make_trainer(Distill(), max_epochs=15).fit(module, labelled())
    first, last = (sum(found["loss"] for found in part) for part in (module.found[:4], module.found[-4:]))
    assert last < 0.5 * first


def test_the_teacher_sees_the_images_at_its_own_full_resolution():
    sizes = {}

    class Watched(Taught):
        def original(self):
            net = super().original()
            net.conv2.register_forward_hook(lambda _, inputs, __: sizes.update(teacher=tuple(inputs[0].shape)))
            return net

    module = Watched(scale=0.5)
    module.model.conv2.register_forward_hook(lambda _, inputs, __: sizes.update(student=tuple(inputs[0].shape)))
    make_trainer(Distill(), max_steps=1, max_epochs=None).fit(module, labelled())
    assert sizes == {"teacher": (4, 6, 8, 8), "student": (4, 6, 4, 4)}


def test_a_teacher_can_be_given():
    module, teacher = Taught(), Net()
    make_trainer(Distill(teacher), max_steps=1, max_epochs=None).fit(module, labelled())
    assert module.teacher == (teacher,)


def test_the_teacher_follows_the_images_into_half_precision():
    distiller = Distiller(Net(), rc.Distillation())
    student, data = Net().to(torch.bfloat16), images(4).to(torch.bfloat16)
    losses = distiller.losses(student, (data, torch.zeros(4, dtype=torch.long)))
    assert next(distiller.teacher.parameters()).dtype == torch.bfloat16
    assert losses["loss"].isfinite()


def test_modules_that_cannot_be_taught_are_told():
    class Foreign(Taught):
        original = None

    with pytest.raises(InputError, match=r"no method original\(\).*Distill\(teacher=...\)"):
        make_trainer(Distill()).fit(Foreign(), labelled())
    module = Taught()
    del module.distiller
    with pytest.raises(InputError, match="no attribute 'distiller'"):
        make_trainer(Distill()).fit(module, labelled())
    with pytest.raises(SpecError, match="temperature"):
        Distill(temperature=0)


# Recalibrate.


class Data(LightningDataModule):
    """Somebody's: augments in the loader by a shift, and finishes its batches in a hook."""

    test_size = (16, 16)

    def __init__(self, test_sides=(16,)):
        super().__init__()
        self.test_sides = test_sides
        self.asked = []
        self.trainings = []

    def train_dataloader(self):
        return DataLoader(TensorDataset(images() + 5, torch.zeros(16, dtype=torch.long)), batch_size=4)

    def val_dataloader(self):
        return labelled(seed=1)

    def test_dataloader(self):
        return [labelled(side=side, seed=2) for side in self.test_sides]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.trainings.append(self.trainer.training)
        return [batch[0] * 2, batch[1]]


class PlainData(Data):
    """Gives plain training images of any size as well, as those of the package do."""

    def plain_train_dataloader(self, size):
        self.asked.append(size)
        return labelled(side=size[0])


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def recalibrated(model, batches):
    return statistics(rc.recalibrate(copy.deepcopy(model), batches))


def test_at_the_end_the_statistics_are_those_of_plain_images_of_the_test_size():
    module, data = Taught(), PlainData()
    make_trainer(Recalibrate(batches=3)).fit(module, data)
    assert data.asked == [(16, 16)]
    expected = recalibrated(module.model, [batch * 2 for batch, _ in list(labelled())[:3]])
    torch.testing.assert_close(statistics(module.model), expected)


def test_what_is_not_trained_is_recalibrated_as_well():
    module, data = Taught(), PlainData()
    before = copy.deepcopy(module.model)
    make_trainer(Recalibrate(batches=3), max_epochs=0).fit(module, data)
    expected = recalibrated(before, [batch * 2 for batch, _ in list(labelled())[:3]])
    torch.testing.assert_close(statistics(module.model), expected)


def test_other_data_modules_give_their_training_images_and_see_no_training():
    module, data = Taught(), Data()
    make_trainer(Recalibrate(batches=4), limit_val_batches=0).fit(module, data)
    assert data.trainings == [True] * 4 + [False] * 4
    expected = recalibrated(module.model, [batch * 2 for batch, _ in data.train_dataloader()])
    torch.testing.assert_close(statistics(module.model), expected)


def test_plain_loaders_are_enough():
    module, loader = Taught(), labelled()
    make_trainer(Recalibrate()).fit(module, loader)
    torch.testing.assert_close(statistics(module.model), recalibrated(module.model, [batch for batch, _ in loader]))


def test_before_each_validation_changes_what_is_validated_and_no_weight():
    seen = []

    class Watch(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if not trainer.sanity_checking and batch_idx == 0:
                seen.append((copy.deepcopy(pl_module.model), statistics(pl_module.model)))

    weights = []
    for callbacks in ([], [Recalibrate(at_end=False, before_validation=True), Watch()]):
        module, data = Taught(), PlainData()
        make_trainer(*callbacks, max_epochs=2).fit(module, data)
        weights.append(dict(module.model.named_parameters()))
    assert data.asked == [(16, 16)] * 2
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    for model, found in seen:
        torch.testing.assert_close(found, recalibrated(model, [batch * 2 for batch, _ in labelled()]))


def test_each_test_size_is_tested_with_statistics_of_its_own():
    seen = {}

    class Watch(Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen[dataloader_idx] = statistics(pl_module.model)

    module, data = Taught(), PlainData(test_sides=(16, 8))
    before = statistics(module.model)
    make_trainer(Recalibrate(per_test_size=True), Watch()).test(module, data, verbose=False)
    assert data.asked == [(16, 16), (8, 8)]
    for index, side in enumerate((16, 8)):
        expected = recalibrated(module.model, [batch * 2 for batch, _ in labelled(side=side)])
        torch.testing.assert_close(seen[index], expected)
    assert not torch.equal(seen[0]["bn1.running_mean"], seen[1]["bn1.running_mean"])
    torch.testing.assert_close(statistics(module.model), before, rtol=0, atol=0)


def test_recalibrating_per_test_size_needs_images_of_that_size():
    with pytest.raises(InputError, match="plain_train_dataloader"):
        make_trainer(Recalibrate(per_test_size=True)).test(Taught(), labelled(), verbose=False)


def test_a_model_without_statistics_is_told_and_trained():
    module = Taught(Net(norm=False))
    with pytest.warns(RescompressWarning, match="no layer of this Net keeps BatchNorm statistics"):
        make_trainer(Recalibrate()).fit(module, labelled())


# All callbacks, in two processes.


def test_two_processes_agree_on_sizes_rates_teacher_and_statistics(tmp_path):
    script = Path(__file__).with_name("ddp_callbacks.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one["sizes"] == other["sizes"]
    assert set(one["sizes"]) == {8, 16}
    assert one["rates"] == other["rates"] == [(size / 16) ** 2 for size in one["sizes"]]
    assert sorted(i for rank in (one, other) for batch in rank["indices"] for i in batch) == list(range(64))
    assert one["weights"] == other["weights"]  # the gradients were averaged: each rank saw other images
    assert one["state"] == other["state"] == [f"model.{name}" for name in names_of_the_net()]
    # The statistics are those of all images, half of which each process saw.
    assert one["mean"] == other["mean"]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    for parameter, values in zip(model.parameters(), one["weights"], strict=False):
        parameter.data.copy_(torch.tensor(values).view_as(parameter))
    every = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)) + i / 8 for i in range(64)])
    rc.recalibrate(model, [every])
    torch.testing.assert_close(torch.tensor(one["mean"]), model[1].running_mean, rtol=1e-4, atol=1e-5)
    # Rank 0 alone writes the costs down, of both.
    assert (one["rows"], other["rows"]) == (1, 0)
    assert one["costs"]["images"] == 64
    assert one["costs"]["macs"] == (4 * 27 * 256 + 4 * 5)
    assert len((tmp_path / "cost.csv").read_text().splitlines()) == 2


def names_of_the_net():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    return list(net.state_dict())
