"""VOLO of timm: outlook attention on a fine map, attention with a position embedding on half of it.

Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", https://arxiv.org/abs/2106.13112
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family
from rescompress.families._windows import describe_stem


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the first convolution of the stem.

    Raises:
        UnsupportedModelError: there is no stem of convolutions.
    """
    host: Any = model
    if host.patch_embed.conv is None:
        raise UnsupportedModelError(f"this {type(model).__name__} has no stem of convolutions in front of its patches")
    fqn = "patch_embed.conv.0"
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv=fqn, refit=refit)


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Resample the position embedding, which is added where patches have been cut and their map has been halved."""
    if host.pos_embed is None:
        return
    patch = host.patch_embed.proj.kernel_size
    old = (int(host.pos_embed.shape[1]), int(host.pos_embed.shape[2]))
    new = (grid[0] // patch[0] // host.pooling_scale, grid[1] // patch[1] // host.pooling_scale)
    surgery.resample(host, "pos_embed", "map_last", old, new)


FAMILY = Family(
    name="volo",
    summary="VOLO of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.volo.VOLO",),
    describe=describe,
)
