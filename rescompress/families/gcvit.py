"""GCViT of timm: attention in windows, every second time with queries made of the whole map.

Hatamizadeh et al., "Global Context Vision Transformers", https://arxiv.org/abs/2206.09959
"""

import math
from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.errors import SmallerGridError
from rescompress.families._base import Family
from rescompress.families._windows import describe_stem, maps_at, named, resize_relative, unchanged

STAGE = "timm.models.gcvit.GlobalContextVitStage"
_BLOCK = "timm.models.gcvit.GlobalContextVitBlock"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the stem's first convolution."""
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv="stem.conv1", refit=refit)


def refit(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Leave out poolings of the global queries until they have the size of a window that divides the map.

    Their convolutions stay. On half the grid a window keeps its size and one pooling is left out.

    Raises:
        SmallerGridError: no number of poolings leads to a window near the old one.
    """
    maps = maps_at(host, anatomy, grid, {_BLOCK: unchanged}, last=(_BLOCK,))
    for fqn, stage in named(host, STAGE):
        side = maps[f"{fqn}.blocks.0"]
        before = tuple(int(length) for length in stage.blocks[0].window_size)
        pools = [name for name, pool in stage.global_block.blocks.named_children() if _pools(name, pool)]
        window, count = _window(before, side, len(pools), fqn)
        for name in pools[count:]:
            surgery.swap(host, f"{fqn}.global_block.blocks.{name}", nn.Identity())
        stage.feat_size = side
        for name, block in stage.blocks.named_children():
            block.window_size = block.attn.window_size = window
            block.num_windows = (side[0] // window[0]) * (side[1] // window[1])
            resize_relative(host, f"{fqn}.blocks.{name}.attn.rel_pos", window)


def _pools(name: str, pool: nn.Module) -> bool:
    return name.startswith("pool") and not isinstance(pool, nn.Identity)


def _window(before: tuple[int, ...], side: Grid, pools: int, fqn: str) -> tuple[Grid, int]:
    """Return the window, and how many poolings of stride 2 lead from the map to it."""
    found: list[tuple[float, Grid, int]] = []
    size = side
    for count in range(pools + 1):
        divides = all(length % part == 0 for length, part in zip(side, size, strict=True))
        ratios = [part / old for part, old in zip(size, before, strict=True)]
        if divides and max(ratios) <= 2 and (min(ratios) >= 0.5 or size == side):
            found.append((sum(abs(math.log(ratio)) for ratio in ratios), size, count))
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    if not found:
        raise SmallerGridError(
            f"{fqn} has windows of {before[0]} x {before[1]}, and halving its map of {side[0]} x {side[1]} leads to no "
            "size near it that divides the map"
        )
    _, window, count = min(found)
    return window, count


FAMILY = Family(
    name="gcvit",
    summary="GCViT of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.gcvit.GlobalContextVit",),
    describe=describe,
)
