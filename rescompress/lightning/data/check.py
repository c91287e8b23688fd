"""What is found in a data folder, and what to say where it is not laid out as it must be.

DataModules look at their folder before a run starts, and `scripts/prepare_*.py` print what they found.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rescompress.errors import InputError, RescompressWarning

if TYPE_CHECKING:
    from rescompress.lightning.data._base import ImageData


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a data folder holds.

    Attributes:
        name: of the data
        root: the folder
        splits: for each split, the number of images of each class (for dense prediction: of each city)
        kind: what the counts of a split belong to
        notes: further things worth knowing, one sentence each
        lacks: what a run should warn of as well, likewise
    """

    name: str
    root: str
    splits: Mapping[str, Mapping[str, int]]
    kind: str = "class"
    notes: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name} in {self.root}"]
        plural = {"class": "classes", "city": "cities"}.get(self.kind, self.kind + "s")
        for split, counts in self.splits.items():
            least, most = (min(counts.values()), max(counts.values())) if counts else (0, 0)
            spread = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            total = sum(counts.values())
            lines.append(f"  {split:<6} {total:>10,} images  {len(counts):>5,} {plural}, {spread} images in each")
        return "\n".join([*lines, *(f"  {note}" for note in (*self.lacks, *self.notes))])

    def table(self) -> str:
        """Return the number of images of every class in every split, one line each."""
        names = list(dict.fromkeys(name for counts in self.splits.values() for name in counts))
        width = max((len(name) for name in [self.kind, *names]), default=0)
        rows = [f"{self.kind:<{width}}" + "".join(f"{split:>10}" for split in self.splits)]
        for name in names:
            rows.append(f"{name:<{width}}" + "".join(f"{c.get(name, 0):>10,}" for c in self.splits.values()))
        return "\n".join(rows)


def report(data: "ImageData", *, counts: bool = False, decode: bool = False) -> str:
    """Say what a folder holds, as text.

    Args:
        data: the DataModule; with `decode` made with corrupt="skip".
        counts: with the number of images of each class.
        decode: with the files that cannot be read, for which all are decoded.

    Raises:
        InputError: the folder is not laid out as it must be.
    """
    found = data.checked()
    lines = [str(found)]
    if counts:
        lines += ["", found.table()]
    if decode:
        for split in ("train", "val"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RescompressWarning)  # the list below says it
                for _ in data._loader(split, training=False):
                    pass
        corrupt = _corrupt(data)
        lines += ["", f"{len(corrupt)} file(s) cannot be read" + (":" if corrupt else "")]
        lines += [f"  {name}: {reason}" for name, reason in sorted(corrupt.items())]
    return "\n".join(lines)


def refuse_corrupt(data: "ImageData") -> None:
    """Raise if a file of what has been read so far is corrupt.

    Raises:
        InputError: some are.
    """
    corrupt = _corrupt(data)
    if corrupt:
        name, reason = min(corrupt.items())
        raise InputError(
            f"{len(corrupt)} file(s) cannot be read, such as {name}: {reason}; mend or remove them, or leave them out "
            "of a run by corrupt: skip"
        )


def _corrupt(data: "ImageData") -> dict[str, str]:
    """Return the files of what has been read so far that are corrupt, and why."""
    return {name: reason for files in data.corrupt_files.values() for name, reason in files.found.items()}


def wrong_layout(cause: str, tree: str) -> InputError:
    """Return the error that says what is wrong with a data folder, and shows how it must look."""
    return InputError(f"{cause}. Expected:\n\n{tree.strip()}\n")


def existing_folder(root: str | Path, name: str, tree: str) -> Path:
    """Return the folder.

    Raises:
        InputError: there is none.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
        raise wrong_layout(f"the folder of {name}, {folder}, {there}; give it by --data.root (root=)", tree)
    return folder


def check_count(name: str, found: int, expected: int | None) -> None:
    """Compare the number of classes in the data with the one that was asked for.

    Raises:
        InputError: they differ.
    """
    if expected is not None and found != expected:
        raise InputError(
            f"{name} holds {found} classes and num_classes is {expected}; give the right number by --data.num_classes "
            "(num_classes=), or mend the folder"
        )
