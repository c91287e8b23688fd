"""ResNets of timm and torchvision, deep stems too.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of
from rescompress.families._probing import side_multiple


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the first convolution by name: `conv1`, or the first one inside it when the stem is deep."""
    stem = surgery.get(model, "conv1")
    if any(".quantized" in kind for kind in class_names(stem)):
        raise UnsupportedModelError(
            f"this {type(model).__name__} is quantized already: its conv1 is a {class_names(stem)[0]}; compress the "
            "float model (torchvision: quantize=False), with Quantize as the last step for integers"
        )
    fqn = "conv1" if isinstance(stem, nn.Conv2d) else "conv1.0"
    conv = surgery.get(model, fqn)
    if not isinstance(conv, nn.Conv2d):
        raise UnsupportedModelError(f"{fqn!r} of {type(model).__name__} is a {type(conv).__name__}, not a convolution")
    height, width = image_of(model, args, kwargs).shape[-2:]
    grid = surgery.output_grid(conv, (height, width))
    return ConvAnatomy(
        family=FAMILY.name,
        input_size=(height, width),
        first_conv=fqn,
        stem_grid=grid,
        # Blur pooling (ResNet-AA) and plain strides round odd sides in opposite ways, and meet again in the shortcut.
        multiple=side_multiple(model, fqn, grid, args, kwargs),
    )


FAMILY = Family(
    name="resnet",
    summary="ResNets of timm and torchvision, deep stems too",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.resnet.ResNet", "torchvision.models.resnet.ResNet"),
    describe=describe,
)
