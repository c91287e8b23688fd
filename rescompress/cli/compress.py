"""`rescompress compress`: build a model, make it smaller, show what that does, and write it to a file."""

import argparse

from rescompress.cli import _arguments

SUMMARY = "make a model smaller, show before => after on a photograph, and write it to a file"

EPILOG = """examples:
  rescompress compress resnet50 --scale 0.5 --out small.pt
  rescompress compress resnet50 --scale 0.5 --out small.onnx --dynamic size
  rescompress compress resnet50 --scale 0.5 --set stem_resize.mode=nearest --image photo.jpg
  rescompress compress resnet50 --scale 0.5 --quantize w8a8_static --calibration photos --out small.pt
  rescompress compress vit_tiny_patch16_224 --set token_merge.r=8 --set token_pool.after_block=5
  rescompress compress torchvision:resnet50 --weights mine.pth --num-classes 10 --spec spec.yaml --json

A spec file looks like this (rescompress methods NAME lists the options):
  steps:
    - {kind: stem_resize, scale: 0.5}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    _arguments.add_model(parser)
    group = parser.add_argument_group("what to do")
    start = group.add_mutually_exclusive_group()
    start.add_argument(
        "--scale",
        type=float,
        metavar="S",
        help="output side over input side of the grid, in (0, 1]; cost falls with S * S",
    )
    start.add_argument("--spec", metavar="FILE", help="a spec, .yaml or .json")
    group.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KIND.OPTION=VALUE",
        help="set an option of a step, which is added where it is not there yet; may be given several times",
    )
    group.add_argument(
        "--quantize",
        metavar="SCHEME",
        help="last of all, hold weights in low bits: w8, w8a8, w8a8_static or w4 (rescompress methods quantize)",
    )
    group.add_argument(
        "--calibration",
        metavar="DIR",
        help="for w8a8_static: a folder of photographs to find the ranges of activations with, subfolders included (64 "
        "at equal distances in the order of their names); or the word random, for noise",
    )
    group = parser.add_argument_group("what to show and write")
    group.add_argument(
        "--out",
        metavar="FILE",
        help="file to write, which runs without rescompress: .pt (TorchScript), .pt2 (torch.export), .onnx (ONNX) or "
        ".aoti.pt2 (compiled by AOTInductor for this kind of processor)",
    )
    group.add_argument(
        "--dynamic",
        choices=("batch", "size", "none"),
        default="batch",
        help="sides of the input that may vary in the file: the batch (default); batch, height and width; or none",
    )
    _arguments.add_image(parser)
    _arguments.add_measuring(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    # Here, not above: --help must not wait for torch.
    from rescompress.cli._compressing import compress_and_show

    compress_and_show(args)
    return 0
