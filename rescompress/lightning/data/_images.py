"""Image files: reading, decoding, augmenting each with its own random numbers, and what to do about corrupt ones."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rescompress.errors import InputError, one_line
from rescompress.lightning.data._augment import Transform
from rescompress.lightning.data._base import Size
from rescompress.lightning.data._loader import Encoded, Loaded
from rescompress.lightning.data._order import drawn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
"""What Pillow and torchvision raise on a damaged file."""


def decode(data: bytes) -> Tensor:
    """Decode an image of any format that Pillow reads, in three channels.

    Shape:
        - Output: (3, H, W), uint8

    Raises:
        What is in UNREADABLE: as `pixels`.
    """
    # Not made contiguous: resizing is twice as fast while the channels of a pixel lie together.
    return torch.from_numpy(pixels(data, "RGB")).permute(2, 0, 1)


def pixels(data: bytes, mode: str) -> "np.ndarray[Any, Any]":
    """Decode an image of any format that Pillow reads, in one of Pillow's modes.

    Shape:
        - Output: (H, W, 3) for "RGB", (H, W) for "L", uint8

    Raises:
        What is in UNREADABLE: it is damaged or no image; the message says what is wrong with it.
    """
    if not data:
        raise OSError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert(mode))
    except UnidentifiedImageError as error:  # which says at what address in memory the bytes are
        raise OSError("no image that Pillow can read") from error
    except OSError as error:
        if "truncated" in str(error).lower():
            raise OSError("the file is cut short") from error
        raise


def decode_on(files: Sequence[Tensor], device: torch.device) -> list[Tensor | Exception]:
    """Decode files on a device, JPEG by its hardware decoder where there is one; errors in the place of broken ones.

    Shape:
        - Output: (3, H, W) each, uint8
    """
    with warnings.catch_warnings():
        # torchvision 0.29 says that TorchCodec is to take over; it is the one that decodes on the GPU until then.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return list(_on_device(files, device))
        except (RuntimeError, ValueError):  # one of them is damaged, or of another format: each by itself
            return [_decode_one(file, device) for file in files]


def decodes_jpeg(device: torch.device) -> bool:
    """Whether this torchvision decodes JPEG on this device: it may have been built without, and processors differ."""
    from torchvision.io import encode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in decode_on
        file = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
        try:
            return _on_device([file], device)[0].device.type == device.type
        except (RuntimeError, ValueError, OSError):
            return False


def _on_device(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    return list(decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device))


def _decode_one(file: Tensor, device: torch.device) -> Tensor | Exception:
    try:
        return _on_device([file], device)[0]
    except (RuntimeError, ValueError):
        try:
            return decode(file.numpy().tobytes()).to(device)
        except UNREADABLE as error:
            return error


Read = TypeVar("Read")


def readable(
    keys: Sequence[tuple[tuple[int, int], int]],
    length: int,
    read: Callable[[int, int], Read],
    name: Callable[[int], str],
    broken: list[tuple[str, str]],
    *,
    training: bool,
    corrupt: str,
) -> Iterator[tuple[Read, int, int]]:
    """Give what is read of each sample, its index and its seed; in training the next readable one for a broken one.

    Args:
        keys: ((index, seed), choice) of each sample.
        length: number of samples in the data.
        read: called with index and seed; raises what is in UNREADABLE.
        name: of the sample of an index.
        broken: gets (name, reason) of each that cannot be read.
        training: replace them.
        corrupt: "stop" ends at the first one.

    Raises:
        InputError: there is nothing to replace one with.
    """
    # A thousand broken files in a row are no accident, and reading on would look like a run that hangs.
    tries = min(length, 1000) if training else 1
    for (index, draw), _ in keys:
        for other in range(index, index + tries):
            other %= length
            try:
                found = read(other, draw)
            except UNREADABLE as error:
                broken.append((name(other), one_line(error)))
                if corrupt == "stop":
                    return
                continue
            yield found, other, draw
            break
        else:
            if training:
                raise InputError(f"{tries} files in a row cannot be read, such as {broken[-1]}; mend the data")


class ImageFiles:
    """Map-style images on disk.

    Paths are kept in one array: a list of strings is copied into every worker, reference count by reference count.

    Args:
        root: folder that the paths are relative to.
        paths: of the images.
        labels: class of each.
        transforms: one for each size; a key's second part says which.
        training: whether the samples get random numbers.
        corrupt: "stop" or "skip"; in training, a broken file is replaced by the next readable one.
        encoded: give the files as they are, to be decoded on the device.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        transforms: Sequence[Transform],
        sizes: Sequence[Size],
        *,
        training: bool,
        corrupt: str,
        encoded: bool,
    ) -> None:
        self.root = str(root)
        self.paths = np.array([path.encode() for path in paths], dtype=bytes)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.transforms = tuple(transforms)
        self.sizes = tuple(sizes)
        self.training = training
        self.corrupt = corrupt
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, keys: list[tuple[tuple[int, int], int]]) -> Loaded:
        choice = keys[0][1]
        read = as_they_are if self.encoded else Decoded(self.transforms[choice])
        broken: list[tuple[str, str]] = []

        def image(index: int, draw: int) -> Tensor:
            return read(Path(self.root, self.name(index)).read_bytes(), draw)

        options: Any = {"training": self.training, "corrupt": self.corrupt}
        found = list(readable(keys, len(self), image, self.name, broken, **options))
        return gathered(
            [image for image, _, _ in found],
            self.labels[[index for _, index, _ in found]],
            [self.name(index) for _, index, _ in found],
            [draw for _, _, draw in found] if self.training else None,
            self.sizes[choice] if self.encoded else None,
            broken,
        )

    def name(self, index: int) -> str:
        """Return a sample's path below the root."""
        return str(self.paths[index].decode())


def as_they_are(data: bytes, draw: int) -> Tensor:
    """Return the bytes of a file as a tensor."""
    if not data:
        raise OSError("the file is empty")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Decoded:
    """Decodes and transforms an image by its own random numbers."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, data: bytes, draw: int) -> Tensor:
        image = decode(data)
        with drawn(draw):
            return self.transform(image)


def gathered(
    images: list[Tensor],
    labels: Tensor,
    names: list[str],
    draws: list[int] | None,
    size: Size | None,
    broken: list[tuple[str, str]],
) -> Loaded:
    """Make a batch; files that are still to be decoded (vectors of bytes) stay apart."""
    together: Any = images
    if images:
        together = Encoded(images) if images[0].ndim == 1 else torch.stack(images)
    seeds = None if draws is None else torch.tensor(draws, dtype=torch.int64)
    return Loaded(together, labels, tuple(names), seeds, size, tuple(broken))
