"""Positions of pooled and merged tokens: rows of rotary tables, entries of relative-position biases.

Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, for rotary embeddings. Both kinds only depend on differences of
positions, so that a token which stands for a window of patches takes the position of the window's centre.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from rescompress.errors import UnsupportedModelError
from rescompress.layers.adopt import class_name, host_class
from rescompress.layers.rotary import SpacedRotary
from rescompress.layers.wrap import Wrapped

Grid = tuple[int, int]

ROTARY = ("rope",)
"""Arguments that hold a rotary table (..., H * W, 2 D): sines, then cosines."""
ROTARY_PAIRS = ("position_embeddings",)
"""Arguments that hold a pair of rotary tables (..., H * W, D): cosines, sines."""
ROTARY_PARTS = ("rope_sin", "rope_cos")
"""Arguments that hold one of such a pair each: sines and cosines."""
BIASES = ("shared_rel_pos", "shared_rel_pos_bias", "relative_position_bias")
"""Arguments that hold a relative-position bias (..., heads, P + H * W, P + H * W)."""
SIDES = ("H", "W")
"""Arguments that hold the sides of the grid."""
MASKS = ("attn_mask", "attention_mask", "src_mask", "src_key_padding_mask")
"""Arguments that hold an attention mask, which is not pooled."""
OPTIONS = ("is_causal", "interpolate_pos_encoding", "output_attentions", "resolution", "**")
"""Arguments that say nothing of single tokens."""

SEVERAL_SEQUENCES = {
    "timm.models.crossvit.MultiScaleBlock": "each takes two sequences, of patches of two sizes, whose class tokens "
    "read the patches of the other one; patch_resize and input_resize shorten both",
}
"""Classes of blocks that do not take one sequence, and what they take."""

BIAS_OF_FEWER = (
    "the model has fitted its relative-position bias to the tokens that are left, which have no grid of their own: "
    "call it without interpolate_pos_encoding"
)

KNOWN = (*ROTARY, *ROTARY_PAIRS, *ROTARY_PARTS, *BIASES, *SIDES, *MASKS, *OPTIONS)


def argument_names(block: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments that a block's class takes behind the sequence; "**" stands for any others."""
    forward: Any = host_class(block).forward  # type: ignore[attr-defined]
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    return tuple("**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters)


def pool_rotary(sin: Tensor, cos: Tensor, grid: Grid, stride: Grid) -> tuple[Tensor, Tensor]:
    """Return the rotary tables of the centres of windows.

    Angles grow evenly along the rows and along the columns, by at most half a turn from token to token (see
    `check_turns`): the centre's is that of the first token plus half the way to the last one.

    Shape:
        - Input: (..., H * W, D) each
        - Output: (..., H // stride[0] * W // stride[1], D) each
    """
    parts = (grid[0] // stride[0], stride[0], grid[1] // stride[1], stride[1])
    sines, cosines = (table.float().unflatten(-2, parts) for table in (sin, cos))
    first_sin, first_cos = sines[..., 0, :, 0, :], cosines[..., 0, :, 0, :]
    shift = torch.zeros_like(first_sin)
    for axis, (row, column) in enumerate(((1, 0), (0, 1))):
        if stride[axis] > 1:
            next_sin, next_cos = sines[..., row, :, column, :], cosines[..., row, :, column, :]
            step = torch.atan2(next_sin * first_cos - next_cos * first_sin, next_cos * first_cos + next_sin * first_sin)
            # Half a turn, which DINOv3 takes on 4 x 4 patches, must not go now one way and now the other.
            step = torch.where(step < 0.01 - math.pi, step + 2 * math.pi, step)
            shift = shift + step * ((stride[axis] - 1) / 2)
    pooled_sin = first_sin * shift.cos() + first_cos * shift.sin()
    pooled_cos = first_cos * shift.cos() - first_sin * shift.sin()
    return pooled_sin.flatten(-3, -2).to(sin.dtype), pooled_cos.flatten(-3, -2).to(cos.dtype)


def check_turns(kind: str, model: nn.Module, grid: Grid, stride: Grid) -> None:
    """Refuse rotary tables whose tokens are so far apart that the angle between two of them is ambiguous.

    Raises:
        UnsupportedModelError: some angle grows by more than half a turn from token to token on `grid`.
    """
    for fqn, module in model.named_modules():
        for axis, turn in enumerate(_fastest_turns(module, grid)):
            if 1 < stride[axis] < grid[axis] and turn > math.pi:
                raise UnsupportedModelError(
                    f"{kind} reads where the middle of a window is from the angles of the tokens in it, and those of "
                    f"{fqn!r} grow by up to {turn:.1f} radians from one {('row', 'column')[axis]} of the {grid[0]} x "
                    f"{grid[1]} grid to the next, more than half a turn ({math.pi:.1f}): its patches are too few for "
                    "that; resize less in the steps before it or give a larger image"
                )


def _fastest_turns(rope: Any, grid: Grid) -> tuple[float, ...]:
    """Return by how much the fastest angle of a rotary embedding over indices grows per row and per column."""
    if isinstance(rope, SpacedRotary):
        learned = rope.freqs
        if learned is not None and not learned.is_meta:
            first, second = (float(one.detach().abs().max()) for one in (learned[0], learned[1]))
            fastest = (second, first) if rope.columns_first else (first, second)
        else:
            fastest = (_fastest(rope.bands),) * 2
        return tuple(band * spacing for band, spacing in zip(fastest, rope.spacing, strict=True))
    if class_name(rope) == "timm.layers.pos_embed_sincos.RotaryEmbeddingCat" and not rope.in_pixels:
        trained = getattr(rope, "ref_feat_shape", None) or grid
        return tuple(_fastest(rope.bands) * old / new for old, new in zip(trained, grid, strict=True))
    return ()


def _fastest(bands: Tensor | None) -> float:
    # The bands of a language model begin at one radian for each index.
    return 1.0 if bands is None or bands.is_meta else float(bands.abs().max())


def strided(grid: Grid, stride: Grid, num_prefix_tokens: int, device: torch.device | None = None) -> Tensor:
    """Return where the prefix tokens and every stride-th patch of a grid stand in the sequence."""
    rows = torch.arange(0, grid[0], stride[0], device=device)[:, None] * grid[1]
    patches = rows + torch.arange(0, grid[1], stride[1], device=device)
    prefix = torch.arange(num_prefix_tokens, device=device)
    return torch.cat([prefix, num_prefix_tokens + patches.flatten()])


def pool_bias(bias: Tensor, grid: Grid, stride: Grid) -> Tensor:
    """Return a relative-position bias between every stride-th patch: the distances of the windows' centres.

    Shape:
        - Input: (..., P + H * W, P + H * W)
        - Output: the same for the pooled grid

    Raises:
        RuntimeError: it is for fewer tokens than the grid has.
    """
    prefix = bias.shape[-1] - grid[0] * grid[1]
    if prefix < 0:
        raise RuntimeError(BIAS_OF_FEWER)
    kept = strided(grid, stride, prefix, bias.device)
    return bias.index_select(-2, kept).index_select(-1, kept)


def gather_rotary(table: Tensor, index: Tensor) -> Tensor:
    """Return the rows of a rotary table for the patches of each sequence.

    Shape:
        - table: (N, D), (heads, N, D) or (B, heads, N, D)
        - index: (B, M)
        - Output: (B, 1 or heads, M, D)
    """
    while table.ndim < 4:
        table = table[None]
    return torch.take_along_dim(table, index[:, None, :, None], dim=-2)


def gather_bias(bias: Tensor, index: Tensor) -> Tensor:
    """Return the entries of a relative-position bias for the tokens of each sequence.

    Shape:
        - bias: (1, heads, T, T) or (heads, T, T)
        - index: (B, M)
        - Output: (B, heads, M, M)
    """
    bias = bias.reshape(bias.shape[-3:])
    return bias[:, index[:, :, None], index[:, None, :]].transpose(0, 1)


def refuse_mask(mask: Tensor | None, reason: str) -> None:
    """Raise unless a mask is None.

    transformers makes masks that hide nothing while a program is exported, since it may not look at values then: such a
    mask is let through, and the program checks it where it runs.

    Raises:
        RuntimeError: there is a mask.
    """
    if mask is None:
        return
    if not torch.compiler.is_exporting():
        raise RuntimeError(reason)
    torch._assert_async((mask if mask.dtype == torch.bool else mask == 0).all(), reason)


class StridedBias(Wrapped):
    """A module that makes a relative-position bias for the whole grid, for the tokens of a pooled grid.

    Shape:
        - Output: (..., P + h * w, P + h * w), the inner module's entries between every stride-th patch
    """

    def __init__(self, inner: nn.Module, grid: Grid, stride: Grid, num_prefix_tokens: int) -> None:
        super().__init__(inner)
        self.grid = grid
        self.stride = stride
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if "dim_size" in kwargs:  # the number of tokens that the bias is made for
            kwargs["dim_size"] = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        return pool_bias(self.inner(*args, **kwargs), self.grid, self.stride)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, stride={self.stride}"


class PositionArguments:
    """For blocks whose sequence has been pooled: gives arguments that hold positions on the block's own grid.

    Attributes:
        argument_names: names of the block's arguments behind the sequence
        host_grid: grid that the host lays positions out for
        host_stride: how many of its cells a token of this block stands for, per side
    """

    argument_names: tuple[str, ...]
    host_grid: Grid
    host_stride: Grid

    def on_own_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments behind the sequence as they are on this block's grid.

        Raises:
            RuntimeError: there is an attention mask, which is not pooled.
        """
        if self.host_stride == (1, 1):
            return args, kwargs
        given = dict(zip(self.argument_names, args, strict=False))
        pooled = {name: self._pooled(name, value, given | kwargs) for name, value in (given | kwargs).items()}
        return (*(pooled[name] for name in given), *args[len(given) :]), {name: pooled[name] for name in kwargs}

    def _pooled(self, name: str, value: Any, given: dict[str, Any]) -> Any:
        if value is None or name not in KNOWN:
            return value
        if name in ROTARY:
            sin, cos = value.chunk(2, dim=-1)
            return torch.cat(pool_rotary(sin, cos, self.host_grid, self.host_stride), dim=-1)
        if name in ROTARY_PAIRS:
            sin, cos = pool_rotary(value[1], value[0], self.host_grid, self.host_stride)
            return (cos, sin)
        if name in ROTARY_PARTS:
            sin, cos = (given[part] for part in ROTARY_PARTS)
            return pool_rotary(sin, cos, self.host_grid, self.host_stride)[ROTARY_PARTS.index(name)]
        if name in BIASES:
            return pool_bias(value, self.host_grid, self.host_stride)
        if name in SIDES:
            return value // self.host_stride[SIDES.index(name)]
        if name in MASKS:
            refuse_mask(value, "an attention mask for all tokens has no meaning behind token_pool; call without one")
            return None
        return value
