"""Time models on the wall clock: warmed up, synchronised, several models in turn so that drift hits all alike."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rescompress.errors import InputError, MeasureError
from rescompress.inputs import Args, as_args, batch_size_of, with_batch
from rescompress.measure.macs import first_line
from rescompress.measure.sandbox import device_of, undisturbed

Progress = Callable[[str], None]
"""Takes one line that says what is being done."""

MIN_RUNS = 5
MAX_RUNS = 200
_WARM_UP_RUNS = 20
_WARM_UP_SHARE = 0.2


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass.

    Attributes:
        batch_size: samples in one pass
        runs: passes timed, after the warm-up
        median_ms: per pass, not per sample
        q1_ms: first quartile
        q3_ms: third quartile
        min_ms: the fastest pass
        times_ms: every pass, in order
    """

    batch_size: int
    runs: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    times_ms: tuple[float, ...]

    @classmethod
    def from_times(cls, batch_size: int, times_ms: Sequence[float]) -> "Latency":
        """Summarise the times of single passes."""
        q1, median, q3 = quartiles(times_ms)
        return cls(batch_size, len(times_ms), median, q1, q3, min(times_ms), tuple(times_ms))


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster one model is than another: quartiles over rounds of (time of one) / (time of the other).

    Both times of a round are taken one right after the other, so that a machine that gets slower meanwhile slows both.
    """

    batch_size: int
    median: float
    q1: float
    q3: float

    @classmethod
    def between(cls, before: Latency, after: Latency) -> "SpeedUp":
        """Compare two models that were timed in turn."""
        ratios = [old / new for old, new in zip(before.times_ms, after.times_ms, strict=True)]
        q1, median, q3 = quartiles(ratios)
        return cls(before.batch_size, median, q1, q3)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def time_models(
    models: Mapping[str, nn.Module],
    example_input: Any,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    budget_s: float = 1.5,
    progress: Progress | None = None,
) -> tuple[dict[str, list[Latency]], list[str]]:
    """Time one or several models in turn (A B A B ...), in evaluation mode and under `torch.inference_mode`.

    The number of passes is what `budget_s` seconds per model and batch size allow, at least 5 and at most 200. The
    modes, the buffers and the random state of the models come back at the end.

    Returns:
        the latencies per model, by batch size in the order given, and notes: on each batch size that one of
        the models refused and that was left out for all, and on a machine that is busy with other things.

    Raises:
        MeasureError: no batch size could be run.
        InputError: the budget is no positive number of seconds.
    """
    if not budget_s > 0 or not math.isfinite(budget_s):
        raise InputError(f"budget_s must be a positive number of seconds, got {budget_s}")
    args = as_args(example_input)
    notes: list[str] = []
    try:
        given = batch_size_of(args)
    except InputError as error:
        notes.append(f"latency only for the input as it is, told as batch 1: {error}")
        given, batch_sizes = 1, (1,)
    notes += _busy()
    timed: dict[str, list[Latency]] = {name: [] for name in models}
    for batch_size in batch_sizes:
        if progress is not None:
            progress(f"timing {' and '.join(models)} at batch {batch_size}")
        try:
            batch = args if batch_size == given else with_batch(args, batch_size)
            for name, times in _take_turns(models, batch, budget_s).items():
                timed[name].append(Latency.from_times(batch_size, times))
        except Exception as error:  # a model of fixed batch size, or too little memory: the other sizes still count
            notes.append(f"latency at batch {batch_size} left out: {type(error).__name__}: {first_line(error)}")
    if not any(timed.values()):
        raise MeasureError("; ".join(notes) or "no batch size to time was given")
    return timed, notes


def _busy() -> list[str]:
    """Say so if other processes want the machine's cores: times are then too long, and ratios may be wrong as well."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return (
        [f"the machine is busy (load {load:.1f} on {cores} cores): latencies are too long"]
        if load > 1.5 * cores
        else []
    )


def _take_turns(models: Mapping[str, nn.Module], args: Args, budget_s: float) -> dict[str, list[float]]:
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model, args))
        stack.enter_context(torch.inference_mode())
        calls = {name: _timer(model, args) for name, model in models.items()}
        for call in calls.values():
            _warm_up(call, budget_s * _WARM_UP_SHARE)
        times: dict[str, list[float]] = {name: [] for name in calls}
        stack.enter_context(_no_garbage_collection())
        end = time.perf_counter() + budget_s * len(calls)
        rounds = 0
        while rounds < MIN_RUNS or (rounds < MAX_RUNS and time.perf_counter() < end):
            for name, call in calls.items():
                times[name].append(call())
            rounds += 1
    return times


def _timer(model: nn.Module, args: Args) -> Callable[[], float]:
    device = device_of(model, args)
    positional, named = args

    def call() -> float:
        _synchronize(device)
        start = time.perf_counter_ns()
        model(*positional, **named)
        _synchronize(device)
        return (time.perf_counter_ns() - start) / 1e6

    return call


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


def _warm_up(call: Callable[[], float], budget_s: float) -> None:
    """Run until caches, allocators and compiled code are in place."""
    call()  # the first pass may compile: it is outside of the budget
    end = time.perf_counter() + budget_s
    for _ in range(_WARM_UP_RUNS):
        call()
        if time.perf_counter() > end:
            break


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
