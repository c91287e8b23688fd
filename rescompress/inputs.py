"""Example inputs: what a user gives, what a model takes by its own config, and another batch size of either."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rescompress.errors import InputError

Args = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def as_args(example_input: Any) -> Args:
    """Return the positional and keyword arguments that an example input stands for.

    A tensor is the only argument. A tuple holds the positional arguments, as for `torch.export.export`. A pair of a
    tuple and a dict with names as keys is (args, kwargs). A dict with names as keys holds keyword arguments.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        if len(example_input) == 2 and isinstance(example_input[0], tuple) and _is_kwargs(example_input[1]):
            return example_input[0], dict(example_input[1])
        return tuple(example_input), {}
    if _is_kwargs(example_input):
        return (), dict(example_input)
    raise InputError(
        f"an example input is a tensor, a tuple of arguments, a dict of keyword arguments or a pair (args, kwargs), "
        f"got {type(example_input).__name__}; wrap a single argument as (argument,)"
        + (", and of a DataLoader's [images, labels] give the images" if isinstance(example_input, list) else "")
    )


def _is_kwargs(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def tensors_of(args: Any) -> list[Tensor]:
    """Return all tensors in `args`, nested ones included, in order."""
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def batch_size_of(args: Any) -> int:
    """Return the size of the first dimension of the first tensor that has one.

    Raises:
        InputError: no tensor has a dimension, or tensors lie in a list, whose length would be the batch size.
    """
    if _has_list_of_tensors(args):
        raise InputError("the batch size of an example input with a list of tensors cannot be told; give tensors")
    for tensor in tensors_of(args):
        if tensor.ndim > 0:
            return int(tensor.shape[0])
    raise InputError("the example input has no tensor with a batch dimension")


def with_batch(args: Any, n: int) -> Any:
    """Return `args` with batch size `n`: samples are repeated in turn, or left out from the end.

    Every tensor whose first dimension has the batch size (that of the first tensor) is resized, others are kept.
    `args` is any nest of tuples and dicts, such as what `as_args` returns. With the batch size that it has already,
    `args` is returned as it is.

    Shape:
        - Input: tensors (B, ...)
        - Output: tensors (n, ...); sample i is sample i % B of the input; the memory format is kept

    Raises:
        InputError: `n` is under 1, or the batch size cannot be told (see `batch_size_of`).
    """
    if n < 1:
        raise InputError(f"a batch size must be at least 1, got {n}")
    batch = batch_size_of(args)
    if n == batch:
        return args
    if batch == 0:
        raise InputError(f"an empty example input (batch size 0) cannot be repeated to batch size {n}")

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch:
            return leaf
        picked = leaf.index_select(0, torch.arange(n, device=leaf.device) % batch)
        if leaf.ndim == 4 and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last):
            return picked.contiguous(memory_format=torch.channels_last)
        return picked

    return tree_map(resized, args)


def _has_list_of_tensors(value: Any) -> bool:
    if isinstance(value, list):
        return bool(tensors_of(value))
    if isinstance(value, tuple):
        return any(_has_list_of_tensors(item) for item in value)
    if isinstance(value, Mapping):
        return any(_has_list_of_tensors(item) for item in value.values())
    return False


def default_input(model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """Return one random image of the size, channels and dtype that the model's own config names.

    timm's `pretrained_cfg` and `patch_embed.img_size`, torchvision's `image_size` and the size to which its detectors
    bring their images, Hugging Face's `config.image_size` are read; without any, the image is 3 x 224 x 224. `size`,
    (height, width), is taken instead of any. The global random state is not touched.

    Shape:
        - Output: (1, C, H, W), values in [0, 1)
    """
    channels, height, width = _input_size(model)
    height, width = size or (height, width)
    tensor = next(model.parameters(), next(model.buffers(), torch.empty(0)))
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    if tensor.is_meta:
        return torch.empty(1, channels, height, width, device="meta", dtype=dtype)
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    return image.to(device=tensor.device, dtype=dtype)


_DETECTORS = (
    "torchvision.models.detection.generalized_rcnn.GeneralizedRCNN",
    "torchvision.models.detection.retinanet.RetinaNet",
    "torchvision.models.detection.fcos.FCOS",
    "torchvision.models.detection.ssd.SSD",
)


_PATCH_READERS = (
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel",
    "transformers.models.siglip2.modeling_siglip2.Siglip2ForImageClassification",
)


def default_args(model: nn.Module, size: tuple[int, int] | None = None) -> Args:
    """Return the arguments of a call with the image of `default_input`, in the form that the model asks for.

    The detectors of torchvision take a list of images (3, H, W) of any size, the vision models of SigLIP 2 patches.
    """
    names = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    if names & set(_PATCH_READERS):
        return (), _given_patches(model, size)
    image = default_input(model, size)
    return (([image[0]],) if names & set(_DETECTORS) else (image,)), {}


def _given_patches(model: Any, size: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return one random image as its processor gives it: patches (1, N, P * P * C), which of them are real, (1, 2)."""
    config = getattr(model.config, "vision_config", model.config)
    patch, side = config.patch_size, math.isqrt(config.num_patches)
    rows, columns = (side, side) if size is None else (size[0] // patch, size[1] // patch)
    image = default_input(model, (rows * patch, columns * patch))
    cut = image.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cut.reshape(1, rows * columns, -1),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int64, device=image.device),
        # Numbers, which the meta device does not have.
        "spatial_shapes": torch.tensor([[rows, columns]], device="cpu" if image.is_meta else image.device),
    }


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    transform: Any = getattr(model, "transform", None)
    if hasattr(transform, "min_size") and hasattr(transform, "fixed_size"):  # a detector of torchvision
        smallest = int(transform.min_size[-1])
        height, width = transform.fixed_size or (smallest, min(smallest * 4 // 3, int(transform.max_size)))
        return 3, int(height), int(width)
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
