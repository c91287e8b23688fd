"""What the methods that resize a map or an image have in common."""

import warnings
from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Grid
from rescompress.errors import RescompressWarning, SpecError, UnsupportedModelError
from rescompress.layers.resize import ResizedConv2d, is_same_padded
from rescompress.layers.wrap import ResizedModule
from rescompress.spec import as_pair, check_choice, check_scale


def check_resize_options(step: Any, modes: tuple[str, ...], optional_antialias: bool = False) -> None:
    """Check scale or size, mode and antialias of a step; turns its size into a (height, width).

    Raises:
        SpecError: neither or both of scale and size, or a value out of range.
    """
    if (step.scale is None) == (step.size is None):
        raise SpecError(f"{step.kind} takes either a scale or a size, got scale={step.scale!r} and size={step.size!r}")
    if step.scale is not None:
        check_scale(f"{step.kind}.scale", step.scale)
    else:
        object.__setattr__(step, "size", as_pair(f"{step.kind}.size", step.size))
    check_choice(f"{step.kind}.mode", step.mode, modes)
    if not isinstance(step.antialias, bool) and (step.antialias is not None or not optional_antialias):
        raise SpecError(f"{step.kind}.antialias must be true or false, got {step.antialias!r}")
    if step.antialias and step.mode not in ("bilinear", "bicubic"):
        raise SpecError(f"{step.kind}.antialias goes with bilinear and bicubic, not with {step.mode!r}")


def asked(step: Any) -> str:
    """Name the option by which the user said how far to resize, and its value: `stem_resize.scale=0.5`."""
    return f"{step.kind}.scale={step.scale}" if step.scale is not None else f"{step.kind}.size={step.size}"


def refuse_larger(step: Any, before: Grid, after: Grid, what: str, multiple: int = 1) -> None:
    """Raise where a resize would enlarge `what`: a size may say so, and a scale is rounded to a multiple.

    Raises:
        SpecError: it would.
    """
    if after[0] <= before[0] and after[1] <= before[1]:
        return
    made = f"{after[0]} x {after[1]}, larger than the {before[0]} x {before[1]} {what}"
    if step.scale is None:
        raise SpecError(f"{asked(step)} makes {made}; a resize may not add cost")
    raise SpecError(
        f"{asked(step)} makes {made}, because its sides must be multiples of {multiple}; take a smaller scale"
    )


def warn_if_not_reached(kind: str, scale: float | None, before: Grid, after: Grid) -> None:
    """Say which scale is reached where the one asked for is not; refuse one so near to 1 that nothing would change.

    Raises:
        SpecError: a scale below 1 leaves the grid as it is.
    """
    if scale is None:
        return
    if scale < 1 and after == before:
        raise SpecError(
            f"{kind}.scale={scale} changes nothing: the nearest grid to {before[0]} x {before[1]} is itself; "
            "use a smaller scale"
        )
    reached = (after[0] / before[0], after[1] / before[1])
    shown = f"{reached[0]:.4f}" if reached[0] == reached[1] else f"{reached[0]:.4f} x {reached[1]:.4f}"
    if any(abs(side - scale) > 1e-6 for side in reached):
        warnings.warn(
            f"{kind}.scale={scale} cannot be reached exactly: {before[0]} x {before[1]} becomes "
            f"{after[0]} x {after[1]}, a scale of {shown}",
            RescompressWarning,
            stacklevel=2,
        )


def put_resize(
    model: nn.Module, fqn: str, kind: str, before: nn.Module | None = None, after: nn.Module | None = None
) -> None:
    """Resize what enters (`before`) or leaves (`after`) the convolution `fqn`.

    Raises:
        UnsupportedModelError: the same place has been taken by an earlier step.
    """
    old = surgery.get(model, fqn)
    if isinstance(old, ResizedConv2d | ResizedModule):
        for new, present in ((before, old.before), (after, old.after)):
            if new is not None and not isinstance(present, nn.Identity):
                raise UnsupportedModelError(
                    f"{fqn!r} is resized already; a model takes {kind} once: compress the original model with the "
                    "scale wanted in the end"
                )
        if before is not None:
            old.before = before
        if after is not None:
            old.after = after
    elif isinstance(old, nn.Conv2d) and "weight" in old._parameters and (type(old) is nn.Conv2d or is_same_padded(old)):
        surgery.swap(model, fqn, ResizedConv2d.from_conv(old, before, after, same_padding=is_same_padded(old)))
    else:
        # A convolution with a forward of its own (weight standardisation, parametrisations) is kept whole.
        nothing = nn.Identity()
        surgery.swap(model, fqn, ResizedModule(old, before or nothing, after or nothing))
