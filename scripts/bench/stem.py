#!/usr/bin/env python
# Time a model, its stem resize unfolded and folded, and plain input resize, in turn within one run, and print how much
# of the MAC ratio each of them realises.
#
#     python scripts/bench/stem.py resnet50 --scale 0.5 --batch 8

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torchvision
from torch import nn

import rescompress as rc
from rescompress.fold import fold_decisions
from rescompress.measure import count_macs, live_activation_bytes


def prepared(model: nn.Module, how: str, image: torch.Tensor) -> nn.Module:
    if how == "eager":
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript, which is still deployed
        frozen = torch.jit.freeze(torch.jit.script(model))
        if how == "torchscript":
            frozen = torch.jit.optimize_for_inference(frozen)
        frozen(image)
    return frozen


def take_turns(
    models: dict[str, nn.Module], image: torch.Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 3):
        for name, model in models.items():
            start = clock()
            model(image)
            if turn >= 3:  # the first passes choose kernels and fill caches
                times[name].append((clock() - start) * 1e3)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description="time a stem resize, unfolded and folded, against plain input resize")
    parser.add_argument("model", nargs="?", default="resnet50", help="a torchvision model; weights are random")
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--mode", default="bilinear", choices=["nearest", "bilinear", "bicubic", "area"])
    parser.add_argument("--side", type=int, default=224, help="side of the image")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--how", nargs="*", default=["torchscript", "eager"], choices=["torchscript", "eager"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--at-least", type=float, help="fail if folded TorchScript realises less of its MAC ratio")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time what the processor spent, on one thread: for a busy machine"
    )
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    one = torch.randn(1, 3, args.side, args.side)
    model = torchvision.models.get_model(args.model, weights=None).eval()
    unfolded = rc.compress(model, rc.Spec.of(rc.StemResize(scale=args.scale, mode=args.mode)), example_input=one)
    for decision in fold_decisions(unfolded, one):
        print(decision)
    models = {
        "original": model,
        "unfolded": unfolded,
        "folded": rc.fold(unfolded, one),
        "input resize": rc.compress(model, rc.Spec.of(rc.InputResize(scale=args.scale)), example_input=one),
    }
    macs = {name: count_macs(module, one).macs for name, module in models.items()}
    live = {name: live_activation_bytes(module, one) for name, module in models.items()}

    print(
        f"{args.model}, scale {args.scale} {args.mode}, {args.side} px, batch {args.batch}, {args.rounds} rounds, ",
        end="",
    )
    print(f"{args.threads} threads, torch {torch.__version__}; peak live activation at batch 1")
    print("| how | model | GMACs | peak live MB | ms, median (quartiles) | fastest | MAC ratio | speed-up | realised |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    enough = True
    images = torch.randn(args.batch, 3, args.side, args.side)
    with torch.inference_mode():
        for how in args.how:
            times = take_turns(
                {name: prepared(module, how, images) for name, module in models.items()}, images, args.rounds, clock
            )
            for name, taken in times.items():
                low, median, high = statistics.quantiles(taken, n=4)
                ratio = macs["original"] / macs[name]
                # Of each round by itself, so that a machine that slows down meanwhile slows both.
                faster = statistics.median(old / new for old, new in zip(times["original"], taken, strict=True))
                print(
                    f"| {how} | {name} | {macs[name] / 1e9:.3f} | {live[name] / 1e6:.2f} "
                    f"| {median:.1f} ({low:.1f}, {high:.1f}) | {min(taken):.1f} "
                    f"| {ratio:.2f} | {faster:.2f} | {faster / ratio:.2f} |"
                )
                if args.at_least is not None and (how, name) == ("torchscript", "folded"):
                    enough = faster / ratio >= args.at_least
    if not enough:
        print(f"folded TorchScript realises less than {args.at_least} of its MAC ratio", file=sys.stderr)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
