# Checks and counts MedMNIST before a run starts.
#
#     python scripts/prepare_medical.py ROOT                               # pathmnist.npz, of 28 pixels
#     python scripts/prepare_medical.py ROOT --sizes 224                   # pathmnist_224.npz, which the recipes read
#     python scripts/prepare_medical.py ROOT --sizes 28 64 224 --counts    # files of these sizes; images of each class
#     python scripts/prepare_medical.py ROOT --sizes 224 --unpack          # arrays that need not fit in memory
#     python scripts/prepare_medical.py ROOT --name bloodmnist
#
# The files come from `python -m medmnist download --root=ROOT --size=224`, those of other sizes likewise. Where
# something is wrong, the exit status is 1, and the message shows the expected tree or names a file that cannot be read.

import argparse
import sys

from rescompress.errors import RescompressError
from rescompress.lightning.data import MedMNIST
from rescompress.lightning.data.check import report
from rescompress.lightning.data.medmnist import SIZES


def main() -> None:
    parser = argparse.ArgumentParser(description="Check, count and report files of MedMNIST.")
    parser.add_argument("root")
    parser.add_argument("--name", default="pathmnist")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[28], choices=SIZES, help="of the files that are read; 28 if not given"
    )
    parser.add_argument("--counts", action="store_true", help="number of images of each class")
    parser.add_argument("--unpack", action="store_true", help="write the arrays as .npy beside the npz files")
    options = parser.parse_args()
    try:
        for size in options.sizes:
            data = MedMNIST(options.root, options.name, train_size=size, test_size=size)
            if options.unpack:
                print(f"wrote {data.unpack(size)}")
            print(report(data, counts=options.counts))
    except (RescompressError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
