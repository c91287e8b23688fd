"""A stream of samples out of tar shards, in an order that depends on seed, epoch and rank alone.

Each rank reads several streams, each with its own shards and its own shuffle buffer; batch k comes from stream k modulo
their number, and a worker serves whole streams. So the batches are the same with any number of workers that divides
that of the streams.
"""

import hashlib
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from rescompress.errors import InputError, one_line
from rescompress.lightning.data._images import UNREADABLE, gathered
from rescompress.lightning.data._loader import Loaded
from rescompress.lightning.data._order import even_batches, mixed

Sample = tuple[str, dict[str, Any] | str, int]
"""Name, files by their suffix (or why they cannot be had), and the seed of its random numbers."""


@dataclass(eq=False, kw_only=True)
class ShardStream(IterableDataset[Loaded]):
    """Whole batches from shards. `begin` sets the epoch and the number of the first batch.

    Attributes:
        urls: of all shards
        images: number of samples in them
        read: makes an image of a file, with a seed
        image_keys: suffixes of images
        label_key: suffix of class numbers
        classes: number of classes
        batch_size: of a batch
        training: shuffle; a rank reads its own shards, again where they run out before the epoch does. In evaluation
            every rank reads all shards, and keeps the samples of its share
        seed: of the run
        rank: of this process
        world: number of processes
        streams: of a rank, in training
        workers: processes that the streams are given to
        buffer: samples that are shuffled together, all streams of a rank taken together
        corrupt: "stop" or "skip"
    """

    urls: Sequence[str]
    images: int
    read: Callable[[bytes, int], Tensor]
    image_keys: Sequence[str]
    label_key: str
    classes: int
    batch_size: int
    training: bool
    seed: int = 0
    rank: int = 0
    world: int = 1
    streams: int = 8
    workers: int = 0
    buffer: int = 2048
    corrupt: str = "stop"
    epoch: int = field(default=0, init=False)
    skip: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.training:
            own = len(self.urls) // self.world
            if not own:
                raise InputError(
                    f"{len(self.urls)} shards cannot be shared by {self.world} processes; write more and smaller shards"
                )
            self.streams = min(self.streams, own)
            if self.workers and self.streams % self.workers:
                raise InputError(
                    f"{self.workers} workers do not divide {self.streams} streams (of {len(self.urls)} shards on "
                    f"{self.world} process(es)); set workers or streams so that they do"
                )
        if not self.count:
            raise InputError(
                f"{self.images} images do not give each of {self.world} process(es) a batch of {self.batch_size}; "
                "use a smaller batch_size or fewer processes"
            )

    def begin(self, epoch: int, skip: int) -> None:
        """Set where the next iteration starts."""
        self.epoch, self.skip = epoch, skip

    @property
    def count(self) -> int:
        """Number of batches in an epoch."""
        if self.training:
            return self.images // self.world // self.batch_size
        return even_batches(self.images, self.batch_size, self.rank, self.world)

    def __iter__(self) -> Iterator[Loaded]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # The first batch that is given out comes from the first worker, whatever its number is.
        numbers = range(self.skip + worker, self.count, workers)
        if self.training:
            yield from self._shuffled(numbers)
        else:
            yield from self._in_order(numbers)

    def _shuffled(self, numbers: range) -> Iterator[Loaded]:
        opened: dict[int, Iterator[Sample]] = {}
        for number in numbers:
            stream = number % self.streams
            if stream not in opened:
                had = len(range(stream, self.skip, self.streams))
                opened[stream] = self._stream(stream)
                next(islice(opened[stream], had * self.batch_size, had * self.batch_size), None)
            yield self._batch(islice(opened[stream], self.batch_size))

    def _stream(self, stream: int) -> Iterator[Sample]:
        """Give the samples of a stream, shuffled, without end: once all were had, its shards are read again."""
        import webdataset

        generator = torch.Generator().manual_seed(int(mixed(self.seed, self.epoch)))
        order = torch.randperm(len(self.urls), generator=generator).tolist()
        own = order[self.rank :: self.world][: len(self.urls) // self.world][stream :: self.streams]
        size = max(1, self.buffer // self.streams)
        for again in count():
            rng = random.Random(int(mixed(self.seed, self.epoch, again, self.rank, stream)))
            rng.shuffle(own)
            yield from webdataset.shuffle(size, initial=size, rng=rng)(self._pass(own, again))

    def _pass(self, shards: Sequence[int], again: int) -> Iterator[Sample]:
        useful = False
        for shard in shards:
            for name, files in self._samples(self.urls[shard]):
                useful = useful or not isinstance(files, str)
                yield name, files, int(mixed(self.seed, self.epoch, again, _number(name)))
        if not useful:
            raise InputError(f"none of the shards of a stream can be read, such as {self.urls[shards[0]]}")

    def _in_order(self, numbers: range) -> Iterator[Loaded]:
        """Give the batches of these numbers: equally large but for one sample, no sample twice."""
        share = (self.images - self.rank + self.world - 1) // self.world
        small, larger = divmod(share, self.count)
        own = islice(self._all(), self.rank, None, self.world)
        for number in range(self.count):
            size = small + (number < larger)
            if number in numbers:
                yield self._batch(islice(own, size))
            else:
                next(islice(own, size, size), None)

    def _all(self) -> Iterator[Sample]:
        found = 0
        for url in self.urls:
            for name, files in self._samples(url):
                found += 1
                yield name, files, 0
        if found < self.images and self.corrupt == "stop":
            raise InputError(
                f"the shards hold {found} samples and {self.images} were expected; count them again by "
                "scripts/prepare_imagenet.py --index"
            )

    def _samples(self, url: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
        from webdataset import gopen, tariterators

        shard = url.rsplit("/", 1)[-1]
        try:
            with gopen(url) as stream:
                files = tariterators.tar_file_expander(iter([{"url": url, "stream": stream}]))
                for sample in tariterators.group_by_keys(files):
                    yield f"{shard}/{sample['__key__']}", sample
        except (*UNREADABLE, EOFError, tarfile.TarError) as error:
            yield url, one_line(error)

    def _batch(self, samples: Iterator[Sample]) -> Loaded:
        """Make a batch of as many samples as there are in `samples`.

        A broken one is replaced by the next readable of its batch in training, so that a resumed run need not decode
        what it skips, and left out in evaluation.
        """
        found: list[tuple[Tensor, int, str, int]] = []
        broken: list[tuple[str, str]] = []
        gaps = 0
        for name, files, draw in samples:
            try:
                image, label = self._decoded(name, files, draw)
            except UNREADABLE as error:
                if isinstance(error, InputError):
                    raise
                broken.append((name, one_line(error)))
                gaps += self.training
                if self.corrupt == "stop":
                    return Loaded(torch.empty(0), torch.empty(0), (), broken=tuple(broken))
                continue
            found += [(image, label, name, draw)] * (gaps + 1)
            gaps = 0
        found += found[:1] * gaps
        images, labels, names, draws = map(list, zip(*found, strict=True)) if found else ([], [], [], [])
        return gathered(images, torch.tensor(labels), names, draws if self.training else None, None, broken)

    def _decoded(self, name: str, files: dict[str, Any] | str, draw: int) -> tuple[Tensor, int]:
        if isinstance(files, str):
            raise OSError(files)
        image = next((files[key] for key in self.image_keys if key in files), None)
        if image is None:
            raise OSError(f"no image in it (.{', .'.join(self.image_keys)})")
        if self.label_key not in files:
            raise OSError(f"no label in it (.{self.label_key})")
        label = int(files[self.label_key])
        if not 0 <= label < self.classes:
            raise InputError(f"{name} is of class {label} and num_classes is {self.classes}; give the right number")
        return self.read(image, draw), label


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
