"""Plain Vision Transformers of mmseg, whose heads read the tokens of several blocks as maps: ViT, BEiT, MAE.

Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers",
https://arxiv.org/abs/2012.15840
"""

from typing import Any

import torch
from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, ViTAnatomy, cells
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of
from rescompress.families._windows import relative_index

VIT = "mmseg.models.backbones.vit.VisionTransformer"
BEIT = "mmseg.models.backbones.beit.BEiT"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes.

    Raises:
        UnsupportedModelError: its patches are not cut by one convolution, or it takes images of another size.
    """
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    size = (int(height), int(width))
    conv = host.patch_embed.projection
    if not isinstance(conv, nn.Conv2d):
        raise UnsupportedModelError(
            f"{type(model).__name__} cuts patches with a {type(conv).__name__}; only one convolution can be resized"
        )
    patch, pads = (conv.kernel_size[0], conv.kernel_size[1]), host.patch_embed.adap_padding is not None
    grid = cells(size, patch, pads)
    is_beit = BEIT in class_names(model)
    stored = tuple(host.patch_shape) if is_beit else tuple(side // host.patch_size for side in host.img_size)
    if is_beit and grid != stored:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is built for a {stored[0]} x {stored[1]} grid of patches, and its relative "
            f"positions fit no other; an image of {height} x {width} makes {grid[0]} x {grid[1]}: give an "
            "example_input of its img_size"
        )
    blocks = tuple(f"layers.{name}" for name, _ in host.layers.named_children())
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=size,
        image_size=size,
        refit=_refit_beit if is_beit else _refit_vit,
        patch_conv="patch_embed.projection",
        patch_size=patch,
        pads_image=pads,
        pos_embed="pos_embed" if hasattr(host, "pos_embed") else None,
        pos_embed_grid=(stored[0], stored[1]),
        pos_embed_prefix_tokens=1,
        num_prefix_tokens=int(getattr(host, "with_cls_token", True)),
        blocks=blocks,
        grids=(grid,) * (len(blocks) + 1),
        num_patch_tokens=(grid[0] * grid[1],) * (len(blocks) + 1),
        fixed_input=is_beit,
        norm=host.norm1_name if host.final_norm else None,
        dense_tokens=True,
    )


def _refit_vit(host: Any, anatomy: Anatomy, grid: Grid) -> None:
    """Let the host resample its position embedding, for images of other sizes, from the grid that it has now.

    It takes that grid for img_size // patch_size, and pads the image to whole patches.
    """
    before = anatomy.grid or grid
    sides = [side // host.patch_size for side in host.img_size]
    stored = [max(1, round(side * new / old)) for side, new, old in zip(sides, grid, before, strict=True)]
    host.img_size = tuple(side * host.patch_size for side in stored)
    padding = host.patch_embed.adap_padding
    if padding is not None:
        padding.kernel_size = padding.stride = tuple(host.patch_embed.projection.stride)


def _refit_beit(host: Any, anatomy: Anatomy, grid: Grid) -> None:
    """Resample the tables of relative positions, one a block, and number them for the new grid."""
    old = (int(host.patch_shape[0]), int(host.patch_shape[1]))
    host.window_size = host.patch_shape = grid
    if hasattr(host, "num_patches"):
        host.num_patches = grid[0] * grid[1]
    for index, layer in enumerate(host.layers):
        attention = layer.attn
        table, numbers = f"layers.{index}.attn.relative_position_bias_table", "relative_position_index"
        surgery.resample(host, table, "relative", old, grid, extra=3)
        device = attention.relative_position_index.device
        surgery.set_parameter(host, f"layers.{index}.attn.{numbers}", _relative_index(grid).to(device))
        surgery.keep_loading(host, f"layers.{index}.attn.{numbers}", "computed", old, grid)
        attention.window_size = grid
        attention.num_relative_distance = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def _relative_index(grid: Grid) -> Tensor:
    """Return which row of a table of relative positions belongs to each pair of tokens, the class token first.

    Shape:
        - Output: (1 + H * W, 1 + H * W); the last three rows of the table are class to token, token to class, class to
          class
    """
    positions, distances = grid[0] * grid[1], (2 * grid[0] - 1) * (2 * grid[1] - 1)
    index = torch.empty(1 + positions, 1 + positions, dtype=torch.long)
    index[1:, 1:] = relative_index(grid)
    index[0, :] = distances
    index[:, 0] = distances + 1
    index[0, 0] = distances + 2
    return index


FAMILY = Family(
    name="mmseg_vit",
    summary="plain Vision Transformers of mmseg (ViT, BEiT, MAE), alone or under SETR, Segmenter, DPT, UPerNet heads",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=(VIT, BEIT),
    describe=describe,
)
