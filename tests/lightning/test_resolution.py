import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("lightning")
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from timm.data.scheduled_sampler import ScheduledTransformDataset

from rescompress.errors import InputError, SpecError
from rescompress.lightning.resolution import ResolutionSchedule, SizeSchedule

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Share:
    """One rank's share of the indices, in the order of the epoch."""

    def __init__(self, length, rank=0, world=1):
        self.length, self.rank, self.world = length, rank, world
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length // self.world

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch))
        yield from order[self.rank :: self.world][: len(self)].tolist()


def epoch_of(schedule, batch_size, epoch, length=600, **share):
    """The batches of an epoch: (size, indices)."""
    sampler = schedule.batch_sampler(Share(length, **share), batch_size)
    sampler.set_epoch(epoch)
    batches = []
    for batch in sampler:
        (choice,) = {choice for _, choice in batch}  # one size per batch
        batches.append((schedule.sizes[choice], [index for index, _ in batch]))
    return batches


MIXED = SizeSchedule(sizes=(14, 20, 28), mode="mixed", level="batch_size", seed=3)
GROWING = SizeSchedule(sizes=(28, 14, 21), mode="progressive", level="batch_size", epochs=5)


def test_smaller_images_come_in_larger_batches_of_as_many_pixels():
    assert MIXED.batch_sizes(64) == (256, 125, 64)
    pixels = [count * size**2 for count, size in zip(MIXED.batch_sizes(64), MIXED.sizes, strict=True)]
    assert pixels == [50176, 50000, 50176]
    for size, indices in epoch_of(MIXED, 16, 0):
        assert 16 * 28**2 - size**2 < len(indices) * size**2 <= 16 * 28**2


def test_without_levelling_by_the_batch_size_it_stays():
    for level in ("learning_rate", "none"):
        assert SizeSchedule(sizes=(14, 28), mode="mixed", level=level).batch_sizes(64) == (64, 64)


def test_the_learning_rate_is_scaled_by_pixels_only_if_asked_for():
    scaled = SizeSchedule(sizes=(14, 28), mode="mixed", level="learning_rate")
    assert scaled.learning_rate_factor(14, 14) == 0.25
    assert scaled.learning_rate_factor(28, 28) == 1.0
    assert MIXED.learning_rate_factor(14, 14) == 1.0


def test_mixed_draws_alike_or_by_weights():
    for weights, shares in ((None, (1 / 3, 1 / 3, 1 / 3)), ((3.0, 1.0, 1.0), (0.6, 0.2, 0.2))):
        schedule = SizeSchedule(sizes=(14, 20, 28), mode="mixed", weights=weights)
        streamed = Counter(schedule.size_at(number) for number in range(3000))
        sampled = Counter(size for size, _ in epoch_of(schedule, 1, 0, length=3000))
        for found in (streamed, sampled):
            for size, share in zip(schedule.sizes, shares, strict=True):
                assert found[size] / 3000 == pytest.approx(share, abs=0.03)


def test_progressive_goes_from_the_smallest_to_the_largest_one_size_an_epoch():
    per_epoch = [{size for size, _ in epoch_of(GROWING, 16, epoch)} for epoch in range(5)]
    assert per_epoch[0] == {14}
    assert per_epoch[2] == {21}
    assert per_epoch[4] == {28}
    flat = [sorted(sizes) for sizes in per_epoch]
    assert all(before[-1] <= after[-1] and before[0] <= after[0] for before, after in itertools.pairwise(flat))
    streamed = [GROWING.size_at(epoch * 100, epoch) for epoch in range(6)]
    assert streamed == sorted(streamed)
    assert (streamed[0], streamed[2], streamed[4], streamed[5]) == (14, 21, 28, 28)


def test_every_epoch_has_as_many_batches():  # Lightning asks for the number once
    for schedule in (MIXED, GROWING):
        counts = {len(epoch_of(schedule, 16, epoch)) for epoch in range(5)}
        assert counts == {len(schedule.batch_sampler(Share(600), 16))}


def test_two_ranks_have_the_same_sizes_and_share_no_image():
    for schedule in (MIXED, GROWING):
        for epoch in (0, 3):
            one, other = (epoch_of(schedule, 8, epoch, rank=rank, world=2) for rank in (0, 1))
            assert [(size, len(indices)) for size, indices in one] == [(size, len(indices)) for size, indices in other]
            assert not {i for _, indices in one for i in indices} & {i for _, indices in other for i in indices}


