"""A convolution that has taken in the resize of its own output: fewer positions, a larger kernel, the same values.

Written by `rescompress.fold`, which explains the arithmetic; this module only carries it out. Where the result is one
convolution and nothing else, `fold` puts a plain `nn.Conv2d` there instead.
"""

from typing import List, Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.resize import _interpolate, pad_same


def output_side(n: int, p: int, q: int, only: int, multiple: int, most: int) -> int:
    """Return floor(n * p / q), the side of the resized map, for a map of side `n` that the rewrite holds for.

    Args:
        n: side of the convolution's output grid before the resize
        p: numerator of the scale
        q: denominator of the scale
        only: the one side that the rewrite holds for; 0 for any
        multiple: what the side must be a multiple of
        most: the largest side that the rewrite was verified for; 0 for any

    Raises:
        ValueError: the rewrite does not hold for this side.
    """
    if only > 0 and n != only:
        raise ValueError(
            f"the resize was folded for a convolution output of side {only}, got {n}; fold again with an example_input "
            "of this size, or resize by scale instead of size"
        )
    if n % multiple != 0:
        raise ValueError(
            f"a folded area resize needs a convolution output side that {multiple} divides, got {n}; "
            "use the model from before fold for this size, or mode 'bilinear'"
        )
    if most > 0 and n > most:
        raise ValueError(
            f"the folded resize was verified up to a convolution output of side {most}, got {n}; "
            "use the model from before fold for this size"
        )
    if n * p < q:
        raise ValueError(
            f"a convolution output of side {n} is too small to be resized by {p}/{q} after folding; "
            "give a larger image, or use the model from before fold"
        )
    return n * p // q


