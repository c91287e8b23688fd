"""Integers and scales of low-bit weights, as torchao computes them, and int4 packed two to a byte."""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rescompress.errors import SpecError

SMALLEST_SCALE = float(torch.finfo(torch.float32).eps)
"""torchao's lower bound of every int8 scale, so that a row of zeros divides by something."""


def int8_rows(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return a weight as int8 and one scale for each of its output channels.

    Args:
        weight: in floating point.
        bits: how many of the eight are used.

    Shape:
        - Input: (O, ...), a linear's or a convolution's weight
        - Output: (O, ...) int8 and (O,) float32

    Raises:
        SpecError: torchao is not installed.
    """
    half = 1 << (bits - 1)
    if weight[:1].numel() == 1:  # torchao takes the range of a block of one value over all blocks: show it twice
        integers, scale = int8_rows(weight.reshape(-1, 1).expand(-1, 2), bits)
        return integers[:, :1].reshape(weight.shape), scale
    block = (1, *weight.shape[1:])
    return _affine(weight, block, -half, half - 1, SMALLEST_SCALE, torch.float32, (len(weight),))


def int4_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return a weight as int4, two values to a byte, and one scale for each group along the input.

    Shape:
        - Input: (O, I), I a multiple of group_size
        - Output: (O, I // 2) uint8 as `pack_int4` lays them out, and (O, I // group_size) float

    Raises:
        SpecError: torchao is not installed.
    """
    groups = (len(weight), weight.shape[1] // group_size)
    integers, scale = _affine(weight, (1, group_size), -8, 7, None, None, groups)
    return pack_int4(integers), scale


def check_floating(x: Tensor) -> None:
    """Refuse values that a model has cast to the type of a weight, which is int8 now; also in TorchScript.

    Raises:
        ValueError: they are whole numbers.
    """
    if not x.is_floating_point():
        raise ValueError(
            "a low-bit layer takes floating-point values; if the model casts its input to the type of this layer's "
            "weight, leave the layer out with exclude"
        )


def check_batch(x: Tensor) -> None:
    """Refuse a single image (C, H, W), which `nn.Conv2d` takes and int8 convolutions do not; also in TorchScript.

    Raises:
        ValueError: it is no batch of maps.
    """
    if x.dim() != 4:
        raise ValueError(f"an int8 convolution takes maps (B, C, H, W), got {x.dim()} dimensions; give x[None] for x")


def pack_int4(values: Tensor) -> Tensor:
    """Pack whole numbers from -8 to 7 two to a byte: value + 8, the even columns in the low four bits.

    Shape:
        - Input: (O, I), I even
        - Output: (O, I // 2) uint8
    """
    nibbles = (values + 8).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `pack_int4`, into whole numbers of type `dtype`."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(-2).to(dtype) - 8


def in_plain_order(ordered: Tensor, shape: tuple[int, int], order: Callable[[Tensor], Tensor]) -> Tensor:
    """Undo `order`, a function that moves the half bytes of a packed int4 tensor around.

    torch has no operator for the way back. Where each half byte went is found by sending their own places through,
    four bits at a time.

    Args:
        ordered: what `order` gave.
        shape: shape of the packed tensor that it was given.
        order: the function.
    """
    count = shape[0] * shape[1] * 2
    places = torch.arange(count, device=ordered.device).reshape(shape[0], -1)
    came_from = torch.zeros(count, dtype=torch.long, device=ordered.device)
    for bit in range(0, max(count - 1, 1).bit_length(), 4):
        digits = ((places >> bit) & 15) - 8
        came_from |= _half_bytes(order(pack_int4(digits))).long() << bit
    values = torch.empty(count, dtype=torch.uint8, device=ordered.device)
    values[came_from] = _half_bytes(ordered)
    return pack_int4(values.to(torch.int8).reshape(shape[0], -1) - 8)


def _half_bytes(packed: Tensor) -> Tensor:
    flat = packed.contiguous().reshape(-1).view(torch.uint8)
    return torch.stack((flat & 15, flat >> 4), dim=-1).flatten()


def _affine(
    weight: Tensor,
    block: tuple[int, ...],
    low: int,
    high: int,
    smallest: float | None,
    scale_dtype: torch.dtype | None,
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    primitives = _torchao_primitives()
    weight = weight.detach()
    if weight.dtype == torch.float64:  # torchao takes float32 and halves
        weight = weight.float()
    scale, zero_point = primitives.choose_qparams_affine(
        weight,
        primitives.MappingType.SYMMETRIC,
        list(block),
        target_dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        eps=smallest,
        scale_dtype=scale_dtype,
        zero_point_dtype=torch.int8,
        keepdim=True,
    )
    integers = primitives.quantize_affine(weight, list(block), scale, zero_point, torch.int8, low, high)
    return integers, scale.reshape(shape)


def _torchao_primitives() -> Any:
    # Its import logs that an enum of its own is registered in an old way, which nobody here can mend.
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("torchao.quantization.quant_primitives")
    except ImportError as error:
        raise SpecError(f"quantize needs torchao ({error}); pip install 'rescompress[quant]'") from error
    finally:
        logger.setLevel(level)
