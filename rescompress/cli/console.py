"""What the command line says: results on stdout, progress and messages on stderr, one line each."""

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rescompress.errors import RescompressError, RescompressWarning

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where no terminal says how wide it is."""

_results: TextIO | None = None
"""Where results go while `sys.stdout` is turned away from there; None for `sys.stdout`."""

_CHATTY = ("huggingface_hub", "timm", "transformers", "urllib3", "PIL", "torch")


class StdoutError(RescompressError):
    """The result cannot be printed."""


def error(message: str) -> None:
    """Print an error on stderr."""
    note(f"error: {message}")


def warning(message: str) -> None:
    """Print a warning on stderr."""
    note(f"warning: {message}")


def note(message: str) -> None:
    """Print a line of progress on stderr."""
    if sys.stderr is not None:  # else print would take stdout, where only results belong
        print(printable(message), file=sys.stderr, flush=True)


def out(text: str = "") -> None:
    """Print a line of the result on stdout."""
    with _to_stdout():
        print(printable(text), file=_results)


def out_json(data: Any) -> None:
    """Print plain data as JSON on stdout; numbers that JSON does not know (NaN, infinity) become null."""
    out(json.dumps(_known_to_json(data), indent=2, allow_nan=False))


def _known_to_json(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _known_to_json(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_known_to_json(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Turn what anybody else prints, such as the user's own model, to stderr."""
    global _results
    before, _results = _results, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


@contextmanager
def _to_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # no failure: the reader has what it wanted
        raise
    except OSError as error:
        raise StdoutError(f"cannot write the result to stdout: {error.strerror}; send it elsewhere") from error


def flush() -> None:
    """Write out what waits for stdout.

    Raises:
        StdoutError: it cannot be written.
    """
    with _to_stdout():
        sys.stdout.flush()


def drop_stdout() -> None:
    """Send what stdout could not take nowhere; without this, Python complains again while shutting down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(renderable: Any) -> None:
    """Print a rich table on stdout: in colours on a terminal, plain in a pipe or file."""
    from rich.console import Console

    stdout = _results or sys.stdout
    console = Console(file=stdout, markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(file=stdout, markup=False, highlight=False, width=PLAIN_WIDTH)
    with _to_stdout():
        console.print(renderable)


def printable(text: str) -> str:
    """Return `text` with control characters shown instead of obeyed: names come from files of unknown origin."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def size(num_bytes: float) -> str:
    """Return a number of bytes for people to read: 1 MB is 1,000,000 bytes."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= length:
            return f"{num_bytes / length:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


@contextmanager
def step(what: str) -> Iterator["Step"]:
    """Show that something is going on: a spinner with the time on a terminal, a line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        note(f"{what} ...")
        yield Step(what, None)
        return
    started = time.perf_counter()
    with console.status(what) as status:
        yield Step(what, status)
    console.print(f"{what} ({time.perf_counter() - started:.1f} s)")


class Step:
    """A piece of work in progress."""

    def __init__(self, what: str, status: Any) -> None:
        self._what = what
        self._status = status

    def update(self, detail: str) -> None:
        """Say what of the work is being done now."""
        if self._status is None:
            note(f"  {detail}")
        else:
            self._status.update(f"{self._what}: {detail}")


@contextmanager
def messages(debug: bool) -> Iterator[None]:
    """Print our own warnings as lines; hide what other libraries warn of and log, unless for debugging."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            warning(text if issubclass(category, RescompressWarning) else f"{category.__name__}: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("default" if debug else "ignore")
        warnings.simplefilter("always", RescompressWarning)
        warnings.showwarning = show
        if not debug:
            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
