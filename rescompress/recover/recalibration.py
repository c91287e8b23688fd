"""Find the statistics of a compressed model's BatchNorm layers anew: no labels, no gradients.

Behind a resize the maps have another distribution than the one that the running statistics were taken from.
Touvron et al., "Fixing the train-test resolution discrepancy", https://arxiv.org/abs/1906.06423, for the effect.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rescompress.errors import InputError, UnsupportedModelError
from rescompress.recover.batches import device_of, moved, take_apart

Model = TypeVar("Model", bound=nn.Module)


def recalibrate(model: Model, loader: Iterable[Any], *, batches: int | None = None) -> Model:
    """Replace the running statistics of every BatchNorm by their mean over the batches of a loader; in place.

    Only the BatchNorm layers are in training mode meanwhile, so dropout and the like stay off. Every batch counts
    alike. With torch.distributed, each process gives its own batches and the statistics are averaged. The mode of the
    model stays as it was; an error leaves the statistics as they were.

    Args:
        model: a model with BatchNorm layers, on any device.
        loader: yields images, pairs (images, labels) or dicts of arguments; labels are not read.
        batches: how many to take; all of them by default.

    Raises:
        UnsupportedModelError: no layer of the model keeps running statistics.
        InputError: the loader gives no batch, or statistics become infinite or NaN.
    """
    norms = {name: norm for name, norm in model.named_modules() if _keeps_statistics(norm)}
    if not norms:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no BatchNorm with running statistics, so there is nothing to recalibrate"
        )
    if batches is not None and batches < 1:
        raise InputError(f"batches must be at least 1, got {batches}")
    device, seen = device_of(model), 0
    with _collecting(model, norms), torch.no_grad():
        for given in loader:
            call = moved(take_apart(given), device)
            model(*call.args, **call.kwargs)
            seen += 1
            if seen == batches:
                break
        if not seen:
            raise InputError("the loader gave no batch; give at least one")
        _average_over_processes(norms)
        for name, norm in norms.items():
            if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
                raise InputError(f"the statistics of {name!r} are infinite or NaN on these batches; look at the images")
    return model


def has_statistics(model: nn.Module) -> bool:
    """Whether `recalibrate` has anything to do in this model."""
    return any(_keeps_statistics(module) for module in model.modules())


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None


@contextmanager
def _collecting(model: nn.Module, norms: dict[str, Any]) -> Iterator[None]:
    """Let the BatchNorms average over batches; everything but their statistics is put back, those too on an error."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = {name: norm.momentum for name, norm in norms.items()}
    before = {name: {key: value.clone() for key, value in norm._buffers.items()} for name, norm in norms.items()}
    try:
        model.eval()
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        yield
    except BaseException:
        for name, norm in norms.items():
            for key, value in before[name].items():
                norm._buffers[key].copy_(value)
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
        for module, was in modes:
            module.training = was


def _average_over_processes(norms: dict[str, Any]) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for norm in norms.values():
        for statistics in (norm.running_mean, norm.running_var):
            torch.distributed.all_reduce(statistics)
            statistics.div_(torch.distributed.get_world_size())
