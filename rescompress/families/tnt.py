"""TNT of timm: a small transformer over the pixels of each patch inside a ViT over the patches.

Han et al., "Transformer in Transformer", https://arxiv.org/abs/2103.00112
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Grid, GridAttribute, ViTAnatomy, cells
from rescompress.families._base import Family, image_of
from rescompress.families._timm import sequence


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes.

    The image is first read by the convolution, or by the unfolding in front of it where the model is not a legacy one.
    """
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    embed = host.pixel_embed
    patch = (int(embed.patch_size[0]), int(embed.patch_size[1]))
    grid = cells((height, width), patch)
    return ViTAnatomy(
        family=FAMILY.name,
        refit=refit,
        input_size=(height, width),
        image_size=(height, width),
        patch_conv="pixel_embed.proj" if embed.legacy else "pixel_embed.unfold",
        patch_size=patch,
        conv_stem=True,
        pos_embed="patch_pos",
        pos_embed_grid=embed.grid_size,
        pos_embed_prefix_tokens=1,
        num_prefix_tokens=1,
        grid_attributes=(
            GridAttribute(name="pixel_embed.grid_size", holds="grid"),
            GridAttribute(name="pixel_embed.num_patches", holds="num_tokens"),
            GridAttribute(name="num_patches", holds="num_tokens"),
        ),
        grid_method="pixel_embed.dynamic_feat_size",
        norm="norm",
        mean_pooled=host.global_pool == "avg",
        **sequence("blocks", host.blocks, grid),
    )


class FixedGrid:
    """Stands in for a host's method that computes the grid of its features as image side // patch side."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, *args: object, **kwargs: object) -> Grid:
        return self.grid


def refit(host: Any, anatomy: ViTAnatomy, grid: Grid) -> None:
    """Let the host know the grid: its patch size, by which it would compute it, is that of the pixels in a patch."""
    surgery.set_attribute(host, "pixel_embed.dynamic_feat_size", FixedGrid(grid))


FAMILY = Family(
    name="tnt",
    summary="TNT of timm: a transformer over pixels inside one over patches",
    methods=("input_resize", "quantize"),
    hosts=("timm.models.tnt.TNT",),
    describe=describe,
)
