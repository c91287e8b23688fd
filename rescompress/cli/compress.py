"""`rescompress compress`: build a model, make it smaller, show what that does, and write it to a file."""

import argparse

from rescompress.cli import _arguments

SUMMARY = "make a model smaller, show before => after on a photograph, and write it to a file"

EPILOG = """examples:
  rescompress compress resnet50 --scale 0.5 --out small.pt
  rescompress compress resnet50 --scale 0.5 --set stem_resize.mode=nearest --image photo.jpg
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
    group = parser.add_argument_group("what to show and write")
    group.add_argument(
        "--out", metavar="FILE", help="file to write: .pt is TorchScript, which runs without rescompress"
    )
    _arguments.add_image(parser)
    _arguments.add_measuring(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    # Here, not above: --help must not wait for torch.
    from rescompress.cli._compressing import compress_and_show

    compress_and_show(args)
    return 0
