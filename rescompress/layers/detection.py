"""Boxes in image coordinates for torchvision's detectors whose maps are smaller than their anchors were laid out for.

A detector predicts boxes relative to anchors, and cuts regions out of its maps, as if these had their old strides. On
smaller maps it sees a smaller image: anchors are laid out on that one and scaled up, regions are scaled down to it.

Ren et al., "Faster R-CNN", https://arxiv.org/abs/1506.01497
"""

import math
import sys
from typing import Any, Dict, List, Tuple, TypeAlias  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.wrap import Wrapped

ImageList: TypeAlias = Any
"""torchvision's batch of images; the class itself once a detector has been scripted."""


class _ReadsImageList(Wrapped):
    """Base of modules whose forward takes the host's batch of images.

    TorchScript looks its class up by the name in this file, where torchvision is not imported.
    """

    def __prepare_scriptable__(self) -> "_ReadsImageList":
        """Give the name its class, which is imported where there is a detector; the compiler calls this first."""
        globals()["ImageList"] = sys.modules["torchvision.models.detection.image_list"].ImageList
        return self


class ScaledAnchors(_ReadsImageList):
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

    def forward(self, image_list: ImageList, feature_maps: List[Tensor]) -> List[Tensor]:  # noqa: UP006
        images, first = image_list.tensors, feature_maps[0]
        height, width = first.shape[2] * self.stride, first.shape[3] * self.stride
        # The inner generator asks the batch for its shape alone, and the batch is this call's own.
        image_list.tensors = images.new_empty([1, 1, 1, 1]).expand(images.shape[0], images.shape[1], height, width)
        boxes = self.inner(image_list, feature_maps)
        image_list.tensors = images
        down, right = images.shape[2] / height, images.shape[3] / width
        scaled: List[Tensor] = []  # noqa: UP006
        for box in boxes:
            scaled.append(box * torch.tensor([right, down, right, down], dtype=box.dtype, device=box.device))
        return scaled

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class ScaledDefaultBoxes(_ReadsImageList):
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

    def forward(self, image_list: ImageList, feature_maps: List[Tensor]) -> List[Tensor]:  # noqa: UP006
        scaled: List[Tensor] = []  # noqa: UP006
        for boxes in self.inner(image_list, feature_maps):
            factor = torch.tensor([self.factor[1], self.factor[0]], dtype=boxes.dtype, device=boxes.device)
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

    def forward(
        self,
        x: Dict[str, Tensor],  # noqa: UP006
        boxes: List[Tensor],  # noqa: UP006
        image_shapes: List[Tuple[int, int]],  # noqa: UP006
    ) -> Tensor:
        first = list(x.values())[0]  # noqa: RUF015  TorchScript has no iterators
        height, width = 0, 0
        for shape in image_shapes:
            height, width = max(height, shape[0]), max(width, shape[1])
        down = first.shape[2] * self.stride / self.padded(height)
        right = first.shape[3] * self.stride / self.padded(width)
        smaller: List[Tensor] = []  # noqa: UP006
        for box in boxes:
            smaller.append(box * torch.tensor([right, down, right, down], dtype=box.dtype, device=box.device))
        shapes: List[Tuple[int, int]] = []  # noqa: UP006
        for shape in image_shapes:
            shapes.append((int(round(shape[0] * down)), int(round(shape[1] * right))))  # noqa: RUF046  it gives floats
        return self.inner(x, smaller, shapes)  # type: ignore[no-any-return]

    def padded(self, side: int) -> int:
        """Return the side of the batch that holds images of this side."""
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
