# Checks and counts ImageNet, or any data of the same layout, before a run starts; makes and counts WebDataset shards.
#
#     python scripts/prepare_imagenet.py ROOT                       # ROOT/{train,val}/CLASS/*.JPEG, or shards
#     python scripts/prepare_imagenet.py ROOT --counts --decode     # images of each class; files that cannot be read
#     python scripts/prepare_imagenet.py ROOT --write-shards OUT    # shards of the folders, in a random order
#     python scripts/prepare_imagenet.py ROOT --index               # count the samples of shards, write _info.json
#
# Where something is wrong, the exit status is 1, and the message shows the expected tree or names a file that cannot be
# read.

import argparse
import sys
from pathlib import Path

from rescompress.errors import InputError, RescompressError
from rescompress.lightning.data import ImageFolders, ImageShards
from rescompress.lightning.data.check import refuse_corrupt, report
from rescompress.lightning.data.shard_files import write_index, write_shards
from rescompress.lightning.data.shards import INFO, named_classes


def main() -> None:
    parser = argparse.ArgumentParser(description="Check, count and report a folder of images or shards.")
    parser.add_argument("root", type=Path)
    parser.add_argument(
        "--classes", type=int, help="expected number of classes; for shards that of classes.txt, or 1000, if not given"
    )
    parser.add_argument(
        "--counts", action="store_true", help="number of images of each class, or samples of each shard"
    )
    parser.add_argument("--decode", action="store_true", help="decode every image and list those that are corrupt")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--index", action="store_true", help="count the samples of the shards and write _info.json")
    parser.add_argument("--write-shards", type=Path, metavar="OUT")
    parser.add_argument("--images-per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the order in which images are written to shards")
    parser.add_argument(
        "--corrupt", choices=("stop", "skip"), default="stop", help="leave files that cannot be read out of the shards"
    )
    options = parser.parse_args()
    try:
        packed = options.index or (options.root / INFO).exists()
        if packed and options.write_shards is not None:
            raise InputError(f"--write-shards makes shards of folders of images, and {options.root} is of shards")
        if options.index:
            print(f"wrote {write_index(options.root)}")
        if not packed:
            folders = ImageFolders(
                str(options.root), num_classes=options.classes, corrupt="skip", workers=options.workers
            )
            print(report(folders, counts=options.counts, decode=options.decode))
            if options.write_shards is None or options.corrupt == "stop":
                refuse_corrupt(folders)
            if options.write_shards is None:
                return
            shard(folders, options)
            options.root = options.write_shards
        classes = options.classes or len(named_classes(options.root)) or 1000
        shards = ImageShards(str(options.root), num_classes=classes, corrupt="skip", workers=options.workers)
        print(report(shards, counts=options.counts, decode=options.decode))
        refuse_corrupt(shards)
    except (RescompressError, OSError) as error:
        sys.exit(f"error: {error}")


def shard(folders: ImageFolders, options: argparse.Namespace) -> None:
    left_out = write_shards(
        folders,
        options.write_shards,
        images_per_shard=options.images_per_shard,
        seed=options.seed,
        corrupt=options.corrupt,
    )
    print(f"wrote {options.write_shards / INFO}")
    if left_out:
        print(f"{len(left_out)} file(s) cannot be read and were left out:")
        print("\n".join(f"  {name}: {reason}" for name, reason in sorted(left_out.items())))


if __name__ == "__main__":
    main()
