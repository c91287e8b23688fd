"""Put a checksum at the end of an ONNX file: the format has none, and a flipped bit in the weights would go unseen.

It is one more entry of the model's metadata. A protobuf message may be continued by appending to it, so every reader
of ONNX takes the file as before. https://protobuf.dev/programming-guides/encoding/#last-one-wins
"""

import hashlib
from pathlib import Path

from rescompress.errors import InputError

KEY = "rescompress.sha256"


def _entry(digest: str) -> bytes:
    """Return a field 14 (metadata_props) with key (field 1) and value (field 2), both shorter than 128 bytes."""
    pair = b"".join(bytes([tag, len(text)]) + text for tag, text in ((0x0A, KEY.encode()), (0x12, digest.encode())))
    return bytes([0x72, len(pair)]) + pair


LENGTH = len(_entry("0" * 64))


def seal(path: Path) -> None:
    """Append the checksum of all bytes of the file."""
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(_entry(digest))


def check_seal(path: Path) -> None:
    """Refuse a file that does not end with the checksum of all bytes before it.

    Raises:
        InputError: it was damaged or changed after it was written.
    """
    data = path.read_bytes()
    if data[-LENGTH:] != _entry(hashlib.sha256(memoryview(data)[:-LENGTH]).hexdigest()):
        raise InputError(f"{path} is damaged or was changed: its checksum is not that of its content")
