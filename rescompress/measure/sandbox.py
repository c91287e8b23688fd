"""Run a model to measure it without leaving a trace: mode, buffers, gradients, random state and flags stay."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from rescompress.inputs import tensors_of
from rescompress.surgery import deep_copy


def device_of(model: nn.Module, args: Any = ()) -> torch.device:
    """Return the device of the first parameter, else of the first buffer, else of the first input tensor."""
    for tensors in (model.parameters(), model.buffers(), iter(tensors_of(args))):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def copied(
    model: nn.Module, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor] = torch.clone
) -> nn.Module:
    """Copy the tree of modules with every parameter and buffer passed through a function; sharing is kept."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(parameter(weight.detach()), requires_grad=weight.requires_grad)
    for values in model.buffers():
        memo[id(values)] = buffer(values.detach())
    return deep_copy(model, memo)


def real_copy(model: nn.Module) -> nn.Module:
    """Copy a model so that it computes with the same weight storage but has its own gradients and buffers."""
    return copied(model, lambda weight: weight)


def on_device(args: Any, device: torch.device | str) -> Any:
    """Move every tensor in `args` to `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, args)


@contextmanager
def set_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in training or evaluation mode, and each module back in its own old mode at the end."""
    old = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in old:
            module.training = was


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its old object and its old values back at the end."""
    old = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in old:
                # TorchScript keeps its buffers itself, and can only write into them.
                if not isinstance(module, torch.jit.ScriptModule):
                    module._buffers[name] = buffer
                if not _same_bits(buffer, values):
                    buffer.copy_(values)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN equals itself here: a buffer that holds one was not changed by that.
    try:
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    except (RuntimeError, NotImplementedError):  # meta tensors hold no values, some subclasses cannot be compared
        return True


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """Restore torch's random state on the CPU and on `device` at the end."""
    on_cuda = device.type == "cuda"
    index = [torch.cuda.current_device() if device.index is None else device.index] if on_cuda else []
    with torch.random.fork_rng(devices=index):
        yield


@contextmanager
def undisturbed(model: nn.Module, args: Any = (), *, training: bool = False) -> Iterator[None]:
    """Run the model itself in the given mode; its modes, its buffers and the random state come back at the end."""
    with ExitStack() as stack:
        stack.enter_context(rng_kept(device_of(model, args)))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(set_mode(model, training))
        yield


@contextmanager
def plain_attention(math: bool = True) -> Iterator[None]:
    """Turn off the fused path of `nn.MultiheadAttention` and, if `math`, all attention kernels but plain products."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            if math:
                stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
