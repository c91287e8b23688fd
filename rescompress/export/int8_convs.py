"""Convolutions in int8 in the operators that each format can hold: plain aten, quantize and dequantize, oneDNN."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescompress.layers.packed_conv import Int8StaticConv2d
from rescompress.layers.quantized_conv import Int8DynamicConv2d


@dataclass(frozen=True)
class Map:
    """What a convolution is given.

    Attributes:
        shape: (B, C, H, W) in the example; None where it is not known
        scale: of a map that is quantized already; None where the convolution quantizes it by its own
        zero_point: of such a map
    """

    shape: list[int] | None = None
    scale: float | None = None
    zero_point: int = 0


class StaticConv2d(nn.Module):
    """What the forms of a statically quantized convolution share: its numbers in plain buffers.

    Args:
        conv: what it stands for.
        given: the map that it is given.

    Shape:
        - Input: (B, C, H, W), float32
        - Output: (B, O, H', W'), float32
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, conv: Int8StaticConv2d, given: Map) -> None:
        super().__init__()
        own = conv.plain()
        self.register_buffer("weight", own["weight"].contiguous())
        self.register_buffer("weight_scale", own["weight_scale"])
        self.register_buffer("bias", own["bias"])
        self.input_scale, self.input_zero_point = float(conv.input_scale), int(conv.input_zero_point)
        if given.scale is not None:
            self.input_scale, self.input_zero_point = given.scale, given.zero_point
        self.output_scale, self.output_zero_point = float(conv.output_scale), int(conv.output_zero_point)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups


class PlainStaticConv2d(StaticConv2d):
    """In aten operators on whole numbers held in float32: right everywhere, and no faster than floating point."""

    def forward(self, x: Tensor) -> Tensor:
        steps = (x * (1.0 / self.input_scale)).round() + self.input_zero_point
        values = steps.clamp(0, 255) - self.input_zero_point
        sums = F.conv2d(values, self.weight.to(x.dtype), None, self.stride, self.padding, self.dilation, self.groups)
        y = sums * (self.weight_scale * self.input_scale).reshape(-1, 1, 1) + self.bias.reshape(-1, 1, 1)
        steps = (y * (1.0 / self.output_scale)).round() + self.output_zero_point
        return (steps.clamp(0, 255) - self.output_zero_point) * self.output_scale


class QdqStaticConv2d(StaticConv2d):
    """Between quantize and dequantize operators, which onnxruntime joins with it into one integer convolution.

    That has a bias of whole numbers, in steps of input scale times weight scale.
    """

    zero_points: Tensor
    bias_scale: Tensor
    bias_zero_points: Tensor

    def __init__(self, conv: Int8StaticConv2d, given: Map) -> None:
        super().__init__(conv, given)
        scale = self.weight_scale.double() * self.input_scale
        limit = 2**31 - 1
        # A tiny scale, of a channel that is all but zero, must not overflow the bias: then its scale is widened.
        needed = self.bias.double().abs() / limit
        scale = torch.maximum(scale, needed)
        self.register_buffer("bias_scale", scale.float())
        self.bias = (self.bias.double() / scale).round().clamp(-limit, limit).to(torch.int32)
        self.register_buffer("zero_points", torch.zeros(len(scale), dtype=torch.int8))
        self.register_buffer("bias_zero_points", torch.zeros(len(scale), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        x = _through_8_bits(x, self.input_scale, self.input_zero_point)
        limits = (-128, 127, torch.int8)
        weight = ops.dequantize_per_channel(self.weight, self.weight_scale, self.zero_points, 0, *limits)
        limits = (-(2**31), 2**31 - 1, torch.int32)
        bias = ops.dequantize_per_channel(self.bias, self.bias_scale, self.bias_zero_points, 0, *limits)
        y = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return _through_8_bits(y, self.output_scale, self.output_zero_point)


class OnednnStaticConv2d(StaticConv2d):
    """By oneDNN's integer convolution, whose weights the compiler packs ahead of time."""

    zero_points: Tensor

    def __init__(self, conv: Int8StaticConv2d, given: Map) -> None:
        super().__init__(conv, given)
        self.register_buffer("zero_points", torch.zeros(len(self.weight), dtype=torch.int64))
        # By it the order of the weight is chosen: one for other shapes is put in order again on each call.
        self.shape = given.shape

    def forward(self, x: Tensor) -> Tensor:
        ops, onednn = torch.ops.quantized_decomposed, torch.ops.onednn
        scale, zero_point = self.input_scale, self.input_zero_point
        steps = ops.quantize_per_tensor(x, scale, zero_point, 0, 255, torch.uint8)
        window = (self.stride, self.padding, self.dilation, self.groups)
        packed = onednn.qconv_prepack(self.weight, self.weight_scale, scale, zero_point, *window, self.shape)
        weight = (packed, self.weight_scale, self.zero_points, self.bias)
        output = (self.output_scale, self.output_zero_point, torch.uint8)
        steps = onednn.qconv_pointwise(steps, scale, zero_point, *weight, *window, *output, "none", [], "")
        y: Tensor = ops.dequantize_per_tensor(steps, *output[:2], 0, 255, torch.uint8)
        return y


def _through_8_bits(x: Tensor, scale: float, zero_point: int) -> Tensor:
    ops = torch.ops.quantized_decomposed
    steps = ops.quantize_per_tensor(x, scale, zero_point, 0, 255, torch.uint8)
    y: Tensor = ops.dequantize_per_tensor(steps, scale, zero_point, 0, 255, torch.uint8)
    return y


class OnednnDynamicConv2d(nn.Module):
    """A dynamically quantized convolution by oneDNN's integer convolution, whose weights the compiler packs.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, O, H', W')
    """

    weight: Tensor
    weight_scale: Tensor
    zero_points: Tensor
    bias: Tensor | None

    def __init__(self, conv: Int8DynamicConv2d, given: Map) -> None:
        super().__init__()
        self.register_buffer("weight", conv.plain_weight().contiguous())
        self.register_buffer("weight_scale", conv.weight_scale.float())
        self.register_buffer("zero_points", torch.zeros(len(self.weight), dtype=torch.int64))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.smallest = conv.smallest
        self.shape = given.shape  # as above

    def forward(self, x: Tensor) -> Tensor:
        onednn = torch.ops.onednn
        wide = x.float()
        scale = (wide.abs().amax(dim=[1, 2, 3], keepdim=True) / 127.5).clamp(min=self.smallest)
        steps = ((wide * (1.0 / scale)).round().clamp(-128, 127) + 128).to(torch.uint8)
        window = (self.stride, self.padding, self.dilation, self.groups)
        packed = onednn.qconv_prepack(self.weight, self.weight_scale, 1.0, 128, *window, self.shape)
        weight = (packed, self.weight_scale, self.zero_points, None)
        sums = onednn.qconv_pointwise(steps, 1.0, 128, *weight, *window, 1.0, 0, torch.float32, "none", [], "")
        y = sums * scale
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).reshape(-1, 1, 1)
        output: Tensor = y.to(x.dtype)
        return output
