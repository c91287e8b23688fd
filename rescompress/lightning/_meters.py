"""What CostMonitor reads time and memory from: the device's own time line, its allocator, the process."""

import time
from collections.abc import Callable
from typing import Any

import torch

from rescompress.measure._peak import give_back_freed_memory, peak_bytes, reset_peak, resident_bytes


class Clock:
    """Marks moments: events on CUDA, without waiting for the device; elsewhere the wall clock, when the device is done.

    Between two events lies what the device itself spent, waiting for its next work included. So around the fetching of
    a batch it is the time for which the device really had nothing to do, and not that of the host, which runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return this moment."""
        if not self.on_cuda:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, pairs: list[tuple[Any, Any]]) -> list[float]:
        """Return the time between the two moments of each pair; waits for the device, once."""
        if not self.on_cuda:
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


class Memory:
    """The highest use of memory since the last reset.

    Attributes:
        how: "cuda", what torch's allocator had given out: weights, gradients, the optimizer's state, activations; or of
            this process, loaders' workers left out, its resident size: "VmHWM" (Linux), "ru_maxrss" where the system
            cannot forget a peak, so that it is the highest since the process began; "none" on other devices
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.how = "cuda"
        elif device.type == "cpu":
            self.how = "VmHWM" if reset_peak() else "ru_maxrss"
        else:
            self.how = "none"

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.how == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.how == "VmHWM":
            # What training freed would else still count as taken while the model is evaluated. To look for cycles takes
            # a quarter of a second with all the libraries loaded, and tensors hardly ever hang in one.
            give_back_freed_memory(collect=False)
            reset_peak()

    def now(self) -> int | None:
        """Return the bytes in use."""
        if self.how == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return None if self.how == "none" else resident_bytes()

    def peak(self) -> int | None:
        """Return the highest use since the last reset."""
        if self.how == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self.how == "none" else peak_bytes(self.how == "VmHWM")

    def reserved(self) -> int | None:
        """Return the most that CUDA's caching allocator had taken from the device; None elsewhere."""
        return torch.cuda.max_memory_reserved(self.device) if self.how == "cuda" else None


class Listening:
    """The trainer's profiler with an ear on it: Lightning tells its profiler when it asks the loader for a batch."""

    FETCH = "[_TrainingEpochLoop].train_dataloader_next"

    def __init__(self, profiler: Any, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.profiler = profiler
        self._begin = begin
        self._end = end

    def start(self, action_name: str) -> None:
        """Hear of the beginning of an action, and pass it on."""
        self.profiler.start(action_name)
        if action_name == self.FETCH:
            self._begin()

    def stop(self, action_name: str) -> None:
        """Hear of the end of an action, and pass it on."""
        if action_name == self.FETCH:
            self._end()
        self.profiler.stop(action_name)

    def __getattr__(self, name: str) -> Any:
        if name == "profiler":  # not yet there while it is unpickled
            raise AttributeError(name)
        return getattr(self.profiler, name)


class Passes:
    """What was timed since the last emptying: waiting for batches, preparing them, computing on them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.empty()

    def empty(self) -> None:
        """Forget everything."""
        self.samples = 0
        self.steps: list[tuple[Any, Any]] = []
        self._waits: list[tuple[Any, Any]] = []
        self._prepared: list[tuple[Any, Any]] = []
        self._waiting_since: Any = None
        self._fetched: Any = None
        self._began: Any = None

    def wait(self) -> None:
        """Wait for a batch from now on, unless that is so already."""
        if self._waiting_since is None:
            self._waiting_since = self.clock.mark()

    def fetched(self) -> None:
        """The batch is here, as the loader made it."""
        self._fetched = self.clock.mark()
        if self._waiting_since is not None:
            self._waits.append((self._waiting_since, self._fetched))
        self._waiting_since = None

    def ready(self) -> None:
        """The batch is on the device, as the model takes it."""
        if self._fetched is not None:
            self._prepared.append((self._fetched, self.clock.mark()))
        self._fetched = None

    def begin(self, samples: int) -> None:
        """Compute from now on."""
        self.samples += samples
        self._began = self.clock.mark()

    def end(self) -> None:
        """The computation is done."""
        if self._began is not None:
            self.steps.append((self._began, self.clock.mark()))
        self._began = None

    def seconds(self) -> tuple[list[float], list[float], list[float]]:
        """Return the times of waiting, of preparing and of computing."""
        return (
            self.clock.seconds(self._waits),
            self.clock.seconds(self._prepared),
            self.clock.seconds(self.steps),
        )
