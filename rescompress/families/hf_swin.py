"""Swin Transformers of Hugging Face transformers: windows that no longer fit a smaller map shrink to its side.

Liu et al., "Swin Transformer", https://arxiv.org/abs/2103.14030, and "Swin Transformer V2",
https://arxiv.org/abs/2111.09883
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid, cells
from rescompress.families._base import Family, image_of

_CONV = "embeddings.patch_embeddings.projection"
_POSITIONS = "embeddings.position_embeddings"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the convolution that cuts the patches; the host fills up the last ones."""
    height, width = (int(side) for side in image_of(model, args, kwargs).shape[-2:])
    conv: Any = surgery.get(model, _CONV)
    return ConvAnatomy(
        family=FAMILY.name,
        input_size=(height, width),
        first_conv=_CONV,
        stem_grid=cells((height, width), tuple(conv.kernel_size), pads=True),
        refit=refit,
    )


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Resample the position embedding; let windows shrink that fitted their stage's map before and no longer do."""
    _move_positions(host, anatomy.stem_grid, grid)
    before, after = anatomy.stem_grid, grid
    for index, stage in enumerate(host.encoder.layers):
        for place, block in enumerate(stage.blocks):
            window = int(block.window_size)
            if min(before) >= window > min(after):
                _shrink(host, f"encoder.layers.{index}.blocks.{place}", window, min(after))
            block.input_resolution = after
        if stage.downsample is not None:  # which fills up odd sides
            before, after = ((-(-side[0] // 2), -(-side[1] // 2)) for side in (before, after))


def _shrink(host: nn.Module, fqn: str, old: int, new: int) -> None:
    """Make the windows of a block cover the whole map, with its own tables for a smaller window."""
    block: Any = surgery.get(host, fqn)
    block.window_size, block.shift_size = new, 0
    for name, module in block.attention.named_modules():
        bias: Any = module
        if hasattr(bias, "create_coords_table_and_index"):  # version 2: computed from the window
            bias.window_size = (new, new)
            for buffer, value in zip(
                ("relative_coords_table", "relative_position_index"), bias.create_coords_table_and_index(), strict=True
            ):
                bias._buffers[buffer] = value.to(bias._buffers[buffer].device)
        elif hasattr(bias, "relative_position_bias_table"):  # version 1: learned
            table = f"{fqn}.attention.{name}.relative_position_bias_table"
            surgery.resample(host, table, "relative", (old, old), (new, new))
            bias.window_size, bias.window_area = (new, new), new * new
            index = bias._create_relative_position_index().view(-1)
            bias._buffers["relative_position_index"] = index.to(bias._buffers["relative_position_index"].device)


def _move_positions(host: Any, old: Grid, new: Grid) -> None:
    embeddings, patches = host.embeddings, host.embeddings.patch_embeddings
    # What the host divides the side of an image by when it is asked to interpolate its positions.
    pixels = round(embeddings.patch_size * old[0] / new[0])
    if embeddings.position_embeddings is not None:
        stored = patches.grid_size
        moved = tuple(
            max(1, round(side * after / before)) for side, before, after in zip(stored, old, new, strict=True)
        )
        surgery.resample(host, _POSITIONS, "tokens", tuple(stored), (moved[0], moved[1]))
        patches.grid_size, patches.num_patches = (moved[0], moved[1]), moved[0] * moved[1]
    embeddings.patch_size = pixels


_HOSTS = (
    "swin.modeling_swin.SwinModel",
    "swinv2.modeling_swinv2.Swinv2Backbone",
    "swinv2.modeling_swinv2.Swinv2Model",
)

FAMILY = Family(
    name="hf_swin",
    summary="Swin and Swin v2 of transformers, as classifiers, backbones and inside other models",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=tuple(f"transformers.models.{name}" for name in _HOSTS),
    describe=describe,
)
