"""Streams of tar shards: all samples, each rank its own, corrupt ones, and what a wrong layout is told."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("webdataset")

from rescompress.errors import InputError, RescompressWarning
from rescompress.lightning.data import ImageFolders, ImageShards, _stream
from rescompress.lightning.data._stream import samples_of
from rescompress.lightning.data.shard_files import write_shards
from tests.lightning import layouts

OPTIONS = {
    "num_classes": 3,
    "train_size": 16,
    "test_size": 16,
    "batch_size": 4,
    "workers": 0,
    "streams": 2,
    "buffer": 8,
}


def made(root: Path, **options: object) -> ImageShards:
    return ImageShards(str(root), **(OPTIONS | options))


def names(data: ImageShards, split: str = "train") -> list[str]:
    return [name for batch in data.batches(split) for name in batch.names]


def test_an_epoch_has_each_sample_once_and_shuffled(tmp_path: Path) -> None:
    data = made(layouts.shards(tmp_path / "data", train=(8, 8, 8, 8)))

    found = names(data)

    assert Counter(found) == {
        f"imagenet-train-{shard:06d}.tar/{8 * shard + number:08d}": 1 for shard in range(4) for number in range(8)
    }
    assert found != sorted(found)
    assert [name[:21] for name in found[:8]] != [found[0][:21]] * 8  # two streams, so two shards at a time


def test_shards_that_run_out_are_read_again_with_other_numbers(tmp_path: Path) -> None:
    data = made(layouts.shards(tmp_path / "data", train=(4, 12)), batch_size=2)
    batches = list(data.batches())

    found = Counter(name for batch in batches for name in batch.names)

    assert sum(found.values()) == 16
    assert sorted(found.values()) == [1] * 8 + [2] * 4
    twice = next(name for name, times in found.items() if times == 2)
    seen = [image for batch in batches for image, name in zip(batch.images, batch.names, strict=True) if name == twice]
    assert not torch.equal(*seen)


def test_evaluation_has_each_sample_once_in_order(tmp_path: Path) -> None:
    data = made(layouts.shards(tmp_path / "data", val=(5, 6)))

    assert names(data, "val") == names(data, "test")
    assert names(data, "val") == [f"imagenet-val-{number // 5 and 1:06d}.tar/{number:08d}" for number in range(11)]


@pytest.mark.parametrize(
    ("rank", "world", "worker", "workers", "opened"),
    [(0, 1, 0, 1, [0, 1, 2, 3]), (0, 1, 0, 2, [0, 2]), (0, 1, 1, 2, [1, 3]), (1, 2, 1, 2, [2, 3])],
)
def test_evaluation_opens_the_shards_of_a_workers_batches_alone(
    rank: int, world: int, worker: int, workers: int, opened: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = made(layouts.shards(tmp_path / "data", val=(4, 4, 4, 4)))
    own = names(data, "val")[rank::world]
    monkeypatch.setattr(ImageShards, "shares", (rank, world))
    monkeypatch.setattr(_stream, "get_worker_info", lambda: SimpleNamespace(id=worker, num_workers=workers))
    found: list[str] = []
    monkeypatch.setattr(_stream, "samples_of", lambda url: found.append(url) or samples_of(url))

    batches = [batch.names for batch in data._loader("val", training=False).loader.dataset]

    assert batches == [tuple(own[4 * number : 4 * number + 4]) for number in range(worker, len(own) // 4, workers)]
    assert [int(url[-10:-4]) for url in found] == opened


def test_the_rest_of_a_pipe_may_stay_unread(tmp_path: Path) -> None:
    layouts.shards(tmp_path / "data")

    samples = samples_of(f"pipe:cat {tmp_path}/data/val/imagenet-val-000000.tar /dev/zero || exit 3")

    assert next(samples)[0].endswith("/00000000")
    samples.close()


@pytest.mark.parametrize(
    ("suffix", "keys", "jpeg"),
    [("jpg", ("jpg", "jpeg", "png"), True), ("png", ("jpg", "jpeg", "png"), False), ("png", ("jpg",), True)],
)
def test_whether_a_gpu_decodes_hangs_on_the_first_sample(
    suffix: str, keys: tuple[str, ...], jpeg: bool, tmp_path: Path
) -> None:
    root = layouts.shards(tmp_path / "data", train=(1,))
    with tarfile.open(root / "train/imagenet-train-000000.tar", "w") as archive:
        layouts.add_to_tar(archive, f"00000000.{suffix}", b"an image")
    data = made(root, image_keys=keys)
    data.setup()

    assert data.holds_jpeg() == jpeg


def test_more_workers_than_streams_are_refused(tmp_path: Path) -> None:
    data = made(layouts.shards(tmp_path / "data"), workers=2, streams=3)

    with pytest.raises(InputError, match="2 workers do not divide 3 streams"):
        names(data)


def test_fewer_shards_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(layouts.shards(tmp_path / "data"))
    monkeypatch.setattr(ImageShards, "shares", (0, 5))

    with pytest.raises(InputError, match="4 shards cannot be shared by 5 processes"):
        names(data)


def test_shards_are_given_by_a_pattern_as_well(tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "data", train=(8, 8))
    (root / "_info.json").unlink()

    data = made(
        root,
        train="train/imagenet-train-{000000..000001}.tar",
        train_images=16,
        val="val/imagenet-val-000000.tar",
        val_images=5,
    )

    assert len(set(names(data))) == 16
    assert len(names(data, "val")) == 5


def test_shards_are_read_through_a_pipe(tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "data", train=(8, 8))
    pattern = f"pipe:cat {root}/train/imagenet-train-{{000000..000001}}.tar"

    data = made(tmp_path, train=pattern, train_images=16, val=pattern, val_images=16)

    assert len(set(names(data))) == 16
    assert len(set(names(data, "val"))) == 16


def spoil(root: Path, how: str) -> None:
    """Write the second training shard anew: without a label, with a broken image, or cut short."""
    target = root / "train" / "imagenet-train-000001.tar"
    if how == "cut short":
        target.write_bytes(target.read_bytes()[:3000])
        return
    with tarfile.open(target, "w") as archive:
        for number in range(8, 16):
            image = layouts.encoded(layouts.picture(number, 0, 40, 48))
            if how == "broken" and number == 10:
                image = image[:-300]
            layouts.add_to_tar(archive, f"{number:08d}.jpg", image)
            if how != "no label" or number != 10:
                layouts.add_to_tar(archive, f"{number:08d}.cls", b"0")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("broken", "imagenet-train-000001.tar/00000010 cannot be read: the file is cut short; "),
        ("no label", r"imagenet-train-000001.tar/00000010 cannot be read: no label in it \(.cls\)"),
        ("cut short", "imagenet-train-000001.tar cannot be read: unexpected end of data; "),
    ],
)
def test_a_corrupt_sample_stops_the_run_or_is_replaced(how: str, message: str, tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "data", train=(8, 8, 8, 8))
    spoil(root, how)

    with pytest.raises(InputError, match=message):
        names(made(root))
    data = made(root, corrupt="skip")
    with pytest.warns(RescompressWarning, match=r"1 file\(s\) of train"):
        found = names(data)
    assert len(found) == 32
    assert not any(name.endswith("/00000010") for name in found if how != "cut short")


def test_a_resumed_stream_with_corrupt_samples_goes_on_where_it_was(tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "data", train=(8, 8, 8, 8))
    spoil(root, "broken")
    data = made(root, corrupt="skip")
    with pytest.warns(RescompressWarning):
        whole = names(data)
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 7, "shares": [1, 4]})

    assert [name for batch in loader for name in batch.names] == whole[28:]


def test_a_class_beyond_their_number_is_told(tmp_path: Path) -> None:
    data = made(layouts.shards(tmp_path / "data"), num_classes=2, corrupt="skip")

    with pytest.raises(InputError, match="is of class 2 and num_classes is 2"):
        names(data)


def test_classes_are_named_by_their_file(tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "data")
    (root / "classes.txt").write_text("tench\ngoldfish\nshark\n")
    data = made(root)

    data.setup()

    assert data.class_names == ("tench", "goldfish", "shark")
    with pytest.raises(InputError, match="names 3 classes and num_classes is 5"):
        made(root, num_classes=5).setup()


def test_the_root_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.shards(tmp_path / "data")
    (root / "classes.txt").write_text("tench\ngoldfish\nshark\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    data = made(Path("~/data"))

    data.setup()

    assert data.class_names == ("tench", "goldfish", "shark")


def test_a_missing_index_and_missing_shards_are_told(tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "data")
    (root / "val" / "imagenet-val-000001.tar").unlink()

    with pytest.raises(InputError, match=r"(?s)1 shards of val do not exist, .*ROOT/\n    _info.json.*--index"):
        made(root).setup()
    (root / "_info.json").unlink()
    with pytest.raises(InputError, match=r"_info.json does not exist"):
        made(root).setup()
    (root / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": ["a"]}}}))
    with pytest.raises(InputError, match=r"_info.json cannot be understood: KeyError"):
        made(root).setup()


def test_an_index_that_counts_too_many_is_told(tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "data", val=(5, 6))
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["val"]["shard_lengths"] = [5, 9]
    (root / "_info.json").write_text(json.dumps(info))

    with pytest.raises(InputError, match=r"000001.tar holds fewer samples than the 9 that"):
        names(made(root), "val")


def test_shards_written_of_folders_hold_the_same_images(tmp_path: Path) -> None:
    folders = ImageFolders(str(layouts.image_folders(tmp_path / "folders")), train_size=16, test_size=16, workers=0)
    out = tmp_path / "shards"
    assert write_shards(folders, out, images_per_shard=5, seed=3) == {}
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))

    data = made(out, test_batch_size=12)

    assert {split: sum(c.values()) for split, c in data.check().splits.items()} == {"train": 24, "val": 12}
    expected, found = next(folders.batches("val")), next(data.batches("val"))
    torch.testing.assert_close(found.images, expected.images[order], rtol=0, atol=0)
    torch.testing.assert_close(found.labels, expected.labels[order])
