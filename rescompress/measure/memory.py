"""Weight bytes from storage, and the peak of live activation bytes without a device.

Live activations are what the framework holds at once, step by step, weights left out: a property of the model and of
the order of its operations, the same on every machine. What an allocator or a process takes comes on top (`peak`).
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from rescompress.errors import MeasureError
from rescompress.inputs import Args, as_args, tensors_of
from rescompress.measure.macs import first_line
from rescompress.measure.sandbox import copied, plain_attention, real_copy, rng_kept, set_mode


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that really hold the bits: `tensor` itself, or what a wrapper subclass is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif isinstance(tensor, Tensor):
        yield tensor


def _packed(model: nn.Module) -> Iterator[Tensor]:
    """Yield weights that quantized modules keep in packed objects or in oneDNN's order, not as buffers."""
    for module in model.modules():
        for value in list(vars(module).values()):
            if isinstance(value, torch.ScriptObject) and hasattr(value, "unpack"):
                yield from tensors_of(value.unpack())
            elif isinstance(value, Tensor) and value.is_mkldnn:
                yield value.to_dense()  # the same bytes, and a storage to count them by


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all storages behind parameters and buffers, each storage counted once.

    Low-bit tensors count what they hold: int8 one byte a value, packed int4 half a byte, scales included.
    """
    found: dict[int, int] = {}
    keep = []  # a storage freed within the loop could give its address to the next one
    for tensor in [*model.parameters(), *model.buffers(), *_packed(model)]:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            keep.append(storage)
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages alive at once, from when an operator returns them until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._ignored: dict[int, Any] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Leave the storages of this tensor out from now on."""
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            if self._alive.pop(storage._cdata, None) is not None:
                self.now -= storage.nbytes()
            self._ignored[storage._cdata] = storage  # held, so that its address is not given to another

    def add(self, tensor: Tensor) -> None:
        """Count the storages of this tensor, if they are new."""
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive or key in self._ignored:
                continue

            def freed(_ref: Any, key: int = key, size: int = size) -> None:
                if self._alive.pop(key, None) is not None:
                    self.now -= size

            self._alive[key] = weakref.ref(storage, freed)
            self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_of(out):
            self.add(tensor)
        return out


def live_activation_bytes(model: nn.Module, example_input: Any, *, training: bool = False) -> int:
    """Return the peak of live activation bytes of one pass, the input included, weights and their gradients left out.

    With `training`, the pass is a forward in training mode and a backward from the sum of its outputs. Only shapes are
    computed, as on a CPU with fused attention, so the number is the same everywhere; a model whose course depends on
    values runs for real. The model does not change.

    Raises:
        MeasureError: the model does not run so on the example input; or, in training, no output depends on a parameter
            that requires a gradient.
    """
    args, kwargs = as_args(example_input)
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        shell = copied(model, lambda weight: _faked(fake, weight), lambda buffer: _faked(fake, buffer))
        faked: Args = tree_map(lambda leaf: _faked(fake, leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with fake:
            return _live(shell, faked, training)
    except MeasureError:
        raise
    except Exception:  # data-dependent, or foreign code that wants real values: run it
        pass
    try:
        own: Args = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return _live(real_copy(model), own, training)
    except MeasureError:
        raise
    except Exception as error:
        what = "a training step" if training else "inference"
        raise MeasureError(
            f"{type(model).__name__} does not run {what} on the example input: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def _faked(mode: FakeTensorMode, tensor: Any) -> Tensor:
    if is_traceable_wrapper_subclass(tensor):
        faked: Tensor = mode.from_tensor(tensor)  # type: ignore[arg-type]  # mypy takes it for the protocol alone
        return faked
    # On the CPU whatever the model's device is: kernels, and so what they save, are then the same everywhere.
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _live(model: nn.Module, args: Args, training: bool) -> int:
    live = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.ignore(tensor)
    for tensor in tensors_of(args):
        live.add(tensor)
    handles = []
    if training:
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Gradients of weights are as large as the weights: they count with these, once they are complete.
                handles.append(parameter.register_post_accumulate_grad_hook(_leave_out_gradient(live)))
    try:
        with (
            rng_kept(torch.device("cpu")),
            set_mode(model, training),
            plain_attention(math=False),
            torch.set_grad_enabled(training),
            live,
        ):
            out = model(*args[0], **args[1])
            if training:
                _backward(model, out)
    finally:
        for handle in handles:
            handle.remove()
    return live.peak


def _leave_out_gradient(live: LiveBytes) -> Any:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.ignore(parameter.grad)

    return hook


def _backward(model: nn.Module, out: Any) -> None:
    losses = [tensor.sum() for tensor in tensors_of(out) if tensor.requires_grad]
    if not losses:
        raise MeasureError(f"no output of {type(model).__name__} depends on a parameter that requires a gradient")
    torch.autograd.backward(losses)