# A trace records Python's decisions about sizes once and for all. Compiled, they stay decisions, so that a traced file
# refuses a wrong size as the module does. What is compiled so may only return tensors.
@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def cut_to_sides(
    out: Tensor,
    x: Tensor,
    cut: bool,
    kernel: List[int],  # noqa: UP006
    stride: List[int],  # noqa: UP006
    dilation: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    p: List[int],  # noqa: UP006
    q: List[int],  # noqa: UP006
    only: List[int],  # noqa: UP006
    multiple: List[int],  # noqa: UP006
    most: List[int],  # noqa: UP006
) -> Tensor:
    """Return `out`, cut to the sides that the resize would make; pairs are (height, width).

    Args:
        out: the map to cut
        x: what the convolution sees
        cut: whether to cut, or only to check
        kernel: the convolution's own kernel
        stride: the convolution's own stride
        dilation: the convolution's own dilation
        padding: zeros that the convolution itself adds to both sides of `x` together
        p: numerators of the scale
        q: denominators of the scale
        only: see `output_side`, as are `multiple` and `most`
        multiple: as above
        most: as above

    Raises:
        ValueError: the rewrite does not hold for this `x`.
    """
    for axis in range(2):
        dim = axis + 2
        n = (x.shape[dim] + padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        m = output_side(n, p[axis], q[axis], only[axis], multiple[axis], most[axis])
        if cut:
            out = out.narrow(dim, 0, m)
    return out


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def fill_borders(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: List[int],  # noqa: UP006
    dilation: List[int],  # noqa: UP006
    groups: int,
    p: List[int],  # noqa: UP006
    q: List[int],  # noqa: UP006
    head: List[int],  # noqa: UP006
    tail: List[int],  # noqa: UP006
    scale: Optional[List[float]],  # noqa: UP006, UP045
    mode: str,
    antialias: bool,
) -> Tensor:
    """Write the first `head` and last `tail` rows and columns of `out`, computed without folding, on strips of `x`.

    A strip that begins at a multiple of q sees the resize's pattern from its start, and so the same values.

    Args:
        out: the folded result, right but for its borders; written into
        x: what the convolution saw, already padded
        weight: the convolution's own kernel, before folding
        bias: the convolution's bias
        stride: the convolution's own stride
        dilation: the convolution's own dilation
        groups: the convolution's groups
        p: numerators of the scale (height, width)
        q: denominators of the scale
        head: rows and columns at the top and left that differ from the folded kernel's
        tail: the same for the bottom and right
        scale: the resize's scale; None where it was given by size
        mode: the resize's mode
        antialias: the resize's antialias

    Raises:
        ValueError: the result is one pixel wide and antialiased, which torch itself gets wrong.
    """
    if antialias and out.shape[3] == 1:
        # torch 2.15 on the CPU: every row of an antialiased map of width 1 comes out as the first row.
        raise ValueError("a folded antialiased resize cannot make a map of width 1; give a wider image")
    for axis in range(2):
        dim = axis + 2
        reach = dilation[axis] * (weight.shape[dim] - 1) + 1
        n = (x.shape[dim] - reach) // stride[axis] + 1
        m = out.shape[dim]
        # A strip has borders at both ends, of which one is only where it was cut: keep that one out of what is used.
        top = min(n, (head[axis] + tail[axis] + p[axis] - 1) // p[axis] * q[axis])
        block = max(0, (m - tail[axis] - head[axis]) // p[axis])
        rows = min(m, head[axis])
        starts = [0, block * q[axis]]
        ends = [top, n]
        firsts = [0, max(m - tail[axis], 0)]
        counts = [rows, min(m, tail[axis])]
        for side in range(2):
            if counts[side] > 0:
                start, length = starts[side], ends[side] - starts[side]
                strip = x.narrow(dim, start * stride[axis], (length - 1) * stride[axis] + reach)
                strip = F.conv2d(strip, weight, bias, stride=stride, dilation=dilation, groups=groups)
                if scale is None:
                    sides = [out.shape[2], out.shape[3]]
                    sides[axis] = length // q[axis] * p[axis]
                    strip = _interpolate(strip, sides, None, mode, antialias)
                else:
                    strip = _interpolate(strip, None, scale, mode, antialias)
                first = firsts[side]
                strip = strip.narrow(dim, first - start // q[axis] * p[axis], counts[side])
                out.narrow(dim, first, counts[side]).copy_(strip)
    return out


class FoldedConv2d(nn.Module):
    """One convolution for a convolution and the resize of its output, for scales p / q along height and width.

    The kernels of all p * p phases are computed as channels, at the base stride times q, and shuffled into place.
    Every pair below is (height, width).

    Shape:
        - Input: (B, in_channels, H, W)
        - Output: (B, out_channels, H', W'), what the convolution followed by the resize gives

    Attributes:
        weight: (out_channels * p_h * p_w, in_channels / groups, *kernel), the phases of one channel side by side
        bias: (out_channels * p_h * p_w), or None
        before: resizes what enters; `nn.Identity` if nothing is to be done
        base_kernel, base_stride, base_dilation: the geometry of the convolution that was folded
        base_padding: what it pads its input with, as `F.pad` takes it
        pad_before: how: "" not at all (the folded convolution pads), "same", "constant", "reflect", "replicate" or
            "circular"
        extra_padding: zeros that the folded kernel needs beside `padding`; negative amounts cut
        p, q: the scale
        only, multiple, most: the sides that the rewrite holds for, see `output_side`
        trim: whether the convolution may make more than the resize does, so that the end must be cut

    Raises:
        ValueError: in forward, for an image side that the rewrite does not hold for.
    """

    __constants__ = [
        "base_dilation",
        "base_kernel",
        "base_stride",
        "dilation",
        "groups",
        "multiple",
        "most",
        "only",
        "p",
        "pad_before",
        "padding",
        "q",
        "stride",
        "trim",
    ]

    bias: Optional[Tensor]  # noqa: UP045

    def __init__(
        self,
        weight: Tensor,
        bias: Optional[Tensor],  # noqa: UP045
        before: nn.Module,
        *,
        stride: Tuple[int, int],  # noqa: UP006
        padding: Tuple[int, int],  # noqa: UP006
        dilation: Tuple[int, int],  # noqa: UP006
        groups: int,
        base_kernel: Tuple[int, int],  # noqa: UP006
        base_stride: Tuple[int, int],  # noqa: UP006
        base_dilation: Tuple[int, int],  # noqa: UP006
        base_padding: List[int],  # noqa: UP006
        pad_before: str,
        extra_padding: List[int],  # noqa: UP006
        p: Tuple[int, int],  # noqa: UP006
        q: Tuple[int, int],  # noqa: UP006
        only: Tuple[int, int],  # noqa: UP006
        multiple: Tuple[int, int],  # noqa: UP006
        most: Tuple[int, int],  # noqa: UP006
        trim: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.before = before
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.base_kernel = base_kernel
        self.base_stride = base_stride
        self.base_dilation = base_dilation
        self.base_padding = base_padding
        self.pad_before = pad_before
        self.extra_padding = extra_padding
        self.p = p
        self.q = q
        self.only = only
        self.multiple = multiple
        self.most = most
        self.trim = trim

    def pad(self, x: Tensor) -> Tensor:
        """Pad as the convolution that was folded does, where the folded one cannot."""
        if self.pad_before == "same":
            return pad_same(x, self.base_kernel, self.base_stride, self.base_dilation)
        if self.pad_before != "":
            return F.pad(x, self.base_padding, mode=self.pad_before)
        return x

    def to_sides(self, out: Tensor, x: Tensor, cut: bool) -> Tensor:
        """Cut `out` to the sides of the result for a padded `x`; refuse an `x` that the rewrite does not hold for."""
        pad = self.base_padding
        result: Tensor = cut_to_sides(
            out,
            x,
            cut,
            [self.base_kernel[0], self.base_kernel[1]],
            [self.base_stride[0], self.base_stride[1]],
            [self.base_dilation[0], self.base_dilation[1]],
            [pad[2] + pad[3], pad[0] + pad[1]] if self.pad_before == "" else [0, 0],
            [self.p[0], self.p[1]],
            [self.q[0], self.q[1]],
            [self.only[0], self.only[1]],
            [self.multiple[0], self.multiple[1]],
            [self.most[0], self.most[1]],
        )
        return result

    def folded(self, x: Tensor) -> Tensor:
        """Run the folded kernel on a padded `x` and put its phases in place."""
        padded = self.to_sides(x, x, False)
        extra = self.extra_padding
        if extra[0] != 0 or extra[1] != 0 or extra[2] != 0 or extra[3] != 0:
            padded = F.pad(padded, extra)
        out = F.conv2d(padded, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        p_h, p_w = self.p[0], self.p[1]
        if p_h == p_w and p_h > 1:
            out = F.pixel_shuffle(out, p_h)
        elif p_h != p_w:
            out = out.unflatten(1, [-1, p_h, p_w]).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
        if self.trim:
            out = self.to_sides(out, x, True)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(self.pad(self.before(x)))

    def extra_repr(self) -> str:
        channels, kernel = self.weight.shape[0] // (self.p[0] * self.p[1]), tuple(self.weight.shape[2:])
        return (
            f"{self.weight.shape[1] * self.groups}, {channels}, kernel_size={kernel}, stride={self.stride}, "
            f"padding={self.padding}, scale=({self.p[0]}/{self.q[0]}, {self.p[1]}/{self.q[1]})"
        )


class BorderedFoldedConv2d(FoldedConv2d):
    """A folded convolution whose resize treats the border of its map apart: bicubic clamps, antialias renormalises.

    A few rows and columns at each side are computed by the convolution and the resize as they were.

    Attributes:
        border_weight: (out_channels, in_channels / groups, *base_kernel), the kernel before folding
        head, tail: rows and columns that the folded kernel has wrong at the start and at the end
        scale, mode, antialias: the resize; scale is None where it was given by size
    """

    __constants__ = [*FoldedConv2d.__constants__, "antialias", "head", "mode", "scale", "tail"]

    scale: Optional[Tuple[float, float]]  # noqa: UP006, UP045

    def set_border(
        self,
        weight: Tensor,
        head: Tuple[int, int],  # noqa: UP006
        tail: Tuple[int, int],  # noqa: UP006
        scale: Optional[Tuple[float, float]],  # noqa: UP006, UP045
        mode: str,
        antialias: bool,
    ) -> "BorderedFoldedConv2d":
        """Say what the borders are made of."""
        self.border_weight = nn.Parameter(weight)
        self.head = head
        self.tail = tail
        self.scale = scale
        self.mode = mode
        self.antialias = antialias
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(self.before(x))
        out = self.folded(x)
        bias = self.bias
        if bias is not None:  # the first phase of each channel
            bias = bias[:: self.p[0] * self.p[1]]
        scale = self.scale
        filled: Tensor = fill_borders(
            out,
            x,
            self.border_weight,
            bias,
            [self.base_stride[0], self.base_stride[1]],
            [self.base_dilation[0], self.base_dilation[1]],
            self.groups,
            [self.p[0], self.p[1]],
            [self.q[0], self.q[1]],
            [self.head[0], self.head[1]],
            [self.tail[0], self.tail[1]],
            None if scale is None else [scale[0], scale[1]],
            self.mode,
            self.antialias,
        )
        return filled
