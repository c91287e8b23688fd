"""Compose a convolution with the resize of its output into one kernel, axis by axis, in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rescompress.layers.folded import BorderedFoldedConv2d, FoldedConv2d
from rescompress.layers.phases import Phases, phases_of_scale, phases_of_size
from rescompress.layers.resize import Resize2d, ResizedConv2d

Pair = tuple[int, int]


@dataclass(frozen=True)
class Axis:
    """One axis of a folded convolution.

    Attributes:
        phases: the pattern of the resize
        matrix: (p, taps, base kernel), what each tap of each phase takes from the base kernel
        stride: the base stride times q
        dilation: distance of the taps
        base_padding: (start, end) of what the base convolution pads itself; zeros if it pads the input beforehand
        padding: what the folded convolution pads at both ends
        extra: (start, end) of further zeros before it; negative amounts cut
        trim: whether it may make more positions than the resize does
    """

    phases: Phases
    matrix: Tensor
    stride: int
    dilation: int
    base_padding: Pair
    padding: int
    extra: Pair
    trim: bool

    @property
    def taps(self) -> int:
        """Length of the folded kernel."""
        return self.matrix.shape[1]

    def positions(self, side: int) -> int:
        """Return how many times the folded kernel is applied along a padded input of this side."""
        side += sum(self.extra) + 2 * self.padding - sum(self.base_padding)
        return (side - self.dilation * (self.taps - 1) - 1) // self.stride + 1


def axes_of(conv: ResizedConv2d, grid: Pair) -> tuple[Axis, Axis]:
    """Return both axes of the fold of `conv`, whose own output grid is `grid` on the input at hand.

    Raises:
        NotPeriodicError: the resize does not repeat along one of them.
    """
    resize = conv.after
    if not isinstance(resize, Resize2d):
        raise TypeError(f"nothing to fold: the convolution is followed by {type(resize).__name__}")
    antialias = resize.antialias and resize.mode in ("bilinear", "bicubic")
    found = []
    for axis in (0, 1):
        if resize.size is not None:
            found.append(phases_of_size(grid[axis], resize.size[axis], resize.mode, antialias))
        else:
            scale = 1.0 if resize.scale is None else resize.scale[axis]
            found.append(phases_of_scale(scale, resize.mode, antialias))
    # Padding that is not zeros, or not the same from call to call, is done beforehand. So is it where the borders are
    # computed apart, because they need it too.
    beforehand = how_padded(conv, bordered=any(phases.head + phases.tail > 0 for phases in found)) != ""
    amounts = padding_of(conv)
    first, second = (
        _compose(phases, conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis], (0, 0) if beforehand else pad)
        for axis, phases, pad in zip((0, 1), found, amounts, strict=True)
    )
    return first, second


def padding_of(conv: nn.Conv2d) -> tuple[Pair, Pair]:
    """Return the (start, end) that a convolution pads its input with along height and width."""
    if conv.padding == "same":
        totals = [conv.dilation[axis] * (conv.kernel_size[axis] - 1) for axis in (0, 1)]
        return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)
    if isinstance(conv.padding, str):
        return (0, 0), (0, 0)
    return (conv.padding[0], conv.padding[0]), (conv.padding[1], conv.padding[1])


def how_padded(conv: ResizedConv2d, *, bordered: bool) -> str:
    """Return how the input must be padded beforehand, as `FoldedConv2d.pad_before`; "" if it need not be."""
    if conv.same_padding:
        return "same"
    if not any(sum(pair) for pair in padding_of(conv)):
        return ""
    if conv.padding_mode != "zeros":
        return conv.padding_mode
    return "constant" if bordered else ""


def _compose(phases: Phases, kernel: int, stride: int, dilation: int, pad: Pair) -> Axis:
    used = [o for o, weights in enumerate(phases.weights.T.tolist()) if any(weights)]
    offsets = [stride * o + dilation * k for o in used for k in range(kernel)]
    step = math.gcd(*offsets) or 1
    matrix = torch.zeros(phases.p, max(offsets) // step + 1, kernel, dtype=torch.float64)
    for o in used:
        for k in range(kernel):
            matrix[:, (stride * o + dilation * k) // step, k] += phases.weights[:, o]
    # One output row of the base convolution reads `reach` rows, a folded one `span` rows.
    reach, span, jump = dilation * (kernel - 1) + 1, max(offsets) + 1, stride * phases.q
    start = pad[0] - stride * phases.first
    needed = []
    for n in phases.lengths:
        blocks = -(-(n * phases.p // phases.q) // phases.p)
        shortest = stride * (n - 1) + reach - sum(pad)
        needed.append(jump * (blocks - 1) + span - start - shortest)
    if start >= max(0, *needed):
        padding, extra = start, (0, 0)
    else:
        padding, extra = 0, (start, max(needed))
    axis = Axis(phases, matrix, jump, step, pad, padding, extra, trim=False)
    # The side of the input decides how many positions there are; `stride` sides give the same base grid.
    trim = any(
        axis.positions(stride * (n - 1) + reach + slack) * phases.p != n * phases.p // phases.q
        for n in phases.lengths
        for slack in range(stride)
    )
    return Axis(phases, matrix, jump, step, pad, padding, extra, trim)


def build(conv: ResizedConv2d, axes: tuple[Axis, Axis]) -> nn.Module:
    """Return the folded convolution: an `nn.Conv2d` if that is all, else a `FoldedConv2d`.

    Parameters are new; device, dtype, memory format and requires_grad are those of `conv`.
    """
    height, width = axes
    p = (height.phases.p, width.phases.p)
    bordered = any(axis.phases.head + axis.phases.tail > 0 for axis in axes)
    pad_before = how_padded(conv, bordered=bordered)
    weight = _kernel(conv.weight, height.matrix, width.matrix)
    bias = None if conv.bias is None else conv.bias.detach().repeat_interleave(p[0] * p[1])
    plain = not bordered and pad_before == "" and p == (1, 1) and isinstance(conv.before, nn.Identity)
    for axis in axes:
        free = axis.phases.only == 0 and axis.phases.multiple == 1 and axis.phases.most == 0
        plain = plain and free and axis.extra == (0, 0) and not axis.trim
    stride, dilation = (height.stride, width.stride), (height.dilation, width.dilation)
    padding = (height.padding, width.padding)
    new: nn.Module
    if plain:
        new = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            (height.taps, width.taps),
            stride,
            padding,
            dilation,
            conv.groups,
            bias is not None,
            device="meta",  # the parameters are replaced at once: allocate nothing
        )
        new.weight = nn.Parameter(weight)
        new.bias = None if bias is None else nn.Parameter(bias)
    else:
        top, left = padding_of(conv)
        new = (BorderedFoldedConv2d if bordered else FoldedConv2d)(
            weight,
            bias,
            conv.before,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=conv.groups,
            base_kernel=as_pair(conv.kernel_size),
            base_stride=as_pair(conv.stride),
            base_dilation=as_pair(conv.dilation),
            base_padding=[*left, *top],
            pad_before=pad_before,
            extra_padding=[*width.extra, *height.extra],
            p=p,
            q=(height.phases.q, width.phases.q),
            only=(height.phases.only, width.phases.only),
            multiple=(height.phases.multiple, width.phases.multiple),
            most=(height.phases.most, width.phases.most),
            trim=height.trim or width.trim,
        )
    resize = conv.after
    if isinstance(new, BorderedFoldedConv2d) and isinstance(resize, Resize2d):
        heads, tails = (height.phases.head, width.phases.head), (height.phases.tail, width.phases.tail)
        new.set_border(conv.weight.detach().clone(), heads, tails, resize.scale, resize.mode, resize.antialias)
        new.border_weight.requires_grad_(conv.weight.requires_grad)
    for parameter, old in ((new.weight, conv.weight), (new.bias, conv.bias)):
        if parameter is not None and old is not None:
            parameter.requires_grad_(old.requires_grad)
    return new.train(conv.training)


def _kernel(weight: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Return the kernels of all phases, (O * p_h * p_w, I, taps_h, taps_w), like `weight` in all but shape."""
    device = "meta" if weight.is_meta else "cpu"  # not every device has float64
    base = weight.detach().to(device=device, dtype=torch.float64)
    rows = torch.einsum("rua,oiab->oriub", height.to(device), base)
    bank = torch.einsum("svb,oriub->orsiuv", width.to(device), rows).flatten(0, 2)
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return bank.to(device=weight.device, dtype=weight.dtype).contiguous(memory_format=layout)


def as_pair(value: tuple[int, ...]) -> Pair:
    """Return the first two of what torch types as a tuple of any length."""
    return value[0], value[1]
