"""Fold the resize behind a convolution into the convolution: the same outputs from fewer positions, for deployment.

A convolution and an interpolation are both linear, and so is one after the other. docs/explanation/folding.md has the
arithmetic; `rescompress.layers.phases` finds the pattern of the interpolation, this file decides and rewrites.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rescompress import surgery
from rescompress.errors import RescompressWarning, UnsupportedModelError
from rescompress.inputs import as_args, default_input
from rescompress.layers.folded import BorderedFoldedConv2d, FoldedConv2d, output_side
from rescompress.layers.phases import NotPeriodicError, Phases, phases_of_scale, phases_of_size
from rescompress.layers.resize import Resize2d, ResizedConv2d, pad_same

Model = TypeVar("Model", bound=nn.Module)
Pair = tuple[int, int]

MACS_PER_MOVED = 24
"""Multiply-accumulates that one element written or read by a resize, a shuffle or a copy is worth in time."""

MAX_BANK = 1 << 24
"""Elements of a folded kernel beyond which even `force` does not fold."""

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
        force: fold even where the arithmetic says that it costs more.

    Raises:
        UnsupportedModelError: the model does not run on the example input.
    """
    plans = _plan(model, example_input, force)
    folded = copy.deepcopy(model)
    for decision, build in plans:
        if build is not None:
            new = build()
            if decision.name == "":
                return new  # type: ignore[return-value]
            surgery.swap(folded, decision.name, new)
    if not any(decision.folded for decision, _ in plans):
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


def _plan(
    model: nn.Module, example_input: Any, force: bool
) -> list[tuple[FoldDecision, Callable[[], nn.Module] | None]]:
    found = {name: conv for name, conv in model.named_modules() if isinstance(conv, ResizedConv2d) and _resizes(conv)}
    if not found:
        return []
    shapes = _input_shapes(model, found, default_input(model) if example_input is None else example_input)
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
            surgery.get(clone, name).register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape))
        with torch.no_grad():
            moved = tree_map(lambda leaf: leaf.to(device) if device and isinstance(leaf, Tensor) else leaf, (args, kwargs))
            clone(*moved[0], **moved[1])
        return shapes

    try:
        return run("meta")
    except Exception:  # whatever a foreign forward does that needs values
        try:
            return run(None)
        except Exception as error:
            raise UnsupportedModelError(
                f"this {type(model).__name__} does not run on the example input: {error}; give an example_input it takes"
            ) from error


def _decide(
    name: str, conv: ResizedConv2d, shapes: list[torch.Size], force: bool
) -> tuple[FoldDecision, Callable[[], nn.Module] | None]:
    """Weigh one convolution; return the decision and, if it is to fold, what builds the replacement."""
    kept = FoldDecision(name=name, folded=False, reason="")
    reason = _obstacle(conv)
    if reason is None and not shapes:
        reason = "the example input does not reach it"
    if reason is not None:
        return replace(kept, reason=reason), None
    grids = [_grid(conv, shape) for shape in shapes]
    seen, grid = grids[0]
    per_position = conv.weight.shape[1] * conv.out_channels
    macs = per_position * math.prod(conv.kernel_size) * math.prod(grid)
    kept = replace(kept, macs_before=macs)
    try:
        geometry = _geometry(conv, grid)
        for _, other in grids:
            for n, axis in zip(other, geometry, strict=True):
                output_side(n, axis.phases.p, axis.phases.q, axis.phases.only, axis.phases.multiple, axis.phases.most)
    except ValueError as error:
        return replace(kept, reason=str(error)), None
    if all(axis.phases.p == axis.phases.q for axis in geometry):
        return replace(kept, reason="the resize changes nothing at this size"), None
    bank = per_position * math.prod(axis.phases.p * axis.taps for axis in geometry)
    if bank > MAX_BANK:
        return replace(kept, reason=f"the folded kernel would have {bank:.1e} elements, more than {MAX_BANK:.1e}"), None
    after, before_cost, after_cost = _costs(conv, geometry, seen, grid)
    kept = replace(kept, macs_after=after)
    cheaper = after_cost < before_cost
    ratio = f"{after_cost / before_cost:.2f} of the cost with the traffic of the resize counted in"
    if not cheaper and not force:
        return replace(kept, reason=f"folding would be {ratio}"), None
    error = None
    if not conv.weight.is_meta:
        error = _largest_error(conv, _build(conv, geometry), shapes[0])
        tolerance = _TOLERANCE.get(conv.weight.dtype, 0.0)
        if not error <= tolerance and not force:
            return replace(kept, reason=f"relative difference {error:.1e} on a random image, over {tolerance:.0e}"), None
    reason = ratio if cheaper else f"forced, at {ratio}"
    return replace(kept, folded=True, reason=reason, max_error=error), lambda: _build(conv, geometry)


def _obstacle(conv: ResizedConv2d) -> str | None:
    """Return why this convolution cannot be folded whatever the size, or None."""
    if type(conv) is not ResizedConv2d:
        return f"it is a {type(conv).__name__}, whose weight or forward may be computed in its own way"
    for tensor in (conv.weight, conv.bias):
        if tensor is not None and type(tensor.data) is not Tensor:
            return f"its weights are a {type(tensor.data).__name__}, no plain tensor; fold before quantizing"
    if not conv.weight.is_floating_point():
        return f"its weights are {conv.weight.dtype}"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks:
        return "hooks are registered on it, which would be lost"
    if conv.same_padding and conv.padding not in ((0, 0), "valid"):
        return f"it pads both as TensorFlow's SAME and by {conv.padding}"
    return None


def _grid(conv: ResizedConv2d, shape: torch.Size) -> tuple[Pair, Pair]:
    """Return the grids that the convolution sees (its own run-time padding included) and makes."""
    clone = surgery.clone_shared(conv, "meta")
    assert_type = clone
    x = assert_type.before(torch.empty(1, *shape[-3:], device="meta", dtype=conv.weight.dtype))  # type: ignore[operator]
    return x, x  # type: ignore[return-value]
