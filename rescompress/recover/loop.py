"""rc.recover: train a compressed model for some steps to give what the original gives, without any framework."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rescompress.errors import InputError, SpecError
from rescompress.recover.batches import ModelCall, device_of, moved, take_apart
from rescompress.recover.distillation import Distillation
from rescompress.recover.recalibration import has_statistics, recalibrate
from rescompress.spec import check_choice

Model = TypeVar("Model", bound=nn.Module)

TUNED = ("all", "norms_and_classifier")

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm)


def recover(
    model: Model,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int,
    distillation: Distillation | None = None,
    tune: str = "all",
    lr: float = 3e-4,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip: float = 1.0,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    recalibrate_batches: int | None = 50,
    checkpoint: str | Path | None = None,
    every: int = 200,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> Model:
    """Train `model` in place to give what `teacher` gives on the same images, and return it in evaluation mode.

    The teacher, usually the model from before `compress`, runs at its own full resolution, frozen and in evaluation
    mode; the images are given to both at the size that both take. AdamW with a linear warm-up and a cosine down to
    zero. At the end the BatchNorm statistics are found anew. What is random inside the models (dropout, drop-path) is
    seeded by the number of the step; the random state of the caller stays as it is.

    Args:
        model: the compressed model; it keeps its record, so that `spec_of` goes on working.
        teacher: gives logits of the same shape.
        loader: yields images, pairs (images, labels) or dicts of arguments; it is begun again when it ends.
        steps: how many batches are learned from.
        distillation: which losses; by default the Kullback-Leibler divergence of the logits alone.
        tune: "all" parameters, or "norms_and_classifier" (FixRes, https://arxiv.org/abs/1906.06423).
        lr: highest learning rate.
        weight_decay: of AdamW, on parameters of more than one dimension.
        warmup: share of the steps in which the learning rate rises.
        clip: largest norm of the gradients.
        optimizer: makes another optimizer of a list of parameters; lr and weight_decay are then its own.
        recalibrate_batches: batches for the statistics at the end, None for all; 0 leaves them as training left them.
        checkpoint: a file that is written every so many steps, and gone on from when it is there: with a loader that
            gives the same batches in the same order, the resumed run ends at the weights of an uninterrupted one.
        every: so many.
        log: called after each step with its number and the losses.

    Raises:
        SpecError: an option is out of range.
        InputError: the loader is empty, labels are missing, the loss is NaN, or the checkpoint is damaged, of another
            run, or cannot be written.
        UnsupportedModelError: the models' outputs cannot be compared, or nothing is to be tuned.
    """
    if steps < 1:
        raise SpecError(f"recover.steps must be at least 1, got {steps}")
    if not 0 <= warmup < 1:
        raise SpecError(f"recover.warmup must be in [0, 1), got {warmup}")
    if every < 1:
        raise SpecError(f"recover.every must be at least 1, got {every}")
    check_choice("recover.tune", tune, TUNED)
    if teacher is model:
        raise SpecError("recover needs a teacher of its own: the model from before compress, not the model itself")
    losses_of, device = distillation or Distillation(), device_of(model)
    with _tuned(model, tune) as parameters, _frozen(teacher, device):
        made = optimizer(parameters) if optimizer else _adamw(parameters, lr, weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: _factor(step, steps, warmup))
        run = _Run(model, made, schedule, steps, Path(checkpoint) if checkpoint is not None else None)
        start = run.resume()
        model.train()
        for step, call in enumerate(itertools.islice(_endless(loader), start, steps), start):
            with _seeded(step, device):
                losses = losses_of.losses(model, teacher, moved(call, device))
            value = {name: float(loss.detach()) for name, loss in losses.items()}
            if not math.isfinite(value["loss"]):
                raise InputError(f"the loss is {value['loss']} at step {step}; lower lr={lr}, or look at the images")
            made.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            made.step()
            schedule.step()
            if log is not None:
                log(step, value)
            if (step + 1) % every == 0 or step + 1 == steps:
                run.save(step + 1)
    model.zero_grad(set_to_none=True)
    if recalibrate_batches != 0 and has_statistics(model):
        recalibrate(model, loader, batches=recalibrate_batches)
    return model.eval()


class _Run:
    """A run that can be killed: what it is at is in a file that is replaced as a whole."""

    def __init__(self, model: nn.Module, optimizer: Any, schedule: Any, steps: int, path: Path | None) -> None:
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        self.steps = steps
        self.path = path

    def resume(self) -> int:
        """Load the file if it is there; return how many steps have been done."""
        if self.path is None:
            return 0
        if self.path.is_dir():
            raise InputError(f"checkpoint={self.path} is a folder; give the path of a file")
        try:  # else it would be found out after the first `every` steps
            _part(self.path).touch()
            _part(self.path).unlink()
        except OSError as error:
            raise InputError(
                f"checkpoint={self.path} cannot be written ({error.strerror}); make its folder, or give another path"
            ) from error
        if not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle fails in any way
            raise InputError(
                f"{self.path} is damaged or no checkpoint ({type(error).__name__}); delete it to begin anew"
            ) from error
        if not isinstance(saved, dict) or not {*self.parts, "step", "steps"} <= set(saved):
            raise InputError(f"{self.path} is no checkpoint of recover; give another path")
        if saved["steps"] != self.steps:
            raise InputError(
                f"{self.path} is of a run of {saved['steps']} steps, and {self.steps} are asked for; give another "
                "path, or delete it to begin anew"
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{self.path} does not fit this model or optimizer: {error}") from error
        return int(saved["step"])

    def save(self, step: int) -> None:
        """Write the file, so that a kill at any moment leaves the old or the new one whole."""
        if self.path is None:
            return
        part = _part(self.path)
        state = {name: thing.state_dict() for name, thing in self.parts.items()}
        try:
            torch.save({**state, "step": step, "steps": self.steps}, part)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _endless(loader: Iterable[Any]) -> Iterator[ModelCall]:
    while True:
        call = None
        for given in loader:
            call = take_apart(given)
            yield call
        if call is None:
            raise InputError("the loader gave no batch; give one that can be iterated over more than once")


@contextmanager
def _seeded(step: int, device: torch.device) -> Iterator[None]:
    """Seed what is random inside a model by the step, so that a resumed run draws what the whole one drew."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(step)
        yield


def _factor(step: int, steps: int, warmup: float) -> float:
    """Return the share of the highest learning rate at a step."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


@contextmanager
def _tuned(model: nn.Module, tune: str) -> Iterator[list[nn.Parameter]]:
    """Give the parameters to be trained; the others need no gradient meanwhile."""
    old = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if tune == "norms_and_classifier":
        chosen = {id(p) for module in (*_norms(model), classifier_of(model)) for p in module.parameters()}
        for parameter in old:
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
    parameters = [parameter for parameter in old if parameter.requires_grad]
    try:
        if not parameters:
            raise SpecError(f"recover.tune={tune!r} finds no parameter that takes a gradient in this model")
        yield parameters
    finally:
        for parameter, needed in old.items():
            parameter.requires_grad_(needed)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, NORMS)]


def classifier_of(model: nn.Module) -> nn.Module:
    """Return the layer that makes the logits: what the model says itself (timm), else its last linear or convolution.

    Raises:
        SpecError: there is none.
    """
    get = getattr(model, "get_classifier", None)
    if callable(get):
        named = get()
        if isinstance(named, nn.Module):
            return named
        if isinstance(named, tuple):  # class and distillation heads
            return nn.ModuleList(named)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise SpecError(f"no layer of this {type(model).__name__} could be its classifier; use tune='all'")
    return layers[-1]


@contextmanager
def _frozen(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the teacher on the device in evaluation mode; both are as before afterwards."""
    modes, home = [(module, module.training) for module in teacher.modules()], device_of(teacher)
    teacher.to(device).eval()
    try:
        yield
    finally:
        teacher.to(home)
        for module, was in modes:
            module.training = was
