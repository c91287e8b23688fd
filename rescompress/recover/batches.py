"""What a data loader gives, taken apart: the arguments that a model is called with, and the labels if there are any."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rescompress.errors import InputError

LABELS = ("labels", "label", "target", "targets")
"""Names under which a batch in a dict holds its labels."""

IGNORED = 255
"""Label of pixels that count for nothing, in dense prediction."""


@dataclass(frozen=True)
class ModelCall:
    """One call of a model on a batch.

    Attributes:
        args: positional arguments of the model
        kwargs: its keyword arguments
        labels: class indices, (B,) or for each pixel (B, H, W); None where the loader gives none
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None


def take_apart(given: Any) -> ModelCall:
    """Read a batch: images alone, (images, labels), or a dict of keyword arguments with labels among them.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(given, Tensor):
        return ModelCall((given,), {}, None)
    if isinstance(given, Mapping) and given:
        labels = next((given[name] for name in LABELS if name in given), None)
        kwargs = {str(name): value for name, value in given.items() if name not in LABELS}
        return ModelCall((), kwargs, labels if isinstance(labels, Tensor) else None)
    if isinstance(given, list | tuple) and given and isinstance(given[0], Tensor):
        labels = given[1] if len(given) > 1 else None
        return ModelCall((given[0],), {}, labels if isinstance(labels, Tensor) else None)
    raise InputError(
        f"a batch is a tensor of images, a pair (images, labels) or a dict of arguments, got {type(given).__name__}; "
        "give a loader that yields one of these"
    )


def moved(call: ModelCall, device: torch.device) -> ModelCall:
    """Return the call on a device."""

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    labels = None if call.labels is None else call.labels.to(device, non_blocking=True)
    return ModelCall(tree_map(move, call.args), tree_map(move, call.kwargs), labels)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device
