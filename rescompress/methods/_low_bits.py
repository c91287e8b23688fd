"""Decide which low-bit layer replaces which, put them in, and time them against what they replace."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rescompress import surgery
from rescompress.layers.int4_linear import Int4WeightLinear
from rescompress.layers.kernels import Timing, choose_kernel
from rescompress.layers.low_bits import LowBits
from rescompress.layers.norm_folding import FoldedNorm, FoldOnLoad, without_norm
from rescompress.layers.packed_conv import Int8StaticConv2d, quiet
from rescompress.layers.quantized_conv import Int8DynamicConv2d, Int8WeightConv2d, why_not
from rescompress.layers.quantized_linear import Int8DynamicLinear, Int8StaticLinear, Int8WeightLinear
from rescompress.methods._activations import Seen

FEWEST_WEIGHTS = 1024
"""A layer with fewer weights than this has nothing to save."""


LARGEST_BATCH = 8
"""Kernels are timed on as many inputs as there were in the first batch, up to this."""


@dataclass(frozen=True)
class Choice:
    """The options of the step that a layer is built by."""

    scheme: str
    group_size: int
    only_faster: bool
    exact: bool


@dataclass(frozen=True)
class Plan:
    """One layer that is to be replaced.

    Attributes:
        name: its FQN
        norm: FQN of the BatchNorm that is folded into it, "" where there is none
    """

    name: str
    norm: str = ""


@dataclass(frozen=True)
class Done:
    """What became of one layer.

    Attributes:
        name: its FQN
        weights: how many weights it has
        timing: its kernels' times; None where nothing was quantized
        left: why it stayed in floating point after all; "" if it did not
    """

    name: str
    weights: int
    timing: Timing | None = None
    left: str = ""


def plan_of(model: nn.Module, name: str, seen: Seen, choice: Choice) -> Plan | str:
    """Return how a layer is replaced, or why it cannot be."""
    layer, scheme = surgery.get(model, name), choice.scheme
    weight = layer.weight
    if not isinstance(weight, Tensor):
        return "its weight is no tensor"
    if "forward" in vars(layer):
        return "its forward was replaced on the object itself"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.is_meta and not choice.exact:
        return "it is on the meta device, where weights have no values"
    if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
        return f"{type(layer).__name__} has a forward or a reader of its own"
    reason = why_not(layer) if isinstance(layer, nn.Conv2d) and scheme != "w4" else ""
    if reason or weight.numel() < FEWEST_WEIGHTS:
        return reason or f"fewer than {FEWEST_WEIGHTS} weights"
    if isinstance(layer, nn.Linear):
        if scheme == "w4" and layer.in_features % choice.group_size:
            return f"its inputs are no multiple of group_size={choice.group_size}"
        return Plan(name)
    if scheme == "w4":
        return "w4 is for linear layers (w8 makes convolutions smaller, w8a8 faster)"
    if not isinstance(layer, nn.Conv2d):
        return f"{type(layer).__name__} is no linear layer and no convolution"
    if scheme == "w8":
        return Plan(name)
    if scheme == "w8a8" and layer.groups > 1:
        return "grouped convolutions gain nothing from w8a8 (w8a8_static makes them faster)"
    if scheme == "w8a8_static" and weight.device.type not in ("cpu", "meta"):
        return f"w8a8_static has no int8 convolution on {weight.device.type} (w8a8 has)"
    if scheme == "w8a8_static" and weight.dtype != torch.float32 and not choice.exact:
        return f"w8a8_static convolves float32 maps, not {weight.dtype}"
    norm = seen.norm()
    if norm and not _foldable(surgery.get(model, norm)):
        norm = ""
    return Plan(name, norm)


def _foldable(norm: nn.Module) -> bool:
    # A subclass may do more than normalise; timm's, which also hold the activation, are known by their children.
    known = type(norm) is nn.BatchNorm2d or {"drop", "act"} == set(norm._modules)
    return known and isinstance(getattr(norm, "running_mean", None), Tensor)


def build(model: nn.Module, plans: list[Plan], seen: dict[str, Seen], choice: Choice) -> list[Done]:
    """Replace the layers in place."""
    done, static = [], {}
    for plan in plans:
        old = surgery.get(model, plan.name)
        norm = surgery.get(model, plan.norm) if plan.norm else None
        found, new = _replacement(plan, old, norm, seen[plan.name], choice)
        done.append(found)
        if found.left:
            continue
        surgery.swap(model, plan.name, new)
        if norm is not None:
            surgery.swap(model, plan.norm, FoldedNorm(norm))
            _fold_on_load(model, plan, norm)
        if isinstance(new, Int8StaticConv2d):
            static[plan] = new
    takers = {f"conv:{plan.name}" for plan in static}
    for plan, conv in static.items():  # only now is it known who takes quantized maps
        readers = seen[plan.name].readers.get(seen[plan.name].last_role(bool(plan.norm)), [])
        conv.stays_quantized = bool(readers) and takers.issuperset(readers)
    return done


def _fold_on_load(model: nn.Module, plan: Plan, norm: nn.Module) -> None:
    """Let the nearest module that holds both fold the BatchNorm of a checkpoint from before."""
    conv_path, norm_path = plan.name.split("."), plan.norm.split(".")
    shared = 0
    while conv_path[shared] == norm_path[shared]:
        shared += 1
    holder = surgery.get(model, ".".join(conv_path[:shared]))
    hook = FoldOnLoad(".".join(conv_path[shared:]), ".".join(norm_path[shared:]), float(norm.eps))  # type: ignore[arg-type]
    holder.register_load_state_dict_pre_hook(hook)


def _replacement(
    plan: Plan, old: nn.Module, norm: nn.Module | None, seen: Seen, choice: Choice
) -> tuple[Done, nn.Module]:
    weights = old.weight.numel()  # type: ignore[operator]
    exact: nn.Module
    if isinstance(old, nn.Conv2d):
        exact = without_norm(old, norm)
        if choice.exact:
            return Done(plan.name, weights), exact if norm is not None else _as_it_is(old)
        new: LowBits
        if choice.scheme == "w8":
            new = Int8WeightConv2d(old)
        elif choice.scheme == "w8a8":
            new = Int8DynamicConv2d(old, norm)
        else:
            new = Int8StaticConv2d(old, norm, seen.input_range, seen.output_ranges[seen.last_role(norm is not None)])
            if not _computes_right(new, seen):
                return Done(plan.name, weights, left="this processor's int8 products overflow"), new
    else:
        exact = _as_it_is(old)
        if choice.exact:
            return Done(plan.name, weights), exact
        new = _linear(old, seen, choice)  # type: ignore[arg-type]
    timing = _timed(new, exact, seen)
    if choice.only_faster and timing.slower:
        return Done(plan.name, weights, timing, "slower in low bits on this machine"), new
    return Done(plan.name, weights, timing), new


def _as_it_is(layer: nn.Module) -> nn.Module:
    """Return another module with the same parameters: a swap that changes no number."""
    return surgery.clone_shared(layer)


def _linear(old: nn.Linear, seen: Seen, choice: Choice) -> LowBits:
    if choice.scheme == "w8":
        return Int8WeightLinear(old)
    if choice.scheme == "w8a8":
        return Int8DynamicLinear(old)
    if choice.scheme == "w4":
        return Int4WeightLinear(old, choice.group_size)
    return Int8StaticLinear(old, max(abs(edge) for edge in seen.input_range))


def _computes_right(conv: Int8StaticConv2d, seen: Seen) -> bool:
    """Whether the kernel agrees with floating point; without VNNI, sums of two products can overflow 16 bits."""
    low, high = min(seen.input_range[0], 0.0), max(seen.input_range[1], 0.0)
    generator = torch.Generator().manual_seed(0)
    # A corner is enough to overflow, and keeps this cheap.
    kernel = conv.plain()["weight"].shape[-2:]
    sides = [min(seen.input_shape[2 + axis], 16 + conv.dilation[axis] * kernel[axis]) for axis in (0, 1)]
    x = torch.rand((1, seen.input_shape[1], *sides), generator=generator) * (high - low) + low
    with torch.no_grad(), quiet():
        gap = float((conv(x) - conv.emulated(x)).abs().max())
    return gap <= 1.5 * conv.output_scale  # neighbours in rounding are right


def _timed(new: LowBits, exact: nn.Module, seen: Seen) -> Timing:
    reference = next(exact.parameters())
    generator = torch.Generator(device=reference.device).manual_seed(0)
    shape = (min(seen.input_shape[0], LARGEST_BATCH), *seen.input_shape[1:])
    x = torch.randn(shape, generator=generator, dtype=reference.dtype, device=reference.device)
    as_before = x
    if isinstance(new, Int8DynamicConv2d):  # these hand maps on in this order
        x = x.contiguous(memory_format=torch.channels_last)
    with quiet():
        return choose_kernel(new, x, lambda _: exact(as_before))
