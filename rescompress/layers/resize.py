"""Resize a map by a scale or to a size, and a convolution that resizes what enters or leaves it.

Morlier et al., "Input Resolution Downsizing as a Compression Technique", https://arxiv.org/abs/2504.03749
"""

import math
from fractions import Fraction
from typing import Any, List, Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODES = ("nearest", "bilinear", "bicubic", "area")
"""Interpolations; all of them are linear in the map."""


class Resize2d(nn.Module):
    """Resize a map by `scale`, or to `size`.

    With a scale, the output side is floor(side * scale), at least 1, and output pixel j is sampled at
    (j + 0.5) / scale - 0.5 of the input (at floor(j / scale) for nearest): the pattern repeats for any input side,
    which is what makes the exact fold into a convolution possible. At scale 1 the map passes through untouched.
    With a `multiple`, sides that the scale does not bring to a multiple of it go to the nearest one, the smaller of
    two as near.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, C, floor(H * scale), floor(W * scale)) or (B, C, *size)

    Attributes:
        whole: (down, right), the scales by which a dense prediction is brought back to its old size behind this one;
            sides that they do not tell from others are refused then. None where nothing is brought back.
        example: (height, width) of the one map that is taken in any case
    """

    __constants__ = ["antialias", "example", "mode", "multiple", "scale", "size", "whole"]

    def __init__(
        self,
        scale: Optional[Tuple[float, float]] = None,  # noqa: UP006, UP045
        size: Optional[Tuple[int, int]] = None,  # noqa: UP006, UP045
        mode: str = "bilinear",
        antialias: bool = False,
        multiple: int = 1,
        whole: Optional[Tuple[float, float]] = None,  # noqa: UP006, UP045
        example: Tuple[int, int] = (0, 0),  # noqa: UP006
    ) -> None:
        super().__init__()
        if (scale is None) == (size is None):
            raise ValueError("Resize2d takes either a scale or a size")
        self.scale = None if scale is None else (_round_up(scale[0]), _round_up(scale[1]))
        self.size = size
        self.mode = mode
        self.antialias = antialias
        self.multiple = multiple
        self.whole = whole
        self.example = example

    def target(self, height: int, width: int) -> Tuple[int, int]:  # noqa: UP006
        """Return the (height, width) that a map of this (height, width) is resized to."""
        size = self.size
        if size is not None:
            return size[0], size[1]
        scale = self.scale
        if scale is not None:
            return self.side(height, scale[0]), self.side(width, scale[1])
        return height, width

    def side(self, side: int, scale: float) -> int:
        """Return the side that a side of a map is brought to by the scale."""
        multiple = self.multiple
        if scale == 1.0:
            return side
        if multiple == 1:
            return max(1, math.floor(side * scale))
        # ceil(x - 1/2) rounds halves down
        return max(1, math.ceil(side * scale / multiple - 0.5)) * multiple

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        size = self.size
        whole = self.whole
        if whole is not None:
            height, width = self.target(x.shape[2], x.shape[3])
            taken = self.target(self.example[0], self.example[1])
            self.refuse_lost_side(x.shape[2], height, whole[0], self.example[0], taken[0])
            self.refuse_lost_side(x.shape[3], width, whole[1], self.example[1], taken[1])
        if size is not None:
            if x.shape[2] == size[0] and x.shape[3] == size[1]:
                return x
            sides: Optional[List[int]] = [size[0], size[1]]  # noqa: UP006, UP045
            return _interpolate(x, sides, None, self.mode, self.antialias)
        if scale is None or (scale[0] == 1.0 and scale[1] == 1.0):
            return x
        if self.multiple > 1 or x.shape[2] * scale[0] < 1 or x.shape[3] * scale[1] < 1:
            height, width = self.target(x.shape[2], x.shape[3])
            return _interpolate(x, [height, width], None, self.mode, self.antialias)
        return _interpolate(x, None, [scale[0], scale[1]], self.mode, self.antialias)

    def refuse_lost_side(self, side: int, target: int, scale: float, example: int, taken: int) -> None:
        """Raise where a side could not be told from others once it has become `target`: 40 may have been 40 or 44.

        `taken` is what the example's own side becomes: it stands for that one alone.
        """
        if side != example and (target == taken or abs(side * scale - target) > 1e-6 * side):
            raise ValueError(
                "this network predicts for every pixel, and a map resized by "
                + str(scale)
                + " would not come back at a side of "
                + str(side)
                + "; give images of the example's size, or of sides that the scale and the network's strides divide"
            )

    def extra_repr(self) -> str:
        what = f"scale={self.scale}" if self.size is None else f"size={self.size}"
        rounding = f", multiple={self.multiple}" if self.multiple > 1 else ""
        return f"{what}, mode={self.mode!r}, antialias={self.antialias}{rounding}"


