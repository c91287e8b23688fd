# Every method beside plain InputResize at about the same MACs, timed in turn in one run; prints Markdown.
#
#     python scripts/bench/methods.py --quick
#     python scripts/bench/methods.py --model resnet50 --scale 0.5 --batch 8

import argparse
import datetime
import platform
import warnings
from collections.abc import Iterator, Sequence

import timm
import torch
import torchvision
from torch import Tensor, nn

import rescompress as rc
from rescompress.fold import fold_decisions
from rescompress.measure import count_macs, time_models
from rescompress.measure.latency import SpeedUp

MODELS = ["resnet50", "vit_small_patch16_224"]
QUICK_MODELS = ["resnet18", "vit_tiny_patch16_224"]


def build(name: str) -> nn.Module:
    """Build a model with random weights: costs do not depend on them."""
    if name.startswith("torchvision:"):
        return torchvision.models.get_model(name.removeprefix("torchvision:")).eval()
    return timm.create_model(name).eval()


def candidates(model: nn.Module, scale: float) -> Iterator[list[rc.Step]]:
    """Yield for each method that takes this model the steps among which the one of nearest MACs is looked for."""
    if not hasattr(model, "patch_embed") and not hasattr(model, "conv_proj"):
        yield [rc.StemResize(scale=scale)]  # the same grid behind the stem as the baseline
        return
    depth = len(model.blocks if hasattr(model, "blocks") else model.encoder.layers)
    yield [rc.PatchResize(scale=scale)]  # the same grid as the baseline
    yield [rc.TokenPool(after_block=block, stride=2) for block in range(depth)]
    yield [rc.TokenMerge(r=r) for r in range(2, 50, 2)]


def nearest(name: str, side: int, target: int, steps: Sequence[rc.Step]) -> rc.Step | None:
    """Return the step whose MACs come nearest to `target`, or None where the model takes none; nothing is computed."""
    with torch.device("meta"):
        model, x = build(name), torch.empty(1, 3, side, side)
    found = []
    for step in steps:
        try:
            macs = count_macs(rc.compress(model, step, example_input=x), x).macs
        except rc.RescompressError:  # a patch or a stride that this model cannot have
            continue
        found.append((abs(macs - target), len(found), step))
    return min(found)[-1] if found else None


def variants(name: str, model: nn.Module, x: Tensor, scale: float) -> dict[str, nn.Module]:
    """Return the original, the baseline, and each method at about the baseline's MACs."""
    baseline = rc.InputResize(scale=scale)
    rows = {"original": model, label(baseline): rc.compress(model, baseline, example_input=x)}
    target = count_macs(rows[label(baseline)], x).macs
    for steps in candidates(model, scale):
        step = nearest(name, x.shape[-1], target, steps)
        if step is None:
            continue
        small = rc.compress(model, step, example_input=x)
        rows[label(step)] = small
        if any(decision.folded for decision in fold_decisions(small, x)):
            rows[f"{label(step)}, folded"] = rc.fold(small, x)
    return rows


def label(step: rc.Step) -> str:
    options = (f"{key}={_short(value)}" for key, value in step.to_dict().items() if key != "kind")
    return f"{step.kind} {', '.join(options)}"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def table(rows: dict[str, nn.Module], x: Tensor, batch: int, budget_s: float) -> str:
    """Return the Markdown table, with the notes of the measurement under it."""
    timed, notes = time_models(rows, x, batch_sizes=[batch], budget_s=budget_s)
    lines = [
        f"| | GMACs | MAC ratio | live MB | batch {batch}, ms (quartiles) | speed-up | speed-up / MAC ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = None
    for name, model in rows.items():
        report = rc.measure(model, x, latency=False, peak_memory=False, training=False)
        first = first or report
        latency = timed[name][0]
        faster = SpeedUp.between(timed["original"][0], latency).median
        ratio = first.macs / report.macs
        cells = [
            name,
            f"{report.macs / 1e9:.3f}",
            f"{ratio:.2f}",
            f"{(report.inference_live_bytes or 0) / 1e6:.2f}",
            f"{latency.median_ms:.4g} ({latency.q1_ms:.4g} to {latency.q3_ms:.4g})",
            f"{faster:.2f}",
            f"{faster / ratio:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)])


def machine() -> str:
    """Say what was measured on, without naming the machine."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{datetime.date.today()}, CPU {platform.machine()} {capability}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, timm {timm.__version__}, random weights"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method beside plain InputResize at about the same MACs.")
    parser.add_argument("--model", nargs="+", help=f"timm names, or torchvision:NAME (default: {' '.join(MODELS)})")
    parser.add_argument("--scale", type=float, nargs="+", default=[0.5], help="of the baseline InputResize")
    parser.add_argument("--side", type=int, default=224, help="of the square image, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images in a timed pass; MACs and memory are for one")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of timed passes for each row")
    parser.add_argument("--threads", type=int, help="that torch computes with (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK_MODELS)}, half a second each")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", rc.RescompressWarning)  # the grids that are reached show in the MACs
    x = torch.randn(1, 3, args.side, args.side, generator=torch.Generator().manual_seed(0))
    print(machine())
    for name in args.model or (QUICK_MODELS if args.quick else MODELS):
        for scale in args.scale:
            rows = variants(name, build(name), x, scale)
            print(f"\n{name} at {args.side} x {args.side}, baseline at scale {scale:g}\n")
            print(table(rows, x, args.batch, 0.5 if args.quick else args.budget), flush=True)


if __name__ == "__main__":
    main()
