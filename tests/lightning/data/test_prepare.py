"""scripts/prepare_*.py: what they count, what they find wrong, and the shards and indices that they write."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from rescompress.lightning.data import ImageShards
from tests.lightning import layouts

SCRIPTS = Path(__file__).parents[3] / "scripts"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def test_folders_are_counted_and_corrupt_files_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.image_folders(tmp_path / "data")
    (root / "train/n00000001/n00000001_3.JPEG").write_bytes(b"no image")

    run(monkeypatch, "prepare_imagenet", root, "--counts", "--decode", "--workers", 0)

    found = capsys.readouterr().out
    assert "train          24 images      3 classes, 8 images in each" in found
    assert "n00000002         8         4" in found
    assert "1 file(s) cannot be read:\n  train/n00000001/n00000001_3.JPEG: " in found


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


def test_the_small_sets_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "prepare_small", "elpv", "--root", layouts.elpv(tmp_path / "elpv"), "--decode")
    assert "ELPV in" in capsys.readouterr().out
    run(monkeypatch, "prepare_small", "--root", layouts.fashion_mnist(tmp_path / "fashion", train=5020), "--counts")
    assert "ankle boot" in capsys.readouterr().out
