"""Run a model on samples and see who computes what: shapes and ranges of activations, and which layer feeds which."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from rescompress import surgery
from rescompress.errors import SpecError, one_line
from rescompress.inputs import tensors_of

ROLES = ("conv", "norm", "act")
"""What may follow a convolution one after the other: its own output, a BatchNorm's, an activation's."""

_ACTIVATIONS = ("relu", "relu_", "hardtanh", "hardtanh_", "relu6", "relu6_")


@dataclass
class Seen:
    """What the runs saw of one layer.

    Attributes:
        calls: how often it was called in one run
        input_shape: shape of its input in the first call
        input_range: smallest and largest value of its inputs, over all runs
        output_ranges: the same for its output and for what follows it, by role
        readers: by role, who reads that tensor: "norm:FQN", "act", "conv:FQN" or "other:OPERATOR"
        weight_read: whether the model looks at its weight outside of its forward: to cast to its type, or to multiply
    """

    calls: int = 0
    input_shape: tuple[int, ...] = ()
    input_range: tuple[float, float] = (float("inf"), float("-inf"))
    output_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    weight_read: bool = False

    def edges(self) -> tuple[float, ...]:
        """Return both ends of all ranges."""
        return (*self.input_range, *(edge for found in self.output_ranges.values() for edge in found))

    def norm(self) -> str:
        """Return the FQN of the BatchNorm that alone reads the output; "" if there is none."""
        readers = self.readers.get("conv", [])
        alone = self.calls == 1 and len(readers) == 1 and readers[0].startswith("norm:")
        return readers[0].removeprefix("norm:") if alone else ""

    def last_role(self, norm_folded: bool) -> str:
        """Return the role whose tensor the layer can be made to return: behind the BatchNorm, behind the ReLU."""
        role = "norm" if norm_folded else "conv"
        alone = self.calls == 1 and self.readers.get(role) == ["act"] and "act" in self.output_ranges
        return "act" if alone else role


def observe(
    model: nn.Module, samples: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]], names: Iterable[str]
) -> dict[str, Seen]:
    """Run a throw-away clone of `model` on samples and return what was seen of the layers `names`, in calling order.

    Args:
        model: the model, which stays as it is.
        samples: (args, kwargs) of each run; who reads what is taken from the first.
        names: FQNs of linear layers and convolutions.

    Raises:
        SpecError: it does not run on one of them.
    """
    clone = surgery.clone_shared(model).eval()
    watch = _Watch()
    for name in names:
        layer = surgery.get(clone, name)
        # Hooks on the clone only: it is thrown away.
        layer.register_forward_pre_hook(lambda _, inputs, name=name: watch.enter(name, inputs))
        layer.register_forward_hook(lambda *_: watch.leave())
        layer._parameters = _Looked(layer._parameters, lambda name=name: watch.look(name))  # type: ignore[misc]
    for name, module in clone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda _, inputs, name=name: watch.enter_norm(name))
            module.register_forward_hook(lambda *_: watch.leave())
    for run, (args, kwargs) in enumerate(samples):
        watch.start(first=run == 0)
        try:
            with torch.no_grad(), watch:
                outputs = clone(*args, **kwargs)
        except Exception as error:  # the host's own code runs here and may raise anything
            raise SpecError(
                f"quantize: {type(model).__name__} does not run on calibration batch {run}: {one_line(error)}"
            ) from error
        watch.hand_out(outputs)
    for name, seen in watch.seen.items():
        seen.weight_read = name in watch.looked_at
        readers = seen.readers.get("conv", [])
        seen.readers["conv"] = [
            f"other:{reader}" if watch.norm_calls.get(reader, 0) > 1 else reader for reader in readers
        ]
    return watch.seen


class _Looked(dict[str, nn.Parameter | None]):
    """The parameters of a module of a clone, which tell when `module.weight` is looked at."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], tell: Callable[[], None]) -> None:
        super().__init__(parameters)
        self.tell = tell

    def __getitem__(self, name: str) -> nn.Parameter | None:
        if name == "weight":
            self.tell()
        return super().__getitem__(name)


class _Watch(TorchDispatchMode):
    """Follows the outputs of convolutions through the operators that read them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, Seen] = {}
        self.norm_calls: dict[str, int] = {}
        self.looked_at: set[str] = set()
        self.first = True
        self.paused = False
        self.inside: list[str] = []
        self.owners = WeakTensorKeyDictionary()

    def start(self, *, first: bool) -> None:
        self.first = first
        self.inside.clear()
        self.owners = WeakTensorKeyDictionary()

    def enter(self, name: str, inputs: tuple[Any, ...]) -> None:
        self.inside.append(f"conv:{name}")
        seen = self.seen.setdefault(name, Seen())
        if not inputs or not isinstance(inputs[0], Tensor):
            return
        self.paused = True  # looking at a tensor is not reading it
        seen.input_range = _wider(seen.input_range, inputs[0])
        self.paused = False
        seen.input_shape = seen.input_shape or tuple(inputs[0].shape)
        if self.first:
            seen.calls += 1

    def hand_out(self, outputs: Any) -> None:
        """Count the caller of the model among the readers of what it is given."""
        for output in tensors_of(outputs):
            if self.first and output in self.owners:
                owner, role = self.owners[output]
                self.seen[owner].readers.setdefault(role, []).append("other:the caller")

    def enter_norm(self, name: str) -> None:
        self.inside.append(f"norm:{name}")
        if self.first:
            self.norm_calls[f"norm:{name}"] = self.norm_calls.get(f"norm:{name}", 0) + 1

    def look(self, name: str) -> None:
        """Note that the weight of a layer is looked at, unless it is the layer itself that does."""
        if f"conv:{name}" not in self.inside:
            self.looked_at.add(name)

    def leave(self) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.paused:
            return output
        name = func.overloadpacket.__name__
        label = self.inside[-1] if self.inside else ""
        if "batch_norm" in name and label.startswith("norm:"):
            reader, role = label, "norm"
        elif name in _ACTIVATIONS and (name not in ("hardtanh", "hardtanh_") or args[1:2] == (0.0,)):
            reader, role = "act", "act"
        elif "convolution" in name and label.startswith("conv:"):
            reader, role = label, "conv"
        else:
            reader, role = f"other:{name}", ""
        sources = [self.owners[x] for x in _tensors(args) if x in self.owners]
        if self.first:
            for source, source_role in sources:
                self.seen[source].readers.setdefault(source_role, []).append(reader)
        result = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(result, Tensor):
            owner = label.removeprefix("conv:") if role == "conv" else (sources[0][0] if role and sources else "")
            # A tensor changed in place is another one from here on.
            follows = role == "conv" or (sources and ROLES.index(sources[0][1]) < ROLES.index(role or "conv"))
            if owner and follows:
                ranges = self.seen[owner].output_ranges
                ranges[role] = _wider(ranges.get(role, (float("inf"), float("-inf"))), result)
                self.owners[result] = (owner, role)
            elif result in self.owners:
                del self.owners[result]
        return output


def _tensors(args: Any) -> Iterable[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _wider(known: tuple[float, float], values: Tensor) -> tuple[float, float]:
    if values.numel() == 0 or not values.is_floating_point() or values.is_meta:
        return known
    low, high = (edge.item() for edge in values.aminmax())
    if math.isnan(low) or math.isnan(high):  # which min and max would pass over
        return float("nan"), float("nan")
    return min(low, known[0]), max(high, known[1])
