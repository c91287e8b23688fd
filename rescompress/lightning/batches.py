"""What every DataModule of rescompress hands to the model, and what can be told of the batches of any other."""

from typing import Any, NamedTuple

from torch import Tensor

from rescompress.errors import InputError
from rescompress.inputs import tensors_of


class Batch(NamedTuple):
    """One batch, ready for the model; `rescompress.recover` reads it as a pair (images, labels).

    Logging a mean over batches needs `batch_size=len(batch.images)` in Lightning's `log`: it cannot tell the size of a
    batch in which there are strings.

    Attributes:
        images: normalised, on the device
        labels: class indices (B,); after mixing images, and for several labels per image, weights (B, classes); for
            dense prediction class indices (B, H, W), in which 255 is ignored
        names: file names or keys in shards, of the same length

    Shape:
        - images: (B, C, H, W)
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]


def images_of(batch: Any) -> Tensor:
    """Return the images (B, C, H, W) of a batch of any kind: its first tensor of four dimensions.

    Raises:
        InputError: there is none.
    """
    for tensor in tensors_of(batch):
        if tensor.ndim == 4:
            return tensor
    raise InputError(f"no images (B, C, H, W) in a batch of type {type(batch).__name__}; its first tensor must be them")


def samples_in(batch: Any) -> int:
    """Return how many samples a batch of any kind holds: the length of its first tensor."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), 0)


def shape_of(batch: Any) -> str:
    """Return the shape of the first tensor of a batch: 32x3x224x224."""
    tensors = tensors_of(batch)
    return "x".join(str(side) for side in tensors[0].shape) if tensors else ""
