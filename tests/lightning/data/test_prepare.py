"""scripts/prepare_*.py: what they count, what they find wrong, and the shards and indices that they write."""

import json
import re
import resource
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning")

from rescompress.lightning.data import ImageShards
from tests.lightning import layouts

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "scripts"
BROKEN = "val/n00000001/ILSVRC2012_val_10002.JPEG"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def test_folders_are_counted_and_corrupt_files_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.image_folders(tmp_path / "data")
    (root / "train/n00000001/n00000001_3.JPEG").write_bytes(b"no image")

    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "prepare_imagenet", root, "--counts", "--decode", "--workers", 0)

    found = capsys.readouterr().out
    assert "train          24 images      3 classes, 8 images in each" in found
    assert "n00000002         8         4" in found
    broken = "train/n00000001/n00000001_3.JPEG: no image that Pillow can read"
    assert f"1 file(s) cannot be read:\n  {broken}\n" in found
    # Python prints a text that it is ended with to stderr, and exits with 1.
    assert str(stop.value) == (
        f"error: 1 file(s) cannot be read, such as {broken}; mend or remove them, or leave them out of a run by "
        "corrupt: skip"
    )


@pytest.mark.filterwarnings("error::rescompress.errors.RescompressWarning")
def test_a_corrupt_image_of_elpv_ends_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.elpv(tmp_path / "elpv")
    (root / "images/cell0003.png").write_bytes(b"")

    with pytest.raises(
        SystemExit, match=r"^error: 1 file\(s\) cannot be read, such as images/cell0003\.png: the file is"
    ):
        run(monkeypatch, "prepare_small", "elpv", "--root", root, "--decode")

    assert capsys.readouterr().out.endswith("1 file(s) cannot be read:\n  images/cell0003.png: the file is empty\n")


def test_shards_with_fewer_samples_than_their_index_says_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = layouts.shards(tmp_path / "data")
    index = json.loads((root / "_info.json").read_text())
    index["splits"]["val"]["shard_lengths"][0] += 2
    (root / "_info.json").write_text(json.dumps(index))

    with pytest.raises(SystemExit, match=r"imagenet-val-000000\.tar: fewer samples than the 7 that were expected; if"):
        run(monkeypatch, "prepare_imagenet", root, "--classes", 3, "--decode", "--workers", 0)


