"""Read off how a resize acts along one axis: p output pixels for every q input pixels, the same weights in each block.

The weights are not taken from a formula but from `F.interpolate` itself, and checked on every length that matters.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_DENOMINATOR = 64
"""Scales that are no ratio p / q with q up to this are not folded: p * p kernels would cost more than they save."""

MAX_SIDE = 1 << 16
"""Sides of a map up to which float rounding inside the interpolation is checked."""

_TOLERANCE = 1e-12


class NotPeriodicError(ValueError):
    """A resize does not repeat along an axis, and the message says why."""


@dataclass(frozen=True)
class Phases:
    """Output pixel p * t + r is the sum over o of `weights[r, o]` times input pixel q * t + `first` + o.

    Attributes:
        p: output pixels a block
        q: input pixels a block
        first: offset of the first input pixel that any phase reads
        weights: (p, window), float64
        head: output pixels at the start that differ from the pattern
        tail: output pixels at the end that differ from the pattern
        lengths: input lengths that stand for all that the pattern holds for
        only: the one input length that it holds for; 0 for any
        multiple: what the input length must be a multiple of
        most: the greatest length that it was checked for; 0 where no rounding can break it
    """

    p: int
    q: int
    first: int
    weights: Tensor
    head: int
    tail: int
    lengths: tuple[int, ...]
    only: int = 0
    multiple: int = 1
    most: int = 0


IDENTITY = Phases(1, 1, 0, torch.ones(1, 1, dtype=torch.float64), 0, 0, (8,))
"""A resize that changes nothing."""


@functools.lru_cache(maxsize=128)
def phases_of_scale(scale: float, mode: str, antialias: bool) -> Phases:
    """Return the pattern of a resize by `scale`.

    Raises:
        NotPeriodicError: the scale is no ratio of small whole numbers, or rounding breaks the pattern.
    """
    if scale == 1.0:
        return IDENTITY
    ratio = Fraction(scale).limit_denominator(MAX_DENOMINATOR)
    p, q = ratio.numerator, ratio.denominator
    if p == 0:
        raise NotPeriodicError(f"scale {scale} is too near to 0: the smallest that is folded is 1/{MAX_DENOMINATOR}")
    if abs(scale - p / q) > 1e-14:
        raise NotPeriodicError(
            f"scale {scale} is no ratio of whole numbers up to {MAX_DENOMINATOR}; the nearest is {ratio}"
        )
    # 49 * (1 / 49) is below 1 in float64: one output row is missing, and the blocks are no longer p long.
    count = torch.arange(1, MAX_SIDE // q)
    lost = ((count * q).double() * scale).floor().long() != count * p
    if lost.any():
        at = int(count[lost][0])
        raise NotPeriodicError(f"side {at * q} times scale {scale} is rounded below {at * p}")
    blocks = 2 * _margin(p, q) + 1  # room for a border at each end and the pattern in between
    if mode == "area":
        return _phases(p, q, scale, mode, antialias, lengths=[blocks * q], multiple=q)
    most = 0
    if mode == "nearest":
        _check_nearest(p, q, MAX_SIDE, scale)
        most = MAX_SIDE if p > 1 else 0
    return _phases(p, q, scale, mode, antialias, lengths=range(blocks * q, (blocks + 1) * q), most=most)


@functools.lru_cache(maxsize=128)
def phases_of_size(length: int, size: int, mode: str, antialias: bool) -> Phases:
    """Return the pattern of a resize from `length` to `size`.

    Raises:
        NotPeriodicError: it enlarges, the ratio is none of small whole numbers, or rounding breaks the pattern.
    """
    if size == length:
        return Phases(1, 1, 0, IDENTITY.weights, 0, 0, (length,), only=length)
    if size > length:
        raise NotPeriodicError(f"{length} to {size} enlarges the map")
    ratio = Fraction(size, length)
    p, q = ratio.numerator, ratio.denominator
    if q > MAX_DENOMINATOR:
        raise NotPeriodicError(f"{size}/{length} is no ratio of whole numbers up to {MAX_DENOMINATOR}")
    if mode == "nearest":
        _check_nearest(p, q, length, None)
    return _phases(p, q, None, mode, antialias, lengths=[length], only=length)


def _margin(p: int, q: int) -> int:
    """Return how many blocks next to a border may feel it: an antialiased cubic reaches 2 * q / p input pixels."""
    return math.ceil(2 / p + 2 / q) + 1


def _matrix(length: int, p: int, q: int, scale: float | None, mode: str, antialias: bool) -> Tensor:
    """Return the (output, input) matrix of the resize of `length` pixels, in float64."""
    eye = torch.eye(length, dtype=torch.float64)[:, None, None, :]
    align = False if mode in ("bilinear", "bicubic") else None
    if scale is None:
        out = F.interpolate(eye, size=(1, length * p // q), mode=mode, align_corners=align, antialias=antialias)
    else:
        out = F.interpolate(eye, scale_factor=(1.0, scale), mode=mode, align_corners=align, antialias=antialias)
    return out[:, 0, 0, :].T


def _phases(
    p: int,
    q: int,
    scale: float | None,
    mode: str,
    antialias: bool,
    *,
    lengths: Iterable[int],
    only: int = 0,
    multiple: int = 1,
    most: int = 0,
) -> Phases:
    """Read the pattern in the middle of a long axis and compare it with the resize of each of `lengths`."""
    middle = _margin(p, q)
    block = _matrix((2 * middle + 1) * q, p, q, scale, mode, antialias)[middle * p : (middle + 1) * p]
    used = (block.abs().amax(0) > _TOLERANCE).nonzero().flatten()
    start, stop = int(used[0]), int(used[-1]) + 1
    first, weights = start - middle * q, block[:, start:stop].clone()
    weights[weights.abs() <= _TOLERANCE] = 0.0
    head = tail = 0
    lengths = tuple(lengths)
    for length in lengths:
        real = _matrix(length, p, q, scale, mode, antialias)
        ideal = _ideal(real.shape[0], length, p, q, first, weights)
        bad = ((real - ideal).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
        half = real.shape[0] // 2
        head = max([head, *(row + 1 for row in bad if row < half)])
        tail = max([tail, *(real.shape[0] - row for row in bad if row >= half)])
    if head + tail > 0 and mode in ("nearest", "area"):
        raise NotPeriodicError(f"{mode} at {p}/{q} does not repeat: rounding moves some of its samples")
    if only == 0 and max(head, tail) > middle * p:
        raise NotPeriodicError(f"{mode} at {p}/{q} does not repeat")
    return Phases(p, q, first, weights, head, tail, lengths, only, multiple, most)


def _ideal(outputs: int, length: int, p: int, q: int, first: int, weights: Tensor) -> Tensor:
    """Return the matrix that the pattern alone would give; taps that fall outside are dropped."""
    rows = torch.arange(outputs)
    columns = (rows // p * q + first)[:, None] + torch.arange(weights.shape[1])
    valid = (columns >= 0) & (columns < length)
    matrix = torch.zeros(outputs, length, dtype=torch.float64)
    return matrix.scatter_add_(1, columns.clamp(0, length - 1), weights[rows % p] * valid)


def _check_nearest(p: int, q: int, length: int, scale: float | None) -> None:
    """Compare every sample that nearest takes of `length` pixels with floor(j * q / p).

    `F.interpolate` finds its samples in float32, except for large float64 maps on the CPU.
    """
    for dtype in (torch.float32, torch.float64):
        # Rows are repeated to make the map large whatever its length.
        index = torch.arange(length, dtype=dtype).expand(1, 1, max(1, MAX_SIDE // length), -1).contiguous()
        if scale is None:
            out = F.interpolate(index, size=(index.shape[2], length * p // q), mode="nearest")
        else:
            out = F.interpolate(index, scale_factor=(1.0, scale), mode="nearest")
        real = out[0, 0, 0].long()
        ideal = torch.arange(real.numel()) * q // p
        wrong = (real != ideal).nonzero().flatten()
        if wrong.numel() > 0:
            at = int(wrong[0])
            raise NotPeriodicError(
                f"nearest at {p}/{q} does not repeat: by {str(dtype).removeprefix('torch.')} rounding, output {at} "
                f"takes input {int(real[at])} instead of {int(ideal[at])}"
            )
