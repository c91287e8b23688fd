"""Train at one image size per batch: always the same, growing over the epochs, or drawn anew, alike on all ranks.

Howard, "progressive resizing", https://docs.fast.ai; Tan and Le, "EfficientNetV2", https://arxiv.org/abs/2104.00298
Touvron et al., "Fixing the train-test resolution discrepancy", https://arxiv.org/abs/1906.06423
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rescompress.errors import InputError, SpecError
from rescompress.lightning.batches import images_of
from rescompress.spec import check_choice

if TYPE_CHECKING:
    from timm.data.scheduled_sampler import ScheduledBatchSampler

MODES = ("fixed", "progressive", "mixed")
LEVELS = ("batch_size", "learning_rate", "none")


@dataclass(frozen=True, kw_only=True)
class SizeSchedule:
    """Which image size each training batch has. Plain data: every rank and every resumed run finds the same sizes.

    Attributes:
        sizes: sides of square images
        mode: "fixed", the one size; "progressive", from the smallest to the largest over the epochs, one size an epoch
            (two where an epoch lies in the middle; every epoch has as many batches, so that with level "batch_size" one
            of small images goes through more of the data); "mixed", drawn for each batch
        level: what keeps the pixels of a step level: "batch_size" (smaller images, more of them), "learning_rate"
            (scaled by the pixels of the image over those of the largest) or "none"
        weights: in "mixed", how often each size is drawn against the others; alike by default
        seed: of the draws
        epochs: over which "progressive" goes from the smallest to the largest

    Raises:
        SpecError: a value is out of range, or does not fit the mode.
    """

    sizes: tuple[int, ...]
    mode: str = "fixed"
    level: str = "none"
    weights: tuple[float, ...] | None = None
    seed: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        check_choice("ResolutionSchedule.mode", self.mode, MODES)
        check_choice("ResolutionSchedule.level", self.level, LEVELS)
        if not self.sizes or any(size != int(size) or size < 1 for size in self.sizes):
            raise SpecError(f"ResolutionSchedule.sizes must be image sides of at least 1, got {list(self.sizes)}")
        if len(set(self.sizes)) != len(self.sizes):
            raise SpecError(f"ResolutionSchedule.sizes names a size twice: {list(self.sizes)}; use weights instead")
        if self.mode == "fixed" and len(self.sizes) != 1:
            raise SpecError(f"mode 'fixed' takes one size, got {list(self.sizes)}; use 'mixed' or 'progressive'")
        if self.mode != "fixed" and len(self.sizes) < 2:
            raise SpecError(f"mode {self.mode!r} takes several sizes, got {list(self.sizes)}; use 'fixed'")
        if self.mode == "progressive":
            object.__setattr__(self, "sizes", tuple(sorted(self.sizes)))
            if self.epochs is None or self.epochs < 1:
                raise SpecError(
                    f"mode 'progressive' needs the number of epochs over which the size grows, got {self.epochs}; "
                    "give Trainer(max_epochs=...) or ResolutionSchedule(epochs=...)"
                )
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            self._check_weights(self.weights)

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if self.mode != "mixed":
            raise SpecError(f"ResolutionSchedule.weights belong to mode 'mixed', and the mode is {self.mode!r}")
        if len(weights) != len(self.sizes) or not all(0 < weight < float("inf") for weight in weights):
            raise SpecError(
                f"ResolutionSchedule.weights must be one positive number for each of {list(self.sizes)}, got "
                f"{list(weights)}"
            )

    @property
    def largest(self) -> int:
        """The size whose pixels the others are brought level with, so that no step takes more memory than its own."""
        return max(self.sizes)

    def batch_sizes(self, batch_size: int) -> tuple[int, ...]:
        """Return the batch size at each of the sizes, `batch_size` being that at the largest."""
        if self.level != "batch_size":
            return (batch_size,) * len(self.sizes)
        return tuple(batch_size * self.largest**2 // size**2 for size in self.sizes)

    def learning_rate_factor(self, height: int, width: int) -> float:
        """Return what the learning rate of a step on images of this size is multiplied by."""
        return height * width / self.largest**2 if self.level == "learning_rate" else 1.0

    def size_at(self, global_batch: int, epoch: int = 0) -> int:
        """Return the size of a batch by its number in the run, for data without a sampler (streams)."""
        if self.mode == "mixed":
            # A string seeds through SHA-512: neighbouring numbers give draws that have nothing to do with each other.
            return random.Random(f"{self.seed} {global_batch}").choices(self.sizes, self.weights)[0]
        if self.mode == "fixed" or self.epochs is None:
            return self.sizes[0]
        progress = min(epoch / (self.epochs - 1), 1.0) if self.epochs > 1 else 1.0
        return self.sizes[round(progress * (len(self.sizes) - 1))]

    def batch_sampler(self, sampler: Any, batch_size: int) -> "ScheduledBatchSampler":
        """Wrap a sampler of indices in timm's, which yields batches of (index, position of the size in `sizes`).

        Incomplete batches are dropped. timm makes the same batches on all ranks whose samplers are equally long.

        Raises:
            InputError: the data do not fill one batch.
        """
        from timm.data.scheduled_sampler import ScheduledBatchSampler

        growing = {
            "choice_schedule": "progressive",
            "schedule_epochs": self.epochs,
            "schedule_spread": 0.0,  # one size an epoch
            "schedule_random_mix": 0.0,
        }
        options = growing if self.mode == "progressive" else {"choice_weights": self.weights}
        try:
            return ScheduledBatchSampler(sampler, self.batch_sizes(batch_size), seed=self.seed, **options)
        except ValueError as error:
            raise InputError(
                f"{len(sampler)} images do not fill the batches {self.batch_sizes(batch_size)} of sizes "
                f"{self.sizes}: {error}"
            ) from error


class ResolutionSchedule(Callback):
    """Give each training batch its size, by the DataModule, and keep the pixels of a step level.

    The DataModule must have an attribute `size_schedule`, as those of `rescompress.lightning.data` have; it is set
    before the loaders are made. Its batch size is that of the largest images.

    Args:
        sizes: sides of square images.
        mode: "fixed", "progressive" or "mixed"; see `SizeSchedule`.
        level: "batch_size", "learning_rate" or "none"; see `SizeSchedule`.
        weights: of the sizes, in "mixed".
        seed: of the draws.
        epochs: of "progressive"; the trainer's max_epochs by default.

    Raises:
        SpecError: an option is out of range (at once), or the number of epochs is missing (at setup).
        InputError: the DataModule is a foreign one, or yields another size than the schedule's.
    """

    def __init__(
        self,
        sizes: list[int],
        mode: str = "fixed",
        level: str = "batch_size",
        weights: list[float] | None = None,
        seed: int = 0,
        epochs: int | None = None,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "sizes": tuple(sizes),
            "mode": mode,
            "level": level,
            "weights": None if weights is None else tuple(weights),
            "seed": seed,
        }
        self._epochs = epochs
        # A wrong option is told here, not after the data are read.
        SizeSchedule(**self._options, epochs=1 if epochs is None else epochs)
        self.schedule: SizeSchedule | None = None
        self._factors: list[float] = []  # of the batches whose gradients the next step takes
        self._stepped = False
        self._handles: list[Any] = []
        self._unscaled: list[tuple[torch.optim.Optimizer, list[list[Any]]]] = []  # learning rates within a step

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the square images, ascending; known before the schedule is."""
        return tuple(sorted(self._options["sizes"]))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the schedule and hand it to the DataModule."""
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "size_schedule"):
            raise InputError(
                f"ResolutionSchedule needs a DataModule with an attribute 'size_schedule', got "
                f"{'plain loaders' if data is None else type(data).__name__}; use one of rescompress.lightning.data, "
                "or let your own read the attribute when it makes its training loader"
            )
        epochs = self._epochs if self._epochs is not None else trainer.max_epochs
        self.schedule = data.size_schedule = SizeSchedule(**self._options, epochs=epochs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the learning rate within each step of the optimizers, if that is what levels the pixels."""
        self._release()
        if self.schedule is None or self.schedule.level != "learning_rate":
            return
        for optimizer in trainer.optimizers:
            # On the optimizer itself: schedulers step before any callback hears of the end of the batch, and many of
            # them compute the next learning rate from the present one, which must be the unscaled one by then.
            unscaled: list[list[Any]] = []
            self._unscaled.append((optimizer, unscaled))
            self._handles.append(optimizer.register_step_pre_hook(self._scale(unscaled)))
            self._handles.append(optimizer.register_step_post_hook(self._restore(unscaled)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the size that the batch has, and note what it does to the learning rate."""
        if self.schedule is None:
            return
        height, width = images_of(batch).shape[-2:]
        if height != width or height not in self.schedule.sizes:
            raise InputError(
                f"batch {batch_idx} holds images of {height} x {width}, and the schedule's sizes are "
                f"{list(self.schedule.sizes)}: {type(getattr(trainer, 'datamodule', None)).__name__} does not keep to "
                "its size_schedule"
            )
        if self._stepped:
            self._factors.clear()
            self._stepped = False
        self._factors.append(self.schedule.learning_rate_factor(height, width))

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Forget batches whose gradients are thrown away: float16 scaling leaves out steps that overflowed."""
        del self._factors[:-1]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put back what a step that failed had scaled: a checkpoint may be written now."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the schedule back, so that the next run with these data is free of it."""
        self._release()
        if stage == "fit" and self.schedule is not None:
            data: Any = getattr(trainer, "datamodule", None)
            if data is not None:
                data.size_schedule = None

    # torch calls the hooks once for each class whose step is called: twice, where a step calls that of its base class.
    # Only the outermost call counts.

    def _scale(self, unscaled: list[list[Any]]) -> Any:
        def hook(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            unscaled.append([group["lr"] for group in optimizer.param_groups])
            if self._factors and len(unscaled) == 1:
                factor = sum(self._factors) / len(self._factors)
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * factor

        return hook

    def _restore(self, unscaled: list[list[Any]]) -> Any:
        def hook(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            rates = unscaled.pop()
            if not unscaled:
                _set_rates(optimizer, rates)
                self._stepped = True

        return hook

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        for optimizer, unscaled in self._unscaled:
            if unscaled:
                _set_rates(optimizer, unscaled[0])
        self._handles.clear()
        self._unscaled.clear()
        self._factors.clear()
        self._stepped = False


def _set_rates(optimizer: torch.optim.Optimizer, rates: list[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
