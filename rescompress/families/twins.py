"""Twins of timm, PCPVT and SVT: four stages of tokens, attention to windows and to a subsampled map.

Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", https://arxiv.org/abs/2104.13840
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.families._base import Family
from rescompress.families._windows import describe_stem
from rescompress.layers.map_tokens import MapTokens


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the convolution that cuts the first stage's patches.

    Positions come from convolutions, and windows that a map does not fill are padded by the host.
    """
    fqn = "patch_embeds.0.proj"
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv=fqn, refit=refit)


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Take the grid of the first stage from its map: the host computes it from the image, which keeps its size.

    The later stages read theirs off the map that they get; what they keep of it is for information only.
    """
    embed = host.patch_embeds[0]
    if not isinstance(embed, MapTokens):
        surgery.swap(host, "patch_embeds.0", MapTokens(embed.proj, embed.norm))
    for embed in host.patch_embeds[1:]:
        embed.img_size = grid
        grid = embed.H, embed.W = grid[0] // embed.patch_size[0], grid[1] // embed.patch_size[1]
        embed.num_patches = grid[0] * grid[1]


FAMILY = Family(
    name="twins",
    summary="Twins of timm, PCPVT and SVT",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.twins.Twins",),
    describe=describe,
)
