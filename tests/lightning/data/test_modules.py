"""What all DataModules promise: finished batches, the same after a kill and with any workers, shared by ranks."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from rescompress.lightning.batches import Batch
from rescompress.lightning.data import ImageData
from rescompress.recover.batches import take_apart
from tests.lightning.data.modules import MODULES

pytestmark = pytest.mark.usefixtures("one_thread")

each = pytest.mark.parametrize("name", list(MODULES))


def epoch(data: ImageData, number: int = 0, skip: int = 0, split: str = "train") -> list[Batch]:
    data.setup()
    loader = data._loader(split, training=split == "train")
    loader.load_state_dict({"epoch": number, "batches": skip, "shares": list(loader._shares)})
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.names for batch in found] == [batch.names for batch in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)
        torch.testing.assert_close(one.labels, other.labels, rtol=0, atol=0)


@each
def test_batches_are_normalised_floats_with_labels_and_names(name: str, tmp_path: Path) -> None:
    data = MODULES[name](tmp_path / "data")

    for split in ("train", "val", "test"):
        batch = epoch(data, split=split)[0]
        assert isinstance(batch, Batch)
        assert batch.images.dtype == torch.float32
        assert batch.images.shape[1:] == (data.channels, *(data.train_size if split == "train" else data.test_size))
        assert batch.labels.dtype == torch.int64
        assert len(batch.images) == len(batch.labels) == len(batch.names)
        valid = batch.labels[batch.labels != 255]
        assert 0 <= int(valid.min()) <= int(valid.max()) < data.num_classes == len(data.class_names)
        assert take_apart(batch).labels is batch.labels


@each
def test_a_resumed_epoch_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    data = MODULES[name](tmp_path / "data")
    whole = epoch(data, 2)

    assert len(whole) >= 3
    same(epoch(data, 2, skip=2), whole[2:])


@each
def test_epochs_differ_and_repeat_alike(name: str, tmp_path: Path) -> None:
    data = MODULES[name](tmp_path / "data")
    first, second = epoch(data, 0), epoch(data, 1)

    assert [batch.names for batch in first] != [batch.names for batch in second]
    torch.rand(5)  # the global state has no say
    same(epoch(data, 1), second)


@pytest.mark.parametrize("name", ["folders", "folders_on_device", "shards", "cityscapes"])
def test_workers_do_not_change_what_is_seen(name: str, tmp_path: Path) -> None:
    data = MODULES[name](tmp_path / "data")
    alone, resumed = epoch(data, 1), epoch(data, 1, skip=1)
    data.workers = 2

    same(epoch(data, 1), alone)
    same(epoch(data, 1, skip=1), resumed)
    data.workers = 0
    evaluated = epoch(data, split="val")
    data.workers = 2
    same(epoch(data, split="val"), evaluated)


@each
def test_what_goes_to_workers_can_be_pickled(name: str, tmp_path: Path) -> None:
    # Where processes are not forked, the source is sent to them.
    data = MODULES[name](tmp_path / "data")
    whole = epoch(data)
    loader = data.train_dataloader()
    source = pickle.loads(pickle.dumps(loader.loader.dataset))

    loaded = list(source) if name == "shards" else [source.__getitems__(keys) for keys in loader.loader.batch_sampler]
    same([data.on_after_batch_transfer(batch, 0) for batch in loaded], whole)


@each
def test_two_ranks_share_the_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MODULES[name](tmp_path / "data", batch_size=2, test_batch_size=2)
    ranks: list[dict[str, Any]] = []
    for rank in range(2):
        monkeypatch.setattr(ImageData, "shares", (rank, 2))
        ranks.append({split: epoch(data, split=split) for split in ("train", "val")})

    names = {
        split: [[name for batch in rank[split] for name in batch.names] for rank in ranks] for split in ("train", "val")
    }
    assert not set(names["train"][0]) & set(names["train"][1])
    assert len(ranks[0]["train"]) == len(ranks[1]["train"])
    evaluated = names["val"][0] + names["val"][1]
    assert len(evaluated) == len(set(evaluated))
    assert len(ranks[0]["val"]) == len(ranks[1]["val"])
    monkeypatch.setattr(ImageData, "shares", (0, 1))
    everything = {name for batch in epoch(data, split="val") for name in batch.names}
    assert set(evaluated) == everything


@pytest.mark.parametrize("name", [name for name in MODULES if name != "cityscapes"])
def test_classes_can_be_told_from_the_pixels(name: str, tmp_path: Path) -> None:
    # The layouts make brighter pictures of later classes; labels that came loose from their images would not follow.
    data = MODULES[name](tmp_path / "data")
    batches = epoch(data, split="test")
    brightness = torch.cat([batch.images.mean((1, 2, 3)) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])

    means = [brightness[labels == label].mean() for label in range(data.num_classes)]
    assert torch.stack(means).diff().min() > 0


@each
def test_training_images_without_augmentation_are_shuffled(name: str, tmp_path: Path) -> None:
    data = MODULES[name](tmp_path / "data", **({} if name == "cityscapes" else {"mixup": 0.5}))
    data.setup()

    plain = [data.on_after_batch_transfer(batch, 0) for batch in data.plain_train_dataloader((8, 8))]

    assert {name for batch in plain for name in batch.names} == {name for batch in epoch(data) for name in batch.names}
    seen = [name for batch in plain for name in batch.names]
    assert seen != sorted(seen)
    assert all(batch.images.shape[-2:] == (8, 8) and batch.labels.dtype == torch.int64 for batch in plain)
    again = [data.on_after_batch_transfer(batch, 0) for batch in data.plain_train_dataloader((8, 8))]
    same(again, plain)
    # As in evaluation: the same file gives the same pixels in another epoch.
    loader = data.plain_train_dataloader((8, 8))
    loader.set_epoch(1)
    pixels = {name: image for batch in plain for name, image in zip(batch.names, batch.images, strict=True)}
    for batch in (data.on_after_batch_transfer(batch, 0) for batch in loader):
        for name_, image in zip(batch.names, batch.images, strict=True):
            if name_ in pixels:
                torch.testing.assert_close(image, pixels[name_], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "cityscapes"])
def test_each_test_size_has_its_loader(name: str, tmp_path: Path) -> None:
    data = MODULES[name](tmp_path / "data", test_size=24, test_sizes=[8, 24])
    data.setup()

    loaders = data.test_dataloader()

    assert isinstance(loaders, list)
    found = [[data.on_after_batch_transfer(batch, 0) for batch in loader] for loader in loaders]
    assert [{batch.images.shape[-1] for batch in batches} for batches in found] == [{8}, {24}]
    assert [batch.names for batch in found[0]] == [batch.names for batch in found[1]]
