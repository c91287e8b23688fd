"""Linear layers with int4 weights, two to a byte, in plain order or in that of torch's int4 kernels."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescompress.layers.integers import check_floating, in_plain_order, int4_groups, unpack_int4
from rescompress.layers.quantized_linear import QuantizedLinear


class Int4WeightLinear(QuantizedLinear):
    """A linear layer whose weight is int4, two values to a byte, with one scale for each group of inputs (w4).

    "shift" and "lookup" scale the weight back on each call; "cpu_tiles" and "cuda_tiles" are torch's int4 kernels,
    which read the weight in tiles of their own. Whichever it is, four bits a weight are held, and nothing twice.

    Args:
        linear: what it replaces.
        group_size: inputs that share a scale.
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("shift", "lookup", "cpu_tiles", "cuda_tiles")
    OWN_ORDER: ClassVar[dict[str, str]] = {"cpu_tiles": "cpu", "cuda_tiles": "cuda"}

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        super().__init__(linear, *int4_groups(linear.weight, group_size))
        self.group_size = group_size

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return int4_groups(weight, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        check_floating(x)
        scale = self.weight_scale.to(x.dtype)
        if self.kernel == "shift":
            return F.linear(x, self._scaled(unpack_int4(self.weight, x.dtype), scale), self.bias)
        if self.kernel == "lookup":  # the two values of each of the 256 bytes
            bytes_ = torch.arange(256, dtype=torch.uint8, device=x.device)
            values = F.embedding(self.weight.int(), unpack_int4(bytes_[:, None], x.dtype))
            return F.linear(x, self._scaled(values, scale), self.bias)
        rows = x.reshape(-1, x.shape[-1])
        # The kernels add a zero point to each product, which is zero here; held, it would cost as much as the scales.
        scales_and_zeros = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).contiguous()
        if self.kernel == "cpu_tiles":
            y = torch._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, scales_and_zeros)
        else:
            y = torch._weight_int4pack_mm(rows, self.weight, self.group_size, scales_and_zeros)
        return self._with_bias(y.reshape(x.shape[:-1] + y.shape[1:]))

    def plain_weight(self) -> Tensor:
        """Return the weight in the order that any machine reads."""
        if self.kernel not in self.OWN_ORDER:
            return self.weight
        shape, kernel = (self.out_features, self.in_features // 2), self.kernel
        return in_plain_order(self.weight, shape, lambda plain: self._ordered(plain, kernel))

    def _scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        groups = values.reshape(self.out_features, -1, self.group_size) * scale[:, :, None]
        return groups.reshape(self.out_features, self.in_features)

    def _hold(self, plain: Tensor, kernel: str) -> None:
        self.weight = self._ordered(plain, kernel) if kernel in self.OWN_ORDER else plain

    def _ordered(self, plain: Tensor, kernel: str) -> Tensor:
        if kernel == "cpu_tiles":
            ordered: Tensor = torch._convert_weight_to_int4pack_for_cpu(unpack_int4(plain, torch.int32) + 8, 1)
            return ordered
        # Its first column of two lies in the high half of the byte; it takes as many tiles at once as divide the input.
        tiles = next((tiles for tiles in (8, 4, 2) if self.in_features % (16 * tiles) == 0), 2)
        return torch._convert_weight_to_int4pack((plain << 4) | (plain >> 4), tiles)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"
