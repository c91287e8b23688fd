"""PiT of timm: overlapping patches and a map of tokens that is pooled between its stages.

Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", https://arxiv.org/abs/2103.16302
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.families._base import Family
from rescompress.families._windows import describe_stem


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the convolution that cuts the patches; its map shrinks from stage to stage."""
    fqn = "patch_embed.conv"
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv=fqn, refit=refit)


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Resample the position embedding, the only thing that is laid out over a grid."""
    surgery.resample(host, "pos_embed", "map", anatomy.stem_grid, grid)
    embed = host.patch_embed
    embed.height, embed.width = embed.grid_size = grid


FAMILY = Family(
    name="pit",
    summary="PiT of timm, distilled or not",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.pit.PoolingVisionTransformer",),
    describe=describe,
)
