"""`rescompress measure`: what one model costs."""

import argparse

from rescompress.cli import _arguments

SUMMARY = "measure what a model costs: MACs, parameters, bytes, memory, latency"

EPILOG = """examples:
  rescompress measure resnet50
  rescompress measure torchvision:vit_b_16 --random --modules 2
  rescompress measure mypackage.nets:build --input-size 128x256 --quick --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    _arguments.add_model(parser)
    parser.add_argument(
        "--modules",
        metavar="DEPTH",
        type=_arguments.positive_int,
        help="also a table of the modules, so many names deep",
    )
    _arguments.add_measuring(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    # Here, not above: --help must not wait for torch.
    import torch

    from rescompress.cli import console
    from rescompress.cli._compressing import request_of
    from rescompress.cli.models import load_model
    from rescompress.measure import measure

    with console.step(f"building {args.model}"):
        loaded = load_model(request_of(args))
    # Costs do not depend on what is in the picture.
    x = torch.rand(1, 3, *loaded.input_size, generator=torch.Generator().manual_seed(0))
    with console.step("measuring") as step:
        report = measure(
            loaded.model,
            loaded.call(x),
            name=loaded.reference,
            latency=not args.quick,
            peak_memory=not args.quick,
            progress=step.update,
        )
    if args.json:
        console.out_json(report.to_dict(full=args.modules is not None))
        return 0
    console.table(report.table())
    if args.modules is not None:
        console.table(report.modules_table(args.modules))
    return 0
