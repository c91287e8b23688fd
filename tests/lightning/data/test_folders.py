"""ImageNet as folders: files, corrupt ones among them, and what a wrong layout is told."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

from rescompress.errors import InputError, RescompressWarning
from rescompress.lightning.batches import Batch
from rescompress.lightning.data import ImageFolders, _photos
from rescompress.lightning.data._images import decodes_jpeg
from tests.lightning import layouts

OPTIONS = {"train_size": 16, "test_size": 16, "batch_size": 4, "workers": 0}
BROKEN = "train/n00000001/n00000001_3.JPEG"


def made(root: Path, **options: object) -> ImageFolders:
    return ImageFolders(str(root), **(OPTIONS | options))


def names(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.names]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def test_classes_and_files_are_counted(tmp_path: Path) -> None:
    data = made(layouts.image_folders(tmp_path / "data", train=5, val=2))

    check = data.check()

    assert data.class_names == ("n00000000", "n00000001", "n00000002")
    assert {split: dict(counts) for split, counts in check.splits.items()} == {
        "train": dict.fromkeys(data.class_names, 5),
        "val": dict.fromkeys(data.class_names, 2),
    }
    assert "train          15 images      3 classes, 5 images in each" in str(check)


@pytest.mark.parametrize("where", ["workers", "device"])
def test_a_corrupt_file_stops_the_run_with_its_name(where: str, tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    for content, reason in (
        (b"no image", "no image that Pillow can read"),
        ((root / BROKEN).read_bytes()[:-200], "the file is cut short"),
        (b"", "the file is empty"),
    ):
        (root / BROKEN).write_bytes(content)
        with pytest.raises(InputError, match=rf"^{BROKEN} cannot be read: {reason}; .*set corrupt: skip"):
            list(made(root, decode_on=where).batches())


def test_a_corrupt_file_stops_the_run_from_a_worker_as_well(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    (root / BROKEN).write_bytes(b"")

    with pytest.raises(InputError, match=rf"^{BROKEN} cannot be read"):
        list(made(root, workers=1).batches())


def test_a_corrupt_file_is_replaced_by_the_next_and_counted(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    whole = list(made(root).batches())
    cut_short(root / BROKEN)
    data = made(root, corrupt="skip")

    with pytest.warns(RescompressWarning, match=rf"^1 file\(s\) of train could not be read and were skipped: {BROKEN}"):
        found = list(data.batches())

    following = BROKEN.replace("_3", "_4")
    assert names(found) == [following if name == BROKEN else name for name in names(whole)]
    assert list(data.corrupt_files["train"].found) == [BROKEN]
    assert all(
        torch.equal(image, other)
        for batch, before in zip(found, whole, strict=True)
        for image, other, name in zip(batch.images, before.images, before.names, strict=True)
        if name != BROKEN
    )


def test_a_corrupt_file_found_on_the_device_is_replaced_within_its_batch(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    whole = names(list(made(root, decode_on="device").batches()))
    cut_short(root / BROKEN)
    data = made(root, decode_on="device", corrupt="skip")

    with pytest.warns(RescompressWarning, match=rf"1 file\(s\) of train .*: {BROKEN}"):
        found = names(list(data.batches()))
        data.teardown("fit")  # what the last batch brought to light

    place = whole.index(BROKEN)
    batch = whole[place - place % 4 : place - place % 4 + 4]
    batch = [*batch[place % 4 + 1 :], *batch]  # the next one, or from the front
    assert found == [batch[0] if name == BROKEN else name for name in whole]


@pytest.mark.parametrize("where", ["workers", "device"])
def test_a_corrupt_file_is_left_out_of_the_evaluation(where: str, tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    broken = "val/n00000001/ILSVRC2012_val_10002.JPEG"
    whole = names(list(made(root).batches("val")))
    (root / broken).write_bytes(b"no image")
    data = made(root, corrupt="skip", decode_on=where)

    with pytest.warns(RescompressWarning, match="1 file"):
        found = names(list(data.batches("val")))
        data.teardown("test")

    assert found == [name for name in whole if name != broken]


@pytest.mark.filterwarnings("ignore:.*were skipped")
@pytest.mark.parametrize(("where", "evaluation"), [("workers", "val"), ("device", "evaluation")])
def test_skipped_files_are_counted_once_for_each_split(where: str, evaluation: str, tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    for broken in (BROKEN, BROKEN.replace("_3", "_6"), "val/n00000001/ILSVRC2012_val_10002.JPEG"):
        cut_short(root / broken)
    data = made(root, corrupt="skip", decode_on=where)

    assert data.skipped == {}
    for split in ("train", "val", "val"):
        list(data.batches(split))

    assert data.skipped == {"train": 2, evaluation: 1}


def test_files_of_other_formats_and_colours_are_read(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    folder = root / "val" / "n00000000"
    Image.new("CMYK", (20, 20), (0, 0, 0, 255)).save(folder / "black.jpg")
    Image.new("RGBA", (20, 20), (255, 255, 255, 0)).save(folder / "white.png")
    Image.new("L", (20, 20), 255).save(folder / "grey.jpg")

    for where in ("workers", "device"):
        data = made(root, decode_on=where, test_batch_size=20, mean=(0.0,), std=(1.0,))
        batch = next(data.batches("val"))
        values = {Path(name).name: float(image.mean()) for name, image in zip(batch.names, batch.images, strict=True)}
        assert values["black.jpg"] == pytest.approx(0, abs=0.02)
        assert values["white.png"] == values["grey.jpg"] == pytest.approx(1)


def test_decoding_on_the_device_gives_the_same_pixels(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")

    for split in ("train", "val"):
        for one, other in zip(made(root).batches(split), made(root, decode_on="device").batches(split), strict=True):
            assert one.names == other.names
            torch.testing.assert_close(one.images, other.images, rtol=0, atol=0.02)  # 1/255 over std: two decoders


@pytest.mark.parametrize(
    ("kind", "decodes", "on_device"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_files_are_decoded_on_a_gpu_that_can(
    kind: str, decodes: bool, on_device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = made(layouts.image_folders(tmp_path / "data"))
    data.setup()
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(kind)))  # type: ignore[assignment]
    monkeypatch.setattr(_photos, "decodes_jpeg", lambda device: decodes)

    assert data.on_device == on_device


def test_files_of_another_format_are_left_to_the_workers(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    Image.new("L", (20, 20)).save(root / "val" / "n00000000" / "black.PNG")
    jpeg, mixed = made(layouts.image_folders(tmp_path / "other")), made(root)
    jpeg.setup()
    mixed.setup()

    assert jpeg.holds_jpeg()
    assert not mixed.holds_jpeg()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_decodes_nothing() -> None:
    assert decodes_jpeg(torch.device("cpu"))
    assert not decodes_jpeg(torch.device("cuda"))


def break_layout(root: Path, how: str) -> None:
    if how == "absent":
        root.rename(root.with_name("elsewhere"))
    elif how == "no val":
        (root / "val").rename(root / "validation")
    elif how == "flat val":
        for file in list((root / "val").glob("*/*")):
            file.rename(root / "val" / file.name)
        for folder in list((root / "val").iterdir()):
            if folder.is_dir():
                folder.rmdir()
    elif how == "empty class":
        for file in (root / "train" / "n00000002").iterdir():
            file.unlink()
    elif how == "unknown class":
        (root / "val" / "n00000002").rename(root / "val" / "cat")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "does not exist; give it by --data.root"),
        ("no val", "/val does not exist"),
        ("flat val", "/val holds 12 files and no class folders: the labels are missing"),
        ("empty class", r"1 class folder\(s\) in .*train hold no images: n00000002"),
        ("unknown class", "/val has classes that train has not: cat"),
    ],
)
def test_a_wrong_layout_is_shown_the_expected_tree(how: str, message: str, tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    break_layout(root, how)

    with pytest.raises(InputError, match=message) as error:
        made(root).setup()
    assert "ROOT/\n    train/\n        n01440764/" in str(error.value)


def test_a_class_that_is_trained_and_not_tested_is_warned_of_once(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")
    (root / "val" / "n00000002").rename(tmp_path / "elsewhere")
    data = made(root)

    with pytest.warns(RescompressWarning, match="val has no images of 1 classes of train: n00000002"):
        data.setup()
    data.setup()  # a second warning would be an error


def test_a_wrong_number_of_classes_is_told(tmp_path: Path) -> None:
    root = layouts.image_folders(tmp_path / "data")

    with pytest.raises(InputError, match="holds 3 classes and num_classes is 1000"):
        made(root, num_classes=1000).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupt": "ignore"}, "corrupt must be one of stop, skip; got 'ignore'"),
        ({"decode_on": "gpu"}, "decode_on must be one of auto, workers, device"),
        ({"policy": "ran"}, "did you mean 'rand'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"test_batch_size": 0}, "test_batch_size must be at least 1, got 0"),
        ({"train_size": (16, 0)}, r"train_size must be an int or a \(height, width\) of at least 1, got \(16, 0\)"),
        ({"test_sizes": [8, 32]}, r"test_sizes \[8, 32\] lack test_size, 16 x 16"),
        ({"scale": (0.5, 0.1)}, "scale must be"),
        ({"mixup": -1.0}, "at least 0"),
        ({"std": (0.0,)}, "one or three channels|std above 0"),
    ],
)
def test_wrong_options_are_told_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(Path("/nowhere"), **options)
