"""Making WebDataset shards out of folders of images, and counting what is in shards."""

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import torch

from rescompress.errors import InputError, one_line
from rescompress.files import whole, write_whole
from rescompress.lightning.data._base import one_of
from rescompress.lightning.data._images import UNREADABLE, decode
from rescompress.lightning.data.check import wrong_layout
from rescompress.lightning.data.folders import ImageFolders
from rescompress.lightning.data.shards import CLASSES, INFO, SPLITS, TREE

AHEAD = 256
"""Images that are read before they are written, and so in memory together."""


def count_samples(shard: Path) -> int:
    """Return the number of samples in a tar file: of different names up to the first dot of the file's name.

    Raises:
        InputError: it is damaged.
    """
    keys = set()
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.isfile():
                    parent, _, name = member.name.rpartition("/")
                    keys.add((parent, name.partition(".")[0]))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{shard} cannot be read: {error}; write it again") from error
    return len(keys)


def shards_in(root: Path, split: str) -> list[Path]:
    """Return the tar files of a split: those in ROOT/train or ROOT/val (or validation), else those so named in ROOT."""
    names = SPLITS[split]
    shards = sorted(path for name in names for path in (root / name).glob("*.tar"))
    return shards or sorted(path for name in names for path in root.glob(f"*{name}*.tar"))


def write_index(root: Path) -> Path:
    """Count the samples of the shards in ROOT/train and ROOT/val (or validation), and write `_info.json`.

    Raises:
        InputError: there are none.
        WriteError: the disk is full, or the folder cannot be written.
    """
    splits = {}
    for split in SPLITS:
        shards = shards_in(root, split)
        if not shards:
            raise wrong_layout(f"{root} has no shards of {split}", TREE)
        lengths = [count_samples(shard) for shard in shards]
        splits[split] = {
            "name": split,
            "filenames": [str(shard.relative_to(root)) for shard in shards],
            "shard_lengths": lengths,
            "num_samples": sum(lengths),
        }
    file = root / INFO
    write_whole(file, json.dumps({"splits": splits}, indent=1))
    return file


def write_shards(
    folders: ImageFolders, out: Path, *, images_per_shard: int = 1000, seed: int = 0, corrupt: str = "stop"
) -> dict[str, str]:
    """Write the images of folders, as they are, to OUT/{train,val}/imagenet-SPLIT-000000.tar, ..., and their index.

    Each is decoded on the way, by as many threads as the DataModule has workers.

    Args:
        folders: of the images.
        out: folder of the shards, of `classes.txt` and `_info.json`.
        images_per_shard: number of images in each; the last one may hold fewer.
        seed: of the order of the images.
        corrupt: files that cannot be read: "stop", or "skip" them.

    Returns:
        The files that were left out, and why.

    Raises:
        InputError: there are shards already, or a file cannot be read; no shard that this call wrote is then kept.
        WriteError: the disk is full, or the folder cannot be written; likewise.
    """
    one_of("corrupt", corrupt, ("stop", "skip"))
    if images_per_shard < 1:
        raise InputError(f"images_per_shard must be at least 1, got {images_per_shard}")
    folders.setup()
    for split in SPLITS:
        there = shards_in(out, split)
        if there:  # of another number or order of images, they would be counted with the new ones
            raise InputError(
                f"{out} holds {len(there)} shard(s) of {split} already, such as {there[0].name}; give another folder, "
                "or remove them"
            )
    left_out: dict[str, str] = {}
    try:
        for split in SPLITS:
            _write_split(folders, split, out / split, images_per_shard, seed, corrupt, left_out)
        write_whole(out / CLASSES, "\n".join(folders.class_names) + "\n")
        write_index(out)
    except BaseException:  # half of the shards would stand in the way of the next try
        for split in SPLITS:
            for shard in (out / split).glob(f"imagenet-{split}-*.tar"):
                shard.unlink()
        raise
    return left_out


def _write_split(
    folders: ImageFolders,
    split: str,
    out: Path,
    images_per_shard: int,
    seed: int,
    corrupt: str,
    left_out: dict[str, str],
) -> None:
    import webdataset

    def samples() -> Iterator[dict[str, object]]:
        number = 0
        for name, label, found in _read(folders, split, seed):
            if isinstance(found, bytes):
                suffix = Path(name).suffix[1:].lower().replace("jpeg", "jpg")
                yield {"__key__": f"{number:08d}", "cls": str(label).encode(), suffix: found}
                number += 1
            elif corrupt == "skip":
                left_out[name] = found
            else:
                raise InputError(
                    f"{name} cannot be read: {found}; mend or remove it, or set corrupt: skip (--corrupt skip), which "
                    "leaves such files out and counts them"
                )

    given = samples()
    for shard, sample in enumerate(given):
        with (
            whole(out / f"imagenet-{split}-{shard:06d}.tar") as part,
            part.open("wb") as stream,
            webdataset.TarWriter(stream) as writer,
        ):
            for one in chain([sample], islice(given, images_per_shard - 1)):
                writer.write(one)


def _read(folders: ImageFolders, split: str, seed: int) -> Iterator[tuple[str, int, bytes | str]]:
    """Give the name of each image of a split, its class, and its bytes or why they cannot be decoded."""
    root = Path(folders.root).expanduser()
    files, labels = folders.listed(split)
    # Streams are shuffled within a buffer only: classes must not follow each other in the shards.
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()

    def checked(index: int) -> bytes | str:
        try:
            found = (root / files[index]).read_bytes()
            decode(found)
        except UNREADABLE as error:
            return one_line(error)
        return found

    with ThreadPoolExecutor(max(1, folders.workers)) as pool:
        for first in range(0, len(order), AHEAD):
            some = order[first : first + AHEAD]
            for index, found in zip(some, pool.map(checked, some), strict=True):
                yield files[index], labels[index], found
