"""A stream of samples out of tar shards, in an order that depends on seed, epoch and rank alone.

Each rank reads several streams, each with its own shards and its own shuffle buffer; batch k comes from stream k modulo
their number, and a worker serves whole streams. So the batches are the same with any number of workers that divides
that of the streams.
"""

import hashlib
import random
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from rescompress.errors import InputError, one_line
from rescompress.lightning.data._images import UNREADABLE, gathered
from rescompress.lightning.data._loader import Loaded
from rescompress.lightning.data._order import even_batches, mixed

Files = tuple[str, dict[str, Any] | str]
"""Name of a sample, and its files by their suffix, or why they cannot be had."""

Sample = tuple[str, dict[str, Any] | str, int]
"""The same, and the seed of its random numbers."""


@dataclass(eq=False, kw_only=True)
class ShardStream(IterableDataset[Loaded]):
    """Whole batches from shards. `begin` sets the epoch and the number of the first batch.

    Attributes:
        urls: of all shards
        lengths: number of samples in each, or in all of them as the only number
        read: makes an image of a file, with a seed
        image_keys: suffixes of images
        label_key: suffix of class numbers
        classes: number of classes
        batch_size: of a batch
        training: shuffle; a rank reads its own shards, again where they run out before the epoch does. In evaluation
            a worker opens the shards that hold samples of its batches, and all where their lengths are not known
        seed: of the run
        rank: of this process
        world: number of processes
        streams: of a rank, in training
        workers: processes that the streams are given to
        buffer: samples that are shuffled together, all streams of a rank taken together
        corrupt: "stop" or "skip"
    """

    urls: Sequence[str]
    lengths: Sequence[int]
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
    def images(self) -> int:
        """Number of samples in all shards."""
        return sum(self.lengths)

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
            for name, files in samples_of(self.urls[shard]):
                useful = useful or not isinstance(files, str)
                yield name, files, int(mixed(self.seed, self.epoch, again, _number(name)))
        if not useful:
            raise InputError(f"none of the shards of a stream can be read, such as {self.urls[shards[0]]}")

    def _in_order(self, numbers: range) -> Iterator[Loaded]:
        """Give the batches of these numbers: equally large but for one sample, no sample twice."""
        share = (self.images - self.rank + self.world - 1) // self.world
        small, larger = divmod(share, self.count)
        samples = Ordered(self.urls, self.lengths)
        for number in numbers:
            first = number * small + min(number, larger)
            own = range(first, first + small + (number < larger))
            yield self._batch(self._found(samples, [self.rank + self.world * place for place in own]))

    def _found(self, samples: "Ordered", places: Sequence[int]) -> Iterator[Sample]:
        for place in places:
            sample = samples.at(place)
            if sample is not None:
                yield *sample, 0
                continue
            reason = (
                f"fewer samples than the {samples.length} that were expected; if nothing is damaged, count them again "
                "by scripts/prepare_imagenet.py --index"
            )
            if self.corrupt == "stop":
                raise InputError(f"{samples.where} {reason}")
            yield samples.url, reason, 0

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
            raise InputError(
                f"{name} is of class {label} and num_classes is {self.classes}; give the right number by "
                "--data.num_classes (num_classes=)"
            )
        return self.read(image, draw), label


class Ordered:
    """Samples by their place among all, asked for in rising order; shards of which none is asked for stay closed.

    Args:
        urls: of all shards.
        lengths: number of samples in each; with another number of them, all shards are read as one.
    """

    def __init__(self, urls: Sequence[str], lengths: Sequence[int]) -> None:
        self.parts = [[url] for url in urls] if len(urls) == len(lengths) else [list(urls)]
        self.lengths = lengths
        self.ends = list(accumulate(lengths))
        self.part = -1
        self.samples: Iterator[tuple[int, Files]] = iter(())

    def at(self, place: int) -> Files | None:
        """Return the sample, or None if its shard ends before it."""
        part = bisect_right(self.ends, place)
        if part != self.part:
            self.part = part
            files = chain.from_iterable(samples_of(url) for url in self.parts[part])
            self.samples = enumerate(files, self.ends[part] - self.length)
        return next((sample for number, sample in self.samples if number == place), None)

    @property
    def length(self) -> int:
        """Number of samples that the open shard should hold."""
        return self.lengths[self.part]

    @property
    def url(self) -> str:
        """The open shard, or the first one where all are read as one."""
        return self.parts[self.part][0]

    @property
    def where(self) -> str:
        """The open shard, for a message."""
        return f"{self.url} holds" if len(self.parts) > 1 else "the shards hold"


def samples_of(url: str) -> Iterator[Files]:
    """Give the samples of a shard; why the rest cannot be had as the last one, if it is damaged."""
    from webdataset import gopen, tariterators

    shard = url.rsplit("/", 1)[-1]
    closing = False
    try:
        with gopen(url) as stream:
            files = tariterators.tar_file_expander(iter([{"url": url, "stream": stream}]))
            for sample in tariterators.group_by_keys(files):
                closing = True
                yield f"{shard}/{sample['__key__']}", sample
                closing = False
    except (*UNREADABLE, EOFError, tarfile.TarError) as error:
        if not closing:  # else a command behind a pipe says that nobody reads what it still has to write
            yield url, _reason(error)


def _reason(error: BaseException) -> str:
    """Return what an error says, without the streams and addresses that webdataset adds to it."""
    if not error.args or getattr(error, "strerror", None):
        return one_line(error)
    return one_line(OSError(str(error.args[0]).partition(" @ <")[0]))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