def test_a_full_disk_ends_the_writing_of_shards_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = layouts.image_folders(tmp_path / "data"), tmp_path / "shards"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            SystemExit, match=r"^error: cannot write .*-train-000000\.tar: File too large; free some space"
        ):
            run(monkeypatch, "prepare_imagenet", root, "--write-shards", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert not [path for path in out.rglob("*") if path.is_file()]


def test_shards_are_written_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = layouts.image_folders(tmp_path / "data"), tmp_path / "shards"

    run(monkeypatch, "prepare_imagenet", root, "--write-shards", out, "--images-per-shard", 10)

    assert "train          24 images      3 shards, 4 to 10 images in each" in capsys.readouterr().out
    data = ImageShards(str(out), num_classes=3, workers=0, train_size=16, test_size=16, test_batch_size=12)
    labels = next(data.batches("val")).labels.tolist()
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert labels != sorted(labels)
    assert data.class_names == ("n00000000", "n00000001", "n00000002")


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_are_not_written_beside_others_of_the_same_split(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = layouts.image_folders(tmp_path / "data"), tmp_path / "shards"
    stale = out / split / "other-000007.tar"
    stale.parent.mkdir(parents=True)
    stale.touch()

    message = rf"^error: .*shards holds 1 shard\(s\) of {split} already, such as other-000007.tar; give another folder"
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "prepare_imagenet", root, "--write-shards", out)

    assert [path for path in out.rglob("*") if path.is_file()] == [stale]


def test_a_corrupt_image_ends_the_writing_of_shards_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = layouts.image_folders(tmp_path / "data"), tmp_path / "shards"
    (root / BROKEN).write_bytes((root / BROKEN).read_bytes()[:-200])

    with pytest.raises(SystemExit, match=rf"^error: {BROKEN} cannot be read: the file is cut short; .*--corrupt skip"):
        run(monkeypatch, "prepare_imagenet", root, "--write-shards", out, "--images-per-shard", 5)

    assert not [path for path in out.rglob("*") if path.is_file()]


def test_a_corrupt_image_is_left_out_of_shards_if_asked_for_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = layouts.image_folders(tmp_path / "data"), tmp_path / "shards"
    (root / BROKEN).write_bytes(b"no image")
    options = ("--images-per-shard", 5, "--corrupt", "skip", "--decode", "--workers", 2)

    run(monkeypatch, "prepare_imagenet", root, "--write-shards", out, *options)

    found = capsys.readouterr().out
    assert f"1 file(s) cannot be read and were left out:\n  {BROKEN}: " in found
    assert "val            11 images      3 shards, 1 to 5 images in each" in found
    assert found.endswith("0 file(s) cannot be read\n")


def test_shards_are_not_made_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.shards(tmp_path / "data")

    with pytest.raises(SystemExit, match=r"--write-shards makes shards of folders of images, and .*data is of shards"):
        run(monkeypatch, "prepare_imagenet", root, "--write-shards", tmp_path / "shards")


@pytest.mark.parametrize("flat", [False, True])
def test_shards_without_an_index_are_told_how_to_get_one(
    flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = layouts.shards(tmp_path / "data")
    (root / "_info.json").unlink()
    if flat:
        for shard in [*root.glob("*/*.tar")]:
            shard.rename(root / shard.name)
        (root / "train").rmdir()

    message = r"data holds tar files of train, such as imagenet-train-.*prepare_imagenet.py .*data --index` writes"
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "prepare_imagenet", root)
    run(monkeypatch, "prepare_imagenet", root, "--index")


def test_the_classes_of_shards_are_as_many_as_their_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.shards(tmp_path / "data")
    (root / "classes.txt").write_text("tench\ngoldfish\nshark\n")

    run(monkeypatch, "prepare_imagenet", root, "--index", "--decode", "--workers", 0)

    assert "0 file(s) cannot be read" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"names 3 classes and num_classes is 5; .* --data.num_classes"):
        run(monkeypatch, "prepare_imagenet", root, "--classes", 5)


def test_shards_are_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.shards(tmp_path / "data")
    before = (root / "_info.json").read_text()
    (root / "_info.json").unlink()

    run(monkeypatch, "prepare_imagenet", root, "--index", "--classes", 3)

    assert "val            11 images      2 shards, 5 to 6 images in each" in capsys.readouterr().out
    assert json.loads((root / "_info.json").read_text()) == json.loads(before)


def test_a_wrong_layout_ends_with_the_expected_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()

    with pytest.raises(SystemExit, match=r"(?s)^error: .*train is empty. Expected:\n\nROOT/\n    train/"):
        run(monkeypatch, "prepare_imagenet", tmp_path)


def test_a_wrong_layout_of_cityscapes_and_missing_labels_end_with_the_expected_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mmseg")
    root = layouts.cityscapes(tmp_path / "data")
    next(root.glob("gtFine/train/bochum/*")).unlink()

    with pytest.raises(SystemExit, match=r"(?s)^error: 1 of 4 images of train have no label file.*\n\nROOT/\n    left"):
        run(monkeypatch, "prepare_cityscapes", root, "--full-size", 32, 64)
    with pytest.raises(
        SystemExit, match=r"(?s)^error: .*/train holds no images of cities\. Expected:\n\nROOT/\n    left"
    ):
        run(monkeypatch, "prepare_cityscapes", root / "leftImg8bit", "--full-size", 32, 64)


def test_corrupt_files_of_cityscapes_end_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmseg")
    root = layouts.cityscapes(tmp_path / "data")
    labels = next(root.glob("gtFine/train/bochum/*"))
    labels.write_bytes(b"no image")
    (image,) = root.glob("leftImg8bit/val/lindau/*")
    image.write_bytes(image.read_bytes()[:1000])

    with pytest.raises(SystemExit, match=r"^error: 2 file\(s\) cannot be read, such as bochum_"):
        run(monkeypatch, "prepare_cityscapes", root, "--full-size", 32, 64, "--decode", "--workers", 0)

    found = capsys.readouterr().out
    assert f"_leftImg8bit.png: its labels, {labels.name}: no image that Pillow can read\n" in found
    assert f"{image.name}: the file is cut short\n" in found