def test_the_epochs_of_mixed_differ_and_come_again():
    sizes = [[size for size, _ in epoch_of(MIXED, 8, epoch)] for epoch in (0, 1, 0)]
    assert sizes[0] == sizes[2] != sizes[1]
    assert [MIXED.size_at(number) for number in range(20)] == [MIXED.size_at(number) for number in range(20)]
    other = SizeSchedule(sizes=MIXED.sizes, mode="mixed", seed=4)
    assert [other.size_at(number) for number in range(20)] != [MIXED.size_at(number) for number in range(20)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, "image sides"),
        ({"sizes": (0,)}, "image sides"),
        ({"sizes": (8, 8), "mode": "mixed"}, "twice"),
        ({"sizes": (8, 16)}, "takes one size"),
        ({"sizes": (8,), "mode": "mixed"}, "takes several sizes"),
        ({"sizes": (8, 16), "mode": "mixt"}, "did you mean 'mixed'"),
        ({"sizes": (8,), "level": "batch"}, "did you mean 'batch_size'"),
        ({"sizes": (8, 16), "mode": "progressive"}, "max_epochs"),
        ({"sizes": (8, 16), "mode": "mixed", "weights": (1.0,)}, "one positive number"),
        ({"sizes": (8,), "weights": (1.0,)}, "belong to mode 'mixed'"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(SpecError, match=message):
        SizeSchedule(**options)


def test_too_few_images_are_told_with_the_batches_that_they_do_not_fill():
    with pytest.raises(InputError, match=r"30 images .*\(256, 125, 64\)"):
        MIXED.batch_sampler(Share(30), 64)


class Squares(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 16, 16, generator=generator), index % 5


class Data(LightningDataModule):
    """Keeps to the schedule as the package's own do."""

    def __init__(self, obeys=True):
        super().__init__()
        self.obeys = obeys
        self.size_schedule = None

    def train_dataloader(self):
        self.seen = self.size_schedule
        if self.size_schedule is None or not self.obeys:
            return DataLoader(Squares(), batch_size=4)
        sizes = [lambda image, size=size: image[:, :size, :size] for size in self.size_schedule.sizes]
        sampler = self.size_schedule.batch_sampler(Share(48), 4)
        return DataLoader(ScheduledTransformDataset(Squares(), sizes), batch_sampler=sampler)


class Module(LightningModule):
    """Halves its learning rate after each step by a schedule that reckons from the present one."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.sizes, self.rates = [], []

    def training_step(self, batch, batch_idx):
        self.sizes.append(batch[0].shape[-1])
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        module = self

        torch.optim.SGD(self.parameters())  # from here on its step calls hooks as well, and so does the one below

        class Recording(torch.optim.SGD):
            def step(self, closure=None):
                with torch.enable_grad():
                    closure()
                module.rates.append(self.param_groups[0]["lr"])
                return super().step()

        optimizer = Recording(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module, data, *callbacks, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1} | options,
    )
    trainer.fit(module, data)
    return trainer


def test_the_data_module_has_the_schedule_before_its_loader_and_loses_it_after_the_run():
    data, module = Data(), Module()
    fit(module, data, ResolutionSchedule([8, 16], "progressive"), max_epochs=2)
    assert data.seen == SizeSchedule(sizes=(8, 16), mode="progressive", level="batch_size", epochs=2)
    assert data.size_schedule is None
    assert set(module.sizes) == {8}  # plain torch samplers are not told of epochs by Lightning


def test_one_step_sees_the_scaled_rate_and_the_scheduler_the_unscaled_one():
    module = Module()
    trainer = fit(module, Data(), ResolutionSchedule([8, 16], "mixed", "learning_rate"))
    assert set(module.sizes) == {8, 16}
    expected = [0.5**step * (size / 16) ** 2 for step, size in enumerate(module.sizes)]
    assert module.rates == pytest.approx(expected, rel=1e-12)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5 ** len(module.sizes)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_a_step_that_fails_leaves_the_unscaled_rate():
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if len(self.rates) == 3:
                raise RuntimeError("as a NaN does")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="as a NaN does"):
        fit(module, Data(), ResolutionSchedule([4, 8], "mixed", "learning_rate", weights=[1e9, 1.0]))
    assert module.rates[0] == 0.25
    assert module.optimizers().param_groups[0]["lr"] == 0.5**3


def test_a_step_of_several_batches_takes_the_mean_of_their_scales():
    module = Module()
    fit(module, Data(), ResolutionSchedule([8, 16], "mixed", "learning_rate"), accumulate_grad_batches=2)
    scales = [(size / 16) ** 2 for size in module.sizes]
    pairs = list(zip(scales[::2], scales[1::2], strict=True))
    assert len(set(map(sum, pairs))) > 1
    assert module.rates == pytest.approx([0.5**step * sum(pair) / 2 for step, pair in enumerate(pairs)], rel=1e-12)


def test_other_levels_leave_the_learning_rate_alone():
    module = Module()
    fit(module, Data(), ResolutionSchedule([8, 16], "mixed", "batch_size"))
    assert module.rates == [0.5**step for step in range(len(module.sizes))]


def test_a_foreign_data_module_is_told_what_it_lacks():
    class Foreign(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Squares())

    with pytest.raises(InputError, match="attribute 'size_schedule', got Foreign"):
        fit(Module(), Foreign(), ResolutionSchedule([8]))
    with pytest.raises(InputError, match="plain loaders"):
        fit(Module(), DataLoader(Squares()), ResolutionSchedule([8]))


def test_a_data_module_that_does_not_obey_is_found_out():
    with pytest.raises(InputError, match=r"images of 16 x 16.*\[8\].*Data does not keep"):
        fit(Module(), Data(obeys=False), ResolutionSchedule([8]))


def test_wrong_options_of_the_callback_are_told_at_once():
    with pytest.raises(SpecError, match="takes one size"):
        ResolutionSchedule([8, 16])
