"""`rescompress families`: which kinds of model are known, and which methods apply to them."""

import argparse

SUMMARY = "list the kinds of model, their host classes and the methods that apply"

EPILOG = """examples:
  rescompress families
  rescompress families --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    # Here, not above: the families import torch, and --help must not wait for it.
    from rescompress.cli._cards import show_families

    show_families(args.json)
    return 0
