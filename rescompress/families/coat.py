"""CoaT and CoaT-Lite of timm: four scales of tokens, in CoaT side by side.

Xu et al., "Co-Scale Conv-Attentional Image Transformers", https://arxiv.org/abs/2104.06399
"""

from typing import Any

from torch import nn

from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.families._base import Family
from rescompress.families._timm import resize_embed
from rescompress.families._windows import describe_stem


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Read the parts off the model's own attributes.

    The parallel blocks of CoaT add up maps of an eighth to a half of the first one's side, doubled up to four times.
    """
    host: Any = model
    fqn = "patch_embed1.proj"
    return describe_stem(
        model,
        args,
        kwargs,
        family=FAMILY.name,
        first_conv=fqn,
        multiple=1 if host.parallel_blocks is None else 8,
        refit=refit,
    )


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Tell each stage's patch embedding the map that it gets and the grid that it makes of it."""
    image: Grid | None = None  # the first stage gets the image, of the size that it has always had
    for stage in (1, 2, 3, 4):
        embed = getattr(host, f"patch_embed{stage}")
        if embed is None:  # pruned
            return
        if image is not None:
            grid = (image[0] // embed.patch_size[0], image[1] // embed.patch_size[1])
        resize_embed(embed, image, grid)
        image = grid


FAMILY = Family(
    name="coat",
    summary="CoaT and CoaT-Lite of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.coat.CoaT",),
    describe=describe,
)
