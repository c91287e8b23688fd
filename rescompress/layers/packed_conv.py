"""Convolutions in int8 from one map to the next, by `quantized::conv2d` with packed weights, in Python and TorchScript.

The kernel runs on the CPU in float32.
"""

import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescompress.layers.composite import padding_of
from rescompress.layers.integers import check_batch, check_floating, int8_rows
from rescompress.layers.low_bits import LowBits
from rescompress.layers.norm_folding import folded


class Int8StaticConv2d(LowBits):
    """A convolution in int8 whose input and output ranges come from calibration (w8a8_static).

    A map that is quantized already is taken as it is. Where only other such convolutions read the output, it stays
    quantized: a ReLU between them does nothing more, because the output's range starts at zero.

    The state dict holds plain tensors: `weight` (int8), `weight_scale`, `bias` and `ranges` (scale and zero point of
    input and output). A floating-point `weight` is quantized while it is loaded, and the ranges stay.

    Args:
        conv: what it replaces.
        norm: the BatchNorm behind it, folded in; None where there is none.
        input_range: smallest and largest value of the input.
        output_range: of the output, behind the ReLU if one follows at once.

    Attributes:
        stays_quantized: whether the output is handed on as it is

    Shape:
        - Input: (B, C, H, W), float32 or quint8
        - Output: (B, O, H', W'), float32 or quint8
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("packed",)

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None,
        input_range: tuple[float, float],
        output_range: tuple[float, float],
    ) -> None:
        super().__init__()
        padding = padding_of(conv)
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = [padding[0][0], padding[1][0]]
        self.groups = conv.groups
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels  # hosts read them
        self.stays_quantized = False
        self.input_scale, self.input_zero_point = affine(*input_range)
        self.output_scale, self.output_zero_point = affine(*output_range)
        weight, bias = folded(conv, norm)
        self.packed: Any = self._pack(*int8_rows(weight, self._bits()), bias)

    def forward(self, x: Tensor) -> Tensor:
        check_batch(x)
        if not x.is_quantized:
            check_floating(x)
            x = torch.quantize_per_tensor(x, self.input_scale, self.input_zero_point, torch.quint8)
        y: Tensor = torch.ops.quantized.conv2d(x, self.packed, self.output_scale, self.output_zero_point)
        # In training other operators may stand between, such as dropout.
        return y if self.stays_quantized and not self.training else y.dequantize()

    def plain(self) -> dict[str, Tensor]:
        """Return all that the layer holds, as plain tensors by their names in the state dict."""
        with quiet():
            weight, bias = self.packed.unpack()
            ranges = (self.input_scale, self.input_zero_point, self.output_scale, self.output_zero_point)
            return {
                "weight": weight.int_repr(),
                "weight_scale": weight.q_per_channel_scales().float(),
                "bias": bias.detach(),
                "ranges": torch.tensor(ranges, dtype=torch.float64),
            }

    def emulated(self, x: Tensor) -> Tensor:
        """Return what the layer should compute, in floating point on the same whole numbers: for float32 maps."""
        own = self.plain()
        values = (x / self.input_scale).round().add(self.input_zero_point).clamp(0, 255) - self.input_zero_point
        weight = own["weight"].float() * own["weight_scale"].reshape(-1, 1, 1, 1)
        y = F.conv2d(
            values * self.input_scale, weight, own["bias"], self.stride, self.padding, self.dilation, self.groups
        )
        steps = (y / self.output_scale).round().add(self.output_zero_point).clamp(0, 255)
        return (steps - self.output_zero_point) * self.output_scale

    def _bits(self) -> int:
        # The kernel of grouped convolutions adds two products in 16 bits, which weights of 8 bits overflow.
        return 8 if self.groups == 1 else 7

    def _pack(self, weight: Tensor, scale: Tensor, bias: Tensor) -> Any:
        with quiet():
            values = torch._make_per_channel_quantized_tensor(
                weight.cpu(), scale.cpu().double(), torch.zeros(len(scale), dtype=torch.long), 0
            )
            return torch.ops.quantized.conv2d_prepack(
                values, bias.cpu().float(), self.stride, self.padding, self.dilation, self.groups
            )

    def _take(self, plain: dict[str, Tensor]) -> None:
        """Hold what `plain` gave."""
        self.packed = self._pack(plain["weight"], plain["weight_scale"], plain["bias"])
        input_scale, input_zero_point, output_scale, output_zero_point = plain["ranges"].tolist()
        self.input_scale, self.input_zero_point = input_scale, int(input_zero_point)
        self.output_scale, self.output_zero_point = output_scale, int(output_zero_point)

    def __getstate__(self) -> dict[str, Any]:
        # The packed object pickles by way of quantized tensors, which torch cannot do without a warning.
        return {name: value for name, value in vars(self).items() if name != "packed"} | {"plain": self.plain()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        others = {name: value for name, value in state.items() if name != "plain"}
        super().__setstate__(others)
        self._take(state["plain"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.plain().items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.plain()
        given = {name: state_dict.pop(prefix + name) for name in own if prefix + name in state_dict}
        weight = given.get("weight")
        if weight is not None and weight.is_floating_point() and weight.shape == own["weight"].shape:
            integers, scale = int8_rows(weight, self._bits())
            bias = given.get("bias", torch.zeros_like(scale))
            given = own | {"weight": integers, "weight_scale": scale, "bias": bias}
        missing_keys.extend(prefix + name for name in own if name not in given)
        wrong = [name for name, value in given.items() if value.shape != own[name].shape]
        error_msgs.extend(
            f"{prefix}{name} has shape {tuple(given[name].shape)} instead of {tuple(own[name].shape)}" for name in wrong
        )
        if not wrong:
            self._take(own | given)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"stays_quantized={self.stays_quantized}, kernel={self.kernel}"
        )


def affine(low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point of the 256 values that cover a range; zero is one of them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-8)
    return scale, min(255, max(0, round(-low / scale)))


def quiet() -> "warnings.catch_warnings[None]":
    """Silence torch's notice that quantized tensors will go some day; TorchScript has no other int8 convolution."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
