"""Networks of timm's ByobNet with attention among their blocks: BoTNet, HaloNet, lambda networks, BAT.

Srinivas et al., "Bottleneck Transformers", https://arxiv.org/abs/2101.11605; Vaswani et al., "Scaling Local
Self-Attention for Parameter Efficient Visual Backbones", https://arxiv.org/abs/2103.12731; Bello, "LambdaNetworks",
https://arxiv.org/abs/2102.08602; Chi et al., "Non-Local Neural Networks with Grouped Bilinear Attentional Transforms",
CVPR 2020
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.errors import SmallerGridError
from rescompress.families import convolutional
from rescompress.families._base import Family, class_names
from rescompress.families._windows import dividing, maps_at, named

BOTTLENECK = "timm.layers.bottleneck_attn.BottleneckAttn"
HALO = "timm.layers.halo_attn.HaloAttn"
LAMBDA = "timm.layers.lambda_layer.LambdaLayer"

BILINEAR = "timm.layers.non_local_attn.BilinearAttnTransform"
KINDS = (BOTTLENECK, HALO, LAMBDA, BILINEAR)


def knows(model: nn.Module) -> bool:
    """Whether there is attention among its blocks; if not, it is a convolutional network like any other."""
    return bool(named(model, *KINDS))


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Describe it as any convolutional network, whose attention is refitted."""
    anatomy = convolutional.describe(model, args, kwargs)
    # Its attention takes one size only as it is, which says nothing of the sizes that it can be refitted to.
    return dataclasses.replace(anatomy, family=FAMILY.name, refit=refit, multiple=1)


def _output(attention: Any, x: Tensor) -> Tensor:
    """Stand for any of them: values keep their map, then queries of stride 2 or a pooling may shrink it."""
    if BILINEAR in class_names(attention):
        return x
    channels = attention.num_heads * (attention.dim_v if LAMBDA in class_names(attention) else attention.dim_head_v)
    stride = getattr(attention, "block_stride", 1)
    made: Tensor = attention.pool(x.new_empty((x.shape[0], channels, x.shape[2] // stride, x.shape[3] // stride)))
    return made


def refit(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Resample what is laid out over a whole map; give local attention blocks that divide it.

    Raises:
        SmallerGridError: a map has no divisor near the blocks of local attention.
    """
    kinds = dict.fromkeys(KINDS, _output)
    for fqn, side in maps_at(host, anatomy, grid, kinds).items():
        attention: Any = surgery.get(host, fqn)
        if BOTTLENECK in class_names(attention):
            _resize_bottleneck(host, fqn, attention, side)
        elif HALO in class_names(attention):
            _resize_halo(host, fqn, attention, side)
        elif BILINEAR in class_names(attention):
            _resize_bilinear(host, fqn, attention, side)
        elif attention.pos_emb is not None:  # with a local convolution for positions, any size fits
            surgery.resample(host, f"{fqn}.pos_emb", "map_last", _distances(attention.feat_size), _distances(side))
            attention.feat_size = side
            surgery.set_parameter(
                host, f"{fqn}.rel_pos_indices", _lambda_index(side).to(attention.rel_pos_indices.device)
            )


def _distances(side: Grid) -> Grid:
    return (2 * side[0] - 1, 2 * side[1] - 1)


def _resize_bottleneck(host: nn.Module, fqn: str, attention: Any, side: Grid) -> None:
    embed = attention.pos_embed
    for name, rows in (("height_rel", side[0]), ("width_rel", side[1])):
        _resize_line(host, f"{fqn}.pos_embed.{name}", 2 * rows - 1)
    embed.height, embed.width = side


def _resize_halo(host: nn.Module, fqn: str, attention: Any, side: Grid) -> None:
    before = int(attention.block_size)
    size = _block_size(before, side, fqn)
    if size == before:
        return
    attention.halo_size = max(1, round(attention.halo_size * size / before))
    attention.win_size = size + 2 * attention.halo_size
    attention.block_size, attention.block_size_ds = size, size // attention.block_stride
    attention.pos_embed.block_size = attention.block_size_ds
    for name in ("height_rel", "width_rel"):
        _resize_line(host, f"{fqn}.pos_embed.{name}", 2 * attention.win_size - 1)


def _resize_bilinear(host: nn.Module, fqn: str, attention: Any, side: Grid) -> None:
    """Resample what scores rows, or columns, of a map cut into block_size parts a side."""
    before, groups = int(attention.block_size), int(attention.groups)
    size = _block_size(before, side, fqn)
    if size == before:
        return
    for name, kernel in (("conv_p", (size, 1)), ("conv_q", (1, size))):
        for tensor in ("weight", "bias"):
            surgery.resample(host, f"{fqn}.{name}.{tensor}", "mixing", (before, before), (size, size), groups)
        conv = getattr(attention, name)
        conv.kernel_size, conv.out_channels = kernel, groups * size * size
    attention.block_size = size


def _block_size(before: int, side: Grid, what: str) -> int:
    """Return the block nearest to the one from before that divides both sides of a map; blocks are square."""
    common = math.gcd(*side)
    if 2 * common < before and common < min(side):
        raise SmallerGridError(
            f"{what} has square blocks of {before} positions a side, and none near it divides both sides of its map of "
            f"{side[0]} x {side[1]}"
        )
    return dividing((before, before), (common, common), what)[0]


def _resize_line(host: nn.Module, name: str, distances: int) -> None:
    """Resample a table over the distances along one axis."""
    rows, channels = surgery.get_parameter(host, name).shape
    surgery.resample(host, name, "map", (rows, channels), (distances, channels))


def _lambda_index(side: Grid) -> Tensor:
    """Return the row and the column of a table of distances for each pair of positions: (2, H * W, H * W)."""
    places = torch.stack(torch.meshgrid(torch.arange(side[0]), torch.arange(side[1]), indexing="ij")).flatten(1)
    return places[:, None, :] - places[:, :, None] + torch.tensor(side)[:, None, None] - 1


FAMILY = Family(
    name="byobnet",
    summary="timm's ByobNet with attention among its blocks (BoTNet, HaloNet, lambda networks, BAT)",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.byobnet.ByobNet",),
    describe=describe,
    knows=knows,
)
