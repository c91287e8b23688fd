"""Swin Transformers of timm (v1, v2, v2-cr) and torchvision (v1, v2): attention in shifted windows.

Liu et al., "Swin Transformer", https://arxiv.org/abs/2103.14030, and "Swin Transformer V2",
https://arxiv.org/abs/2111.09883
"""

import contextlib
from typing import Any

import torch
from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.families._base import Family, class_names
from rescompress.families._windows import (
    clipped,
    describe_stem,
    fix_size,
    maps_at,
    named,
    relative_index,
    unchanged,
    without_table,
)

TIMM = (
    "timm.models.swin_transformer.SwinTransformer",
    "timm.models.swin_transformer_v2.SwinTransformerV2",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr",
)
STAGES = (
    "timm.models.swin_transformer.SwinTransformerStage",
    "timm.models.swin_transformer_v2.SwinTransformerV2Stage",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrStage",
)
TORCHVISION = "torchvision.models.swin_transformer.SwinTransformer"
_ATTENTION = "torchvision.models.swin_transformer.ShiftedWindowAttention"
_ATTENTION_V2 = "torchvision.models.swin_transformer.ShiftedWindowAttentionV2"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the patch embedding; windows keep their size wherever it fits the smaller map."""
    timm = TORCHVISION not in class_names(model)
    return describe_stem(
        model,
        args,
        kwargs,
        family=FAMILY.name,
        first_conv="patch_embed.proj" if timm else "features.0.0",
        refit=refit_timm if timm else refit_torchvision,
    )


def refit_timm(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Give the stages their new sizes by timm's own `set_input_size`; images keep the size that they had."""
    side = grid
    for fqn, stage in named(host, *STAGES):
        window = tuple(int(length) for length in stage.blocks[0].window_size)
        with contextlib.ExitStack() as stack:
            for block in stage.blocks:
                if "relative_position_bias_table" in block.attn._parameters:
                    stack.enter_context(without_table(block.attn))
            stage.set_input_size(feat_size=side, window_size=window)
        for name, block in stage.blocks.named_children():
            if "relative_position_bias_table" in block.attn._parameters and block.window_size != window:
                table = f"{fqn}.blocks.{name}.attn.relative_position_bias_table"
                surgery.resample(host, table, "relative", window, block.window_size)  # type: ignore[arg-type]
                index = relative_index(block.window_size).to(block.attn.qkv.weight.device)
                surgery.set_parameter(host, f"{fqn}.blocks.{name}.attn.relative_position_index", index)
        if not isinstance(stage.downsample, nn.Identity):
            side = ((side[0] + 1) // 2, (side[1] + 1) // 2)
    embed: Any = getattr(host, "patch_embed", None)
    if embed is not None and embed.grid_size is not None:
        _tell_patches(host, embed, anatomy, grid)


def _tell_patches(host: Any, embed: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Write how many pixels a position now stands for, so that `set_input_size` finds the grid of other images too."""
    pixels = [p * old / new for p, old, new in zip(embed.patch_size, anatomy.stem_grid, grid, strict=True)]
    if any(side != int(side) for side in pixels):
        fix_size(host)  # it could not be told such a grid
        return
    embed.patch_size = tuple(map(int, pixels))
    embed.grid_size = tuple(side // patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True))
    embed.num_patches = embed.grid_size[0] * embed.grid_size[1]
    if set(TIMM) & set(class_names(host)):
        host._ref_grid_size = embed.grid_size
        host._ref_window_sizes = tuple(tuple(stage.blocks[0].window_size) for _, stage in named(host, *STAGES))


def refit_torchvision(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Shrink windows that no longer fit: the host would fill them up, and attend to what it filled in.

    The host itself runs at any size, and drops the shift of a window that covers its map.
    """
    kinds = {_ATTENTION: unchanged}
    before, after = (maps_at(host, anatomy, size, kinds, last=(_ATTENTION,)) for size in (anatomy.stem_grid, grid))
    for fqn, attention in named(host, _ATTENTION):
        old: Grid = (attention.window_size[0], attention.window_size[1])
        new = clipped(old, before[fqn], after[fqn])
        if new == old:
            continue
        attention.window_size = list(new)  # a new list: blocks share theirs
        index = relative_index(new).flatten()
        surgery.set_parameter(host, f"{fqn}.relative_position_index", index.to(attention.qkv.weight.device))
        surgery.keep_loading(host, f"{fqn}.relative_position_index", "computed", old, new)
        if _ATTENTION_V2 in class_names(attention):
            table = attention.relative_coords_table
            coordinates = _log_coordinates(new).to(table.device, table.dtype)
            surgery.set_parameter(host, f"{fqn}.relative_coords_table", coordinates)
            surgery.keep_loading(host, f"{fqn}.relative_coords_table", "computed", old, new)
        else:
            surgery.resample(host, f"{fqn}.relative_position_bias_table", "relative", old, new)


def _log_coordinates(window: Grid) -> torch.Tensor:
    """Return Swin v2's log-spaced distances, (1, 2H - 1, 2W - 1, 2): they span the same range for every window."""
    axes = [torch.arange(1 - side, side, dtype=torch.float32) / max(side - 1, 1) for side in window]
    distances = 8 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]
    return torch.sign(distances) * torch.log2(distances.abs() + 1.0) / 3.0


FAMILY = Family(
    name="swin",
    summary="Swin Transformers of timm (v1, v2, v2-cr) and torchvision (v1, v2)",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(*TIMM, TORCHVISION),
    describe=describe,
)
