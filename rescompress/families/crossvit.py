"""CrossViT of timm: two ViTs side by side over images and patches of different sizes.

Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer", https://arxiv.org/abs/2103.14899
"""

import math
from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Grid, GridAttribute, ViTAnatomy
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, image_of
from rescompress.families._timm import sequence
from rescompress.layers.resample import PatchConv2d
from rescompress.layers.resize import Resize2d, ResizedConv2d


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Describe the first branch, which reads the image as it comes; the other one follows in `refit`.

    Raises:
        UnsupportedModelError: there are not two branches, or the first one rescales the image.
    """
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    if len(host.patch_embed) != 2 or tuple(host.patch_embed[0].img_size) != (height, width):
        raise UnsupportedModelError(
            f"this {type(model).__name__} has {len(host.patch_embed)} branches, the first of which reads images of "
            f"{tuple(host.patch_embed[0].img_size)} pixels; known are two, the first of which reads the given image"
        )
    embed = host.patch_embed[0]
    grid = surgery.output_grid(embed.proj, (height, width))
    return ViTAnatomy(
        family=FAMILY.name,
        refit=refit,
        input_size=(height, width),
        image_size=(height, width),
        patch_conv=_first_conv(host, 0),
        patch_size=(int(embed.patch_size[0]), int(embed.patch_size[1])),
        conv_stem=isinstance(embed.proj, nn.Sequential),
        pos_embed="pos_embed_0",
        pos_embed_grid=grid,
        pos_embed_prefix_tokens=1,
        num_prefix_tokens=1,
        grid_attributes=(
            GridAttribute(name="patch_embed.0.patch_size", holds="pixels_per_token_pair"),
            GridAttribute(name="patch_embed.0.num_patches", holds="num_tokens"),
        ),
        **sequence("blocks", host.blocks, grid),
    )


def refit(host: Any, anatomy: ViTAnatomy, grid: Grid) -> None:
    """Do to the second branch what has been done to the first: larger patches, or a smaller image in front of them.

    Its own image is another one: the host scales the given one for it, by the size that it had before.
    """
    old, embed = anatomy.grids[0] or grid, host.patch_embed[1]
    fqn = _first_conv(host, 1)
    made: Any = surgery.get(host, _first_conv(host, 0))
    conv: Any = surgery.get(host, fqn)
    before = getattr(conv, "before", None)
    image = before.size if isinstance(before, Resize2d) and before.size is not None else embed.img_size
    here = surgery.output_grid(embed.proj, image)
    # The nearest grid, the smaller of two as near: ceil(x - 1/2) rounds halves down.
    new = (
        max(1, math.ceil(here[0] * grid[0] / old[0] - 0.5)),
        max(1, math.ceil(here[1] * grid[1] / old[1] - 0.5)),
    )
    if isinstance(made, PatchConv2d) and tuple(made.kernel_size) != anatomy.patch_size:
        patch = (image[0] // new[0], image[1] // new[1])
        surgery.swap(host, fqn, PatchConv2d.from_patch_conv(conv, patch))
        new = (image[0] // patch[0], image[1] // patch[1])
    else:
        pixels = (image[0] // here[0], image[1] // here[1])
        like: Any = made.before
        resize = Resize2d(None, (new[0] * pixels[0], new[1] * pixels[1]), like.mode, like.antialias)
        if isinstance(conv, ResizedConv2d):
            conv.before = resize
        else:
            surgery.swap(host, fqn, ResizedConv2d.from_conv(conv, before=resize))
    surgery.resample(host, "pos_embed_1", "tokens", here, new, 1)
    embed.num_patches = new[0] * new[1]
    # The host takes its grid as image side // patch side where it gives features as maps.
    pixels = (embed.img_size[0] // new[0], embed.img_size[1] // new[1])
    if (embed.img_size[0] // pixels[0], embed.img_size[1] // pixels[1]) == new:
        embed.patch_size = pixels


def _first_conv(host: Any, branch: int) -> str:
    """Return the FQN of the convolution of a branch that reads its image."""
    fqn = f"patch_embed.{branch}.proj"
    return f"{fqn}.0" if isinstance(host.patch_embed[branch].proj, nn.Sequential) else fqn


FAMILY = Family(
    name="crossvit",
    summary="CrossViT of timm: two branches of patches, with one convolution or several",
    methods=("patch_resize", "input_resize", "quantize"),
    hosts=("timm.models.crossvit.CrossVit",),
    describe=describe,
)
