"""Count the multiply-accumulates (MACs) of one forward pass, every matrix product visible, and name what was left out.

Convolutions and matrix products count; elementwise operations, norms, pooling, interpolation, softmax and views do
not, by convention. The formulas are those of `torch.utils.flop_counter`, whose FLOPs are twice the MACs.
"""

import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rescompress.errors import MeasureError
from rescompress.inputs import as_args, tensors_of
from rescompress.measure.sandbox import on_device, plain_attention, real_copy, rng_kept, undisturbed
from rescompress.surgery import clone_shared


@dataclass(frozen=True)
class ModuleMacs:
    """What one module costs, the modules inside it included.

    Attributes:
        fqn: its name; empty for the model itself
        kind: the name of its class
        macs: summed over its calls
        parameters: how many it holds
        output_shape: of the first tensor that its last call returned; None if there was none
        calls: how often it was called
    """

    fqn: str
    kind: str
    macs: int
    parameters: int
    output_shape: tuple[int, ...] | None
    calls: int


@dataclass(frozen=True)
class MacCount:
    """The MACs of one forward pass.

    Attributes:
        macs: of the whole model, for the example input as given (all of its batch)
        uncounted: (operator, calls) of what may hide matrix products and could not be counted
        modules: one row per module that was called, in the order of definition
        how: "meta" if only shapes were computed, "real" if the model ran
    """

    macs: int
    uncounted: tuple[tuple[str, int], ...]
    modules: tuple[ModuleMacs, ...]
    how: str


# Operators of these kinds compute products inside. None of them may go by silently when no formula knows it; a name
# is better matched too often than too seldom, because a wrong zero is believed and a line in `uncounted` is read.
_PRODUCT = re.compile(
    r"(^|_)(mm|addmm|bmm|baddbmm|addbmm|mv|dot|vdot|linear|bilinear|trilinear|conv\w*|matmul|attention|"
    r"fft\w*|lstm|gru|rnn|linalg|cdist|cholesky|svd|qr|eigh?|solve|inverse|grouped)(_|\d|$)"
    r"|grid_sampler|_mm(_|$)|encoder_layer|matrix_exp"
)
_NO_PRODUCT = re.compile(
    r"^(upsample|_upsample|_convert|im2col|col2im|linalg_(vector_)?norm|_?weight_norm)|prepack|backward"
)
# Every operator of a foreign namespace may hide a product, but for these, which are known not to.
_HARMLESS_FOREIGN = {"torchvision::nms", "torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi_align"}
_OWN_NAMESPACES = {"aten", "prim", "prims", "profiler", "inductor", "c10d", "rngprims"}


