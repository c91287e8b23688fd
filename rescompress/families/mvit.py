"""MViTv2 of timm: attention with pooled queries and keys, relative positions along each axis.

Li et al., "MViTv2", https://arxiv.org/abs/2112.01526
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.families._base import Family
from rescompress.families._windows import arguments_at, describe_stem

_ATTENTIONS = ("timm.models.mvitv2.MultiScaleAttention", "timm.models.mvitv2.MultiScaleAttentionPoolFirst")


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the patch embedding."""
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv="patch_embed.proj", refit=refit)


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Resample the position embedding and the tables of relative positions.

    The host reads its tables from their start: on a smaller map it would run as it is, each distance off by the same
    amount.
    """
    if host.pos_embed is not None:
        surgery.resample(host, "pos_embed", "tokens", anatomy.stem_grid, grid, host.num_prefix_tokens)
    for fqn, args in arguments_at(host, anatomy, grid, dict.fromkeys(_ATTENTIONS)).items():
        attention: Any = surgery.get(host, fqn)
        if attention.rel_pos_type != "spatial":
            continue
        side = (int(args[1][0]), int(args[1][1]))
        pooled = [_pooled(pool, side) for pool in (attention.pool_q, attention.pool_k)]
        for axis, name in enumerate(("rel_pos_h", "rel_pos_w")):
            rows, channels = getattr(attention, name).shape
            distances = 2 * max(sizes[axis] for sizes in pooled) - 1
            surgery.resample(host, f"{fqn}.{name}", "map", (rows, channels), (distances, channels))


def _pooled(pool: nn.Module | None, side: Grid) -> Grid:
    """Return the size of the map that a pooling, a convolution or none, makes of one of size `side`."""
    if pool is None:
        return side
    parts: Any = pool
    sides = []
    for axis, length in enumerate(side):
        kernel, stride, padding = (
            value[axis] if isinstance(value, tuple) else value
            for value in (parts.kernel_size, parts.stride, parts.padding)
        )
        sides.append((length + 2 * padding - kernel) // stride + 1)
    return (sides[0], sides[1])


FAMILY = Family(
    name="mvit",
    summary="MViTv2 of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.mvitv2.MultiScaleVit",),
    describe=describe,
)
