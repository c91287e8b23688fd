"""Convolutions with int8 weights in plain buffers, scaled back on use or multiplied in int8, in aten operators."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescompress.layers.composite import padding_of
from rescompress.layers.integers import SMALLEST_SCALE, check_batch, check_floating, int8_rows
from rescompress.layers.low_bits import LowBits
from rescompress.layers.norm_folding import folded
from rescompress.layers.onednn_weight import OnednnWeight
from rescompress.layers.quantized_linear import int_matmul
from rescompress.layers.resize import ResizedConv2d


def why_not(conv: nn.Module) -> str:
    """Say why a convolution cannot be replaced by one of these; "" if it can."""
    if isinstance(conv, ResizedConv2d):
        return "its output is resized, and `fold` could not reach it in low bits"
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} has a forward of its own"
    if conv.padding_mode != "zeros":
        return f"it pads its input with {conv.padding_mode!r}"
    if any(start != end for start, end in padding_of(conv)):
        return "it pads more at one end than at the other"
    return ""


class Int8WeightConv2d(LowBits):
    """A convolution whose weight is int8 with one scale for each output channel (w8).

    A state dict with a floating-point `weight` is quantized while it is loaded.

    Args:
        conv: what it replaces.
        norm: the BatchNorm behind it, folded in; None leaves it where it is.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, O, H', W')
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("scale_weight",)
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None) -> None:
        super().__init__()
        padding = padding_of(conv)
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = [padding[0][0], padding[1][0]]
        self.kernel_size = list(conv.kernel_size)
        self.groups = conv.groups
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels  # hosts read them
        weight = conv.weight
        self.weight_shape = list(weight.shape)
        if norm is None:
            self.bias = conv.bias
        else:
            weight, bias = folded(conv, norm)
            self.register_buffer("bias", bias)
        integers, scale = int8_rows(weight)
        # The order of memory in which an int8 product reads it; a checkpoint is copied into it.
        self.register_buffer("weight", integers.contiguous(memory_format=torch.channels_last))
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        check_floating(x)
        weight = self.weight.to(x.dtype) * self.weight_scale.to(x.dtype).reshape(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.is_floating_point() and list(weight.shape) == self.weight_shape:
            state_dict[prefix + "weight"], state_dict[prefix + "weight_scale"] = int8_rows(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight_shape)}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, kernel={self.kernel}"
        )


class Int8DynamicConv2d(Int8WeightConv2d):
    """A convolution that multiplies in int8: activations are quantized as they come, a scale for each image (w8a8).

    "onednn" is oneDNN's int8 convolution into float32; the integer kernels are one matrix product over all windows.
    torch's own `quantized::conv2d_dynamic` squeezes the output into the range of the input and is wrong by 70 % behind
    a ReLU.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, O, H', W')
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("float", "int8", "uint8", "onednn")
    OWN_ORDER: ClassVar[dict[str, str]] = {"onednn": "cpu"}
    smallest: float

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None) -> None:
        super().__init__(conv, norm)
        self.smallest = SMALLEST_SCALE
        self.ordered = OnednnWeight(self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        check_floating(x)
        check_batch(x)
        wide = x if x.dtype == torch.float64 else x.float()
        # Not aminmax, which takes ten times as long, nor abs, which writes the map once more.
        largest = torch.maximum(wide.amax(dim=[1, 2, 3], keepdim=True), -wide.amin(dim=[1, 2, 3], keepdim=True))
        scale = (largest / 127.5).clamp(min=self.smallest)
        bias = self.bias
        values = (wide * (1.0 / scale)).round_().clamp_(-128, 127)
        if self.kernel == "onednn":
            grid = values.add_(128).to(torch.uint8)
            y: Tensor = self.ordered(grid, self.weight_scale.float()).to(wide.dtype).mul_(scale)
            if bias is not None:
                y = y.add_(bias.to(wide.dtype).reshape(-1, 1, 1))
            return y.to(x.dtype)
        weight_scale = self.weight_scale.to(wide.dtype)
        if self.kernel == "float":
            weight = self.weight.to(wide.dtype)
            y = F.conv2d(values, weight, None, self.stride, self.padding, self.dilation, self.groups)
            y = y * (scale * weight_scale.reshape(-1, 1, 1))
        else:
            y = (self._sums(values).to(wide.dtype) * (scale * weight_scale)).permute(0, 3, 1, 2)
        if bias is not None:
            y = y + bias.to(wide.dtype).reshape(-1, 1, 1)
        return y.to(x.dtype)

    def plain_weight(self) -> Tensor:
        """Return the weight in the order that any machine reads."""
        if self.kernel != "onednn":
            return self.weight
        return self.ordered.plain().contiguous(memory_format=torch.channels_last)

    def for_export(self, *, scripted: bool = False) -> nn.Module:
        """Return the layer as a file for any machine should hold it; TorchScript files hold it plainly as it is."""
        return self if scripted else super().for_export()

    def _sums(self, values: Tensor) -> Tensor:
        """Return the int32 sums of all windows, (B, H', W', O)."""
        unsigned = self.kernel == "uint8"
        nhwc = values.permute(0, 2, 3, 1)
        grid = (nhwc + 128).to(torch.uint8) if unsigned else nhwc.to(torch.int8)
        if max(self.padding) > 0:
            sides = [0, 0, self.padding[1], self.padding[1], self.padding[0], self.padding[0]]
            grid = F.pad(grid, sides, value=128.0 if unsigned else 0.0)
        height = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        width = self.dilation[1] * (self.kernel_size[1] - 1) + 1
        windows = grid.unfold(1, height, self.stride[0]).unfold(2, width, self.stride[1])
        windows = windows[..., :: self.dilation[0], :: self.dilation[1]].permute(0, 1, 2, 4, 5, 3)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.weight.shape[0], -1)
        sums = int_matmul(windows.reshape(-1, weight.shape[1]), weight)
        if unsigned:
            sums = sums - weight.sum(dim=1, dtype=torch.int32) * 128
        return sums.reshape(windows.shape[0], windows.shape[1], windows.shape[2], -1)

    def _hold(self, plain: Tensor, kernel: str) -> None:
        # A submodule of its own, since `for_export` and pickling share the others.
        ordered = OnednnWeight(self.stride, self.padding, self.dilation, self.groups)
        if kernel == "onednn":
            ordered.put(plain)
            plain = torch.empty(0, dtype=torch.int8)
        self.ordered, self.weight = ordered, plain
