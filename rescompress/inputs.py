"""Example inputs: what a model takes by its own config, and the forms in which a user may give them.

The convention is torch.export's: a tuple of positional arguments; a single tensor stands for a tuple of one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rescompress.errors import InputError


def as_args(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) from a tensor, a tuple or list of arguments, a mapping of keyword arguments, or both.

    Raises:
        InputError: none of these.
    """
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, list | tuple):
        if len(example_input) == 2 and isinstance(example_input[0], tuple) and isinstance(example_input[1], Mapping):
            return example_input[0], dict(example_input[1])
        return tuple(example_input), {}
    raise InputError(
        f"example_input must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
        f"{type(example_input).__name__}"
    )


def with_batch(example: Any, batch_size: int) -> Any:
    """Repeat or cut every tensor of a nested example along its first dimension to `batch_size`."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] == 0:
            return leaf
        repeats = -(-batch_size // leaf.shape[0])
        return leaf.repeat(repeats, *[1] * (leaf.ndim - 1))[:batch_size]

    return tree_map(resize, example)


def default_input(model: nn.Module) -> Tensor:
    """Return one random image of the size, channels and dtype that the model's own config names.

    timm's `pretrained_cfg` and `patch_embed.img_size`, torchvision's `image_size`, Hugging Face's `config.image_size`
    are read; without any, the image is 3 x 224 x 224. The global random state is not touched.

    Shape:
        - Output: (1, C, H, W), values in [0, 1)
    """
    channels, height, width = _input_size(model)
    tensor = next(model.parameters(), next(model.buffers(), torch.empty(0)))
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    if tensor.is_meta:
        return torch.empty(1, channels, height, width, device="meta", dtype=dtype)
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    return image.to(device=tensor.device, dtype=dtype)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    cfg = getattr(model, "pretrained_cfg", None)
    cfg = cfg if isinstance(cfg, Mapping) else {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    channels = getattr(model, "in_chans", channels)
    config = getattr(model, "config", None)
    for size in (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "image_size", None),
        getattr(config, "image_size", None),
    ):
        pair = (size, size) if isinstance(size, int) else size
        if isinstance(pair, list | tuple) and len(pair) == 2:
            height, width = pair
            break
    channels = getattr(config, "num_channels", channels)
    return int(channels), int(height), int(width)
