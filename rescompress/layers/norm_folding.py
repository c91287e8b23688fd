"""Fold the BatchNorm behind a convolution into it, also when a checkpoint from before is loaded."""

from typing import Any

import torch
from torch import Tensor, nn


def folded(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with the BatchNorm behind it multiplied in."""
    weight = conv.weight.detach()
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.detach()
    if norm is None:
        return weight, bias
    return _folded(weight, bias, norm.eps, norm.state_dict())  # type: ignore[arg-type]


def _folded(weight: Tensor, bias: Tensor, eps: float, norm: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    factor = (norm["running_var"] + eps).rsqrt()
    if "weight" in norm:
        factor = factor * norm["weight"]
    bias = (bias - norm["running_mean"]) * factor + norm.get("bias", torch.zeros_like(bias))
    return weight * factor.reshape(-1, 1, 1, 1), bias


def without_norm(conv: nn.Conv2d, norm: nn.Module | None) -> nn.Conv2d:
    """Return the convolution in floating point with the BatchNorm behind it folded in."""
    weight, bias = folded(conv, norm)
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        device="meta",  # the parameters are replaced at once: allocate nothing
    )
    new.weight, new.bias = nn.Parameter(weight), nn.Parameter(bias)
    return new


class FoldedNorm(nn.Module):
    """Stands where a BatchNorm was that now lives in the convolution before it; what it did besides goes on.

    Args:
        norm: the BatchNorm, or one of timm's that holds its activation as `act`.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.drop = _child(norm, "drop")
        self.act = _child(norm, "act")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))  # type: ignore[no-any-return]


class FoldOnLoad:
    """A load_state_dict pre-hook for what holds both: folds the BatchNorm of a checkpoint from before.

    Args:
        conv: name of the convolution from there.
        norm: name of the BatchNorm from there.
        eps: its eps.
    """

    def __init__(self, conv: str, norm: str, eps: float) -> None:
        self.conv, self.norm, self.eps = conv, norm, eps

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        """Replace the keys of both by those of the folded convolution."""
        conv, norm = f"{prefix}{self.conv}.", f"{prefix}{self.norm}."
        weight = state_dict.get(conv + "weight")
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            return  # nothing there, or from a quantized model
        statistics = {key.removeprefix(norm): state_dict.pop(key) for key in list(state_dict) if key.startswith(norm)}
        lacking = [norm + name for name in ("running_mean", "running_var") if name not in statistics]
        if lacking:
            missing_keys.extend(lacking)
            return
        bias = state_dict.get(conv + "bias", torch.zeros_like(statistics["running_mean"]))
        if len(bias) == len(weight):  # else the convolution itself says what is wrong with the shapes
            state_dict[conv + "weight"], state_dict[conv + "bias"] = _folded(weight, bias, self.eps, statistics)


def _child(module: nn.Module, name: str) -> nn.Module:
    child = module._modules.get(name)
    return nn.Identity() if child is None else child