def _round_up(scale: float) -> float:
    """Return the smallest float that is at least the fraction meant: floor(90 * 0.7) would be 62, for 0.7 < 7/10."""
    fraction = Fraction(scale).limit_denominator(1000)
    if fraction == 0 or abs(fraction - Fraction(scale)) > 1e-12:
        return float(scale)
    nearest = float(fraction)
    return nearest if Fraction(nearest) >= fraction else math.nextafter(nearest, 1.0)


def _interpolate(
    x: Tensor,
    size: Optional[List[int]],  # noqa: UP006, UP045
    scale: Optional[List[float]],  # noqa: UP006, UP045
    mode: str,
    antialias: bool,
) -> Tensor:
    if antialias and not x.is_cuda and (x.dtype == torch.float16 or x.dtype == torch.bfloat16):
        # Antialiasing has no kernel for half precision on the CPU.
        y = F.interpolate(x.float(), size=size, scale_factor=scale, mode=mode, align_corners=False, antialias=True)
        return y.to(x.dtype)
    # align_corners may only be given for the modes that know it.
    if mode == "bilinear" or mode == "bicubic":
        return F.interpolate(x, size=size, scale_factor=scale, mode=mode, align_corners=False, antialias=antialias)
    return F.interpolate(x, size=size, scale_factor=scale, mode=mode)


class ResizedConv2d(nn.Conv2d):
    """A convolution with its old parameters, the image resized before it and the map after it.

    Shape:
        - Input: (B, in_channels, H, W)
        - Output: (B, out_channels, H', W'), the convolution's output grid resized by `after`

    Attributes:
        before: resizes what enters; `nn.Identity` if nothing is to be done
        after: resizes what leaves; `nn.Identity` if nothing is to be done
        same_padding: pad at run time as TensorFlow's SAME does, so that the output side is ceil(side / stride)
    """

    __constants__ = [*nn.Conv2d.__constants__, "same_padding"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Annotated here, not on the class: TorchScript cannot read `nn.Module` there.
        self.before: nn.Module = nn.Identity()
        self.after: nn.Module = nn.Identity()
        self.same_padding: bool = False

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        same_padding: bool = False,
    ) -> "ResizedConv2d":
        """Build from a plain convolution; parameters are shared, not copied."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",  # the parameters are replaced at once: allocate nothing
        )
        new._parameters["weight"] = conv._parameters["weight"]
        new._parameters["bias"] = conv._parameters["bias"]
        new.before = before or new.before
        new.after = after or new.after
        new.same_padding = same_padding
        new.train(conv.training)
        return new

    def conv(self, x: Tensor) -> Tensor:
        """Run the convolution alone."""
        if self.same_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        y: Tensor = self._conv_forward(x, self.weight, self.bias)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.conv(self.before(x)))
        return y


def pad_same(x: Tensor, kernel: Tuple[int, int], stride: Tuple[int, int], dilation: Tuple[int, int]) -> Tensor:  # noqa: UP006
    """Zero-pad as TensorFlow's SAME does: ceil(side / stride) outputs, the odd pixel at the end."""
    height = max(
        (math.ceil(x.shape[2] / stride[0]) - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1 - x.shape[2], 0
    )
    width = max((math.ceil(x.shape[3] / stride[1]) - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1 - x.shape[3], 0)
    if height > 0 or width > 0:
        x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
    return x


def is_same_padded(conv: nn.Module) -> bool:
    """Whether `conv` is timm's Conv2dSame, matched by name so that timm stays optional."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(conv).__mro__][:1] == [
        "timm.layers.conv2d_same.Conv2dSame"
    ]
