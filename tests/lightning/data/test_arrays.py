"""Data in memory: MedMNIST at its four sizes, Fashion-MNIST, ELPV; their splits, and what wrong files are told."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from rescompress.errors import InputError, RescompressWarning
from rescompress.lightning.data import ELPV, FashionMNIST, MedMNIST
from tests.lightning import layouts

PLAIN = {"mean": (0.0,), "std": (1.0,), "batch_size": 6}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def medical() -> None:
    pytest.importorskip("medmnist")


@pytest.mark.usefixtures("medical")
@pytest.mark.parametrize(
    ("train_size", "test_size", "source", "files"),
    [
        (28, 28, None, ("pathmnist.npz", "pathmnist.npz")),
        (14, 64, None, ("pathmnist.npz", "pathmnist_64.npz")),
        (40, 64, None, ("pathmnist_64.npz", "pathmnist_64.npz")),
        (28, 32, 64, ("pathmnist_64.npz", "pathmnist_64.npz")),
    ],
)
def test_each_size_is_read_from_its_file(
    train_size: int, test_size: int, source: int | None, files: tuple[str, str], tmp_path: Path
) -> None:
    root = layouts.medmnist(tmp_path, sizes=(28, 64))
    data = MedMNIST(str(root), train_size=train_size, test_size=test_size, source_size=source, **PLAIN)

    train, test = next(data.batches()), next(data.batches("test"))

    assert (train.names[0].split("/")[0], test.names[0].split("/")[0]) == files
    assert (train.images.shape[-1], test.images.shape[-1]) == (train_size, test_size)


@pytest.mark.usefixtures("medical")
def test_images_and_labels_are_those_of_the_file(tmp_path: Path) -> None:
    data = MedMNIST(str(layouts.medmnist(tmp_path)), **PLAIN)
    arrays = np.load(tmp_path / "pathmnist.npz")

    batches = list(data.batches("test"))

    images = torch.cat([batch.images for batch in batches])
    torch.testing.assert_close(images, torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2) / 255)
    assert torch.cat([batch.labels for batch in batches]).tolist() == arrays["test_labels"][:, 0].tolist()


@pytest.mark.usefixtures("medical")
def test_unpacked_arrays_are_the_same_and_are_not_loaded_whole(tmp_path: Path) -> None:
    root = layouts.medmnist(tmp_path, sizes=(64,))
    options = {"train_size": 64, "test_size": 64} | PLAIN
    packed = list(MedMNIST(str(root), **options).batches())
    MedMNIST(str(root), **options).unpack(64)
    (root / "pathmnist_64.npz").unlink()
    data = MedMNIST(str(root), **options)

    for one, other in zip(data.batches(), packed, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)
        torch.testing.assert_close(one.labels, other.labels)
    assert isinstance(data._array("train_images", 64).base, np.memmap)


@pytest.mark.usefixtures("medical")
def test_grey_sets_are_given_in_three_channels_or_one(tmp_path: Path) -> None:
    root = layouts.medmnist(tmp_path, name="octmnist", classes=4, channels=1)

    three = next(MedMNIST(str(root), "octmnist", **PLAIN).batches("test"))
    one = next(MedMNIST(str(root), "octmnist", channels=1, **PLAIN).batches("test"))

    assert one.images.shape == (6, 1, 28, 28)
    torch.testing.assert_close(three.images, one.images.expand(-1, 3, -1, -1))


@pytest.mark.usefixtures("medical")
def test_several_labels_are_weights(tmp_path: Path) -> None:
    root = layouts.medmnist(tmp_path, name="chestmnist", classes=14, channels=1, several_labels=True)
    data = MedMNIST(str(root), "chestmnist", **PLAIN)

    batch = next(data.batches("test"))

    assert data.several_labels
    assert batch.labels.dtype == torch.float32
    assert batch.labels.sum(1).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("medical")
def test_every_2d_set_is_known_with_its_classes() -> None:
    from medmnist.info import INFO

    names = [name for name in INFO if not name.endswith("3d")]
    assert len(names) == 12
    for name in names:
        assert MedMNIST("nowhere", name).num_classes == len(INFO[name]["label"])


@pytest.mark.usefixtures("medical")
def test_wrong_names_files_and_counts_are_told(tmp_path: Path) -> None:
    root = layouts.medmnist(tmp_path)
    with pytest.raises(InputError, match=r"no 2D set 'pathmnst'; did you mean 'pathmnist'"):
        MedMNIST(str(root), "pathmnst")
    with pytest.raises(InputError, match=r"(?s)pathmnist_224.npz does not exist \(it is at http.*ROOT/"):
        MedMNIST(str(root), test_size=224).setup()
    with pytest.raises(InputError, match=r"three channels; set channels to 3"):
        MedMNIST(str(root), channels=1)
    (root / "pathmnist.npz").rename(root / "pathmnist_64.npz")
    with pytest.raises(InputError, match=r"of shape \(28, 28, 3\) and should be \(64, 64, 3\)"):
        MedMNIST(str(root), train_size=64, test_size=64).setup()
    (root / "pathmnist.npz").write_bytes((root / "pathmnist_64.npz").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cannot be read: .*download it again"):
        MedMNIST(str(root)).setup()
    layouts.medmnist(root, classes=11, name="bloodmnist")
    with pytest.raises(InputError, match=r"has labels from 0 to 10 and there are 8 classes"):
        MedMNIST(str(root), "bloodmnist").setup()


@pytest.mark.usefixtures("medical")
def test_numbers_other_than_the_published_ones_are_noted(tmp_path: Path) -> None:
    check = MedMNIST(str(layouts.medmnist(tmp_path))).check()

    assert "train: 36 images, where the published set has 89,996" in str(check)
    assert check.splits["val"] == dict.fromkeys(check.splits["val"], 1)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_packed_or_not(packed: bool, tmp_path: Path) -> None:
    data = FashionMNIST(str(layouts.fashion_mnist(tmp_path, packed=packed)), val_images=10, **PLAIN)

    batch = next(data.batches("test"))

    pixels = torch.stack([torch.from_numpy(layouts.picture(number, number, 28, 28, 1)) for number in range(5)])
    torch.testing.assert_close(batch.images[:, 0], pixels / 255)
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]


def test_fashion_mnist_is_validated_on_images_that_are_not_trained_on(tmp_path: Path) -> None:
    root = str(layouts.fashion_mnist(tmp_path))

    assert len(FashionMNIST(root, val_images=20).source("train", [(28, 28)], True)) == 40
    assert len(FashionMNIST(root, val_images=20).source("val", [(28, 28)], False)) == 20
    assert len(FashionMNIST(root, val_images=20, train_images=15).source("train", [(28, 28)], True)) == 15
    whole = FashionMNIST(root, val_images=0)
    assert len(whole.source("train", [(28, 28)], True)) == 60
    assert torch.equal(whole.source("val", [(28, 28)], False).images, whole.source("test", [(28, 28)], False).images)


def test_missing_and_damaged_files_of_fashion_mnist_are_told(tmp_path: Path) -> None:
    root = layouts.fashion_mnist(tmp_path / "data")
    labels = root / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()

    labels.write_bytes(whole[:-12])
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte.gz cannot be read"):
        FashionMNIST(str(root), val_images=10).setup()
    labels.write_bytes(gzip.compress(gzip.decompress(whole)[:-3]))
    with pytest.raises(InputError, match=r"no idx file of 1 dimension"):
        FashionMNIST(str(root), val_images=10).setup()
    labels.unlink()
    with pytest.raises(InputError, match=r"(?s)exists. Expected:\n\nROOT/.*dataset-fashion-mnist"):
        FashionMNIST(str(root), val_images=10).setup()
    with pytest.raises(InputError, match=r"nowhere, does not exist; give it by --data.root"):
        FashionMNIST(str(tmp_path / "nowhere")).setup()


def test_fashion_mnist_needs_something_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"val_images=60 leaves nothing of 60 images"):
        FashionMNIST(str(layouts.fashion_mnist(tmp_path)), val_images=60).setup()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_real_fashion_mnist_has_its_published_numbers() -> None:
    data = FashionMNIST(str(DEBIAN), val_images=5000, mean=(0.0,), std=(1.0,), batch_size=500)

    counts = {split: sum(classes.values()) for split, classes in data.check().splits.items()}
    pixels = torch.cat([batch.images for batch in data.batches("test")])

    assert counts == {"train": 55000, "val": 5000, "test": 10000}
    # Mean and standard deviation of the test images, which are near those that the data are normalised by.
    assert float(pixels.mean()) == pytest.approx(0.287, abs=0.001)
    assert float(pixels.std()) == pytest.approx(0.352, abs=0.002)


def test_elpv_has_the_same_split_in_every_run(tmp_path: Path) -> None:
    root = str(layouts.elpv(tmp_path, images=80))
    data = ELPV(root, seed=1, labels="level", train_size=30, test_size=30, **PLAIN)
    other = ELPV(root, seed=2, labels="level", train_size=30, test_size=30, **PLAIN)

    assert {split: dict(counts) for split, counts in data.check().splits.items()} == {
        "train": dict.fromkeys(data.class_names, 13),
        "val": dict.fromkeys(data.class_names, 2),
        "test": dict.fromkeys(data.class_names, 5),
    }
    torch.testing.assert_close(next(data.batches("test")).images, next(other.batches("test")).images)
    parts = torch.cat([data._part(split) for split in ("train", "val", "test")])
    assert sorted(parts.tolist()) == list(range(80))


def test_elpv_counts_cells_as_defective_from_two_thirds_on(tmp_path: Path) -> None:
    data = ELPV(str(layouts.elpv(tmp_path, images=8)))

    assert data._listed()[1].tolist() == [0, 0, 1, 1] * 2
    assert data.class_names == ("functional", "defective")


def test_a_corrupt_image_of_elpv_stops_the_run_or_is_left_out(tmp_path: Path) -> None:
    root = layouts.elpv(tmp_path)
    (root / "images" / "cell0003.png").write_bytes(b"no image")

    with pytest.raises(InputError, match=r"images/cell0003.png cannot be read: no image that Pillow can read;"):
        next(ELPV(str(root)).batches())
    data = ELPV(str(root), corrupt="skip")
    with pytest.warns(RescompressWarning, match=r"1 file\(s\) of ELPV"):
        found = [len(data.source(split, [(30, 30)], False)) for split in ("train", "val", "test")]
    assert sum(found) == 23


def test_missing_images_and_labels_of_elpv_are_told(tmp_path: Path) -> None:
    root = layouts.elpv(tmp_path)
    (root / "images" / "cell0003.png").unlink()
    with pytest.raises(InputError, match=r"(?s)1 images of .*such as images/cell0003.png. Expected:\n\nROOT/"):
        ELPV(str(root)).setup()
    (root / "labels.csv").write_text("images/cell0001.png\n")
    with pytest.raises(InputError, match=r"labels are missing"):
        ELPV(str(root)).setup()
    (root / "labels.csv").unlink()
    with pytest.raises(InputError, match=r"labels.csv does not exist"):
        ELPV(str(root)).setup()
