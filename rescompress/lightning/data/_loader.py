"""A loader that Lightning can stop and resume anywhere: it knows its epoch and how many of its batches are done."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rescompress.errors import InputError, RescompressWarning


class Loaded(NamedTuple):
    """A batch as workers make it; the DataModule finishes it on the device into a `Batch`.

    Attributes:
        images: uint8 (B, C, H, W), or an `Encoded`
        labels: integers, or several labels per image as floats
        names: of the files
        draws: seeds of the random numbers of each sample (B,); None in evaluation
        size: (height, width) that the images are brought to on the device; None where they have it
        broken: (name, reason) of each file that could not be read
    """

    images: Any
    labels: Tensor
    names: tuple[str, ...]
    draws: Tensor | None = None
    size: tuple[int, int] | None = None
    broken: tuple[tuple[str, str], ...] = ()


def with_tuples(batch: Loaded) -> Loaded:
    """Return a batch whose tuples are tuples: torch's thread that pins memory makes lists of them."""
    return batch._replace(
        names=tuple(batch.names),
        size=None if batch.size is None else (batch.size[0], batch.size[1]),
        broken=tuple((name, reason) for name, reason in batch.broken),
    )


class Encoded:
    """Files as they were read, one uint8 tensor each, still to be decoded. (A list would be moved to the device.)"""

    def __init__(self, files: list[Tensor]) -> None:
        self.files = files


class Begins(Protocol):
    """What sets the place where the next iteration of a loader starts: a sampler of batches, or a stream."""

    def begin(self, epoch: int, skip: int) -> None: ...


class CorruptFiles:
    """Files that could not be read: the first one stops the run, or they are counted and told of after the epoch.

    Args:
        policy: "stop" or "skip".
        split: of the data, for the message.
    """

    def __init__(self, policy: str, split: str) -> None:
        self.policy = policy
        self.split = split
        self.found: dict[str, str] = {}
        self._told = 0

    def note(self, broken: tuple[tuple[str, str], ...]) -> None:
        """Note what a batch could not read.

        Raises:
            InputError: the policy is to stop.
        """
        for name, reason in broken:
            if self.policy == "stop":
                raise InputError(
                    f"{name} cannot be read: {reason}; mend or remove it, or set corrupt: skip, which takes another "
                    "image in its place and counts them"
                )
            self.found.setdefault(name, reason)

    def tell(self) -> None:
        """Warn of the files that were found since the last time."""
        new = list(self.found)[self._told :]
        if new:
            self._told = len(self.found)
            names = ", ".join(new[:10]) + (", ..." if len(new) > 10 else "")
            warnings.warn(
                f"{len(new)} file(s) of {self.split} could not be read and were skipped: {names}",
                RescompressWarning,
                stacklevel=2,
            )


def as_loaded(batch: Any) -> Any:
    """Return what a dataset's `__getitems__` made: whole batches, so that there is nothing to collate."""
    return batch


class EpochLoader:
    """Batches of one split, epoch after epoch.

    Lightning asks for an iterator before it says which epoch it is, and torch's workers start to read at once. So
    torch's iterator is made here when the first batch is asked for.

    Args:
        loader: torch's, which makes the batches.
        start: where it begins is told to this.
        length: number of batches in an epoch.
        corrupt: what is done about files that cannot be read.
        processed: the trainer's number of batches done in this epoch, if there is a trainer; so that a checkpoint made
            within a step repeats that step's batch.
        shares: (processes, batch size), on which the place in an epoch depends.
        number: takes the batch, its epoch and its number in the epoch before it is given out.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        start: Begins,
        length: int,
        corrupt: CorruptFiles,
        *,
        processed: Callable[[], int | None] = lambda: None,
        shares: tuple[int, int] = (1, 1),
        number: Callable[[Loaded, int, int], Loaded] = lambda batch, epoch, number: batch,
    ) -> None:
        self.loader = loader
        self.corrupt = corrupt
        self.epoch = 0
        self._start = start
        self._length = length
        self._processed = processed
        self._shares = shares
        self._number = number
        self._given = 0
        self._resume_at = 0

    batch_sampler = None  # which Lightning asks for where there is a sampler

    @property
    def sampler(self) -> "EpochLoader":
        """Lightning calls `set_epoch` on a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; another one than that of a loaded state begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._resume_at, self._given = epoch, 0, 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Loaded]:
        epoch, skip = self.epoch, self._resume_at
        self._resume_at, self._given = 0, skip
        self._start.begin(epoch, skip)
        if skip < self._length:
            for loaded in self.loader:
                batch = with_tuples(loaded)
                self.corrupt.note(batch.broken)
                if len(batch.names) == 0:  # all of its files are corrupt
                    continue
                self._given += 1
                if self._given == self._length:  # Lightning does not ask for what comes after the last one
                    self.corrupt.tell()
                yield self._number(batch, epoch, self._given - 1)
        self.corrupt.tell()

    @property
    def _iterator(self) -> Any:
        """Torch's iterator: Lightning ends the workers that it finds behind this name when a loop is over."""
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of its batches that are done."""
        processed = self._processed()
        done = self._given if processed is None else processed
        return {"epoch": self.epoch, "batches": done, "shares": list(self._shares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration behind the batches that are done."""
        if state["batches"] and tuple(state["shares"]) != self._shares:
            was, now = state["shares"], self._shares
            warnings.warn(
                f"the run was interrupted on {was[0]} process(es) with batches of {was[1]} and goes on on {now[0]} "
                f"with {now[1]}: until the end of this epoch some images come twice or not at all",
                RescompressWarning,
                stacklevel=2,
            )
        self.epoch, self._resume_at = int(state["epoch"]), int(state["batches"])


def make_loader(source: Any, batches: Any, workers: int) -> DataLoader[Any]:
    """Return torch's loader over a dataset of whole batches, or over a stream where `batches` is None.

    Its generator keeps the global random state out of it.
    """
    return DataLoader(
        source,
        batch_size=None if batches is None else 1,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=as_loaded,
        pin_memory=torch.cuda.is_available(),
        # A stream is sent to its workers anew each epoch, with the place where it starts.
        persistent_workers=workers > 0 and batches is not None,
        generator=torch.Generator().manual_seed(0),
    )
