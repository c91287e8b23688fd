"""Writing files whole or not at all: a kill or a full disk at any moment leaves the old one or the new one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rescompress.errors import WriteError

RETRY = "run the same command again"

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def write_whole(path: str | Path, text: str, *, retry: str = RETRY) -> None:
    """Write a text file, UTF-8 with its line ends as they are; its folder is made if it is not there.

    Args:
        path: of the file.
        text: that it will hold.
        retry: what follows in the message of an error once its cause is mended.

    Raises:
        WriteError: it cannot be written; the old one is still there, and nothing of the new one.
    """
    with whole(path, retry=retry) as part:
        part.write_text(text, encoding="utf-8", newline="")


@contextmanager
def whole(path: str | Path, *, retry: str = RETRY) -> Iterator[Path]:
    """Give a path in the same folder to write to; at the end that file takes the place of `path`.

    After an error, whichever, it is removed.

    Raises:
        WriteError: an OSError came up within; it names the file, the reason and the remedy.
    """
    target = Path(path)
    # Two processes that write the same file must not write into each other's part.
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        remedy = "give a place that can be written to" if error.errno in _REFUSED else "free some space"
        raise WriteError(f"cannot write {target}: {error.strerror or error}; {remedy} and {retry}") from error
