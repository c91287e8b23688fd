"""Choose among the ways to compute a layer by timing them: the fastest correct one, once for each shape and device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rescompress.layers.low_bits import LowBits

ROUNDS = 5
GIVE_UP = 4.0
"""A kernel whose first run takes this many times the best one's is not timed further."""

ABOUT_AS_FAST = 1.15
"""On a machine that does other things too, times closer than this tell nothing."""

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_measured: dict[tuple[Any, ...], "Timing"] = {}


@dataclass(frozen=True)
class Timing:
    """What timing the kernels of one layer shape found.

    Attributes:
        kernel: the fastest of those that agree with the reference; of those about as fast, the last in KERNELS
        kernel_ms: its time
        float_ms: time of the same layer in floating point
        times_ms: (kernel, time) of every kernel that ran and agreed
        refused: (kernel, reason) of the others
    """

    kernel: str
    kernel_ms: float
    float_ms: float
    times_ms: tuple[tuple[str, float], ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def slower(self) -> bool:
        """Whether the layer is slower than it was in floating point."""
        return self.kernel_ms > self.float_ms


def choose_kernel(layer: LowBits, x: Tensor, in_floating_point: Callable[[Tensor], Tensor]) -> Timing:
    """Time the kernels of `layer` on an input like `x`, set the fastest correct one, and return what was found.

    Args:
        layer: a low-bit layer that is not in use yet.
        x: an input; the result is kept for its shape, type and device and the layer's.
        in_floating_point: the layer that `layer` stands for.
    """
    key = (
        type(layer).__name__,
        tuple((name, tuple(buffer.shape)) for name, buffer in layer.named_buffers()),
        layer.extra_repr().rpartition("kernel=")[0],
        tuple(x.shape),
        x.dtype,
        str(x.device),
        torch.get_num_threads(),
    )
    if key not in _measured:
        _measured[key] = _measure(layer, x, in_floating_point)
    found = _measured[key]
    anywhere = {name: ms for name, ms in found.times_ms if name not in layer.OWN_ORDER}
    layer.portable = min(anywhere, key=lambda name: anywhere[name])
    layer.use(found.kernel)
    return found


def _measure(layer: LowBits, x: Tensor, in_floating_point: Callable[[Tensor], Tensor]) -> Timing:
    refused: dict[str, str] = {}
    best: dict[str, float] = {}
    with torch.no_grad():
        ways: dict[str, Callable[[Tensor], Tensor]] = {}
        wanted = layer.twin(layer.KERNELS[0])(x)
        size = max(wanted.abs().max().item(), 1e-12) if wanted.numel() else 1.0
        for name in layer.KERNELS:
            try:
                ways[name] = layer.twin(name)
                gap = (ways[name](x) - wanted).abs().max().item() if wanted.numel() else 0.0
            except RuntimeError as error:  # a kernel that this device, shape or type lacks
                refused[name] = " ".join(str(error).split())[:120]
                continue
            if not gap <= _TOLERANCE.get(x.dtype, 1e-4) * size:
                refused[name] = f"off by {gap / size:.2g} of the output's size"
                continue
            best[name] = _seconds(ways[name], x)
        ways[""] = in_floating_point
        best[""] = _seconds(in_floating_point, x)
        quickest = min(best.values())
        contenders = [name for name, seconds in best.items() if name == "" or seconds <= GIVE_UP * quickest]
        for _ in range(ROUNDS):  # in turn, so that a machine that slows down slows all of them
            for name in contenders:
                best[name] = min(best[name], _seconds(ways[name], x))
    float_s = best.pop("")
    # Of those about as fast, the last one: layers list the kernel last that leaves the caches to others.
    kernel = next(name for name in reversed(best) if best[name] <= ABOUT_AS_FAST * min(best.values()))
    return Timing(
        kernel=kernel,
        kernel_ms=best[kernel] * 1e3,
        float_ms=float_s * 1e3,
        times_ms=tuple((name, seconds * 1e3) for name, seconds in best.items()),
        refused=tuple(refused.items()),
    )


def _seconds(action: Callable[[Tensor], object], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    action(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
