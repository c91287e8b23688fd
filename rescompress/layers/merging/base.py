"""What merging blocks have in common: how tokens enter, merge and leave, and what travels with them."""

from typing import Any, Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.adopt import Adopted
from rescompress.layers.merge import (
    index_of,
    keep_matched,
    match_tokens,
    merge_matched,
    places_of,
    proportional_bias,
    repeat_merged,
    source_of_matched,
    unpack,
    weigh_merged,
)
from rescompress.layers.wrap import Wrapped

State = Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]  # noqa: UP006, UP045
"""Tokens (B, P + N, C), their sizes (B, P + N, 1), their places (B, P + N, 2), and where the tokens of the block's
input are among them (B, T); None where all tokens are still there."""


class MergingBlock(Adopted):
    """A block that merges.

    Attributes:
        r: pairs that it merges
        num_prefix_tokens: tokens at the start of its sequence that take no part
        grid: grid of the patch tokens before any merging
        comes_in: extra channels that its input has: 0, 1 for sizes, or 3 for sizes and places
        goes_out: the same for its output
        places: whether it needs the places of merged tokens, for its position embeddings
        dense: whether it merges at its entry, by the tokens themselves, and gives every token back at its exit
        repeats: whether it gives each token as often as the patches it stands for, in no particular order
        weighs: whether it scales tokens, so that their plain mean is that over the patches
    """

    __constants__ = ["comes_in", "dense", "goes_out", "grid", "num_prefix_tokens", "places", "r", "repeats", "weighs"]

    r: int
    num_prefix_tokens: int
    grid: Tuple[int, int]  # noqa: UP006
    comes_in: int
    goes_out: int
    places: bool
    dense: bool
    repeats: bool
    weighs: bool

    def enter(self, x: Tensor) -> State:
        """Return the state with which the block computes."""
        size: Optional[Tensor] = None  # noqa: UP045
        place: Optional[Tensor] = None  # noqa: UP045
        source: Optional[Tensor] = None  # noqa: UP045
        if self.comes_in > 0:
            x, carried = unpack(x, self.comes_in)
            size = carried[..., :1]
            if self.comes_in > 1:
                place = carried[..., 1:]
        r = min(self.r, (x.shape[1] - self.num_prefix_tokens) // 2)
        if self.dense and r > 0:
            match = match_tokens(x, r, self.num_prefix_tokens)
            source = source_of_matched(x.shape[1], match, self.num_prefix_tokens)
            if self.places:
                place = keep_matched(places_of(self.grid, self.num_prefix_tokens, x), match, self.num_prefix_tokens)
            x, size = merge_matched(x, torch.ones_like(x[..., :1]), match, self.num_prefix_tokens)
        return x, size, place, source

    def merge(self, state: State, metric: Tensor) -> State:
        """Merge between attention and MLP, unless it was done at the entry."""
        x, size, place, source = state
        r = min(self.r, (x.shape[1] - self.num_prefix_tokens) // 2)
        if self.dense or r <= 0:
            return state
        match = match_tokens(metric, r, self.num_prefix_tokens)
        if self.goes_out > 1:
            if place is None:
                place = places_of(self.grid, self.num_prefix_tokens, x)
            place = keep_matched(place, match, self.num_prefix_tokens)
        if size is None:
            size = torch.ones_like(x[..., :1])
        x, size = merge_matched(x, size, match, self.num_prefix_tokens)
        return x, size, place, source

    def leave(self, state: State) -> Tensor:
        """Return the block's output: all tokens again, or with the channels that travel on."""
        x, size, place, source = state
        if source is not None:
            return x.gather(1, source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if size is not None and self.repeats:
            return repeat_merged(x, size, self.grid[0] * self.grid[1], self.num_prefix_tokens)
        if size is not None and self.weighs:
            return weigh_merged(x, size, self.num_prefix_tokens)
        if self.goes_out > 0:
            carried = torch.ones_like(x[..., :1]) if size is None else size
            x_with = torch.cat([x, carried.to(x.dtype)], dim=-1)
            if self.goes_out > 1:
                where = places_of(self.grid, self.num_prefix_tokens, x) if place is None else place
                x_with = torch.cat([x_with, where.to(x.dtype)], dim=-1)
            return x_with
        return x

    def extra_repr(self) -> str:
        return f"r={self.r}"


class MergingAttention(Adopted):
    """An attention that weighs keys by the sizes of their tokens, and returns its mean key as a metric."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, bias: Tensor | None, **options: Any
    ) -> Tensor:
        """Scaled dot-product attention with log(size) added to the logits.

        Shape:
            - q, k, v: (B, heads, N, head_dim)
            - size: (B, N, 1) or None
            - bias: broadcastable to (B, heads, N, N), or None
            - Output: (B, N, heads * head_dim)
        """
        mask = proportional_bias(size)
        if bias is not None:
            mask = bias if mask is None else bias + mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        return x.transpose(1, 2).flatten(2)


def index_of_state(block: MergingBlock, state: State) -> Tensor | None:
    """Return where the tokens stand in the sequence of the whole grid; None where it is whole."""
    place = state[2]
    return None if place is None else index_of(place, block.grid, block.num_prefix_tokens)


class MeanOfMerged(Wrapped):
    """The norm behind the last block, for heads that average: weighs each patch token by the patches it stands for.

    The plain mean that the head takes over its output is then the mean over all original patches.

    Shape:
        - Input: (B, P + N, C + 1), sizes in the last channel
        - Output: (B, P + N, C)
    """

    __constants__ = ["num_prefix_tokens"]

    def __init__(self, inner: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__(inner)
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        x, size = unpack(x, 1)
        return weigh_merged(self.inner(x), size, self.num_prefix_tokens)
