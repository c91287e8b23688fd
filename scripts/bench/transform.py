"""What compress itself costs, in copies of the model, and what its self-check adds.

    python scripts/bench/transform.py                         # ViT-L/16 and ResNet-152
    python scripts/bench/transform.py resnet18 --rounds 9

The limit is three times one copy.deepcopy of the model, the self-check apart. Rounds are interleaved, medians printed.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm

from rescompress.compress import carry_out, default_spec
from rescompress.families import describe
from rescompress.inputs import default_input
from rescompress.self_check import self_check


def seconds(action: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["vit_large_patch16_224", "resnet152"], help="timm model names")
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    print("| model | deepcopy s | compress s, check apart | ratio | self-check s |")
    print("|---|---:|---:|---:|---:|")
    for name in options.models:
        model = timm.create_model(name).eval()
        args = (default_input(model),)

        def transform(model=model, args=args) -> None:  # what compress does, without the check
            anatomy = describe(model, args)
            carry_out(copy.deepcopy(model), default_spec(anatomy, options.scale), anatomy)

        def check(model=model, args=args) -> None:
            anatomy = describe(model, args)
            self_check(model, default_spec(anatomy, options.scale), anatomy, args, {})

        transform(), check()  # warm-up
        rounds = [
            (seconds(lambda model=model: copy.deepcopy(model)), seconds(transform), seconds(check))
            for _ in range(options.rounds)
        ]
        copied, transformed, checked = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {copied:.2f} | {transformed:.2f} | {transformed / copied:.2f} | {checked:.2f} |", flush=True)


if __name__ == "__main__":
    main()
