"""Count the multiply-accumulates of a whole training step: the forward pass and what the backward pass multiplies.

By the same convention as `macs`: convolutions and matrix products count, the optimizer's elementwise work does not.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rescompress.errors import MeasureError
from rescompress.inputs import as_args, tensors_of
from rescompress.measure.macs import first_line
from rescompress.measure.sandbox import copied, on_device, plain_attention, rng_kept, set_mode


def count_training_macs(model: nn.Module, example_input: Any) -> int:
    """Return the MACs of one forward pass in training mode and of the backward pass from the sum of its outputs.

    About three times the forward pass: each product is needed once more for the gradient of its input and once more for
    that of its weight, but for inputs and weights that require no gradient. Only shapes are computed, on the meta
    device, and the model does not change.

    Raises:
        MeasureError: the model does not run so on the example input, or no output depends on a parameter that requires
            a gradient.
    """
    args, kwargs = as_args(example_input)
    counter = FlopCounterMode(display=False)
    try:
        shell = copied(model, _meta, _meta)
        with (
            warnings.catch_warnings(),
            set_mode(shell, True),
            rng_kept(torch.device("cpu")),
            plain_attention(),
            torch.enable_grad(),
            counter,
        ):
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            out = shell(*on_device(args, "meta"), **on_device(kwargs, "meta"))
            losses = [tensor.sum() for tensor in tensors_of(out) if tensor.requires_grad]
            if losses:
                torch.autograd.backward(losses)
    except Exception as error:  # foreign code on a device that it was never written for: anything may come
        raise MeasureError(
            f"{type(model).__name__} does not run a training step on shapes alone: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not losses:
        raise MeasureError(f"no output of {type(model).__name__} depends on a parameter that requires a gradient")
    return counter.get_total_flops() // 2


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")
