#!/usr/bin/env python
# Time original, scale only, low bits only and both: eager, compiled, and from files by the programs that deploy them,
# in turn within one run.
#
#     python scripts/bench/deploy.py resnet50 --scheme w8a8_static
#     python scripts/bench/deploy.py vit_base_patch16_224 --scheme w8a8
#     python scripts/bench/deploy.py resnet18 --size 96 --rounds 5                            # a quick run
#     python scripts/bench/deploy.py vit_base_patch16_224 --scheme w8a8 --device cuda        # bf16, allocator peaks
#
# Fails if a speed-up that --at-least names is not reached: aotinductor=14 is that of both over the eager original,
# aotinductor/compiled=11 over the compiled original, aotinductor/low_bits=3 over low bits alone in the same way.
# "compiled" is torch.compile as it comes, "frozen" with its option freezing, which packs the weights.
#
# Weights are random: the error is that of the arithmetic against the same model in fp32, not a loss of accuracy.

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.compress import record_of
from rescompress.export import read_header
from rescompress.measure import count_macs
from rescompress.methods.quantize import SCHEMES

VARIANTS = ("original", "scale", "low_bits", "both")
FILES = {"torchscript": ".pt", "onnxruntime": ".onnx", "aotinductor": ".aoti.pt2"}

Key = tuple[str, str]
"""A way to run, and a variant of the model."""


def variants(model: nn.Module, images: Tensor, scale: float, scheme: str) -> dict[str, nn.Module]:
    step = rc.Quantize(scheme=scheme)
    calibration = [images] if scheme == "w8a8_static" else None
    scaled = rc.compress(model, scale=scale, example_input=images)
    low = rc.compress(model, step, example_input=images, calibration=calibration)
    both = rc.compress(scaled, step, example_input=images, calibration=calibration)
    for line in record_of(both).log:
        print(f"- {line[:200]}")
    # Folding is for convolutional networks; where there is nothing to fold it says so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RescompressWarning)
        return {"original": model, "scale": rc.fold(scaled, images), "low_bits": low, "both": rc.fold(both, images)}


def programs_of(
    models: dict[str, nn.Module], ways: list[str], images: Tensor, folder: Path
) -> tuple[dict[Key, Callable[[Tensor], Tensor]], dict[Key, int]]:
    """Return what is to be timed, and the bytes of each file."""
    programs: dict[Key, Callable[[Tensor], Tensor]] = {}
    file_bytes = {}
    for way in ways:
        for name, model in models.items():
            if way == "eager":
                programs[way, name] = model
            elif way in ("compiled", "frozen"):
                if name in ("original", "scale"):  # low bits are compiled ahead of time, as aotinductor
                    programs[way, name] = torch.compile(model, options={"freezing": way == "frozen"})
            else:
                path = rc.export(model, folder / f"{name}{FILES[way]}", images)
                file_bytes[way, name] = path.stat().st_size
                made_by = read_header(path)["made_by"]
                print(f"- wrote {path.name}, {file_bytes[way, name] / 1e6:.1f} MB, by {made_by}", file=sys.stderr)
                programs[way, name] = optimized(path) if way == "torchscript" else rc.load(path)
    return programs, file_bytes


def optimized(path: Path) -> torch.jit.ScriptModule:
    return torch.jit.optimize_for_inference(torch.jit.load(path))


def take_turns(
    programs: dict[Key, Callable[[Tensor], Tensor]], images: Tensor, rounds: int
) -> dict[Key, tuple[list[float], int]]:
    """Return for each program the milliseconds of each round, and on CUDA the largest allocation."""
    measured: dict[Key, tuple[list[float], int]] = {key: ([], 0) for key in programs}
    for turn in range(rounds + 3):
        for key, program in programs.items():
            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            program(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if turn >= 3:  # the first passes compile, choose kernels and fill caches
                times, peak = measured[key]
                times.append((time.perf_counter() - start) * 1e3)
                peak = max(peak, torch.cuda.max_memory_allocated() if images.is_cuda else 0)
                measured[key] = (times, peak)
    return measured


def speed_up(times: dict[Key, tuple[list[float], int]], slow: Key, fast: Key) -> float:
    # Of each round by itself, so that a machine that slows down meanwhile slows both.
    return statistics.median(old / new for old, new in zip(times[slow][0], times[fast][0], strict=True))


def missed(wanted: list[str], times: dict[Key, tuple[list[float], int]]) -> list[str]:
    """Return what was asked for with --at-least and is not reached."""
    found = []
    for promise in wanted:
        name, _, ratio = promise.partition("=")
        way, _, against = name.partition("/")
        slow = (way, "low_bits") if against == "low_bits" else (against or "eager", "original")
        reached = speed_up(times, slow, (way, "both"))
        print(f"{name}: {reached:.2f}, asked for {float(ratio):.2f}")
        if reached < float(ratio):
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="time scale and low bits, alone and together, as they are deployed")
    parser.add_argument("model", nargs="?", default="resnet50", help="a timm model; weights are random")
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--scheme", default="w8a8_static", choices=SCHEMES)
    parser.add_argument("--size", type=int, default=224, help="side of the image")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--ways", nargs="*", help="of eager compiled frozen torchscript onnxruntime aotinductor")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: in bf16, eager and compiled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--at-least", nargs="*", default=[], help="speed-ups to reach, see above")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch deprecates TorchScript, which is still deployed
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    on_cuda = options.device != "cpu"

    size = {"img_size": options.size} if "vit" in options.model else {}
    dtype = torch.bfloat16 if on_cuda else torch.float32
    model = timm.create_model(options.model, **size).eval().to(options.device, dtype)
    images = torch.randn(options.batch, 3, options.size, options.size).to(options.device, dtype)
    models = variants(model, images, options.scale, options.scheme)
    macs = {"original": count_macs(model, images[:1]).macs, "scale": count_macs(models["scale"], images[:1]).macs}
    macs |= {"low_bits": macs["original"], "both": macs["scale"]}  # counted before precision
    ways = options.ways or (["eager", "compiled"] if on_cuda else ["eager", "compiled", "frozen", *FILES])

    print(
        f"\n{options.model}, {options.size} px, batch {options.batch}, scale {options.scale}, {options.scheme}, "
        f"{options.rounds} rounds, {options.device}, {options.threads} threads, torch {torch.__version__}\n"
    )
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        programs, file_bytes = programs_of(models, ways, images, Path(folder))
        outputs = {key: program(images).float() for key, program in programs.items()}
        times = take_turns(programs, images, options.rounds)
        in_float = {name: models[name](images).float() for name in ("original", "scale")}

    memory = "peak MB" if on_cuda else "file MB"
    print(f"| how | model | ms, median (quartiles) | speed-up | MAC ratio | realised | {memory} | error |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for (way, name), (taken, peak) in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        faster, ratio = speed_up(times, next(iter(times)), (way, name)), macs["original"] / macs[name]
        wanted = in_float["scale" if name in ("scale", "both") else "original"]
        error = ((outputs[way, name] - wanted).norm() / wanted.norm()).item()
        size_mb = (peak if on_cuda else file_bytes.get((way, name), 0)) / 1e6
        print(
            f"| {way} | {name} | {median:.1f} ({low:.1f}, {high:.1f}) | {faster:.2f} | {ratio:.2f} "
            f"| {faster / ratio:.2f} | {f'{size_mb:.1f}' if size_mb else ''} | {error:.4f} |"
        )
    return len(missed(options.at_least, times))


if __name__ == "__main__":
    sys.exit(main())
