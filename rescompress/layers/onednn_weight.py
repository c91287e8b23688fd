"""An int8 convolution weight in oneDNN's own order, the product with it, and how TorchScript files hold it plainly."""

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting


class OnednnWeight(nn.Module):
    """Holds the weight of a convolution as oneDNN reads it, or nothing.

    TorchScript has no way to write such a tensor, so what it saves is the plain weight, and loading a file puts it in
    the order of the machine that loads it.

    Shape:
        - Input: (B, C, H, W) uint8, whole numbers + 128
        - Output: (B, O, H', W') float32 in channels_last order, the sums times the weight's scales
    """

    weight: Tensor
    zero_points: Tensor

    def __init__(self, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = torch.empty(0, dtype=torch.int8)
        self.zero_points = torch.empty(0, dtype=torch.int32)

    def put(self, plain: Tensor) -> None:
        """Hold an int8 weight, (O, C / groups, h, w), on the CPU; an empty tensor lets go of what was held."""
        self.zero_points = torch.zeros(plain.shape[0], dtype=torch.int32)
        self.weight = plain
        if plain.numel() > 0:
            # For an input of scale 1 around 128, as `forward` gives it. Of the outputs' scales it counts alone that
            # there is one for each, so ones stand for them.
            self.weight = torch.ops.onednn.qconv_prepack(
                plain, torch.ones(plain.shape[0]), 1.0, 128, self.stride, self.padding, self.dilation, self.groups, None
            )

    def plain(self) -> Tensor:
        """Return the weight as it was put in; empty where there is none."""
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight

    def forward(self, x: Tensor, weight_scale: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qconv_pointwise(
            x,
            1.0,
            128,
            self.weight,
            weight_scale,
            self.zero_points,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return y

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, list[int], list[int], list[int], int, bool]:
        """Return all that is in here, for pickle and for TorchScript."""
        return (self.plain(), self.stride, self.padding, self.dilation, self.groups, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, list[int], list[int], list[int], int, bool]) -> None:
        """Take what `__getstate__` gave."""
        if not is_scripting():  # Python alone makes a bare object first
            nn.Module.__init__(self)
        self.stride, self.padding, self.dilation, self.groups, self.training = state[1:]
        self.put(state[0])
