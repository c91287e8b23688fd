"""Make a sequence of tokens of a map, and say which grid they form."""

from typing import Tuple  # noqa: UP035  TorchScript reads it

from torch import Tensor, nn


class MapTokens(nn.Module):
    """A patch embedding that takes its grid from the map of its convolution instead of from the image's size.

    A host that divides the image's size by the patch's knows nothing of a resize between the two.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, H' * W', C') and (H', W'), the grid of the map that the convolution makes
    """

    def __init__(self, proj: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.proj = proj
        self.norm = norm

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:  # noqa: UP006
        x = self.proj(x)
        size = (x.shape[2], x.shape[3])
        return self.norm(x.flatten(2).transpose(1, 2)), size