def _rows_flop(x: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    """Count x (..., K) times a weight into (..., N): the weight may be packed, the shapes around it are not."""
    return 2 * int(math.prod(x)) * int(out_shape[-1])


def _mv_flop(matrix: Any, *_args: Any, **_kwargs: Any) -> int:
    return 2 * int(math.prod(matrix))


def _addmv_flop(_bias: Any, matrix: Any, *_args: Any, **_kwargs: Any) -> int:
    return 2 * int(math.prod(matrix))


def _addbmm_flop(_bias: Any, a: Any, b: Any, *_args: Any, **_kwargs: Any) -> int:
    return 2 * int(math.prod(a)) * int(b[-1])


def _qconv_flop(_x: Any, _x_scale: Any, _x_zero: Any, weight: Any, *_args: Any, out_shape: Any, **_kwargs: Any) -> int:
    return 2 * int(math.prod(out_shape)) * int(math.prod(weight) // out_shape[1])


def _packed_conv_flop(_x: Any, packed: Any, *_args: Any, out_shape: Any, **_kwargs: Any) -> int:
    return 2 * int(math.prod(out_shape)) * int(math.prod(packed.unpack()[0].shape[1:]))


_EXTRA_FORMULAS = {
    ("aten", "mv"): _mv_flop,
    ("aten", "dot"): _mv_flop,
    ("aten", "vdot"): _mv_flop,
    ("aten", "addmv"): _addmv_flop,
    ("aten", "addbmm"): _addbmm_flop,
    ("aten", "_addmm_activation"): _addbmm_flop,
    ("aten", "_int_mm"): _rows_flop,
    ("aten", "_weight_int8pack_mm"): _rows_flop,
    ("aten", "_weight_int4pack_mm"): _rows_flop,
    ("aten", "_weight_int4pack_mm_for_cpu"): _rows_flop,
    ("onednn", "qconv_pointwise"): _qconv_flop,
    ("quantized", "conv2d"): _packed_conv_flop,
    ("quantized", "conv2d_relu"): _packed_conv_flop,
    ("quantized", "linear"): _rows_flop,
    ("quantized", "linear_relu"): _rows_flop,
    ("quantized", "linear_dynamic"): _rows_flop,
    ("quantized", "linear_relu_dynamic"): _rows_flop,
}
"""Formulas for products that torch's counter has none for; in FLOPs, as it expects."""


def _extra_formulas() -> dict[Any, Any]:
    found = {}
    for (namespace, name), formula in _EXTRA_FORMULAS.items():
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:  # not every build of torch has every operator
            found[packet] = formula
    return found


class _Leaves(TorchDispatchMode):
    """Sees what is left after the counter decomposed what it could, and keeps what it could not count."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = counter.flop_registry
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self.known and _may_hide_products(func):
            self.uncounted[str(packet).replace(".", "::", 1)] += 1
        return func(*args, **(kwargs or {}))


def _may_hide_products(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        return True  # a higher-order operator: what it runs inside is not seen
    name = func._opname
    if _NO_PRODUCT.search(name):
        return False
    if func.namespace in _OWN_NAMESPACES:
        return _PRODUCT.search(name) is not None
    if func.namespace == "quantized":  # most of them only convert
        return _PRODUCT.search(name) is not None
    return f"{func.namespace}::{name}" not in _HARMLESS_FOREIGN


class _Calls:
    """Attributes the running total to modules by hooks, which are removed at the end."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        self.model = model
        self.counter = counter
        self.flops: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.started: list[int] = []
        self.handles: list[Any] = []

    def __enter__(self) -> "_Calls":
        for fqn, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # TorchScript takes no hooks: its products count in what is around it
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave(fqn)))
        return self

    def __exit__(self, *_exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        self.started.append(self.counter.get_total_flops())

    def _leave(self, fqn: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.flops[fqn] += self.counter.get_total_flops() - self.started.pop()
            self.calls[fqn] += 1
            tensors = tensors_of(output)
            self.shapes[fqn] = tuple(int(side) for side in tensors[0].shape) if tensors else None

        return hook

    def rows(self) -> tuple[ModuleMacs, ...]:
        return tuple(
            ModuleMacs(
                fqn=fqn,
                kind=getattr(module, "original_name", type(module).__name__),
                macs=self.flops[fqn] // 2,
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                output_shape=self.shapes[fqn],
                calls=self.calls[fqn],
            )
            for fqn, module in self.model.named_modules()
            if fqn in self.shapes
        )


def count_macs(model: nn.Module, example_input: Any) -> MacCount:
    """Count the MACs of one forward pass in evaluation mode.

    Shapes alone are computed where the model allows it (on the meta device, in milliseconds and without memory);
    a model whose course depends on values runs for real, on the device where it is. Neither changes the model.

    Raises:
        MeasureError: the model does not run on the example input.
    """
    args, kwargs = as_args(example_input)
    try:
        # Without gradients: the tracker of torch's counter fails on a parameter that a module gets under no_grad.
        shell = clone_shared(model, "meta").eval().requires_grad_(False)
        return _count(shell, on_device(args, "meta"), on_device(kwargs, "meta"), "meta")
    except (
        Exception
    ):  # foreign code on a device that it was never written for: anything may come, and the real run tells
        pass
    try:
        subject = real_copy(model).requires_grad_(False)
    except Exception:  # what cannot be copied (a lock, an open file) still runs
        subject = model
    try:
        with undisturbed(subject, (args, kwargs)):
            return _count(subject, args, kwargs, "real")
    except Exception as error:
        raise MeasureError(
            f"{type(model).__name__} does not run on the example input: {type(error).__name__}: {first_line(error)}"
        ) from error


def _count(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], how: str) -> MacCount:
    counter = FlopCounterMode(display=False, custom_mapping=_extra_formulas())
    leaves = _Leaves(counter)
    # The observer is entered first, so it stands behind the counter and sees what that decomposed.
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        plain_attention(),
        rng_kept(torch.device("cpu")),
        _Calls(model, counter) as calls,
        leaves,
        counter,
    ):
        # The counter's global hooks fire once more for a compiled module; that changes no count.
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        model(*args, **kwargs)
    return MacCount(
        macs=counter.get_total_flops() // 2,
        uncounted=tuple(sorted(leaves.uncounted.items())),
        modules=calls.rows(),
        how=how,
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened: messages of torch can run over pages."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters the model holds, each shared one counted once."""
    seen: dict[int, Tensor] = {id(parameter): parameter for parameter in model.parameters()}
    return sum(parameter.numel() for parameter in seen.values())