def test_cityscapes_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmseg")
    root = layouts.cityscapes(tmp_path / "data")

    run(monkeypatch, "prepare_cityscapes", root, "--full-size", 32, 64, "--counts", "--decode", "--workers", 0)

    found = capsys.readouterr().out
    assert "train           4 images      2 cities, 2 images in each" in found
    assert "0 file(s) cannot be read" in found
    # 32 rows in each of 4 images: 22 ids in turn, of which the first three are ignored, each image starting one later.
    assert f"ignored           {(6 + 5 + 4 + 3) / 128:.2%}" in found


def test_medmnist_is_counted_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("medmnist")
    root = layouts.medmnist(tmp_path / "data", sizes=(28, 64))

    run(monkeypatch, "prepare_medical", root, "--sizes", 28, 64, "--unpack", "--counts")

    found = capsys.readouterr().out
    assert "MedMNIST pathmnist (64 pixels)" in found
    assert "smooth muscle" in found
    assert (root / "pathmnist_64" / "train_images.npy").is_file()


def test_the_check_of_the_recipes_reads_the_file_that_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("medmnist")
    command = re.search(r"`python scripts/(prepare_medical)\.py ([^`]*)`", (ROOT / "recipes/README.md").read_text())
    assert command
    # The recipes' tests run every config of medical on a folder with no other file.
    layouts.medmnist(tmp_path / "data/medmnist", sizes=(224,))
    monkeypatch.chdir(tmp_path)

    run(monkeypatch, command[1], *shlex.split(command[2]))

    assert "MedMNIST pathmnist (224 pixels)" in capsys.readouterr().out


def test_a_missing_file_of_medmnist_is_told_how_to_get_and_unpack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("medmnist")
    root = layouts.medmnist(tmp_path / "data", name="bloodmnist", classes=8)

    with pytest.raises(SystemExit, match=r"bloodmnist_224.npz does not exist") as error:
        run(monkeypatch, "prepare_medical", root, "--name", "bloodmnist", "--sizes", 224)

    assert "python -m medmnist download --root=ROOT --size=224 " in str(error.value)
    unpack = re.search(r"python scripts/(prepare_medical)\.py ROOT (.*) makes them", str(error.value))
    assert unpack
    layouts.medmnist(root, name="bloodmnist", classes=8, sizes=(224,))
    run(monkeypatch, unpack[1], root, *unpack[2].split())
    assert (root / "bloodmnist_224" / "train_images.npy").is_file()


def test_medmnist_with_fewer_labels_than_images_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("medmnist")
    file = layouts.medmnist(tmp_path) / "pathmnist.npz"
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, "val_labels": arrays["val_labels"][:-1]})

    with pytest.raises(SystemExit, match=r"^error: .*pathmnist\.npz holds 9 images and 8 labels of val; download it"):
        run(monkeypatch, "prepare_medical", tmp_path)


@pytest.mark.parametrize(
    ("name", "cause"),
    [("fashion_mnist", r"neither .*train-images.* exists"), ("elpv", r".*labels\.csv does not exist")],
)
def test_a_wrong_layout_of_the_small_sets_ends_with_the_expected_tree(
    name: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=rf"(?s)^error: {cause}\. Expected:\n\nROOT/ "):
        run(monkeypatch, "prepare_small", name, "--root", tmp_path)


def test_labels_of_elpv_that_are_no_chances_end_with_the_expected_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = layouts.elpv(tmp_path / "elpv")
    labels = (root / "labels.csv").read_text()

    for wrong in ("", labels.replace(" 1.0", " 2.0"), labels.replace(" 1.0", " inf"), labels.replace(" 1.0", "")):
        (root / "labels.csv").write_text(wrong)
        with pytest.raises(SystemExit, match=r"(?s)^error: .*labels\.csv .*\. Expected:\n\nROOT/ "):
            run(monkeypatch, "prepare_small", "elpv", "--root", root)


def test_the_small_sets_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "prepare_small", "elpv", "--root", layouts.elpv(tmp_path / "elpv"), "--decode")
    assert "ELPV in" in capsys.readouterr().out
    run(monkeypatch, "prepare_small", "--root", layouts.fashion_mnist(tmp_path / "fashion", train=5020), "--counts")
    assert "ankle boot" in capsys.readouterr().out
