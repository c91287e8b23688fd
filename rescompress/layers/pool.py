"""Pool the grid of a ViT's patch tokens.

Pan et al., "Scalable Vision Transformers with Hierarchical Pooling", https://arxiv.org/abs/2103.10619
"""

from typing import Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    # The host passes its blocks' extra arguments to every child; a mask has no meaning for pooling itself.
    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
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
