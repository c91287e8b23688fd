"""Bring low-bit layers into a form that a format can hold, computing on the same whole numbers as in Python.

TorchScript holds the layers as they are. A .pt2 program holds plain aten operators, which run anywhere; an ONNX file
the quantize and dequantize operators that onnxruntime joins into integer convolutions; a compiled package oneDNN's
integer convolutions, where the processor has them.
"""

import contextlib
import dataclasses
import importlib
import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_map

from rescompress import surgery
from rescompress.errors import ExportError
from rescompress.export.checking import Case, run
from rescompress.export.int4_onnx import OnnxInt4Linear
from rescompress.export.int8_convs import (
    Map,
    OnednnDynamicConv2d,
    OnednnStaticConv2d,
    PlainStaticConv2d,
    QdqStaticConv2d,
    StaticConv2d,
)
from rescompress.inputs import Args, tensors_of
from rescompress.layers.int4_linear import Int4WeightLinear
from rescompress.layers.low_bits import LowBits
from rescompress.layers.packed_conv import Int8StaticConv2d
from rescompress.layers.quantized_conv import Int8DynamicConv2d
from rescompress.layers.quantized_linear import Int8ProductLinear, Int8WeightLinear

_STATIC_CONVS: dict[str, type[StaticConv2d]] = {
    "held": PlainStaticConv2d,
    "plain": PlainStaticConv2d,
    "qdq": QdqStaticConv2d,
    "onednn": OnednnStaticConv2d,
}

DISTURBED_RUNS = 2
LEAST_SLACK, MOST_SLACK = 0.05, 0.5
"""Bounds of the slack: one value rounded to its neighbour; beyond, a comparison would prove nothing."""

_ROUNDING = (Int8StaticConv2d, Int8DynamicConv2d, Int8ProductLinear)


def rounds(model: nn.Module) -> bool:
    """Whether activations are rounded to few values, so that another order of sums can give the value next to it."""
    return any(isinstance(module, _ROUNDING) for module in model.modules())


def with_slack(model: nn.Module, cases: list[Case]) -> list[Case]:
    """Return the cases with the slack that a model needs whose activations are rounded; other cases as they are.

    A difference in the last bit can round a value to its neighbour, and what follows rounds that again. How far this
    carries depends on the model: it is measured, by disturbing the inputs by some of their last bits.
    """
    if not rounds(model):
        return cases
    generator = torch.Generator().manual_seed(0)

    def disturbed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        signs = torch.randint(-2, 3, leaf.shape, generator=generator).to(leaf)
        return leaf + signs * torch.finfo(leaf.dtype).eps * leaf.abs()

    found = []
    for case in cases:
        moved = max(
            _distance(case.outputs, run(model, tree_map(disturbed, case.inputs))) for _ in range(DISTURBED_RUNS)
        )
        found.append(dataclasses.replace(case, slack=min(max(LEAST_SLACK, 3 * moved), MOST_SLACK)))
    return found


def _distance(wanted: Any, found: Any) -> float:
    """Return how far outputs are apart, relative to the largest of each."""
    distance = 0.0
    for a, b in zip(tensors_of(wanted), tensors_of(found), strict=True):
        if a.is_floating_point() and a.numel() > 0 and bool(a.isfinite().all()):
            distance = max(distance, ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item())
    return distance


def compiled_form(model: nn.Module) -> str:
    """Return the form for a compiled package: oneDNN's where it is fast and the weights stay in low bits.

    To put weights in the processor's order the compiler computes all that is constant, which would turn weights that
    are scaled back on each call into float32.
    """
    low_bits = [module for module in model.modules() if isinstance(module, LowBits)]
    scaled_back = any(not isinstance(module, _ROUNDING) for module in low_bits)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    able = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return "onednn" if able and on_cpu and not scaled_back else "plain"


