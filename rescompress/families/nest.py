"""NesT of timm: attention inside blocks of the map, four times fewer blocks on each level.

Zhang et al., "Aggregating Nested Transformers", https://arxiv.org/abs/2105.12723
"""

import math
from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.errors import SmallerGridError
from rescompress.families._base import Family
from rescompress.families._windows import describe_stem, named

LEVEL = "timm.models.nest.NestLevel"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the patch embedding; the blocks of the first level must divide the grid."""
    return describe_stem(
        model,
        args,
        kwargs,
        family=FAMILY.name,
        first_conv="patch_embed.proj",
        refit=refit,
        multiple=blocks_a_side(model),
    )


def blocks_a_side(host: nn.Module) -> int:
    """Return how many blocks lie side by side on the first level, where they are most."""
    return math.isqrt(named(host, LEVEL)[0][1].pos_embed.shape[1])


def refit(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Keep the number of blocks on every level and make each smaller, its position embedding resampled.

    Raises:
        SmallerGridError: the grid is not square, or the blocks do not divide it.
    """
    blocks = blocks_a_side(host)
    if grid[0] != grid[1] or grid[0] % blocks:
        raise SmallerGridError(f"this {type(host).__name__} takes square grids of {blocks} blocks a side, got {grid}")
    new = grid[0] // blocks
    for fqn, level in named(host, LEVEL):
        old = int(level.block_size)
        surgery.resample(host, f"{fqn}.pos_embed", "tokens", (old, old), (new, new))
        level.block_size = new
    whole: Any = host
    if hasattr(whole, "block_size"):
        whole.block_size, whole.seq_length, whole.num_patches = new, new * new, grid[0] * grid[1]
    whole.patch_embed.grid_size, whole.patch_embed.num_patches = grid, grid[0] * grid[1]


FAMILY = Family(
    name="nest",
    summary="NesT of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.nest.Nest",),
    describe=describe,
)
