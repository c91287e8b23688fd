"""MaxViT and CoAtNet of timm, MaxViT of torchvision: attention in windows, in grids, and over whole maps.

Tu et al., "MaxViT", https://arxiv.org/abs/2204.01697; Dai et al., "CoAtNet", https://arxiv.org/abs/2106.04803
"""

from typing import Any

from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.errors import SmallerGridError
from rescompress.families._base import Family, class_names
from rescompress.families._windows import (
    describe_stem,
    dividing,
    fix_size,
    maps_at,
    named,
    relative_index,
    resize_relative,
    unchanged,
)

TIMM = "timm.models.maxxvit.MaxxVit"
TORCHVISION = "torchvision.models.maxvit.MaxVit"
_WHOLE = "timm.models.maxxvit.Attention2d"
_NHWC = ("timm.models.maxxvit.PartitionAttentionCl", "timm.models.maxxvit.ParallelPartitionAttention")
PARTITIONS = (*_NHWC, "timm.models.maxxvit.PartitionAttention2d")
BLOCKS = (*PARTITIONS, "timm.models.maxxvit.TransformerBlock2d")
_LAYER = "torchvision.models.maxvit.PartitionAttentionLayer"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the stem's first convolution."""
    timm = TORCHVISION not in class_names(model)
    return describe_stem(
        model,
        args,
        kwargs,
        family=FAMILY.name,
        first_conv="stem.conv1" if timm else "stem.0.0",
        refit=refit_timm if timm else refit_torchvision,
    )


def _projected(attention: Any, x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], attention.proj.out_channels, *x.shape[2:]))


def refit_timm(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Give each stage windows and grids that divide its map, and attention over whole maps its new size.

    Raises:
        SmallerGridError: a map has no divisor near the window.
    """
    kinds = {**dict.fromkeys(PARTITIONS, unchanged), _WHOLE: _projected}
    for fqn, side in maps_at(host, anatomy, grid, kinds, last=_NHWC).items():
        module: Any = surgery.get(host, fqn)
        if _WHOLE in class_names(module):
            if module.rel_pos is not None:
                resize_relative(host, f"{fqn}.rel_pos", side)
            continue
        before = (int(module.partition_size[0]), int(module.partition_size[1]))
        size = dividing(before, side, fqn)
        module.partition_size = size
        for name, child in module.named_children():
            if getattr(child, "rel_pos", None) is not None:
                resize_relative(host, f"{fqn}.{name}.rel_pos", size)
    fix_size(host)


def refit_torchvision(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Give each block a partition that divides its map.

    Raises:
        SmallerGridError: a map is not square, or has no divisor near the partition.
    """
    for fqn, side in maps_at(host, anatomy, grid, {_LAYER: unchanged}).items():
        layer: Any = surgery.get(host, fqn)
        if side[0] != side[1]:
            raise SmallerGridError(f"{fqn} partitions square maps only, got {side[0]} x {side[1]}")
        windows = layer.partition_type == "window"
        before = int(layer.p if windows else layer.g)
        size = dividing((before, before), side, fqn)[0]
        layer.grid_size, layer.n_partitions = side, side[0] // size
        layer.p, layer.g = (size, layer.n_partitions) if windows else (layer.n_partitions, size)
        if size == before:
            continue
        attention, name = layer.attn_layer[1], f"{fqn}.attn_layer.1"
        attention.size, attention.max_seq_len = size, size**2
        old, new = (before, before), (size, size)
        surgery.resample(host, f"{name}.relative_position_bias_table", "relative", old, new)
        index = relative_index(new).to(attention.relative_position_index.device)
        surgery.set_parameter(host, f"{name}.relative_position_index", index)
        surgery.keep_loading(host, f"{name}.relative_position_index", "computed", old, new)
    for _, block in named(host, "torchvision.models.maxvit.MaxVitBlock"):
        block.grid_size = block.layers[0].layers.window_attention.grid_size


FAMILY = Family(
    name="maxvit",
    summary="MaxViT and CoAtNet of timm, MaxViT of torchvision",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(TIMM, TORCHVISION),
    describe=describe,
)
