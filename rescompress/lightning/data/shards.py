"""ImageNet as WebDataset shards: tar files that are streamed, for many machines and for storage without fast seeks.

The format is https://github.com/webdataset/webdataset's; `_info.json` is that of timm's shards on the hub.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rescompress.errors import InputError
from rescompress.lightning.data._base import Size
from rescompress.lightning.data._images import Decoded, as_they_are
from rescompress.lightning.data._loader import EpochLoader, Loaded, make_loader
from rescompress.lightning.data._photos import PhotoData
from rescompress.lightning.data._stream import ShardStream, samples_of
from rescompress.lightning.data.check import Check, existing_folder, wrong_layout

INFO = "_info.json"
CLASSES = "classes.txt"
SPLITS = {"train": ("train",), "val": ("val", "validation")}
TREE = """
ROOT/
    _info.json                     {"splits": {"train": {"filenames": [...], "shard_lengths": [...],
                                    "num_samples": 1281167}, "val": {...}}}
    classes.txt                    optional: the name of a class on each line
    train/                         (or side by side, as _info.json names them)
        imagenet-train-000000.tar  of 000000.jpg, 000000.cls, 000001.jpg, ...: the .cls is the number of the class
        ...
    val/
        imagenet-val-000000.tar
        ...

python scripts/prepare_imagenet.py ROOT --index    counts the samples in shards and writes _info.json
python scripts/prepare_imagenet.py FOLDERS --write-shards ROOT    makes shards of folders of images
"""


class ImageShards(PhotoData):
    """Images streamed from tar shards, each rank reading its own in training. Tested on val.

    An epoch has as many batches as the images give; ranks whose shards hold fewer read some of them again. With a
    ResolutionSchedule, the size is one for each batch number, and images are resized on the device.

    Args:
        root: folder of `_info.json`, and of the shards.
        num_classes: number of classes.
        train: shards, in braces: "train/imagenet-train-{000000..001023}.tar", or addresses that WebDataset opens:
            "https://HOST/train-{000..999}.tar", "pipe:aws s3 cp s3://BUCKET/train-{000..999}.tar -". Those of
            `_info.json` by default.
        val: likewise.
        train_images: their number, needed with `train`.
        val_images: likewise.
        streams: independent parts that a rank's shards are read in; the number of workers divides it.
        buffer: number of images that are shuffled together, on each rank.
        image_keys: suffixes of the images.
        label_key: suffix of the class numbers.
        options: those of `PhotoData` and `ImageData`.
    """

    def __init__(
        self,
        root: str,
        *,
        num_classes: int = 1000,
        train: str | None = None,
        val: str | None = None,
        train_images: int | None = None,
        val_images: int | None = None,
        streams: int = 8,
        buffer: int = 2048,
        image_keys: Sequence[str] = ("jpg", "jpeg", "png", "webp"),
        label_key: str = "cls",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, pattern, images in (("train", train, train_images), ("val", val, val_images)):
            if (pattern is None) != (images is None):
                raise InputError(f"give {name} and {name}_images together, or neither, got {pattern!r} and {images}")
        if streams < 1 or buffer < 1:
            raise InputError(f"streams and buffer must be at least 1, got {streams} and {buffer}")
        self.root = root
        self.num_classes = num_classes
        self.class_names = tuple(str(number) for number in range(num_classes))
        self.streams = streams
        self.buffer = buffer
        self.image_keys = tuple(image_keys)
        self.label_key = label_key
        self._given = {"train": (train, train_images), "val": (val, val_images)}
        self._shards: dict[str, tuple[list[str], list[int]]] = {}

    def check(self) -> Check:
        counts, notes = {}, []
        for split, (pattern, images) in self._given.items():
            if pattern is not None and images is not None:
                import webdataset

                names = webdataset.shardlists.expand_urls(pattern)
                urls = [name if ":" in name else str(Path(self.root).expanduser() / name) for name in names]
                self._shards[split] = urls, [images]
                counts[split] = {f"{len(urls)} shards": images}
            else:
                folder = existing_folder(self.root, "shards", TREE)
                names, lengths = _listed(folder, split)
                self._shards[split] = [str(folder / name) for name in names], lengths
                counts[split] = dict(zip(names, lengths, strict=True))
            missing = [url for url in self._shards[split][0] if ":" not in url and not Path(url).is_file()]
            if missing:
                raise wrong_layout(f"{len(missing)} shards of {split} do not exist, such as {missing[0]}", TREE)
        named = named_classes(self.root)
        if named:
            self.class_names = named[: self.num_classes]
            if len(named) != self.num_classes:
                raise InputError(
                    f"{Path(self.root, CLASSES)} names {len(named)} classes and num_classes is {self.num_classes}; "
                    "give the right number by --data.num_classes (num_classes=)"
                )
        else:
            notes.append(f"no classes.txt: classes are named by their numbers, 0 to {self.num_classes - 1}")
        return Check(name="Shards", root=self.root, splits=counts, kind="shard", notes=tuple(notes))

    def holds_jpeg(self) -> bool:
        jpeg = {"jpg", "jpeg"}
        if jpeg >= set(self.image_keys):
            return True
        _, files = next(samples_of(self._shards["train"][0][0]), ("", ""))  # the first sample stands for all
        return not isinstance(files, str) and next((key for key in self.image_keys if key in files), "") in jpeg

    def _loader(
        self, split: str, *, training: bool, size: Size | None = None, shuffle: bool | None = None
    ) -> EpochLoader:
        schedule = self.size_schedule if training else None
        if schedule is not None and schedule.level == "batch_size":
            raise InputError("batches of a stream are of one size; set ResolutionSchedule's level to learning_rate")
        urls, lengths = self._shards["train" if split == "train" else "val"]
        rank, world = self.shares
        shuffle = training if shuffle is None else shuffle
        largest = max(self.train_sizes) if training else size or self.test_size
        stream = ShardStream(
            urls=urls,
            lengths=lengths,
            read=as_they_are if self.on_device else Decoded(self.transforms([largest], training)[0]),
            image_keys=self.image_keys,
            label_key=self.label_key,
            classes=self.num_classes,
            batch_size=self.batch_size if shuffle else self.test_batch_size,
            training=shuffle,
            seed=self.seed,
            rank=rank,
            world=world,
            streams=self.streams,
            workers=self.workers,
            buffer=self.buffer,
            corrupt=self.corrupt,
        )

        def numbered(batch: Loaded, epoch: int, number: int) -> Loaded:
            side = None if schedule is None else schedule.size_at(epoch * stream.count + number, epoch)
            wanted: Size = largest if side is None else (side, side)
            return batch._replace(size=wanted, draws=batch.draws if training else None)

        return EpochLoader(
            make_loader(stream, None, self.workers),
            stream,
            stream.count,
            self._corrupt(split),
            processed=self._processed if training else lambda: None,
            shares=(world, self.batch_size),
            number=numbered,
        )


def named_classes(root: str | Path) -> tuple[str, ...]:
    """Return the names of the classes of shards, of `classes.txt`; none if there is no such file."""
    file = Path(root, CLASSES).expanduser()
    return tuple(file.read_text().strip().split("\n")) if file.is_file() else ()


def _listed(folder: Path, split: str) -> tuple[list[str], list[int]]:
    """Return the names of a split's shards and the number of samples in each, from `_info.json`."""
    try:
        splits = json.loads((folder / INFO).read_text())["splits"]
        found = next(splits[name] for name in SPLITS[split] if name in splits)
        names, lengths = list(found["filenames"]), [int(length) for length in found["shard_lengths"]]
    except FileNotFoundError as error:
        raise wrong_layout(f"{folder / INFO} does not exist", TREE) from error
    except StopIteration as error:
        raise wrong_layout(f"{folder / INFO} names no split {split!r}", TREE) from error
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise wrong_layout(f"{folder / INFO} cannot be understood: {error!r}", TREE) from error
    if not names or len(names) != len(lengths) or min(lengths) < 1:
        raise wrong_layout(f"{folder / INFO} names {len(names)} shards of {split}, with lengths {lengths[:5]}", TREE)
    return names, lengths
