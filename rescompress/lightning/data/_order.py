"""The order of an epoch's samples and the random numbers of each: functions of seed, epoch and index, of nothing else.

So neither the number of workers nor an interruption changes what a run sees. The numbers come from a mixing function
on 64-bit integers, for a whole epoch at once.

Steele et al., "Fast Splittable Pseudorandom Number Generators", https://doi.org/10.1145/2714064.2660195
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from rescompress.errors import InputError

Key: TypeAlias = tuple[int, int]
"""Index of a sample, and the seed of the random numbers that it is augmented with in this epoch."""

_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def mixed(*parts: int | Tensor) -> Tensor:
    """Return seeds in [0, 2**63) that differ wherever any part differs; tensors (int64) are broadcast.

    The same on every device: integer arithmetic that wraps around.
    """
    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        if not isinstance(part, Tensor):
            part = torch.tensor((part + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
        state = _scrambled((state ^ part) + _STEP)
    return state & (2**63 - 1)


def _scrambled(state: Tensor) -> Tensor:
    # The shift of a negative number brings in ones; the masks make it that of an unsigned number.
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _FIRST
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _SECOND
    return state ^ ((state >> 31) & (2**33 - 1))


def uniform(draws: Tensor, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each seed.

    Shape:
        - Input: (B,), int64
        - Output: (B, count), float32
    """
    numbers = mixed(draws[:, None], torch.arange(count, device=draws.device)[None])
    return (numbers >> 39).to(torch.float32) / 2**24


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Seed the random numbers of torch (on the CPU), numpy and Python inside the block, and leave them as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class EpochOrder(Sampler[Key]):
    """One rank's share of the samples, in the order of the epoch.

    Batch k of all ranks together is the same set of samples on any number of ranks. In training, what does not go up
    in the ranks is left out, so that all are equally long; in evaluation every sample comes once on one rank.

    Args:
        length: number of samples in the data.
        seed: of the run.
        training: shuffle, with random numbers for each sample, and equal shares.
        rank: of this process.
        world: number of processes.
        shuffle: in training; without it the order is that of the data.
    """

    def __init__(
        self, length: int, *, seed: int = 0, training: bool = True, rank: int = 0, world: int = 1, shuffle: bool = True
    ) -> None:
        self.length = length
        self.seed = seed
        self.training = training
        self.rank = rank
        self.world = world
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.training:
            return self.length // self.world
        return (self.length - self.rank + self.world - 1) // self.world

    def __iter__(self) -> Iterator[Key]:
        indices = torch.arange(self.length)
        if self.training and self.shuffle:
            generator = torch.Generator().manual_seed(int(mixed(self.seed, self.epoch)))
            indices = torch.randperm(self.length, generator=generator)
        indices = indices[self.rank :: self.world][: len(self)]
        draws = mixed(self.seed, self.epoch, indices) if self.training else torch.zeros_like(indices)
        yield from zip(indices.tolist(), draws.tolist(), strict=True)


def even_batches(length: int, batch_size: int, rank: int, world: int) -> int:
    """Return into how many batches a rank cuts its share of `length` samples, of which none may come twice.

    As many on every rank, so that ranks that wait for each other (FSDP) meet; only where a rank has fewer samples than
    that, with batches of one, it has one batch less.
    """
    share = (length - rank + world - 1) // world
    return min(math.ceil(math.ceil(length / world) / batch_size), share)


class PlainBatches(Sampler[list[tuple[Key, int]]]):
    """Cut an order into batches of (key, 0), the form that timm's ScheduledBatchSampler gives them.

    In training the incomplete last batch is dropped. In evaluation all batches are as large as each other, but for one
    sample; see `even_batches`.

    Raises:
        InputError: there are too few samples for one batch on each rank.
    """

    def __init__(self, order: EpochOrder, batch_size: int) -> None:
        self.order = order
        self.batch_size = batch_size
        if order.training:
            self.count = len(order) // batch_size
        else:
            self.count = even_batches(order.length, batch_size, order.rank, order.world)
        if not self.count:
            raise InputError(
                f"{order.length} images do not give each of {order.world} process(es) a batch of {batch_size}; "
                "use a smaller batch_size, fewer processes or more images"
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[tuple[Key, int]]]:
        keys = iter(self.order)
        small, larger = divmod(len(self.order), self.count)
        for number in range(self.count):
            size = self.batch_size if self.order.training else small + (number < larger)
            yield [(key, 0) for key in islice(keys, size)]


class BatchOrder(Protocol):
    """A sampler of batches that knows epochs: `PlainBatches` or timm's ScheduledBatchSampler."""

    def set_epoch(self, epoch: int) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class ResumedBatches(Sampler[Any]):
    """The batches of one epoch without those that were had before: they are not even read."""

    def __init__(self, batches: BatchOrder) -> None:
        self.batches = batches
        self.skip = 0

    def begin(self, epoch: int, skip: int) -> None:
        """Set where the next iteration starts."""
        self.batches.set_epoch(epoch)
        self.skip = skip

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.skip, None)
