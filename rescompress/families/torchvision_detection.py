"""Detectors of torchvision: Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, SSD and SSDLite.

Their boxes stay in the coordinates of the images that were given: anchors and regions follow the smaller maps.
Ren et al., "Faster R-CNN", https://arxiv.org/abs/1506.01497
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.errors import UnsupportedModelError
from rescompress.families import convolutional
from rescompress.families._base import Family, class_names
from rescompress.layers.detection import FillToKernel, ScaledAnchors, ScaledDefaultBoxes, ScaledRegions
from rescompress.layers.resize import ResizedConv2d

SSD = "torchvision.models.detection.ssd.SSD"
ANCHORS = "torchvision.models.detection.anchor_utils.AnchorGenerator"
DEFAULT_BOXES = "torchvision.models.detection.anchor_utils.DefaultBoxGenerator"
REGIONS = "torchvision.ops.poolers.MultiScaleRoIAlign"


@dataclass(frozen=True, kw_only=True)
class DetectorAnatomy(ConvAnatomy):
    """A detector over the maps of a convolutional backbone.

    Attributes:
        map_stride: pixels per position of the first of those maps, before any reduction
    """

    map_stride: int


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DetectorAnatomy:
    """Find the stem by a run of the detector, and the stride of its maps by one of its backbone."""
    host: Any = model
    probed = convolutional.describe(model, args, kwargs)
    divisible = int(host.transform.size_divisible)
    generator = _generator(host)
    if not {ANCHORS, DEFAULT_BOXES} & set(class_names(generator)):
        raise UnsupportedModelError(
            f"this {type(model).__name__} lays anchors out with {class_names(generator)[0]}; how they follow a smaller "
            "map is known of torchvision's AnchorGenerator and DefaultBoxGenerator alone"
        )
    size = probed.input_size if probed.reader is None else probed.reader.size
    stem_stride = max(1, round(size[0] / probed.stem_grid[0]))
    fields = {name: getattr(probed, name) for name in ConvAnatomy.__dataclass_fields__}
    fields |= {
        "family": FAMILY.name,
        # The host pads its images so that every stride divides them: strides of whole pixels, and so must ours be.
        "multiple": max(1, divisible // stem_stride),
        "refit": refit,
        "restored": (),
        "restored_sizes": (),
    }
    return DetectorAnatomy(map_stride=_map_stride(host), **fields)


def _generator(host: Any) -> nn.Module:
    generator: nn.Module = host.rpn.anchor_generator if hasattr(host, "rpn") else host.anchor_generator
    return generator


def _map_stride(host: Any) -> int:
    """Return the stride of the first map that the backbone gives, from a run on the meta device."""
    backbone: Any = surgery.clone_shared(host.backbone, "meta").eval()
    side = 512
    with torch.no_grad():
        maps = backbone(torch.empty(1, 3, side, side, device="meta", dtype=next(backbone.parameters()).dtype))
    first = next(iter(maps.values())) if isinstance(maps, dict) else maps
    return round(side / int(first.shape[-1]))


def refit(host: Any, anatomy: DetectorAnatomy, grid: Grid) -> None:
    """Let anchors, default boxes and regions follow the smaller maps."""
    fqn = "rpn.anchor_generator" if hasattr(host, "rpn") else "anchor_generator"
    generator: Any = surgery.get(host, fqn)
    if isinstance(generator, ScaledDefaultBoxes):
        factor = (anatomy.stem_grid[0] / grid[0], anatomy.stem_grid[1] / grid[1])
        generator.factor = (generator.factor[0] * factor[0], generator.factor[1] * factor[1])
    elif DEFAULT_BOXES in class_names(generator):
        factor = (anatomy.stem_grid[0] / grid[0], anatomy.stem_grid[1] / grid[1])
        surgery.swap(host, fqn, ScaledDefaultBoxes(generator, factor, tiled=generator.steps is not None))
        _fill_small_maps(host)
    elif not isinstance(generator, ScaledAnchors):
        surgery.swap(host, fqn, ScaledAnchors(generator, anatomy.map_stride))
    for name, module in list(host.named_modules()):
        if REGIONS in class_names(module) and not name.endswith(".inner"):
            wrapped = ScaledRegions(module, anatomy.map_stride, int(host.transform.size_divisible))
            surgery.swap(host, name, wrapped)


def _fill_small_maps(host: Any) -> None:
    """Let the last layers of an SSD, whose kernels shrink the map without padding, run on maps below their kernel."""
    for name, module in list(host.backbone.named_modules()):
        plain = type(module) is nn.Conv2d and module.padding == (0, 0) and max(module.kernel_size) > 1
        if plain and max(module.stride) == 1:
            fill = FillToKernel((module.kernel_size[0], module.kernel_size[1]))
            surgery.swap(host, f"backbone.{name}", ResizedConv2d.from_conv(module, before=fill))


FAMILY = Family(
    name="torchvision_detection",
    summary="detectors of torchvision: Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, SSD, SSDLite",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(
        "torchvision.models.detection.generalized_rcnn.GeneralizedRCNN",
        "torchvision.models.detection.retinanet.RetinaNet",
        "torchvision.models.detection.fcos.FCOS",
        SSD,
    ),
    describe=describe,
)
