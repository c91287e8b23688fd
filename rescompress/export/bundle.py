"""The header of a written file: what the program inside is, as JSON that can be read without running or loading it.

A file is a zip, whose member `<name>/extra/rescompress.json` the header is, or an ONNX model, among whose metadata it
is. It is read with zipfile, `protobuf` and json alone, so that a file of unknown origin can be looked at safely.
"""

import json
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rescompress.errors import ExportError, InputError, SpecError, one_line
from rescompress.export import protobuf
from rescompress.spec import Spec

HEADER_NAME = "rescompress.json"
HEADER_SCHEMA = 1
MAX_HEADER_BYTES = 16 * 2**20
"""No honest header comes near; a larger one is refused before it is unpacked."""

MOST_NESTED = 100
"""How deep lists and dicts in a header may be nested."""


def header_text(header: dict[str, Any]) -> str:
    """Return the header as the text that goes into the file.

    Raises:
        ExportError: it holds something that JSON cannot, or is too large to be read back.
    """
    try:
        header = {"header_schema": HEADER_SCHEMA, **header}
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ExportError(
            f"the report, labels or preprocessing cannot be written as JSON: {one_line(error)}; give plain numbers and "
            "strings"
        ) from error
    if len(text.encode()) > MAX_HEADER_BYTES:
        raise ExportError(
            f"the header takes {len(text.encode())} bytes, more than the {MAX_HEADER_BYTES} that are read back; "
            "give a shorter report or fewer labels"
        )
    if _nested_deeper(header, MOST_NESTED):
        raise ExportError(
            f"the report or preprocessing is nested deeper than {MOST_NESTED}; give plain lists and dicts"
        )
    return text


def read_header(path: str | Path) -> dict[str, Any]:
    """Return everything that a written file says of itself, without loading the model.

    Raises:
        InputError: there is no such file, it is damaged, or rescompress did not write it.
    """
    try:
        data = _header_bytes(Path(path))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile checks little of what it reads, so a damaged file fails in any way
        raise InputError(f"{path} is damaged or not a file that rescompress wrote: {one_line(error, 200)}") from error
    try:
        header = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its header is not JSON ({one_line(error, 200)})") from error
    if _nested_deeper(header, MOST_NESTED):  # whoever walks through it later may be recursive
        raise InputError(f"{path} is damaged: its header is nested deeper than {MOST_NESTED}")
    if not isinstance(header, dict) or not isinstance(header.get("spec"), dict):
        raise InputError(f"{path} is damaged: its header holds no spec")
    schema = header.get("header_schema")
    if schema != HEADER_SCHEMA:
        raise InputError(
            f"{path} has a header of schema {schema!r}, and this version reads {HEADER_SCHEMA}; upgrade rescompress"
        )
    return header


def read_spec(path: str | Path) -> Spec:
    """Return the spec of a written file, without loading the model; that of an uncompressed model has no steps.

    Raises:
        InputError: there is no such file, it is damaged, or rescompress did not write it.
    """
    try:
        return Spec.from_dict(read_header(path)["spec"])
    except (SpecError, RecursionError) as error:
        raise InputError(f"{path} holds a spec that cannot be read: {one_line(error)}") from error


def _nested_deeper(data: Any, most: int) -> bool:
    level = [data]
    for _ in range(most + 1):
        level = [item for container in level if isinstance(container, dict | list) for item in _items(container)]
    return bool(level)


def _items(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _header_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise InputError(f"{path} is a pipe, socket or device, not a file")
    if status.st_size == 0:
        raise InputError(f"{path} is empty")
    data = _from_onnx(path) if _may_be_onnx(path) else _from_zip(path)
    if len(data) > MAX_HEADER_BYTES:
        raise InputError(f"the header of {path} is larger than {MAX_HEADER_BYTES} bytes; refused")
    return data


def _may_be_onnx(path: Path) -> bool:
    """An ONNX file has no mark of its own, but begins with a short field, and a zip with the letters PK."""
    with path.open("rb") as file:
        start = file.read(4)
    return start[:2] != b"PK" and (path.suffix.lower() == ".onnx" or start[:1] == b"\x08")


def _from_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        found = [info for info in archive.infolist() if info.filename.split("/")[1:] == ["extra", HEADER_NAME]]
        if not found:
            raise InputError(f"{path} has no header: rescompress did not write it")
        if len(found) > 1:
            raise InputError(f"{path} is damaged: it has {len(found)} headers")
        # The size that the zip claims may be a lie, so no more than the limit is unpacked either.
        with archive.open(found[0]) as member:
            return member.read(MAX_HEADER_BYTES + 1)


def _from_onnx(path: Path) -> bytes:
    found = [value for key, value in protobuf.onnx_metadata(path, 2 * MAX_HEADER_BYTES) if key == HEADER_NAME]
    if not found:
        raise InputError(f"{path} has no header: rescompress did not write it")
    if len(found) > 1:
        raise InputError(f"{path} is damaged: it has {len(found)} headers")
    return found[0]
