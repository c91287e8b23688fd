"""XCiT of timm: attention between channels behind a stem of convolutions, and class attention at the end.

El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", https://arxiv.org/abs/2106.09681
"""

from typing import Any

from torch import nn

from rescompress.anatomy import GridAttribute, ViTAnatomy, cells
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of
from rescompress.families._timm import sequence


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes.

    Nothing is laid out over the grid: the position encoding is computed for every image, from 0 to 1 over its sides.

    Raises:
        UnsupportedModelError: the patches are made by another stem.
    """
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    if class_names(host.patch_embed)[0] != "timm.models.xcit.ConvPatchEmbed":
        raise UnsupportedModelError(
            f"this {type(model).__name__} makes patches with {class_names(host.patch_embed)[0]}; known is XCiT's stem "
            "of convolutions"
        )
    side = int(host.patch_embed.patch_size)
    grid = cells((height, width), (side, side), pads=True)
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=(height, width),
        image_size=(height, width),
        patch_conv="patch_embed.proj.0.0",
        patch_size=(side, side),
        conv_stem=True,
        pads_image=True,
        pos_embed=None,
        pos_embed_grid=grid,
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=1,
        prefix_from_block=len(host.blocks),
        grid_attributes=(GridAttribute(name="patch_embed.num_patches", holds="num_tokens"),),
        fixed_input=False,
        **sequence("blocks", host.blocks, grid),
    )


FAMILY = Family(
    name="xcit",
    summary="XCiT of timm: attention between channels, a stem of convolutions",
    methods=("input_resize", "token_pool", "quantize"),
    hosts=("timm.models.xcit.Xcit",),
    describe=describe,
)
