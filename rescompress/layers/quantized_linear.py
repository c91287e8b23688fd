"""Linear layers with int8 weights in plain buffers, computed by aten operators that TorchScript writes.

Each class lists the ways to compute it as KERNELS, the first being the reference that the others must agree with;
`rescompress.layers.kernels` times them and sets `kernel`. The arithmetic is that of torchao's int8 tensors.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescompress.layers.integers import SMALLEST_SCALE, check_floating, int8_rows
from rescompress.layers.low_bits import LowBits


def int_matmul(a: Tensor, weight: Tensor) -> Tensor:
    """Return a @ weight.T in int32.

    Shape:
        - Input: (M, K) int8 or uint8 and (N, K) int8
        - Output: (M, N) int32
    """
    return in_eights(a, weight) if a.is_cuda else torch._int_mm(a, weight.t())


def in_eights(a: Tensor, weight: Tensor) -> Tensor:
    """Return what `int_matmul` does, within what cuBLAS takes: more than 16 rows, inputs and outputs in eights."""
    rows, outputs = a.shape[0], weight.shape[0]
    inputs_more, outputs_more = (8 - a.shape[1] % 8) % 8, (8 - outputs % 8) % 8
    if rows <= 16 or inputs_more > 0:
        a = F.pad(a, [0, inputs_more, 0, max(17 - rows, 0)])
    if inputs_more > 0 or outputs_more > 0:
        weight = F.pad(weight, [0, inputs_more, 0, outputs_more])
    return torch._int_mm(a, weight.t())[:rows, :outputs]


def scaled_matmul(values: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, kernel: str) -> Tensor:
    """Multiply quantized activations with quantized weights and scale the sums back, in the order of torchao.

    Shape:
        - Input: (M, K) whole numbers from -128 to 127 in floating point, (N, K) int8, (M, 1) or (1, 1), (N,)
        - Output: (M, N) in the type of `values`
    """
    if kernel == "int8":
        sums = int_matmul(values.to(torch.int8), weight).to(input_scale.dtype)
    elif kernel == "uint8":  # one operand unsigned is what AVX512-VNNI multiplies
        surplus = weight.sum(dim=1, dtype=torch.int32) * 128
        sums = (int_matmul((values + 128).to(torch.uint8), weight) - surplus).to(input_scale.dtype)
    else:
        sums = torch.mm(values.to(input_scale.dtype), weight.t().to(input_scale.dtype))
    return (sums * input_scale).to(values.dtype) * weight_scale.to(values.dtype)


class QuantizedLinear(LowBits, ABC):
    """What the low-bit linear layers share: the buffers, the bias, and loading a checkpoint from before.

    A state dict with a floating-point `weight` is quantized while it is loaded.

    Args:
        linear: what it replaces.
        weight: its weight in low bits.
        weight_scale: what they are multiplied with.

    Shape:
        - Input: (*, I)
        - Output: (*, O)
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.register_parameter("bias", linear.bias)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @abstractmethod
    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands for a floating-point weight: integers and scales."""

    def _with_bias(self, y: Tensor) -> Tensor:
        bias = self.bias  # in a local variable, of which TorchScript knows that it stays what it was
        return y if bias is None else y + bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        fits = isinstance(weight, Tensor) and weight.shape == (self.out_features, self.in_features)
        if isinstance(weight, Tensor) and fits and weight.is_floating_point():
            state_dict[prefix + "weight"], state_dict[prefix + "weight_scale"] = self.quantized(weight)
            for name, buffer in self._buffers.items():  # what calibration found stays
                if buffer is not None and name not in self._non_persistent_buffers_set:
                    state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, kernel={self.kernel}"


class Int8WeightLinear(QuantizedLinear):
    """A linear layer whose weight is int8 with one scale for each output (w8)."""

    KERNELS: ClassVar[tuple[str, ...]] = ("scale_output", "scale_weight", "packed")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, *int8_rows(linear.weight))

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return int8_rows(weight)

    def forward(self, x: Tensor) -> Tensor:
        check_floating(x)
        scale = self.weight_scale.to(x.dtype)
        if self.kernel == "scale_weight":
            return F.linear(x, self.weight.to(x.dtype) * scale[:, None], self.bias)
        if self.kernel == "packed":
            rows = x.reshape(-1, x.shape[-1])
            y = torch._weight_int8pack_mm(rows, self.weight, scale)
            y = y.reshape(x.shape[:-1] + y.shape[1:])
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * scale
        return self._with_bias(y)


class Int8ProductLinear(Int8WeightLinear, ABC):
    """What the linear layers that multiply in int8 share: all but where the scale of the activations comes from."""

    KERNELS: ClassVar[tuple[str, ...]] = ("float", "int8", "uint8")

    @abstractmethod
    def _scale_of(self, rows: Tensor) -> Tensor:
        """Return the scale of each of some rows of activations (M, I), as (M, 1), or one for all, as (1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        check_floating(x)
        rows = x.reshape(-1, x.shape[-1])
        wide = rows if rows.dtype == torch.float64 else rows.float()
        scale = self._scale_of(wide)
        values = (wide * (1.0 / scale)).round().clamp(-128, 127)
        y = scaled_matmul(values, self.weight, scale, self.weight_scale, self.kernel)
        return self._with_bias(y.to(x.dtype).reshape(x.shape[:-1] + y.shape[1:]))


class Int8DynamicLinear(Int8ProductLinear):
    """A linear layer that multiplies in int8: activations are quantized as they come, a scale for each token (w8a8)."""

    smallest: float

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.smallest = SMALLEST_SCALE

    def _scale_of(self, rows: Tensor) -> Tensor:
        return (rows.abs().amax(dim=1, keepdim=True) / 127.5).clamp(min=self.smallest)


class Int8StaticLinear(Int8ProductLinear):
    """A linear layer that multiplies in int8, with one scale for all activations from calibration (w8a8_static).

    Args:
        linear: what it replaces.
        largest: largest magnitude of its input.
    """

    input_scale: Tensor

    def __init__(self, linear: nn.Linear, largest: float) -> None:
        super().__init__(linear)
        scale = max(largest / 127.5, SMALLEST_SCALE)
        self.register_buffer("input_scale", torch.full((1, 1), scale, device=linear.weight.device))

    def _scale_of(self, rows: Tensor) -> Tensor:
        return self.input_scale
