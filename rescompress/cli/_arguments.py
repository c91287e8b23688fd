"""Arguments that several commands take: the model, its weights, its input."""

import argparse

MODEL_HELP = (
    "timm:resnet50 (the prefix timm: may be left out), torchvision:vit_b_16, hf:DIRECTORY_OR_ID, mmseg:CONFIG.py, or "
    "package.module:factory"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model reference and what is needed to build it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = parser.add_argument_group("building the model")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--weights", metavar="FILE", help="a state dict of this model: .safetensors, .pth, .pt or .bin")
    source.add_argument("--random", action="store_true", help="random weights, nothing is downloaded")
    group.add_argument(
        "--input-size",
        metavar="SIZE",
        type=input_size,
        help="side of the image in pixels, 192, or height x width, 192x256",
    )
    group.add_argument("--num-classes", metavar="N", type=positive_int, help="classes of the head")


def add_image(parser: argparse.ArgumentParser) -> None:
    """Add the photograph."""
    parser.add_argument(
        "--image", metavar="FILE", help="photograph to run on; by default the cat that scikit-image ships (chelsea.png)"
    )


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add what is measured and how it is printed."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="no latency and no measured peak memory: what can be computed without running",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout; progress goes to stderr")


def input_size(text: str) -> tuple[int, int]:
    """Read 224 or 192x256 as (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"expected pixels such as 224, or height x width such as 192x256, got {text!r}"
        )
    return int(sides[0]), int(sides[-1])


def positive_int(text: str) -> int:
    """Read a whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
