"""The folder of a run: what an earlier start of it left there, and what that is kept from."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from rescompress.errors import InputError, RescompressWarning, one_line
from rescompress.files import write_whole
from rescompress.lightning._configs import SAVED, saved
from rescompress.lightning.checkpoints import LastCheckpoint, read_checkpoint
from rescompress.lightning.results import FILE, Result

LAST = "last.ckpt"
EARLIER = "earlier"
"""Where --fresh puts a run away: a whole run's folder in that of the run that takes its place."""

_LEFT = (LAST, FILE, SAVED, "cost.csv", "logs", "hparams.yaml", "events.out.tfevents.*")


class RunFolder:
    """Folder of one run; one that is not there yet is an empty one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def last(self) -> Path:
        """Path of the run's own checkpoint."""
        return self.path / LAST

    def owns(self, checkpoint: Any) -> bool:
        """Whether a path is that of the run's own checkpoint."""
        return self.last.exists() and os.path.exists(checkpoint) and os.path.samefile(checkpoint, self.last)

    def checkpoint(self) -> dict[str, Any] | None:
        """Return what the run's checkpoint holds, or None where there is none yet.

        Raises:
            InputError: it is damaged.
        """
        if not self.last.exists():
            return None
        try:
            return read_checkpoint(self.last)
        except InputError as error:
            raise InputError(f"{error}; to begin anew, say --fresh") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the folder; the lock of a killed process is gone with it.

        Raises:
            InputError: another process trains there.
        """
        if getattr(rank_zero_only, "rank", 0):  # the ranks are one run
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"another process trains in {self.path}; wait for its end, or give --folder for another run"
            ) from error
        except (NotImplementedError, OSError) as error:
            rank_zero_warn(
                f"{self.path} cannot be locked ({one_line(error)}): let no second process train there",
                category=RescompressWarning,
            )
        try:
            yield
        finally:
            lock.release()

    def how_to_go_on(self) -> str:
        """Say what the same command will do."""
        found = self.checkpoint()
        if found is None:
            return "there is no checkpoint yet, so the same command begins anew"
        return f"the same command goes on from step {found['global_step']} of {self.last}"

    def puts_away(self, checkpoint: Any) -> bool:
        """Whether `put_away` would move or remove a checkpoint."""
        return self.owns(checkpoint) or Path(checkpoint).resolve().parent == (self.path / EARLIER).resolve()

    @rank_zero_only
    def put_away(self) -> None:
        """Move what the earlier run left into a folder of its own, where it is the same run as it was here."""
        if not self.last.exists():
            (self.path / FILE).unlink(missing_ok=True)  # of a run without checkpoints
            return
        away = self.path / EARLIER
        shutil.rmtree(away, ignore_errors=True)
        away.mkdir()
        for pattern in _LEFT:  # the checkpoint first: without it, nothing goes on with the rest
            for path in self.path.glob(pattern):
                os.replace(path, away / path.name)
        rank_zero_info(f"beginning anew; the earlier run is now in {away}")

    def options(self) -> dict[str, Any] | None:
        """Return the options that the run was begun with, as they were written down, or None where they were not.

        Raises:
            InputError: the file is damaged.
        """
        path = self.path / SAVED
        if not path.is_file():
            return None
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} is damaged; remove it to go on from {LAST} as it is, or say --fresh") from error
        return found if isinstance(found, dict) else {}

    @rank_zero_only
    def save_options(self, text: str, run: str) -> None:
        """Write down the options of a run by its name, whole or not at all."""
        write_whole(self.path / SAVED, saved(text, run))

    def result(self, later: Result) -> Result | None:
        """Return what this run left when it was tested before, with the weights of a later result."""
        try:
            found = Result.read(self.path)
        except InputError:
            return None
        return found if (found.seed, found.steps) == (later.seed, later.steps) else None


def is_finished(checkpoint: str | Path) -> bool:
    """Whether the run in a checkpoint's folder is finished; a file that lies in no such folder counts as if it was."""
    folder = Path(checkpoint).parent
    if not (folder / SAVED).is_file():
        return True
    try:
        return Result.read(folder).finished
    except InputError:
        return False


def begun_from(checkpoint: dict[str, Any]) -> str | None:
    """Return the path of the checkpoint of another run that the run of this one was begun from."""
    state = (checkpoint.get("callbacks") or {}).get(LastCheckpoint.__qualname__) or {}
    return state.get("begun_from")
