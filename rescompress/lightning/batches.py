"""What every DataModule of rescompress hands to the model: images, labels and the names of the files they came from."""

from typing import NamedTuple

from torch import Tensor


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
