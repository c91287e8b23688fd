"""Where a file may be written, found out before the long work, and a write that leaves the old file or the new one."""

import importlib.util
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rescompress.errors import ExportError, did_you_mean
from rescompress.export.seal import seal

SUFFIXES = {
    ".pt": "TorchScript",
    ".pt2": "torch.export",
    ".onnx": "ONNX",
    ".aoti.pt2": "compiled by AOTInductor",
}
"""The formats that are written, by suffix."""


def suffix_of(path: Path) -> str | None:
    """Return the suffix of `path` that names a format, the longest that fits, or None."""
    name = path.name.lower()
    fitting = [suffix for suffix in SUFFIXES if name.endswith(suffix) and len(name) > len(suffix)]
    return max(fitting, key=len, default=None)


def check_writable(path: str | Path) -> Path:
    """Return `path` if a model can be written there: a known suffix in an existing, writable folder.

    The tools that the format needs must be there too. An existing file is left as it is.

    Raises:
        ExportError: it cannot, and why.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if suffix is None:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())
        near = did_you_mean(path.suffix, SUFFIXES) if path.suffix else ""
        hint = near if near.startswith("; did you mean") else ""
        raise ExportError(f"cannot write {path}: the suffix {path.suffix!r} names no format; known: {known}{hint}")
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder; name a file in it")
    folder = path.parent
    if not folder.exists():
        raise ExportError(f"cannot write {path}: there is no folder {folder}; create it first")
    if not folder.is_dir():
        raise ExportError(f"cannot write {path}: {folder} is not a folder")
    try:
        # By trying: permission bits do not tell of read-only mounts, quotas and the superuser.
        with tempfile.TemporaryDirectory(prefix=".rescompress-", dir=folder):
            pass
    except OSError as error:
        raise ExportError(f"cannot write {path}: the folder {folder} is not writable ({error.strerror})") from error
    missing = _missing_tool(suffix)
    if missing is not None:
        raise ExportError(f"cannot write {path}: {missing}")
    return path


def _missing_tool(suffix: str) -> str | None:
    """Say what the format needs and this machine lacks, without importing it."""
    if suffix == ".onnx":
        absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if absent:
            return f"{suffix} needs {', '.join(absent)}; pip install 'rescompress[onnx]'"
    if suffix == ".aoti.pt2":
        compiler = shlex.split(os.environ.get("CXX", "g++")) or ["g++"]  # as torch._inductor chooses on Linux
        if shutil.which(compiler[0]) is None:
            return f"{suffix} needs a C++ compiler and there is no {compiler[0]!r}; install g++ or set CXX to one"
    return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; at the end without an error that file takes the place of `path`.

    It lies in a folder of its own beside `path`, on the same file system, and has the same name, which some formats
    keep inside. A format without checksums gets one at the end, of what was written and checked. Whatever happens,
    nothing but the old or the new file is left.

    Raises:
        ExportError: the temporary folder cannot be made, or the file cannot be put in place.
    """
    target = Path(os.path.realpath(path))  # through a link, not instead of it
    try:
        with tempfile.TemporaryDirectory(
            prefix=".rescompress-", dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            new = Path(folder) / target.name
            yield new
            if suffix_of(target) == ".onnx":
                seal(new)
            os.replace(new, target)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
