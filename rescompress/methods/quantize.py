"""Hold weights in 8 or 4 bits, and multiply in 8 bits, in plain layers that export to any format.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
https://arxiv.org/abs/1712.05877
"""

import dataclasses
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from rescompress.anatomy import Anatomy, ConvAnatomy, ViTAnatomy
from rescompress.errors import SpecError, did_you_mean
from rescompress.layers.low_bits import LowBits
from rescompress.methods._activations import Seen, observe
from rescompress.methods._low_bits import FEWEST_WEIGHTS, Choice, Plan, build, plan_of
from rescompress.spec import Applied, Run, Samples, Stage, Step, check_choice, is_int

SCHEMES = ("w8", "w8a8", "w8a8_static", "w4")
LEFT = "left in floating point"
"""How a line of the log begins that gives a reason and, behind a colon, the layers that it holds for."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """Replace linear layers and convolutions by low-bit ones.

    Attributes:
        scheme: "w8" (int8 weights), "w8a8" (int8 products, ranges of activations found on each call), "w8a8_static"
            (int8 products, ranges from calibration), "w4" (int4 weights of linear layers)
        group_size: for w4, inputs that share a scale
        include: patterns of FQNs, as in a shell; only these layers, and the first convolution and the head if named
        exclude: patterns of FQNs that stay in floating point
        first_conv: whether the convolution that reads the image is quantized too
        head: whether the last layer is quantized too
        only_faster: leave layers in floating point that are slower in low bits on this machine
        exact: put the layers in with full-precision weights: the zero step

    Raises:
        SpecError: a value out of range.
    """

    kind: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.PRECISION

    scheme: str
    group_size: int = 32
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    first_conv: bool = False
    head: bool = False
    only_faster: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_choice("quantize.scheme", self.scheme, SCHEMES)
        if not is_int(self.group_size, 2) or self.group_size % 2:
            raise SpecError(f"quantize.group_size must be an even int of at least 2, got {self.group_size!r}")
        for option in ("include", "exclude"):
            value = getattr(self, option)
            patterns = (value,) if isinstance(value, str) else value
            if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
                raise SpecError(f"quantize.{option} must be a pattern of layer names or a list of them, got {value!r}")
            object.__setattr__(self, option, tuple(patterns))
        for option in ("first_conv", "head", "only_faster", "exact"):
            if not isinstance(getattr(self, option), bool):
                raise SpecError(f"quantize.{option} must be true or false, got {getattr(self, option)!r}")

    def identity(self) -> "Quantize":
        """Return the step that puts the same layers in with full-precision weights."""
        return dataclasses.replace(self, exact=True)

    def apply(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Replace the layers; w8a8_static cannot be done without samples."""
        return self.apply_with(model, anatomy, Samples()).anatomy

    def apply_with(self, model: nn.Module, anatomy: Anatomy, samples: Samples) -> Applied:
        """Replace the layers, and tell what stayed in floating point and what became slower."""
        static = self.scheme == "w8a8_static" and not self.exact
        if static and not samples.calibration:
            raise SpecError(
                "quantize.scheme='w8a8_static' needs inputs to find the ranges of activations with: pass "
                "calibration=batches to compress, or calibration='random' for noise, or use scheme='w8a8'"
            )
        self._check_first(model)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        self._check_patterns(names, type(model).__name__)
        example = _example_run(model, anatomy) if samples.example is None else samples.example
        seen = observe(model, samples.calibration if static else (example,), names)
        left = self._left_out(names, seen, anatomy)
        choice = Choice(self.scheme, self.group_size, self.only_faster, self.exact)
        plans: list[Plan] = []
        for name in names:
            if name in left:
                continue
            plan = plan_of(model, name, seen[name], choice)
            if isinstance(plan, str):
                left[name] = plan
            else:
                plans.append(plan)
        done = build(model, plans, seen, choice)
        left |= {found.name: found.left for found in done if found.left}
        left |= _other_weights(model, names)
        if all(found.left for found in done):
            raise SpecError(
                f"quantize.scheme={self.scheme!r} leaves every layer of this {type(model).__name__} in floating "
                f"point: {'; '.join(_grouped(left, most=3)) or 'it has no linear layer and no convolution'}"
            )
        noise = ("ranges of activations are from noise: speed is real, accuracy is not",) if samples.random else ()
        return Applied(anatomy, (*_told(self.scheme, done), *_grouped(left), *(noise if static else ())))

    def _check_first(self, model: nn.Module) -> None:
        """Refuse a second step that does not say which layers the first one left for it."""
        low_bits = [name for name, module in model.named_modules() if isinstance(module, LowBits)]
        if low_bits and not self.include:
            raise SpecError(
                f"this {type(model).__name__} is quantized already: {len(low_bits)} layers such as {low_bits[0]!r}; "
                "quantize the original, or name the layers for a second step with quantize.include"
            )

    def _check_patterns(self, names: list[str], model: str) -> None:
        for option in ("include", "exclude"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise SpecError(
                        f"quantize.{option}: no linear layer or convolution of this {model} matches {pattern!r}"
                        f"{did_you_mean(pattern, names[:40])}"
                    )

    def _left_out(self, names: list[str], seen: dict[str, Seen], anatomy: Anatomy) -> dict[str, str]:
        first = next(iter(seen), "")  # called first, where no family knows better
        if isinstance(anatomy, ConvAnatomy):
            first = anatomy.first_conv
        elif isinstance(anatomy, ViTAnatomy):
            first = anatomy.patch_conv
        last = next(reversed(seen), "")
        left = {}
        for name in names:
            named = any(fnmatchcase(name, pattern) for pattern in self.include)
            if any(fnmatchcase(name, pattern) for pattern in self.exclude):
                left[name] = "excluded"
            elif self.include and not named:
                left[name] = "not included"
            elif name not in seen:
                left[name] = "never called as a layer: its weight is read elsewhere"
            elif seen[name].weight_read:
                left[name] = "the model looks at its weight, or the type of it, outside of the layer"
            elif not all(math.isfinite(edge) for edge in seen[name].edges()):
                left[name] = "infinite or NaN values pass through it"
            elif name == first and not (self.first_conv or named):
                left[name] = "reads the image (first_conv=True quantizes it)"
            elif name == last and not (self.head or named):
                left[name] = "the head (head=True quantizes it)"
        return left


def _other_weights(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Return the modules with large weights that are no linear layers or 2-D convolutions, and what they are."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        large = any("weight" in key and p.ndim > 1 and p.numel() >= FEWEST_WEIGHTS for key, p in own.items())
        if large and name not in names:
            kind = type(module).__name__
            found[name] = f"{kind} is not a linear layer or a 2-D convolution, or reads its weight itself"
    return found


def _example_run(model: nn.Module, anatomy: Anatomy) -> Run:
    """Return an image of zeros as the anatomy was described with."""
    parameter = next(model.parameters())
    return (torch.zeros((1, 3, *anatomy.input_size), dtype=parameter.dtype, device=parameter.device),), {}


def _told(scheme: str, done: list[Any]) -> list[str]:
    kept = [found for found in done if not found.left]
    weights = sum(found.weights for found in kept)
    lines = [f"{scheme}: {len(kept)} layers with {weights / 1e6:.2f} M weights"]
    slower = [found for found in kept if found.timing is not None and found.timing.slower]
    timed = [found.timing for found in kept if found.timing is not None]
    if timed:
        before, after = sum(timing.float_ms for timing in timed), sum(timing.kernel_ms for timing in timed)
        lines.append(f"these layers alone: {before:.2f} ms in floating point, {after:.2f} ms now")
        if after > before:
            lines.append(f"{scheme} makes the model slower on this machine; only_faster=True keeps what is not")
    if slower:
        some = ", ".join(found.name for found in slower[:4]) + (", ..." if len(slower) > 4 else "")
        lines.append(f"slower one by one than in floating point: {len(slower)} of {len(timed)} layers ({some})")
    return lines


def _grouped(left: dict[str, str], most: int | None = None) -> list[str]:
    """Return one line for each reason why layers stay in floating point, with at most so many names."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    lines = []
    for reason, found in names.items():
        more = f" and {len(found) - most} more" if most is not None and len(found) > most else ""
        lines.append(f"{LEFT}, {reason}: {', '.join(found[:most])}{more}")
    return lines
