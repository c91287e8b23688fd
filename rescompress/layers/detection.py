"""Boxes in image coordinates for torchvision's detectors whose maps are smaller than their anchors were laid out for.

A detector predicts boxes relative to anchors, and cuts regions out of its maps, as if these had their old strides. On
smaller maps it sees a smaller image: anchors are laid out on that one and scaled up, regions are scaled down to it.

Ren et al., "Faster R-CNN", https://arxiv.org/abs/1506.01497
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.wrap import Wrapped


class _Seen:
    """The batch of images that the maps seem to have been made of, for hosts that ask for its shape alone."""

    def __init__(self, tensors: Tensor, image_sizes: Any) -> None:
        self.tensors = tensors
        self.image_sizes = image_sizes


class ScaledAnchors(Wrapped):
    """Lay anchors out over the smaller image that the maps belong to, and scale them to the one that was given.

    Shape:
        - Input: images with `tensors` (B, C, H, W) and `image_sizes`, and maps [(B, C', h, w), ...]
        - Output: B tensors (anchors, 4) in pixels of the H x W images

    Attributes:
        stride: pixels per position of the first map, before any reduction
    """

    def __init__(self, inner: nn.Module, stride: int) -> None:
        super().__init__(inner)
        self.stride = stride

    def num_anchors_per_location(self) -> list[int]:
        """Return what the inner generator says."""
        return self.inner.num_anchors_per_location()  # type: ignore[no-any-return, operator]

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        images, first = image_list.tensors, feature_maps[0]
        height, width = first.shape[-2] * self.stride, first.shape[-1] * self.stride
        seen = images.new_empty((1, 1, 1, 1)).expand(len(images), images.shape[1], height, width)
        boxes: list[Tensor] = self.inner(_Seen(seen, image_list.image_sizes), feature_maps)
        down, right = images.shape[-2] / height, images.shape[-1] / width
        return [box * box.new_tensor([right, down, right, down]) for box in boxes]

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class ScaledDefaultBoxes(Wrapped):
    """Default boxes of an SSD on smaller maps: as large as what the network sees, and spread over the whole image.

    Shape:
        - Output: B tensors (boxes, 4) in pixels of the images

    Attributes:
        factor: (down, right), old side over new side of the maps
        tiled: whether the host lays the centres out at fixed steps of pixels; else it spreads them over any map
    """

    def __init__(self, inner: nn.Module, factor: tuple[float, float], tiled: bool) -> None:
        super().__init__(inner)
        self.factor = factor
        self.tiled = tiled

    def num_anchors_per_location(self) -> list[int]:
        """Return what the inner generator says."""
        return self.inner.num_anchors_per_location()  # type: ignore[no-any-return, operator]

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        scaled = []
        for boxes in self.inner(image_list, feature_maps):
            factor = boxes.new_tensor([self.factor[1], self.factor[0]])
            centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * factor
            centre = centre * factor if self.tiled else centre
            scaled.append(torch.cat([centre - half, centre + half], dim=1))
        return scaled

    def extra_repr(self) -> str:
        return f"factor={self.factor}, tiled={self.tiled}"


class ScaledRegions(Wrapped):
    """Cut regions out of maps that belong to a smaller image than the one that the boxes are given for.

    Shape:
        - Input: maps {name: (B, C, h, w)}, boxes [(regions, 4), ...] and image sizes [(H, W), ...] in pixels
        - Output: the inner module's, (all regions, C, size, size)

    Attributes:
        stride: pixels per position of the first map, before any reduction
        size_divisible: the host pads its images to multiples of it
    """

    def __init__(self, inner: nn.Module, stride: int, size_divisible: int) -> None:
        super().__init__(inner)
        self.stride = stride
        self.size_divisible = size_divisible

    @property
    def output_size(self) -> Any:
        """What the inner module says: its hosts ask for it."""
        return self.inner.output_size

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        first = next(iter(x.values()))
        seen = [side * self.stride for side in first.shape[-2:]]
        whole = [self._padded(max(shape[axis] for shape in image_shapes)) for axis in (0, 1)]
        down, right = seen[0] / whole[0], seen[1] / whole[1]
        smaller = [box * box.new_tensor([right, down, right, down]) for box in boxes]
        shapes = [(round(height * down), round(width * right)) for height, width in image_shapes]
        return self.inner(x, smaller, shapes)  # type: ignore[no-any-return]

    def _padded(self, side: int) -> int:
        return math.ceil(side / self.size_divisible) * self.size_divisible

    def extra_repr(self) -> str:
        return f"stride={self.stride}, size_divisible={self.size_divisible}"


class FillToKernel(nn.Module):
    """Zero-pad a map at its end to the kernel of the convolution behind it, which would not run on fewer positions.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, C, max(H, kernel), max(W, kernel))
    """

    def __init__(self, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        below, right = max(self.kernel[0] - x.shape[2], 0), max(self.kernel[1] - x.shape[3], 0)
        return F.pad(x, [0, right, 0, below])

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}"
