# Checks and counts ImageNet, or any data of the same layout, before a run starts; makes and counts WebDataset shards.
#
#     python scripts/prepare_imagenet.py ROOT                       # ROOT/{train,val}/CLASS/*.JPEG, or shards
#     python scripts/prepare_imagenet.py ROOT --counts --decode     # images of each class; files that cannot be read
#     python scripts/prepare_imagenet.py ROOT --write-shards OUT    # shards of the folders, in a random order
#     python scripts/prepare_imagenet.py ROOT --index               # count the samples of shards, write _info.json
#
# The exit status is 1, and the message shows the expected tree, where something is wrong.

import argparse
import sys
from pathlib import Path

import torch

from rescompress.errors import InputError
from rescompress.lightning.data import ImageFolders, ImageShards
from rescompress.lightning.data.check import report
from rescompress.lightning.data.shard_files import write_index, write_shards


def main() -> None:
    parser = argparse.ArgumentParser(description="Check, count and report a folder of images or shards.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--classes", type=int, help="expected number of classes; for shards 1000 if not given")
    parser.add_argument(
        "--counts", action="store_true", help="number of images of each class, or samples of each shard"
    )
    parser.add_argument("--decode", action="store_true", help="decode every image and list those that are corrupt")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--index", action="store_true", help="count the samples of the shards and write _info.json")
    parser.add_argument("--write-shards", type=Path, metavar="OUT")
    parser.add_argument("--images-per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the order in which images are written to shards")
    options = parser.parse_args()
    try:
        if options.index:
            print(f"wrote {write_index(options.root)}")
        if not options.index and not (options.root / "_info.json").exists():
            folders = ImageFolders(
                str(options.root), num_classes=options.classes, corrupt="skip", workers=options.workers
            )
            print(report(folders, counts=options.counts, decode=options.decode))
            if options.write_shards is None:
                return
            shard(folders, options)
            options.root, options.classes = options.write_shards, folders.num_classes
        shards = ImageShards(
            str(options.root), num_classes=options.classes or 1000, corrupt="skip", workers=options.workers
        )
        print(report(shards, counts=options.counts, decode=options.decode))
    except InputError as error:
        sys.exit(f"error: {error}")


def shard(folders: ImageFolders, options: argparse.Namespace) -> None:
    out = options.write_shards
    for split in ("train", "val"):
        files, labels = folders.listed(split)
        # Streams are shuffled within a buffer only: classes must not follow each other in the shards.
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(options.seed)).tolist()
        target = out / split / f"imagenet-{split}"
        write_shards(options.root, files, labels, order, target, options.images_per_shard)
    (out / "classes.txt").write_text("\n".join(folders.class_names) + "\n")
    print(f"wrote {write_index(out)}")


if __name__ == "__main__":
    main()
