"""Hiera of timm: a grid of mask units, in whose order the tokens are sorted once.

Ryali et al., "Hiera", https://arxiv.org/abs/2306.00989
"""

import math
from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.errors import SmallerGridError, UnsupportedModelError
from rescompress.families._base import Family
from rescompress.families._windows import describe_stem


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the patch embedding; whole mask units must fit into the grid.

    Raises:
        UnsupportedModelError: it takes videos.
    """
    host: Any = model
    if host.patch_embed.spatial_dims != 2:
        raise UnsupportedModelError("this Hiera takes videos; only its version for images can be resized")
    strides = [math.prod(stride[axis] for stride in host.unroll.schedule) for axis in (0, 1)]
    return describe_stem(
        model,
        args,
        kwargs,
        family=FAMILY.name,
        first_conv="patch_embed.proj",
        refit=refit,
        multiple=math.lcm(*strides, *host.mask_unit_size),
    )


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Resample the position embedding and write the new grid into the schedules that sort the tokens.

    Raises:
        SmallerGridError: mask units do not fill the grid.
    """
    before = tuple(host.tokens_spatial_shape)
    if any(side % unit for side, unit in zip(grid, host.mask_unit_size, strict=True)):
        raise SmallerGridError(f"mask units of {tuple(host.mask_unit_size)} do not fill a {grid[0]} x {grid[1]} grid")
    if host.pos_embed is not None and host.pos_embed_win is None:
        surgery.resample(host, "pos_embed", "tokens", before, grid)
    # With a window embedding, the host itself interpolates the other part to the grid of mask units.
    host.tokens_spatial_shape = list(grid)
    host.mask_spatial_shape = [side // unit for side, unit in zip(grid, host.mask_unit_size, strict=True)]
    host.unroll.size = list(grid)
    host.reroll.size = list(grid)
    host.reroll.schedule = {
        block: (strides, [new * side // old for side, old, new in zip(size, before, grid, strict=True)])
        for block, (strides, size) in host.reroll.schedule.items()
    }


FAMILY = Family(
    name="hiera",
    summary="Hiera of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.hiera.Hiera",),
    describe=describe,
)
