"""Making WebDataset shards out of folders of images, and counting what is in shards."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from rescompress.errors import InputError
from rescompress.lightning.data.check import wrong_layout
from rescompress.lightning.data.shards import INFO, SPLITS, TREE


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


def write_index(root: Path) -> Path:
    """Count the samples of the shards in ROOT/train and ROOT/val (or validation), and write `_info.json`.

    Raises:
        InputError: there are none.
    """
    splits = {}
    for split, names in SPLITS.items():
        shards = sorted(path for name in names for path in (root / name).glob("*.tar"))
        shards = shards or sorted(path for name in names for path in root.glob(f"*{name}*.tar"))
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
    partial = root / f"{INFO}.part"
    partial.write_text(json.dumps({"splits": splits}, indent=1))
    partial.replace(file)
    return file


def write_shards(
    root: Path, files: Sequence[str], labels: Sequence[int], order: Sequence[int], out: Path, images_per_shard: int
) -> None:
    """Write images to tar files, as they are, in the given order.

    Args:
        root: folder that the files' names are relative to.
        files: names of the images.
        labels: their classes.
        order: indices of all images, in the order in which they are written.
        out: the shards are OUT-000000.tar, ...
        images_per_shard: number of images in each.
    """
    import webdataset

    out.parent.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(order), images_per_shard)):
        target = out.with_name(f"{out.name}-{shard:06d}.tar")
        partial = target.with_suffix(".part")
        with partial.open("wb") as stream, webdataset.TarWriter(stream) as writer:
            for number in range(first, min(first + images_per_shard, len(order))):
                name = files[order[number]]
                suffix = Path(name).suffix[1:].lower().replace("jpeg", "jpg")
                sample = {"__key__": f"{number:08d}", "cls": str(labels[order[number]]).encode()}
                writer.write(sample | {suffix: (root / name).read_bytes()})
        partial.replace(target)
