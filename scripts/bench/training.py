#!/usr/bin/env python
# What training really takes beside what was predicted: the memory of a step and its time, by scale. The memory of each
# model is measured in a process of its own; the steps of all scales of a model are timed in turn within one process.
#
#     python scripts/bench/training.py
#     python scripts/bench/training.py --device cuda --batch 64
#     python scripts/bench/training.py --models resnet18 --scales 1 0.5 --batch 4 --rounds 5

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.measure import count_training_macs, live_activation_bytes
from rescompress.measure._peak import give_back_freed_memory, peak_bytes, reset_peak, resident_bytes

COLUMNS = (
    "model",
    "scale",
    "step GMACs",
    "MAC ratio",
    "ms a step (quartiles)",
    "time ratio",
    "time measured / predicted",
    "predicted live MB",
    "measured MB",
    "memory measured / predicted",
    "predicted ratio",
    "measured ratio",
    "at rest MB",
)


class Step:
    """A model in training: forward, backward and an SGD step with momentum, on the same batch each time."""

    def __init__(self, name: str, scale: float, batch: int, device: str) -> None:
        torch.manual_seed(0)
        model = timm.create_model(name)
        side = model.default_cfg["input_size"][-1]
        example = torch.randn(1, 3, side, side)
        self.model: nn.Module = model if scale == 1 else rc.compress(model, scale=scale, example_input=example)
        self.model.to(device).train()
        self.images = torch.randn(batch, 3, side, side, device=device)
        self.labels = torch.arange(batch, device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        # The gradients stay: they are as large as the weights, and live activations are counted without both.
        self.optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def seconds(self) -> float:
        synchronize(self.images)
        began = time.perf_counter()
        self()
        synchronize(self.images)
        return time.perf_counter() - began


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


@dataclass
class Memory:
    """Of one training step, in bytes.

    At rest there are weights, gradients, momentum, the batch, and on the CPU the libraries. `step` is what the step
    takes over that, and the batch, which counts among the live activations.
    """

    rest: int
    step: int
    how: str


def measured_memory(name: str, scale: float, options: argparse.Namespace) -> Memory:
    """Measure in a process of its own, so that nothing that another model left behind counts."""
    # What compress warns of is told once, by the process that times.
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--models",
        name,
        "--scales",
        str(scale),
        "--batch",
        str(options.batch),
    ]
    command += ["--device", options.device, "--threads", str(options.threads), "--only-memory"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def own_memory(step: Step) -> Memory:
    for _ in range(2):  # gradients, momentum and what kernels keep come with the first steps
        step()
    batch = step.images.nbytes
    if step.images.is_cuda:
        synchronize(step.images)
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        step()
        synchronize(step.images)
        return Memory(rest, torch.cuda.max_memory_allocated() - rest + batch, "torch.cuda.max_memory_allocated")
    give_back_freed_memory()
    if not reset_peak():
        sys.exit("this system does not forget a process's peak of memory (/proc/self/clear_refs); use --device cuda")
    rest = resident_bytes()
    step()
    return Memory(rest, peak_bytes(True) - rest + batch, "VmHWM")


def timed_in_turn(steps: list[Step], rounds: int) -> list[list[float]]:
    for step in steps:
        step(), step()  # the first ones choose kernels and fill caches
    turns = [[step.seconds() for step in steps] for _ in range(rounds)]
    return [list(times) for times in zip(*turns, strict=True)]


def quartiles(values: list[float]) -> list[float]:
    # Before Python 3.13, statistics.quantiles refuses a single value.
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def main() -> None:
    parser = argparse.ArgumentParser(description="measured against predicted training memory and step time")
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224"], help="timm model names")
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0, 0.75, 0.5], help="the first one is compared to"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only_memory:
        step = Step(options.models[0], options.scales[0], options.batch, options.device)
        print(json.dumps(asdict(own_memory(step))))
        return

    where = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {options.threads} threads"
    what = f"batch {options.batch}, float32, SGD with momentum, {options.rounds} rounds"
    print(f"{what}, {where}, torch {torch.__version__}")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---|" + "---:|" * (len(COLUMNS) - 1))
    for name in options.models:
        memories = [measured_memory(name, scale, options) for scale in options.scales]
        steps = [Step(name, scale, options.batch, options.device) for scale in options.scales]
        macs = [count_training_macs(step.model, step.images) for step in steps]
        live = [live_activation_bytes(step.model, step.images, training=True) for step in steps]
        times = timed_in_turn(steps, options.rounds)
        for scale, memory, mac, predicted, taken in zip(options.scales, memories, macs, live, times, strict=True):
            low, median, high = quartiles([1e3 * seconds for seconds in taken])
            # Of each round by itself, so that a machine that slows down meanwhile slows both.
            slower = statistics.median(one / first for one, first in zip(taken, times[0], strict=True))
            print(
                f"| {name} | {scale:g} | {mac / 1e9:.1f} | {mac / macs[0]:.3f} | {median:.0f} ({low:.0f}, {high:.0f}) "
                f"| {slower:.3f} | {slower / (mac / macs[0]):.2f} | {predicted / 1e6:.0f} "
                f"| {memory.step / 1e6:.0f} | {memory.step / predicted:.2f} | {predicted / live[0]:.3f} "
                f"| {memory.step / memories[0].step:.3f} | {memory.rest / 1e6:.0f} |",
                flush=True,
            )
    print(f"\ntime: predicted is that of scale {options.scales[0]:g} times the MAC ratio")
    print(f"memory: {memories[0].how}, over what is there at rest")


if __name__ == "__main__":
    main()
