#!/usr/bin/env python
# Time original, scale only, low bits only and both, eager, as TorchScript and compiled, in turn within one run.
#
#     python scripts/bench/deploy.py resnet50 --scheme w8a8_static --batch 8
#     python scripts/bench/deploy.py vit_base_patch16_224 --scheme w8a8 --how eager
#     python scripts/bench/deploy.py resnet18 --size 96 --rounds 5             # a quick run
#
# Weights are random: the error is that of the arithmetic against the same model in fp32, not a loss of accuracy.

import argparse
import io
import statistics
import time
import warnings

import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.compress import record_of
from rescompress.measure import count_macs
from rescompress.measure.memory import weight_bytes
from rescompress.methods.quantize import SCHEMES, Quantize

VARIANTS = ("original", "scale", "low bits", "both")


def variants(model: nn.Module, images: Tensor, scale: float, scheme: str) -> dict[str, nn.Module]:
    step = Quantize(scheme=scheme)
    scaled = rc.compress(model, scale=scale, example_input=images)
    low = rc.compress(model, step, example_input=images, calibration=[images])
    both = rc.compress(scaled, step, example_input=images, calibration=[images])
    for line in record_of(both).log:
        print(f"- {line[:200]}")
    # Folding is for convolutional networks; where there is nothing to fold it says so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RescompressWarning)
        folded = {"scale": rc.fold(scaled, images), "both": rc.fold(both, images)}
    return {"original": model, "low bits": low, **folded}


def prepared(model: nn.Module, how: str, images: Tensor) -> nn.Module:
    if how == "torchscript":
        program = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.script(model)))
    elif how == "compiled":
        torch.compiler.reset()
        program = torch.compile(model)
    else:
        program = model
    for _ in range(2):
        program(images)
    return program


def file_bytes(model: nn.Module) -> int:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(model), stream)
    return len(stream.getvalue())


def times_ms(programs: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program(images)
            if turn > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="time scale and low bits, alone and together")
    parser.add_argument("model", nargs="?", default="resnet50", help="a timm model; weights are random")
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--scheme", default="w8a8_static", choices=SCHEMES)
    parser.add_argument("--size", type=int, default=224, help="side of the image")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--how", nargs="*", default=["eager", "torchscript"], choices=["eager", "torchscript", "compiled"]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch deprecates TorchScript, which is still deployed
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    size = {"img_size": options.size} if "vit" in options.model else {}
    model = timm.create_model(options.model, **size).eval()
    images = torch.randn(options.batch, 3, options.size, options.size)
    models = variants(model, images, options.scale, options.scheme)
    one = images[:1]
    macs = {"original": count_macs(model, one).macs, "scale": count_macs(models["scale"], one).macs}
    macs |= {"low bits": macs["original"], "both": macs["scale"]}  # counted before precision

    print(
        f"\n{options.model}, {options.size} px, batch {options.batch}, scale {options.scale}, {options.scheme}, "
        f"{options.rounds} rounds, {options.threads} threads, torch {torch.__version__}\n"
    )
    print("| how | model | ms, median (quartiles) | fastest | speed-up | MAC ratio | weight MB | file MB | error |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    with torch.inference_mode():
        outputs = {name: models[name](images) for name in VARIANTS}
        against = {"original": "original", "scale": "scale", "low bits": "original", "both": "scale"}
        eager: list[float] = []
        for how in options.how:
            times = times_ms({name: prepared(models[name], how, images) for name in VARIANTS}, images, options.rounds)
            eager = eager or times["original"]  # of the first way asked for
            for name in VARIANTS:
                low, median, high = statistics.quantiles(times[name], n=4)
                # Of each round by itself, so that a machine that slows down meanwhile slows both.
                faster = statistics.median(old / new for old, new in zip(eager, times[name], strict=True))
                wanted = outputs[against[name]]
                error = ((outputs[name] - wanted).norm() / wanted.norm()).item()
                print(
                    f"| {how} | {name} | {median:.1f} ({low:.1f}, {high:.1f}) | {min(times[name]):.1f} | {faster:.2f} "
                    f"| {macs['original'] / macs[name]:.2f} | {weight_bytes(models[name]) / 1e6:.1f} "
                    f"| {file_bytes(models[name]) / 1e6:.1f} | {error:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
