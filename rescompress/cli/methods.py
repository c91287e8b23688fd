"""`rescompress methods`: which methods there are, and the options of one."""

import argparse

SUMMARY = "list the methods, or the options of one"

EPILOG = """examples:
  rescompress methods
  rescompress methods token_merge
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="a method, for its options")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    # Here, not above: the methods import torch, and --help must not wait for it.
    from rescompress.cli._cards import show_all, show_one

    if args.name is None:
        show_all(args.json)
    else:
        show_one(args.name, args.json)
    return 0
