"""Images that are given as sequences of patches, of any shape and padded to one length, made smaller before the model.

Dehghani et al., "Patch n' Pack: NaViT", https://arxiv.org/abs/2307.06304; Tschannen et al., "SigLIP 2",
https://arxiv.org/abs/2502.14786 (NaFlex)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""The arguments in which transformers gives such images, in the order of the hosts' forwards."""


class ResizedPatches:
    """Forward pre-hook that puts every image together, resizes it and cuts it into fewer patches, or larger ones.

    An image of h x w patches becomes one of max(1, floor(h * scale)) x max(1, floor(w * scale)), cut short where a very
    long one would not fit; sequences of N are then of floor(N * scale * scale). A hook, for what is outside the
    embedding (attention, pooling heads) reads mask and shapes too.

    Shape:
        - pixel_values: (B, N, P * P * C), rows before columns before channels, to (B, M, Q * Q * C)
        - pixel_attention_mask: (B, N), or None where nothing is padded, to (B, M)
        - spatial_shapes: (B, 2), (height, width) of each image in patches

    Attributes:
        given: side P in pixels of the patches that the caller cuts
        patch: side Q of those that the model reads
        scale: new side over old side of the grid of patches, at most 1
        mode: as of `torch.nn.functional.interpolate`
        antialias: low-pass filter before sampling
    """

    def __init__(self, given: int, patch: int, scale: float, mode: str = "bilinear", antialias: bool = True) -> None:
        self.given = given
        self.patch = patch
        self.scale = scale
        self.mode = mode
        self.antialias = antialias

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(NAMES, args, strict=False)) | kwargs
        patches, mask, shapes = (named.get(name) for name in NAMES)
        if not isinstance(patches, Tensor) or not isinstance(shapes, Tensor):
            raise ValueError("a model that resizes its images needs pixel_values and spatial_shapes, as tensors")
        resized = self.resized(patches, mask, shapes)
        return (*resized, *args[len(NAMES) :]), {name: one for name, one in kwargs.items() if name not in NAMES}

    def target(self, shapes: Tensor, length: int) -> Tensor:
        """Return the shapes (B, 2) of the resized images, of at most `length` patches each."""
        # What is added is more than float64 loses of a scale like 2/3, and far less than one patch.
        scaled = (shapes.double() * self.scale + 1e-9).floor().to(shapes.dtype)
        height = scaled[:, 0].clamp(1, length)
        return torch.stack(
            (height, scaled[:, 1].clamp(min=1).minimum(torch.full_like(height, length) // height)), dim=1
        )

    def length(self, given: int) -> int:
        """Return the length of sequences that were `given` long."""
        return max(1, int(given * self.scale * self.scale + 1e-9))

    def resized(self, patches: Tensor, mask: Tensor | None, shapes: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the arguments for the resized images."""
        given = patches.shape[1]
        length = self.length(given)
        target = self.target(shapes, length)
        sequences = []
        for image, old, new in zip(patches, shapes, target, strict=True):
            rows, columns = _counts(old, given)
            cut = self._image_resized(image[: rows * columns], (rows, columns), _counts(new, length))
            sequences.append(F.pad(cut, (0, 0, 0, length - cut.shape[0])))
        if mask is not None or self.scale < 1:
            dtype = torch.int64 if mask is None else mask.dtype
            filled = torch.arange(length, device=target.device)[None] < target.prod(dim=1, keepdim=True)
            mask = filled.to(dtype=dtype, device=patches.device)
        return torch.stack(sequences), mask, target

    def _image_resized(self, patches: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        rows, columns = old
        side, wanted = self.given, self.patch
        image = patches.reshape(rows, columns, side, side, -1)
        image = image.permute(4, 0, 2, 1, 3).reshape(1, -1, rows * side, columns * side)
        size = (new[0] * wanted, new[1] * wanted)
        if self.scale < 1 or side != wanted:
            # Not every device filters in half precision.
            wide = image.float() if self.antialias and image.dtype in (torch.float16, torch.bfloat16) else image
            image = F.interpolate(wide, size=size, mode=self.mode, antialias=self.antialias).to(image.dtype)
        cut = image.reshape(-1, new[0], wanted, new[1], wanted)
        return cut.permute(1, 3, 2, 4, 0).reshape(new[0] * new[1], -1)


def _counts(shape: Tensor, most: int) -> tuple[int, int]:
    """Return the (height, width) of a shape as numbers; what exports the model learns of their bounds."""
    height, width = shape.tolist()
    torch._check(height > 0, lambda: f"spatial_shapes must be positive, got {height} x {width} patches")
    torch._check(width > 0, lambda: f"spatial_shapes must be positive, got {height} x {width} patches")
    torch._check(
        height * width <= most, lambda: f"spatial_shapes says {height} x {width} patches, more than the {most} given"
    )
    return height, width
