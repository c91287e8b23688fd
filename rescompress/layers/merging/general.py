"""The merging block for classes of blocks that need not be scripted: it is told the names of their parts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rescompress.layers.merging.base import MergingBlock, index_of_state
from rescompress.layers.token_positions import MASKS, PositionArguments, refuse_mask


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where the parts of a residual block with attention and MLP are.

    Attributes:
        attention: name of the attention
        mlp: name of the MLP
        norms: names of the norms before attention and MLP; None where the norms come behind them
        after_attention: names of what the attention's output passes before it is added, in order: modules that are
            called, and parameters or numbers that are multiplied; those that are None are left out
        after_mlp: the same for the MLP's output
        places: whether the block has positions of its own, so that it must know where merged tokens are
    """

    attention: str = "attn"
    mlp: str = "mlp"
    norms: tuple[str, str] | None = ("norm1", "norm2")
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()
    places: bool = False


class GeneralMergeBlock(PositionArguments, MergingBlock):
    """A block with merging between attention and MLP; all its parts are the old block's own.

    Shape:
        - Input: (B, P + N, C), or with more channels where sizes travel with the tokens
        - Output: (B, P + N - r, C), or with more channels

    Raises:
        RuntimeError: in forward, when the host passes an attention mask, which has no meaning for merged tokens.
    """

    parts: Parts
    tokens_before: nn.Module
    tokens_after: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        reason = "token_merge has no meaning under an attention mask; call the model without one"
        if given.get("is_causal"):
            raise RuntimeError(reason)
        for name in MASKS:
            refuse_mask(given.pop(name, None), reason)
        _, given = self.on_own_grid((), given)
        parts = self.parts
        norms = parts.norms or ("", "")
        state = self.enter(self.tokens_before(x))
        x, size = state[0], state[1]
        index = index_of_state(self, state)
        attention = getattr(self, parts.attention)
        y, _, metric = attention(self._through((norms[0],), x), size, index, self.for_attention(given, x))
        state = self.merge((x + self._through(parts.after_attention, y), *state[1:]), metric)
        x = state[0]
        y = self.mlp_output(self._through((norms[1],), x))
        x = self.leave((x + self._through(parts.after_mlp, y), *state[1:]))
        return self.tokens_after(x)  # type: ignore[no-any-return]

    def for_attention(self, given: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """Return what the attention gets of the block's arguments."""
        return given

    def mlp_output(self, x: Tensor) -> Tensor:
        """Return what the MLP makes of its input."""
        return getattr(self, self.parts.mlp)(x)  # type: ignore[no-any-return]

    def _through(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            part = getattr(self, name) if name else None
            if isinstance(part, nn.Module):
                x = part(x)
            elif part is not None:
                x = part * x
        return x


def rotated(x: Tensor, sin: Tensor, cos: Tensor, half: bool) -> Tensor:
    """Turn pairs of channels by the angles of a rotary table.

    Shape:
        - x, sin, cos: (..., N, D)

    With `half`, channel i is paired with i + D / 2, otherwise 2i with 2i + 1.
    """
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
    return (x * cos + turned * sin).to(x.dtype)