def in_form(model: nn.Module, inputs: Args, form: str) -> nn.Module:
    """Return the model with its low-bit layers in a form that a format holds; the model itself where it has none.

    Args:
        model: in evaluation mode; it is not changed.
        inputs: an example, run once to see which maps stay quantized from one convolution to the next.
        form: "script" for TorchScript, "plain" for .pt2, "qdq" for ONNX, "onednn" for a compiled package; "held" for
            what is only looked at and not run: who follows whom, and the bytes that a file holds.

    Raises:
        ExportError: a convolution is given maps of several ranges.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LowBits)]
    if not names:
        return model
    _register_operators()
    model = surgery.clone_shared(model)
    maps = {} if form in ("script", "held") else _maps(model, inputs)
    for name in names:
        surgery.swap(model, name, _in_form(surgery.get(model, name), form, maps.get(name)))
    return model.eval()


def _in_form(layer: nn.Module, form: str, given: Map | None) -> nn.Module:
    if not isinstance(layer, LowBits):
        raise TypeError(f"{type(layer).__name__} is no low-bit layer")
    if form == "script":
        return layer.for_export(scripted=True)
    given = given or Map()  # a layer that is not called on this example
    if isinstance(layer, Int8StaticConv2d):
        return _STATIC_CONVS[form](layer, given)
    if isinstance(layer, Int8DynamicConv2d) and form == "onednn":
        return OnednnDynamicConv2d(layer, given)
    if isinstance(layer, Int4WeightLinear) and form == "qdq":
        return OnnxInt4Linear(layer)
    plain = layer.for_export()
    if not isinstance(plain, LowBits):
        return plain
    kernel = plain.kernel
    if form == "qdq":
        kernel = _onnx_kernel(plain)
    elif form == "onednn" and kernel == "float":  # the compiler would hold its weight in float32
        kernel = "int8"
    return plain.twin(kernel)


def _onnx_kernel(layer: LowBits) -> str:
    """Return the kernel whose operators ONNX has."""
    if isinstance(layer, Int8DynamicConv2d):
        return "float"
    if isinstance(layer, Int8ProductLinear):
        return "uint8"  # MatMulInteger; one operand unsigned is what processors multiply fastest
    if isinstance(layer, Int8WeightLinear):
        return "scale_output"
    return layer.KERNELS[0]


def _maps(model: nn.Module, inputs: Args) -> dict[str, Map]:
    """Return what maps int8 convolutions are given, by FQN.

    Raises:
        ExportError: one of them is given maps of several ranges.
    """
    found: dict[str, list[Map]] = {}

    def look(name: str, given: Tensor) -> None:
        scale, zero_point = (given.q_scale(), given.q_zero_point()) if given.is_quantized else (None, 0)
        found.setdefault(name, []).append(Map(list(given.shape), scale, zero_point))

    clone = surgery.clone_shared(model)
    for name, module in clone.named_modules():
        if isinstance(module, Int8StaticConv2d | Int8DynamicConv2d):
            # Hooks on the clone only: it is thrown away.
            module.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
    with torch.no_grad():
        clone(*inputs[0], **inputs[1])
    for name, maps in found.items():
        ranges = {(given.scale, given.zero_point) for given in maps}
        if len(ranges) > 1:
            raise ExportError(
                f"{name} is given maps of {len(ranges)} different ranges, which only a TorchScript file can hold; "
                "quantize with exclude for it, or write .pt"
            )
    return {name: maps[0] for name, maps in found.items()}


def join_maps(program: ExportedProgram) -> None:
    """Hand 8-bit maps from one layer to the next as they are, where they are scaled back and rounded again alike.

    A ReLU between them does nothing more to values that start at zero.
    """
    _register_operators()
    ops, graph = torch.ops.quantized_decomposed, program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not ops.quantize_per_tensor.default:
            continue
        source = node.args[0]
        while isinstance(source, Node) and _keeps(source, node.args[1], node.args[2]):
            source = source.args[0]
        scaled_back = isinstance(source, Node) and source.target is ops.dequantize_per_tensor.default
        if scaled_back and source.args[1:6] == node.args[1:6]:
            node.replace_all_uses_with(source.args[0])
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _keeps(node: Node, scale: Any, zero_point: Any) -> bool:
    """Whether an activation leaves all values of an 8-bit map as they are."""
    aten = torch.ops.aten
    low, high = 0.0, float("inf")
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        limits: Any = node.args[1:3] or (-1.0, 1.0)
        low, high = limits
    elif node.target in (aten.relu6.default, aten.relu6_.default):
        high = 6.0
    elif node.target not in (aten.relu.default, aten.relu_.default):
        return False
    return bool(zero_point == 0 and low <= 0 and scale * 255 <= high)


def _register_operators() -> None:
    """Let torch know the quantize and dequantize operators, and the shape of a packed weight."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    with contextlib.suppress(RuntimeError):  # known already: from an earlier call, or a torch that knows it by itself
        torch.library.register_fake("onednn::qconv_prepack", lambda weight, *_: torch.empty_like(weight))
