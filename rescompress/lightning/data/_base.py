"""What all DataModules have in common: loaders that can be resumed, and the last steps of a batch on the device."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rescompress.errors import InputError, RescompressWarning, SpecError
from rescompress.lightning.batches import Batch
from rescompress.lightning.data._augment import mixed_images, resized
from rescompress.lightning.data._loader import CorruptFiles, Encoded, EpochLoader, Loaded, make_loader
from rescompress.lightning.data._order import BatchOrder, EpochOrder, PlainBatches, ResumedBatches
from rescompress.lightning.data.check import Check
from rescompress.spec import as_pair, check_choice

if TYPE_CHECKING:
    from rescompress.lightning.resolution import SizeSchedule

Size = tuple[int, int]
"""Height and width."""


class Source(Protocol):
    """A split of map-style data: whole batches by their keys."""

    def __len__(self) -> int: ...
    def __getitems__(self, keys: list[tuple[tuple[int, int], int]]) -> Loaded: ...


class ImageData(LightningDataModule):
    """Base of the DataModules: batches of images that depend on seed, epoch and index alone.

    After `setup`, `num_classes` and `class_names` are known. `size_schedule` is set by ResolutionSchedule.

    Args:
        train_size: of the images that the model is trained on, one side or (height, width).
        test_size: of those that it is validated and tested on.
        test_sizes: test at each of these sizes, sides of squares, instead of `test_size` alone, which is one of them:
            its score is the one of the results table.
        batch_size: on each device.
        test_batch_size: in validation and test; the same by default.
        workers: processes that read and decode.
        seed: of the order and of all random numbers.
        corrupt: files that cannot be read: "stop", or "skip" them, with a count after the epoch.
        mixup: strength of MixUp, 0 for none. https://arxiv.org/abs/1710.09412
        cutmix: strength of CutMix, 0 for none; with both, each batch gets one of them.
            https://arxiv.org/abs/1905.04899
        mean: of the channels, in [0, 1]; they are normalised by it.
        std: of the channels.

    Raises:
        InputError: a value is out of range.
    """

    num_classes: int
    class_names: tuple[str, ...]
    channels: int = 3

    def __init__(
        self,
        *,
        train_size: int | Size,
        test_size: int | Size,
        test_sizes: list[int] | None = None,
        batch_size: int = 64,
        test_batch_size: int | None = None,
        workers: int = 4,
        seed: int = 0,
        corrupt: str = "stop",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        one_of("corrupt", corrupt, ("stop", "skip"))
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("test_batch_size", test_batch_size, 1),
            ("workers", workers, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if mixup < 0 or cutmix < 0:
            raise InputError(f"mixup and cutmix must be at least 0, got {mixup} and {cutmix}")
        self.train_size = as_size(train_size, "train_size")
        self.test_size = as_size(test_size, "test_size")
        self.test_sizes = test_sizes
        if test_sizes is not None and self.test_size not in [as_size(size, "test_sizes") for size in test_sizes]:
            raise InputError(
                f"test_sizes {list(test_sizes)} lack test_size, {self.test_size[0]} x {self.test_size[1]}, whose score "
                "is the one of the results table; add it, or set test_size to one of them"
            )
        self.batch_size = batch_size
        self.test_batch_size = test_batch_size or batch_size
        self.workers = workers
        self.seed = seed
        self.corrupt = corrupt
        self.mixup, self.cutmix = mixup, cutmix
        if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
            raise InputError(f"mean and std must be of one or three channels, std above 0, got {mean} and {std}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.size_schedule: SizeSchedule | None = None
        self.corrupt_files: dict[str, CorruptFiles] = {}
        self._checked: Check | None = None

    def check(self) -> Check:
        """Look at the folder, without decoding an image, and return what there is.

        Raises:
            InputError: it is not laid out as it must be; the message shows how.
        """
        raise InputError(f"{type(self).__name__} does not say what its folder holds")

    def source(self, split: str, sizes: list[Size], training: bool) -> Source:
        """Return one split of the data, "train", "val" or "test", at these sizes, augmented if it is for training."""
        raise InputError(f"{type(self).__name__} has no split {split!r}")

    def setup(self, stage: str | None = None) -> None:
        """Look at the folder, before anything is run, and warn of what it lacks."""
        if self._checked is None:
            for lack in self.checked().lacks:
                rank_zero_warn(lack, category=RescompressWarning)

    def checked(self) -> Check:
        """Return what `check` finds, looking once only."""
        if self._checked is None:
            self._checked = self.check()
        return self._checked

    @property
    def skipped(self) -> dict[str, int]:
        """Number of different files of each split that this process could not read and has left out, if there are any.

        Those decoded on the device in validation and test count as of "evaluation".
        """
        return {split: len(corrupt.found) for split, corrupt in self.corrupt_files.items() if corrupt.found}

    def skipped_everywhere(self) -> dict[str, int]:
        """Return the same of all processes together; each of them has to call it."""
        _, world = self.shares
        if world == 1:
            return self.skipped
        own = {split: set(corrupt.found) for split, corrupt in self.corrupt_files.items()}
        everywhere: list[Any] = [None] * world
        torch.distributed.all_gather_object(everywhere, own)
        splits = sorted({split for one in everywhere for split in one})
        united = {split: set().union(*(one.get(split, ()) for one in everywhere)) for split in splits}
        return {split: len(names) for split, names in united.items() if names}

    @property
    def train_sizes(self) -> list[Size]:
        """All sizes that the model is trained on: those of the schedule, if there is one."""
        if self.size_schedule is None:
            return [self.train_size]
        return [(size, size) for size in self.size_schedule.sizes]

    @property
    def shares(self) -> tuple[int, int]:
        """Rank of this process and their number."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def train_dataloader(self) -> EpochLoader:
        """Return the training images, augmented."""
        self.setup()
        return self._loader("train", training=True)

    def plain_train_dataloader(self, size: Size) -> EpochLoader:
        """Return the training images at one size, shuffled but not augmented: for statistics, such as BatchNorm's."""
        self.setup()
        return self._loader("train", training=False, size=size, shuffle=True)

    def val_dataloader(self) -> EpochLoader:
        """Return the validation images."""
        self.setup()
        return self._loader("val", training=False)

    def test_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Return the test images; once for each of `test_sizes`, if there are any."""
        self.setup()
        if self.test_sizes is None:
            return self._loader("test", training=False)
        return [self._loader("test", training=False, size=as_size(size, "test_sizes")) for size in self.test_sizes]

    def batches(self, split: str = "train", device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Give finished batches of one epoch without a Trainer; those of "train" as in training."""
        self.setup()
        for loaded in self._loader(split, training=split == "train"):
            yield self.on_after_batch_transfer(move_data_to_device(loaded, torch.device(device)), 0)

    def teardown(self, stage: str) -> None:
        """Tell of corrupt files in an epoch that was not finished."""
        for corrupt in self.corrupt_files.values():
            corrupt.tell()

    def _loader(
        self, split: str, *, training: bool, size: Size | None = None, shuffle: bool | None = None
    ) -> EpochLoader:
        """Return a loader of a split.

        Args:
            split: "train", "val" or "test".
            training: augment, at the sizes of training.
            size: another size than `test_size`, without augmentation.
            shuffle: in the order of training, without its last images; as `training` by default.
        """
        rank, world = self.shares
        shuffle = training if shuffle is None else shuffle
        sizes = self.train_sizes if training else [size or self.test_size]
        source = self.source(split, sizes, training)
        trainer: Any = self.trainer
        overfit = trainer is not None and trainer.overfit_batches > 0
        order = EpochOrder(len(source), seed=self.seed, training=shuffle, rank=rank, world=world, shuffle=not overfit)
        batches: BatchOrder
        if training and self.size_schedule is not None:
            batches = self.size_schedule.batch_sampler(order, self.batch_size)
        else:
            batches = PlainBatches(order, self.batch_size if shuffle else self.test_batch_size)
        resumed = ResumedBatches(batches)
        return EpochLoader(
            make_loader(source, resumed, self.workers),
            resumed,
            len(batches),
            self._corrupt(split),
            processed=self._processed if training else lambda: None,
            shares=(world, self.batch_size),
        )

    def _corrupt(self, split: str) -> CorruptFiles:
        return self.corrupt_files.setdefault(split, CorruptFiles(self.corrupt, split))

    def _processed(self) -> int | None:
        """Return how many batches of this epoch the trainer is done with; the one in work is not."""
        if self.trainer is None or self.trainer.fit_loop._combined_loader is None:
            return None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Finish a batch on the device: decode if that is left to do, augment, resize, normalise, mix."""
        if not isinstance(batch, Loaded):
            return batch
        if isinstance(batch.images, Encoded):
            batch = self.decode(batch)
        images = batch.images if batch.draws is None else self.augment(batch.images, batch.draws)
        images = images.float() / 255
        if batch.size is not None:
            images = resized(images, batch.size)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        images = (images - mean) / std
        if images.shape[1] != self.channels:
            images = images.repeat(1, self.channels, 1, 1)
        labels = batch.labels if batch.labels.is_floating_point() else batch.labels.long()
        if batch.draws is not None and (self.mixup or self.cutmix):
            images, labels = mixed_images(
                images, labels, int(batch.draws[0]), self.mixup, self.cutmix, self.num_classes
            )
        if self.trainer is not None:  # half precision: Lightning converted the batch while it was still integers
            images, labels = self.trainer.precision_plugin.convert_input((images, labels))
        return Batch(images, labels, batch.names)

    def augment(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment training images on the device, where that was not done by the workers.

        Shape:
            - Input: (B, C, H, W) uint8, and seeds (B,)
            - Output: (B, C, H, W) uint8
        """
        return images

    def decode(self, batch: Loaded) -> Loaded:
        """Decode a batch of files on the device."""
        raise InputError(f"{type(self).__name__} decodes in workers only")


def as_size(value: int | Sequence[int], name: str) -> Size:
    """Return (height, width).

    Raises:
        InputError: it is no size.
    """
    try:
        return as_pair(name, value)
    except SpecError as error:
        raise InputError(str(error)) from None


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless a value is one of the choices.

    Raises:
        InputError: it is not.
    """
    try:
        check_choice(option, value, choices)
    except SpecError as error:
        raise InputError(str(error)) from None
