"""Fuse batch norms into the convolutions before them: fewer operators and weights, the same outputs.

Which norm follows which convolution is read from the graph that torch.export makes of the model, so it holds whatever
the modules are called and in whatever order they are registered: the norm is the only reader of the convolution, and
each weight is read once. The rewritten model is compared with the original before it is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rescompress import surgery
from rescompress.export.checking import Case, are_detections, check, quietly, reason

_CONVS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_NORM = torch.ops.aten.batch_norm.default


@dataclass(frozen=True)
class Fusion:
    """What fuse did.

    Attributes:
        pairs: (convolution, batch norm) by fully qualified name
        reason: why nothing was fused; None if something was
    """

    pairs: tuple[tuple[str, str], ...]
    reason: str | None


def fuse(model: nn.Module, cases: list[Case], plain: nn.Module | None = None) -> tuple[nn.Module, Fusion]:
    """Return a copy with every batch norm that can be in the convolution before it, or `model` itself if none can.

    Args:
        model: in evaluation mode; it is not changed.
        cases: inputs and the outputs that the fused model must still give.
        plain: the same model with its low-bit layers in a form that torch.export captures.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model, Fusion((), "there is no batch norm")
    if are_detections(cases[0].outputs):
        return model, Fusion((), "torch.export captures no detector, whose boxes are as many as it finds")
    fused = surgery.clone_shared(model)
    try:
        with quietly():
            pairs = _pairs(_graph_of(model if plain is None else plain, cases[0]), model)
            for conv, norm in pairs:
                _fuse_pair(fused, conv, norm)
            check(fused, cases)
    except Exception as error:  # torch.export and the host's own code raise anything; unfused the model is as right
        return model, Fusion((), f"left as it is: {reason(error)}")
    if not pairs:
        return model, Fusion((), "no batch norm follows a convolution alone")
    return fused, Fusion(tuple(pairs), None)


def _graph_of(model: nn.Module, case: Case) -> ExportedProgram:
    args, kwargs = case.inputs
    try:
        return torch.export.export(model, args, kwargs, strict=False)
    except Exception:  # modules that share a child, as torchvision's ResNets do, need the strict tracer
        return torch.export.export(model, args, kwargs, strict=True)


def _pairs(program: ExportedProgram, model: nn.Module) -> list[tuple[str, str]]:
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is not _NORM or _training(node):
            continue
        before = node.args[0]
        if not (isinstance(before, Node) and before.target in _CONVS and list(before.users) == [node]):
            continue
        conv = _owner(before, (1, 2), ("weight", "bias"), names)
        norm = _owner(node, (1, 2, 3, 4), ("weight", "bias", "running_mean", "running_var"), names)
        if conv is None or norm is None:
            continue
        if isinstance(surgery.get(model, conv), nn.Conv2d) and _rest_of(surgery.get(model, norm)) is not None:
            found.append((conv, norm))
    return found


def _training(node: Node) -> bool:
    return node.args[5] is not False


def _owner(node: Node, positions: tuple[int, ...], tensors: tuple[str, ...], names: dict[str, str]) -> str | None:
    """Return the module that owns the tensors at `positions`, if each is its own and read here alone."""
    owners = set()
    for position, tensor in zip(positions, tensors, strict=True):
        argument = node.args[position] if position < len(node.args) else None
        if argument is None:
            continue
        if not isinstance(argument, Node) or list(argument.users) != [node]:
            return None
        owner, _, name = names.get(argument.name, "").rpartition(".")
        if name != tensor:  # computed, parametrized, or of a module that is the whole model
            return None
        owners.add(owner)
    return owners.pop() if len(owners) == 1 else None


def _rest_of(norm: nn.Module) -> nn.Module | None:
    """Return what is left of a norm without its normalisation, or None if its class is not known."""
    kind = type(norm)
    if kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return nn.Identity()
    if f"{kind.__module__}.{kind.__qualname__}" == "timm.layers.norm_act.BatchNormAct2d":
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return None


def _fuse_pair(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = surgery.get(model, conv_name), surgery.get(model, norm_name)
    rest = _rest_of(norm)
    if not isinstance(conv, nn.Conv2d) or rest is None:
        raise TypeError(f"{conv_name} and {norm_name} are no convolution and batch norm")
    # In double precision: the product of three roundings in half precision would be seen in the outputs.
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        _double(conv.bias),
        surgery.get_parameter(model, f"{norm_name}.running_mean").double(),
        surgery.get_parameter(model, f"{norm_name}.running_var").double(),
        float(norm.eps),  # type: ignore[arg-type]
        _double(norm._parameters["weight"]),
        _double(norm._parameters["bias"]),
    )
    conv._parameters["weight"] = nn.Parameter(weight.detach().to(conv.weight), requires_grad=False)
    conv._parameters["bias"] = nn.Parameter(bias.detach().to(conv.weight), requires_grad=False)
    surgery.swap(model, norm_name, rest)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()
