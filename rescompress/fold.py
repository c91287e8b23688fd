"""Fold the resize behind a convolution into the convolution: the same outputs from fewer positions, for deployment.

A convolution and an interpolation are both linear, and so is one after the other. docs/explanation/folding.md has the
arithmetic; `rescompress.layers.phases` finds the pattern of the interpolation, this file decides and rewrites.
"""

import copy
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rescompress import surgery
from rescompress.errors import RescompressWarning, UnsupportedModelError
from rescompress.families import _hf_config
from rescompress.inputs import as_args, default_args
from rescompress.layers.composite import Axis, Pair, as_pair, axes_of, build, padding_of
from rescompress.layers.folded import output_side
from rescompress.layers.resize import Resize2d, ResizedConv2d, pad_same

Model = TypeVar("Model", bound=nn.Module)

MACS_PER_MOVED = 24
"""Multiply-accumulates that one element written or read by a resize, a shuffle or a copy is worth in time."""

MAX_BANK = 1 << 24
"""Elements of a folded kernel beyond which even `force` does not fold."""

_RECORD = "_rescompress"
"""Attribute by which `compress` knows its models."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class FoldDecision:
    """What fold did, or would do, with one convolution.

    Attributes:
        name: the convolution's fully qualified name
        folded: whether it is folded
        reason: why, or why not
        macs_before: multiply-accumulates of the convolution on its full grid, at batch 1; None if never reached
        macs_after: multiply-accumulates of the folded kernel, borders included; None if there can be none
        max_error: largest difference of the outputs on a random image over the largest output; None if not folded
    """

    name: str
    folded: bool
    reason: str
    macs_before: int | None = None
    macs_after: int | None = None
    max_error: float | None = None

    def __str__(self) -> str:
        macs = "" if self.macs_before is None else f", {self.macs_before / 1e6:.1f} MMACs"
        macs += "" if self.macs_after is None else f" => {self.macs_after / 1e6:.1f} MMACs"
        error = "" if self.max_error is None else f", largest relative difference {self.max_error:.1e}"
        return f"{self.name or 'the model'}: {'folded' if self.folded else 'kept'}{macs}{error}: {self.reason}"


def fold(model: Model, example_input: Any = None, *, force: bool = False) -> Model:
    """Return a copy of `model` in which resizes behind a convolution are folded into it wherever that is cheaper.

    The copy computes the same, up to rounding. It is for deployment: the folded convolution has another kernel, so a
    checkpoint from before does not load into it. Where only the convolution is left it is a plain `nn.Conv2d`.

    A model with nothing to fold is returned as a copy, with a warning; `fold_decisions` says why each resize stayed.

    Args:
        model: a model that `compress` made, or any model that holds a `ResizedConv2d`.
        example_input: a tensor or a tuple of arguments as for torch.export; its size decides where folding is cheaper,
            and it is the only size that a resize to a fixed `size` is folded for.
        force: fold even where the arithmetic says that it costs more; never where the outputs would differ.

    Raises:
        UnsupportedModelError: the model does not run on the example input.
    """
    plans = _plan(model, example_input, force)
    folded = surgery.deep_copy(model)
    record = getattr(folded, _RECORD, None)
    for decision, new in plans:
        if new is not None:
            # The replacement's `before` is still the original's: nothing of the original may be shared.
            new = copy.deepcopy(new)
            if decision.name == "":
                folded = new  # type: ignore[assignment]
            else:
                surgery.swap(folded, decision.name, new)
    if any(decision.folded for decision, _ in plans):
        if record is not None:  # compress refuses what is folded
            setattr(folded, _RECORD, replace(record, folded=True))
        _hf_config.forbid_saving_folded(folded)
    else:
        why = "; ".join(str(decision) for decision, _ in plans) or "no convolution of it is followed by a resize"
        warnings.warn(
            f"nothing was folded in this {type(model).__name__}, the copy is as before: {why}",
            RescompressWarning,
            stacklevel=2,
        )
    return folded


def fold_decisions(model: nn.Module, example_input: Any = None, *, force: bool = False) -> tuple[FoldDecision, ...]:
    """Return what `fold` does with each convolution that a resize follows; arguments and errors are those of `fold`."""
    return tuple(decision for decision, _ in _plan(model, example_input, force))


def _plan(model: nn.Module, example_input: Any, force: bool) -> list[tuple[FoldDecision, nn.Module | None]]:
    found = {name: conv for name, conv in model.named_modules() if isinstance(conv, ResizedConv2d) and _resizes(conv)}
    if not found:
        return []
    shapes = _input_shapes(model, found, default_args(model) if example_input is None else example_input)
    return [_decide(name, conv, shapes[name], force) for name, conv in found.items()]


def _resizes(conv: ResizedConv2d) -> bool:
    return isinstance(conv.after, Resize2d) and conv.after.scale != (1.0, 1.0)


def _input_shapes(model: nn.Module, names: Any, example_input: Any) -> dict[str, list[torch.Size]]:
    """Run the model once, on the meta device if it can, and return the shapes that each module was called with."""
    args, kwargs = as_args(example_input)

    def run(device: str | None) -> dict[str, list[torch.Size]]:
        clone = surgery.clone_shared(model, device).eval()
        shapes: dict[str, list[torch.Size]] = {name: [] for name in names}
        for name in names:
            seen = shapes[name]
            surgery.get(clone, name).register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0].shape)
            )
        with torch.no_grad():
            moved = tree_map(
                lambda leaf: leaf.to(device) if device and isinstance(leaf, Tensor) else leaf, (args, kwargs)
            )
            clone(*moved[0], **moved[1])
        return shapes

    try:
        return run("meta")
    except Exception:  # whatever a foreign forward does that needs values
        try:
            return run(None)
        except Exception as error:
            raise UnsupportedModelError(
                f"this {type(model).__name__} does not run on the example input ({error}); give an example_input for it"
            ) from error


def _decide(
    name: str, conv: ResizedConv2d, shapes: list[torch.Size], force: bool
) -> tuple[FoldDecision, nn.Module | None]:
    """Weigh one convolution; return the decision and, if it is to fold, the replacement."""
    kept = FoldDecision(name=name, folded=False, reason="")
    reason = _obstacle(conv)
    if reason is None and not shapes:
        reason = "the example input does not reach it"
    if reason is not None:
        return replace(kept, reason=reason), None
    sides = [_sides(conv, shape) for shape in shapes]
    seen, grid = sides[0]
    try:
        axes = axes_of(conv, grid)
        for _, other in sides:
            for n, along in zip(other, (axes[0].phases, axes[1].phases), strict=True):
                output_side(n, along.p, along.q, along.only, along.multiple, along.most)
    except ValueError as error:  # the resize does not repeat, or not at this size
        return replace(kept, reason=str(error)), None
    if all(axis.phases.p == axis.phases.q for axis in axes):
        return replace(kept, reason="the resize changes nothing at this size"), None
    before, after = _costs(conv, axes, seen, grid)
    kept = replace(kept, macs_before=before.macs, macs_after=after.macs)
    bank = conv.weight.shape[0] * conv.weight.shape[1] * math.prod(axis.phases.p * axis.taps for axis in axes)
    if bank > MAX_BANK:
        return replace(kept, reason=f"the folded kernel would have {bank} elements, more than {MAX_BANK}"), None
    cheaper = after.total < before.total
    ratio = f"{after.total / before.total:.2f} of the cost, with the traffic of the resize counted in"
    if not cheaper and not force:
        return replace(kept, reason=f"folded, it would have {ratio}"), None
    folded = build(conv, axes)
    try:
        off = None if conv.weight.is_meta else _largest_error(conv, folded, shapes[0])
    except ValueError as error:  # what only running it can tell
        return replace(kept, reason=str(error)), None
    tolerance = _TOLERANCE.get(conv.weight.dtype, 0.0)
    if off is not None and not off <= tolerance:  # `not <=` so that NaN is refused too
        return replace(kept, reason=f"relative difference {off:.1e} on a random image, over {tolerance:.0e}"), None
    reason = ratio if cheaper else f"forced, at {ratio}"
    return replace(kept, folded=True, reason=reason, max_error=off), folded


def _obstacle(conv: ResizedConv2d) -> str | None:
    """Return why this convolution cannot be folded whatever the size, or None."""
    if type(conv) is not ResizedConv2d:
        return f"it is a {type(conv).__name__}, whose weight or forward may be computed in its own way"
    for tensor in (conv.weight, conv.bias):
        if tensor is not None and type(tensor.data) is not Tensor:
            return f"its weights are a {type(tensor.data).__name__}, no plain tensor; fold before quantizing"
    if isinstance(conv.after, Resize2d) and conv.after.multiple > 1:
        return f"sides are rounded to multiples of {conv.after.multiple}, so its pattern is another for each size"
    if not conv.weight.is_floating_point():
        return f"its weights are {conv.weight.dtype}"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks:
        return "hooks are registered on it, which would be lost"
    if conv.same_padding and conv.padding not in ((0, 0), "valid"):
        return f"it pads both as TensorFlow's SAME and by {conv.padding}"
    return None


def _sides(conv: ResizedConv2d, shape: torch.Size) -> tuple[Pair, Pair]:
    """Return the sides that the convolution sees, its own padding included, and those of the grid that it makes."""
    before, stride = conv.before, conv.stride
    height, width = before.target(shape[-2], shape[-1]) if isinstance(before, Resize2d) else shape[-2:]
    if conv.same_padding:
        image = torch.empty(1, 1, height, width, device="meta")
        padded = pad_same(image, as_pair(conv.kernel_size), as_pair(stride), as_pair(conv.dilation))
        height, width = padded.shape[-2:]
    top, left = padding_of(conv)
    seen = (height + sum(top), width + sum(left))
    reach = [conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1 for axis in (0, 1)]
    return seen, ((seen[0] - reach[0]) // stride[0] + 1, (seen[1] - reach[1]) // stride[1] + 1)


@dataclass(frozen=True)
class _Cost:
    """Multiply-accumulates, and elements read or written by anything but a convolution's own arithmetic."""

    macs: int
    moved: int

    @property
    def total(self) -> int:
        return self.macs + MACS_PER_MOVED * self.moved


