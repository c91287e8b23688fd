"""Pool the grid of a ViT's patch tokens, behind a block or around it.

Pan et al., "Scalable Vision Transformers with Hierarchical Pooling", https://arxiv.org/abs/2103.10619
"""

from typing import Any, Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.adopt import Adopted
from rescompress.layers.token_positions import PositionArguments
from rescompress.layers.wrap import Wrapped

MODES = ("avg", "max")


class TokenPool2d(nn.Module):
    """Pool the grid of patch tokens by its average or maximum; prefix tokens pass through.

    Shape:
        - Input: (B, P + H * W, C), P prefix tokens before an H x W grid in row-major order
        - Output: (B, P + (H // stride[0]) * (W // stride[1]), C)

    Raises:
        RuntimeError: in forward, when the number of tokens is not that of the grid.
    """

    __constants__ = ["grid", "mode", "num_prefix_tokens", "stride"]

    def __init__(
        self,
        grid: Tuple[int, int],  # noqa: UP006
        stride: Tuple[int, int],  # noqa: UP006
        num_prefix_tokens: int,
        mode: str = "avg",
    ) -> None:
        super().__init__()
        self.grid = grid
        self.stride = stride
        self.num_prefix_tokens = num_prefix_tokens
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 1 and self.stride[1] == 1:
            return x
        prefix = x[:, : self.num_prefix_tokens]
        patches = x[:, self.num_prefix_tokens :]
        height, width = self.grid[0], self.grid[1]
        if patches.shape[1] != height * width:
            raise RuntimeError(f"token_pool was made for a {self.grid} grid, and got {patches.shape[1]} patch tokens")
        planes = patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
        if self.mode == "max":
            planes = F.max_pool2d(planes, self.stride, self.stride)
        else:
            planes = F.avg_pool2d(planes, self.stride, self.stride)
        return torch.cat([prefix, planes.flatten(2).transpose(1, 2)], dim=1)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, stride={self.stride}, mode={self.mode!r}"


class TokenRepeat2d(nn.Module):
    """Give every patch of a pooled grid its token back by repetition; prefix tokens pass through.

    Average pooling of what comes out gives what went in.

    Shape:
        - Input: (B, P + h * w, C), P prefix tokens before an h x w grid in row-major order
        - Output: (B, P + h * stride[0] * w * stride[1], C)
    """

    __constants__ = ["grid", "num_prefix_tokens", "stride"]

    def __init__(
        self,
        grid: Tuple[int, int],  # noqa: UP006
        stride: Tuple[int, int],  # noqa: UP006
        num_prefix_tokens: int,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.stride = stride
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[0], x.shape[2]
        height, width = self.grid[0], self.grid[1]
        prefix = x[:, : self.num_prefix_tokens]
        cells = x[:, self.num_prefix_tokens :].reshape(batch, height, 1, width, 1, channels)
        cells = cells.expand(batch, height, self.stride[0], width, self.stride[1], channels)
        return torch.cat([prefix, cells.reshape(batch, -1, channels)], dim=1)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, stride={self.stride}"


class Transparent(Wrapped):
    """A wrapper whose inner module's attributes can be read from it: hosts read parts of their blocks, `block.attn`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(super().__getattr__("inner"), name)


class OneGrid(Transparent):
    """What cuts an image into patches, in a host that takes images of any size: afterwards it takes those of one grid.

    A sequence of tokens does not tell the grid that it came from: 32 x 128 pixels make as many tokens as 64 x 64.

    Raises:
        RuntimeError: in forward, when the map that leaves the inner module has another grid than `grid`; where that is
            None, when the image that enters it has another size than `image`.
    """

    def __init__(
        self,
        inner: nn.Module,
        grid: tuple[int, int] | None,
        image: tuple[int, int],
        kind: str,
    ) -> None:
        super().__init__(inner)
        self.grid = grid
        self.image = image
        self.kind = kind

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        made = self.inner(x, *args, **kwargs)
        seen, wanted = (x, self.image) if self.grid is None else (made, self.grid)
        sides = tuple(seen.shape[-2:]) if isinstance(seen, Tensor) and seen.ndim == 4 else None
        if sides != wanted:
            what = "pixels" if self.grid is None else "patches"
            raise RuntimeError(
                f"{self.kind} was made for images of {wanted[0]} x {wanted[1]} {what}, and got "
                + ("something else than a batch of images" if sides is None else f"{sides[0]} x {sides[1]}")
            )
        return made

    def extra_repr(self) -> str:
        return f"grid={self.grid}, image={self.image}"


class PooledSequence(Transparent):
    """A block that takes a sequence and nothing else, and what is done to the sequence before and after it.

    Shape:
        - Input: (B, P + N, C)
        - Output: (B, P + M, C)
    """

    def __init__(self, inner: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__(inner)
        self.tokens_before = before
        self.tokens_after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens_after(self.inner(self.tokens_before(x)))  # type: ignore[no-any-return]


class PooledMasked(PooledSequence):
    """The same for a block of timm, which may also be given an attention mask: a mask is not pooled."""

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        x = self.tokens_before(x)
        return self.tokens_after(self.inner(x, attn_mask=attn_mask, is_causal=is_causal))  # type: ignore[no-any-return]


class PooledBlock(PositionArguments, Adopted):
    """A block that also takes positions, masks, options: positions are given to it as they are on its own grid.

    Shape:
        - Input: (B, P + N, C)
        - Output: (B, P + M, C)
    """

    tokens_before: nn.Module
    tokens_after: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.on_own_grid(args, kwargs)
        made = self.host_forward(self.tokens_before(x), *args, **kwargs)
        if isinstance(made, tuple):  # attention weights follow the tokens
            return (self.tokens_after(made[0]), *made[1:])
        return self.tokens_after(made)
