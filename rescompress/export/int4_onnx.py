"""Linear layers with int4 weights for ONNX: onnxruntime multiplies four bits as they are, where the groups fit it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescompress.layers.int4_linear import Int4WeightLinear
from rescompress.layers.integers import unpack_int4


@torch.library.custom_op("rescompress::matmul_int4", mutates_args=())
def matmul_int4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply with the transpose of an int4 weight: the operator that becomes onnxruntime's MatMulNBits.

    Shape:
        - Input: (*, I), (O, I // group, group // 2) uint8 as `pack_int4` lays them out, (O * I // group,)
        - Output: (*, O)
    """
    values = unpack_int4(weight.flatten(1), x.dtype).reshape(len(weight), weight.shape[1], -1)
    return F.linear(x, (values * scale.reshape(len(weight), -1, 1).to(x.dtype)).flatten(1))


@matmul_int4.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def translation(x: Any, weight: Any, scale: Any) -> Any:
    """Return `matmul_int4` as a node of ONNX."""
    from onnxscript import values

    # The exporter knows the schemas of the ONNX standard only.
    multiply = values.Op(values.Opset("com.microsoft", 1), "MatMulNBits", _schema())
    rows, groups, half = (int(side) for side in weight.shape)
    return multiply(
        x,
        weight,
        scale,
        K=2 * half * groups,
        N=rows,
        bits=4,
        block_size=2 * half,
    )


def _schema() -> Any:
    from onnx.defs import OpSchema

    parameter, attribute = OpSchema.FormalParameter, OpSchema.Attribute
    return OpSchema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[parameter("A", "T"), parameter("B", "B"), parameter("scales", "T")],
        outputs=[parameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("B", ["tensor(uint8)"], "")],
        attributes=[attribute(name, OpSchema.AttrType.INT) for name in ("K", "N", "bits", "block_size")],
    )


class OnnxInt4Linear(nn.Module):
    """Stands for an `Int4WeightLinear` in an ONNX file.

    Groups of other than 16, 32, 64, 128 or 256 inputs are unpacked by plain arithmetic on each call.

    Shape:
        - Input: (*, I)
        - Output: (*, O)
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: Int4WeightLinear) -> None:
        super().__init__()
        self.direct = linear.group_size in (16, 32, 64, 128, 256) and linear.weight_scale.dtype == torch.float32
        grouped = (linear.out_features, linear.in_features // linear.group_size, linear.group_size // 2)
        self.register_buffer("weight", linear.plain_weight().reshape(grouped).contiguous())
        self.register_buffer("weight_scale", linear.weight_scale.flatten() if self.direct else linear.weight_scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.direct:
            y: Tensor = torch.ops.rescompress.matmul_int4(x, self.weight, self.weight_scale)
            return y if self.bias is None else y + self.bias
        # Not by shifts, which the exporter takes for those of 16-bit numbers.
        pairs = self.weight.to(x.dtype)
        high = (pairs / 16).floor()
        values = torch.stack((pairs - 16 * high, high), dim=-1).flatten(2) - 8
        return F.linear(x, (values * self.weight_scale[:, :, None].to(x.dtype)).flatten(1), self.bias)
