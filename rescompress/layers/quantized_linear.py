"""Linear layers with int8 weights in plain buffers, computed by aten operators that TorchScript writes.

Each class lists the ways to compute it as KERNELS, the first being the reference that the others must agree with;
`rescompress.layers.kernels` times them and sets `kernel`. The arithmetic is that of torchao's int8 tensors.
"""

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


class QuantizedLinear(LowBits):
    """What the low-bit linear layers share: the bias, the kernel, and loading a checkpoint from before.

    A state dict with a floating-point `weight` is quantized while it is loaded.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.register_parameter("bias", linear.bias)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the buffers that stand for a floating-point weight."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """Return the weight in floating point, (O, I)."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        fits = isinstance(weight, Tensor) and weight.shape == (self.out_features, self.in_features)
        if isinstance(weight, Tensor) and fits and weight.is_floating_point():
            for name, value in self.quantized(weight).items():
                state_dict[prefix + name] = value
            for name, buffer in self._buffers.items():  # what calibration found stays
                if buffer is not None and name not in self._non_persistent_buffers_set:
                    state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, kernel={self.kernel}"


class Int8WeightLinear(QuantizedLinear):
    """A linear layer whose weight is int8 with one scale for each output (w8).

    Shape:
        - Input: (*, I)
        - Output: (*, O)
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("scale_output", "scale_weight", "packed")
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        for name, value in self.quantized(linear.weight).items():
            self.register_buffer(name, value)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        integers, scale = int8_rows(weight)
        return {"weight": integers, "weight_scale": scale}

    def dequantized(self) -> Tensor:
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale[:, None]

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
        bias = self.bias
        if bias is not None:
            y = y + bias
        return y


class Int8DynamicLinear(Int8WeightLinear):
    """A linear layer that multiplies in int8: activations are quantized as they come, a scale for each token (w8a8).

    Shape:
        - Input: (*, I)
        - Output: (*, O)
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("float", "int8", "uint8")
    smallest: float

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.smallest = SMALLEST_SCALE

    def forward(self, x: Tensor) -> Tensor:
        check_floating(x)
        rows = x.reshape(-1, x.shape[-1])
        wide = rows if rows.dtype == torch.float64 else rows.float()
        input_scale = (wide.abs().amax(dim=1, keepdim=True) / 127.5).clamp(min=self.smallest)
        values = (wide * (1.0 / input_scale)).round().clamp(-128, 127)
        y = scaled_matmul(values, self.weight, input_scale, self.weight_scale, self.kernel)
        y = y.to(x.dtype).reshape(x.shape[:-1] + y.shape[1:])
        bias = self.bias
        if bias is not None:
            y = y + bias
        return y


class Int8StaticLinear(Int8WeightLinear):
    """A linear layer that multiplies in int8, with one scale for all activations from calibration (w8a8_static).

    Args:
        linear: what it replaces.
        largest: largest magnitude of its input.

    Shape:
        - Input: (*, I)
        - Output: (*, O)
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("float", "int8", "uint8")
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, largest: float) -> None:
        super().__init__(linear)
        scale = max(largest / 127.5, SMALLEST_SCALE)
        self.register_buffer("input_scale", torch.full((1, 1), scale, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        check_floating(x)
        rows = x.reshape(-1, x.shape[-1])
        wide = rows if rows.dtype == torch.float64 else rows.float()
        values = (wide * (1.0 / self.input_scale)).round().clamp(-128, 127)
        y = scaled_matmul(values, self.weight, self.input_scale, self.weight_scale, self.kernel)
        y = y.to(x.dtype).reshape(x.shape[:-1] + y.shape[1:])
        bias = self.bias
        if bias is not None:
            y = y + bias
        return y
