# Checks and counts Cityscapes before a run starts.
#
#     python scripts/prepare_cityscapes.py ROOT              # ROOT/leftImg8bit and ROOT/gtFine
#     python scripts/prepare_cityscapes.py ROOT --counts     # images of each city, share of pixels of each class
#     python scripts/prepare_cityscapes.py ROOT --decode     # files that cannot be read
#
# Where something is wrong, the exit status is 1, and the message shows the expected tree or names a file that cannot be
# read.

import argparse
import sys

import torch

from rescompress.errors import RescompressError
from rescompress.lightning.data import Cityscapes
from rescompress.lightning.data.check import refuse_corrupt, report


def main() -> None:
    parser = argparse.ArgumentParser(description="Check, count and report the folder of Cityscapes.")
    parser.add_argument("root")
    parser.add_argument("--counts", action="store_true", help="images of each city, share of pixels of each class")
    parser.add_argument("--decode", action="store_true", help="read every image and label, list those that are corrupt")
    parser.add_argument("--full-size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    try:
        size = tuple(options.full_size)
        data = Cityscapes(options.root, full_size=size, test_size=size, corrupt="skip", workers=options.workers)
        print(report(data, counts=options.counts, decode=options.decode))
        if options.counts:
            print(f"\n{pixel_shares(data)}")
        refuse_corrupt(data)
    except (RescompressError, OSError) as error:
        sys.exit(f"error: {error}")


def pixel_shares(data: Cityscapes) -> str:
    pixels = torch.zeros(256, dtype=torch.int64)
    for batch in data._loader("train", training=False):
        pixels += torch.bincount(batch.labels.flatten().long(), minlength=256)
    shares = pixels.double() / pixels.sum()
    lines = [f"{name:<16}{share:8.2%}" for name, share in zip(data.class_names, shares.tolist(), strict=False)]
    return "\n".join(["pixels of train", *lines, f"{'ignored':<16}{float(shares[255]):8.2%}"])


if __name__ == "__main__":
    main()
