"""Learning rates that rise linearly and then fall over the whole run, whose length the trainer knows."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rescompress.errors import SpecError


class Warmup(LRScheduler, ABC):
    """A linear rise, then what a subclass says; stepped once for each step of the optimizer.

    Until `begin` has told the length of the run, the learning rate is that of its first step.
    """

    interval = "step"

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.0, final: float = 0.0, total_steps: int | None = None
    ) -> None:
        """Take the options.

        Args:
            optimizer: whose learning rates are set.
            warmup: how long the learning rate rises: a share of the run below 1, or a number of steps.
            final: what it ends at, as a share of the highest.
            total_steps: length of the run; by default `begin` tells it.

        Raises:
            SpecError: an option is out of range.
        """
        if not warmup >= 0:
            raise SpecError(f"{type(self).__name__}.warmup must be a share or a number of steps, got {warmup}")
        if not 0 <= final <= 1:
            raise SpecError(f"{type(self).__name__}.final must be in [0, 1], got {final}")
        self.warmup = warmup
        self.final = final
        self.total_steps = total_steps
        self.length = total_steps or 1
        super().__init__(optimizer)

    def begin(self, length: int) -> None:
        """Take the length of the run, and set the learning rates of the present step."""
        self.length = length
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[Any]:
        """Return the learning rates of the present step."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def factor(self, step: int) -> float:
        """Return the share of the highest learning rate at a step, the first being 0."""
        rising = round(self.warmup * self.length) if self.warmup < 1 else int(self.warmup)
        if step < rising:
            return (step + 1) / rising
        gone = min(1.0, (step - rising) / max(1, self.length - rising))
        return self.final + (1 - self.final) * self.shape(gone)

    @abstractmethod
    def shape(self, gone: float) -> float:
        """Return what is left, from 1 to 0, after a share of the way down."""


class WarmupCosine(Warmup):
    """A linear rise, then half a cosine down."""

    def shape(self, gone: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * gone))


class WarmupPoly(Warmup):
    """A linear rise, then a power of what is left of the run: the usual schedule of segmentation."""

    def __init__(
        self,
        optimizer: Optimizer,
        power: float = 0.9,
        warmup: float = 0.0,
        final: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        """Take the options.

        Args:
            optimizer: whose learning rates are set.
            power: 1 is a straight line.
            warmup: how long the learning rate rises: a share of the run below 1, or a number of steps.
            final: what it ends at, as a share of the highest.
            total_steps: length of the run; by default the trainer's.

        Raises:
            SpecError: an option is out of range.
        """
        if not power > 0:
            raise SpecError(f"WarmupPoly.power must be above 0, got {power}")
        self.power = power
        super().__init__(optimizer, warmup, final, total_steps)

    def shape(self, gone: float) -> float:
        return float((1 - gone) ** self.power)
