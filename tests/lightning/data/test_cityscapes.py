"""Cityscapes: labels of 19 classes from either file, mmseg's transforms on image and label alike, full-size tests."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("mmseg")

from rescompress.errors import InputError, RescompressWarning
from rescompress.lightning.data import Cityscapes
from tests.lightning import layouts

OPTIONS = {"train_size": (16, 32), "test_size": (32, 64), "full_size": (32, 64), "batch_size": 2, "workers": 0}


def made(root: Path, **options: object) -> Cityscapes:
    return Cityscapes(str(root), **(OPTIONS | options))


def test_label_ids_alone_give_the_classes_of_the_train_ids(tmp_path: Path) -> None:
    of_ids = list(made(layouts.cityscapes(tmp_path / "a")).batches("val"))
    of_train_ids = list(made(layouts.cityscapes(tmp_path / "b", train_ids=True)).batches("val"))

    for one, other in zip(of_ids, of_train_ids, strict=True):
        torch.testing.assert_close(one.labels, other.labels, rtol=0, atol=0)
    # The rows of the first image go through the ids in order: three are ignored, then come all classes.
    first = of_ids[0].labels[0, :22, 0].tolist()
    assert first == [255, 255, 255, *range(19)]


def test_the_evaluation_is_at_full_size_and_untouched(tmp_path: Path) -> None:
    data = made(layouts.cityscapes(tmp_path / "data"), mean=(0.0,), std=(1.0,))

    batch = next(data.batches("test"))

    assert batch.names == ("frankfurt_000000_000019_leftImg8bit.png",)
    pixels = torch.from_numpy(layouts.picture(0, 0, 32, 64)).permute(2, 0, 1)
    torch.testing.assert_close(batch.images[0], pixels / 255)
    assert batch.labels.shape == (1, 32, 64)


def test_a_smaller_test_size_keeps_the_size_of_the_labels(tmp_path: Path) -> None:
    data = made(layouts.cityscapes(tmp_path / "data"), test_size=(16, 32))

    batch = next(data.batches("val"))

    assert batch.images.shape == (1, 3, 16, 32)
    assert batch.labels.shape == (1, 32, 64)


def test_labels_are_cropped_resized_and_mirrored_with_their_image(tmp_path: Path) -> None:
    # An image that shows its own labels: whatever is done to one must be done to the other.
    root = layouts.cityscapes(tmp_path / "data", train_ids=True)
    classes = np.repeat(np.repeat(np.arange(8).reshape(2, 4), 16, 0), 16, 1).astype(np.uint8)
    for file in root.glob("leftImg8bit/train/*/*.png"):
        file.write_bytes(layouts.encoded(np.repeat(classes[..., None] * 30, 3, 2), "PNG"))
    for file in root.glob("gtFine/train/*/*TrainIds.png"):
        file.write_bytes(layouts.encoded(classes, "PNG"))
    data = made(root, photometric=False, mean=(0.0,), std=(1.0,), largest_share=1.0, train_size=(24, 48))

    agreeing, ignored = [], []
    data.setup()
    for number in range(4):
        loader = data.train_dataloader()
        loader.set_epoch(number)
        for batch in (data.on_after_batch_transfer(loaded, 0) for loaded in loader):
            shown = (batch.images[:, 0] * 255 / 30).round()
            valid = batch.labels != 255
            agreeing.append((shown == batch.labels)[valid].float().mean())
            ignored.append((~valid).float().mean())
    # Between two classes the image has values of neither.
    assert min(agreeing) > 0.7
    # Images that were shrunk below the crop are padded by what is ignored.
    assert max(ignored) > 0.1
    assert min(ignored) == 0


def test_each_size_of_a_schedule_has_its_crop(tmp_path: Path) -> None:
    from rescompress.lightning.resolution import SizeSchedule

    data = made(layouts.cityscapes(tmp_path / "data", train=6), batch_size=1)
    data.size_schedule = SizeSchedule(sizes=(16, 8), mode="mixed")

    found = {(tuple(batch.images.shape[2:]), tuple(batch.labels.shape[1:])) for batch in data.batches()}

    assert found == {((16, 16), (16, 16)), ((8, 8), (8, 8))}


def test_missing_labels_are_told_with_a_count(tmp_path: Path) -> None:
    root = layouts.cityscapes(tmp_path / "data")
    (root / "gtFine/train/bochum/bochum_000001_000019_gtFine_labelIds.png").unlink()

    with pytest.raises(InputError, match="1 of 4 images of train have no label file, such as bochum_000001") as error:
        made(root).setup()
    assert "ROOT/\n    leftImg8bit/" in str(error.value)


def test_a_wrong_layout_and_a_wrong_image_size_are_told(tmp_path: Path) -> None:
    root = layouts.cityscapes(tmp_path / "data")

    with pytest.raises(InputError, match="is of 32 x 64 pixels, and full_size is 1024 x 2048"):
        made(root, full_size=(1024, 2048)).setup()
    (root / "leftImg8bit").rename(root / "images")
    with pytest.raises(InputError, match="leftImg8bit/train holds no images of cities"):
        made(root).setup()


def test_a_corrupt_image_stops_the_run_or_is_replaced(tmp_path: Path) -> None:
    root = layouts.cityscapes(tmp_path / "data")
    broken = "bochum_000001_000019_leftImg8bit.png"
    (root / "leftImg8bit/train/bochum" / broken).write_bytes(b"no image")

    with pytest.raises(InputError, match=f"{broken} cannot be read"):
        list(made(root).batches())
    data = made(root, corrupt="skip")
    with pytest.warns(RescompressWarning, match=rf"1 file\(s\) of train .*: {broken}"):
        found = [name for batch in data.batches() for name in batch.names]
    assert sorted(found).count("bochum_000003_000019_leftImg8bit.png") == 2
    assert broken not in found


def test_images_of_which_none_can_be_read_stop_the_run(tmp_path: Path) -> None:
    root = layouts.cityscapes(tmp_path / "data", train=3)
    for file in root.glob("leftImg8bit/train/*/*.png"):
        file.write_bytes(b"no image")

    with pytest.raises(InputError, match=r"3 files in a row cannot be read, such as .*leftImg8bit\.png"):
        list(made(root, corrupt="skip").batches())


def test_cities_are_counted(tmp_path: Path) -> None:
    check = made(layouts.cityscapes(tmp_path / "data", train=5)).check()

    assert check.splits == {"train": {"aachen": 3, "bochum": 2}, "val": {"frankfurt": 1, "lindau": 1}}
    assert "train           5 images      2 cities, 2 to 3 images in each" in str(check)
    assert "train has label ids only: the classes are taken from them" in str(check)