def _costs(conv: ResizedConv2d, axes: tuple[Axis, Axis], seen: Pair, grid: Pair) -> tuple[_Cost, _Cost]:
    """Return the cost of the convolution and its resize, and of the folded convolution, at batch 1."""
    channels = conv.out_channels
    taps = conv.weight.shape[1] * math.prod(conv.kernel_size)
    phases = axes[0].phases, axes[1].phases
    small = math.prod(n * along.p // along.q for n, along in zip(grid, phases, strict=True))
    full = math.prod(grid)
    before = _Cost(full * channels * taps, channels * (2 * full + small))
    p = phases[0].p * phases[1].p
    positions = math.prod(axis.positions(side) for axis, side in zip(axes, seen, strict=True)) * p
    macs = positions * channels * conv.weight.shape[1] * axes[0].taps * axes[1].taps
    moved = channels * positions * (3 if p > 1 else 1)
    if any(axis.extra != (0, 0) for axis in axes):
        moved += 2 * conv.in_channels * math.prod(seen)
    for along, n, other in zip(phases, grid, reversed(grid), strict=True):
        if along.head + along.tail > 0:
            # As fill_borders cuts its strips: whole blocks that hold the border and one that is only the cut's.
            blocks = -(-(along.head + along.tail) // along.p)
            strips = min(n, blocks * along.q) + min(n, (blocks + 1) * along.q)
            macs += strips * other * channels * taps
            moved += strips * other * channels * 3
    return before, _Cost(macs, moved)


def _largest_error(conv: ResizedConv2d, folded: nn.Module, shape: torch.Size) -> float:
    """Return the largest difference on a random image over the largest output."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *shape[-3:], generator=generator).to(conv.weight.device, conv.weight.dtype)
    with torch.no_grad():
        expected = conv(image).double()
        return float((folded(image).double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
