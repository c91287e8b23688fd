"""Read the metadata of an ONNX file without the onnx package, jumping over its graph and weights unread.

An ONNX file is one protobuf message: https://protobuf.dev/programming-guides/encoding. Its field 14, metadata_props,
is a list of messages with a key (field 1) and a value (field 2).
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_METADATA, _KEY, _VALUE = 14, 1, 2

MOST_FIELDS = 100_000
"""An honest model has some hundred; a file of nothing but empty fields would be read for hours."""

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def onnx_metadata(path: Path, limit: int) -> Iterator[tuple[str, bytes]]:
    """Yield each key and value of the model's metadata.

    Args:
        path: of the file.
        limit: bytes that one entry may take; larger ones are errors.

    Raises:
        ValueError: the file is no protobuf message, or ends early.
    """
    with path.open("rb") as file:
        for entry in _fields(file, os.fstat(file.fileno()).st_size, {_METADATA}, limit):
            parts = dict(_pairs(entry[1]))
            yield parts.get(_KEY, b"").decode("utf-8", "replace"), parts.get(_VALUE, b"")


def _pairs(message: bytes) -> Iterator[tuple[int, bytes]]:
    return _fields(io.BytesIO(message), len(message), {_KEY, _VALUE}, len(message))


def _fields(file: BinaryIO, end: int, wanted: set[int], limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the wanted fields of a message; all others are jumped over."""
    for _ in range(MOST_FIELDS):
        if file.tell() >= end:
            return
        number, kind = divmod(_varint(file), 8)
        if kind == _VARINT:
            _varint(file)
            continue
        if kind not in (_EIGHT_BYTES, _BYTES, _FOUR_BYTES) or number == 0:
            raise ValueError(f"it is no ONNX file (a field {number} of kind {kind})")
        length = _varint(file) if kind == _BYTES else {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}[kind]
        if file.tell() + length > end:
            raise ValueError(f"field {number} ends {file.tell() + length - end} bytes behind the end of the file")
        if kind == _BYTES and number in wanted:
            if length > limit:
                raise ValueError(f"field {number} is larger than {limit} bytes")
            yield number, file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)
    raise ValueError(f"it has more than {MOST_FIELDS} fields")


def _varint(file: BinaryIO) -> int:
    """Read a number of seven bits a byte, the lowest first, until a byte without the highest bit."""
    value = 0
    for position in range(10):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 0x7F) << (7 * position)
        if byte[0] < 0x80:
            return value
    raise ValueError("it holds a number of more than ten bytes")
