"""Visformer of timm: three stages, each with a position embedding of its own.

Chen et al., "Visformer: The Vision-friendly Transformer", https://arxiv.org/abs/2104.12533
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.families._base import Family
from rescompress.families._timm import resize_embed
from rescompress.families._windows import describe_stem


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the first convolution: that of the stem, or the first patch embedding where there is no stem."""
    host: Any = model
    fqn = "patch_embed1.proj" if host.stem is None else "stem.0"
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv=fqn, refit=refit)


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Tell each stage the map that it gets, and resample its position embedding to the grid that it makes of it."""
    image = None if host.stem is None else grid
    for stage in (1, 2, 3):
        embed = getattr(host, f"patch_embed{stage}")
        if embed is None:  # with a ViT's stem, the stages share one grid; pruned stages are gone
            continue
        old = embed.grid_size
        if image is not None:
            grid = (image[0] // embed.patch_size[0], image[1] // embed.patch_size[1])
        resize_embed(embed, image, grid)
        if getattr(host, f"pos_embed{stage}", None) is not None:
            surgery.resample(host, f"pos_embed{stage}", "map", old, grid)
        image = grid


FAMILY = Family(
    name="visformer",
    summary="Visformer of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.visformer.Visformer",),
    describe=describe,
)
