# Checks and counts the small real data sets before a run starts.
#
#     python scripts/prepare_small.py                          # Fashion-MNIST where Debian's package puts it
#     python scripts/prepare_small.py fashion_mnist --root ROOT
#     python scripts/prepare_small.py elpv --counts            # of the package elpv-dataset (data CC BY-NC-SA)
#
# Where something is wrong, the exit status is 1, and the message shows the expected tree or names a file that cannot be
# read.

import argparse
import sys

from rescompress.errors import RescompressError
from rescompress.lightning.data import ELPV, FashionMNIST
from rescompress.lightning.data.check import refuse_corrupt, report


def main() -> None:
    parser = argparse.ArgumentParser(description="Check, count and report Fashion-MNIST or ELPV.")
    parser.add_argument("name", nargs="?", default="fashion_mnist", choices=("fashion_mnist", "elpv"))
    parser.add_argument("--root")
    parser.add_argument("--counts", action="store_true", help="number of images of each class")
    parser.add_argument("--decode", action="store_true", help="decode every image and list those that are corrupt")
    options = parser.parse_args()
    try:
        given = {} if options.root is None else {"root": options.root}
        data = {"fashion_mnist": FashionMNIST, "elpv": ELPV}[options.name](corrupt="skip", **given)
        print(report(data, counts=options.counts, decode=options.decode))
        refuse_corrupt(data)
    except (RescompressError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
