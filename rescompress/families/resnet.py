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


def knows(model: nn.Module) -> bool:
    """Whether the first convolution is where ResNets have it; a stem that was built anew is left to the probe."""
    return _stem(model) is not None or _is_quantized(model)


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the first convolution by name: `conv1`, or the first one inside it when the stem is deep."""
    fqn = _stem(model)
    if fqn is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is quantized already: its conv1 is a "
            f"{class_names(surgery.get(model, 'conv1'))[0]}; compress the float model (torchvision: quantize=False), "
            "with Quantize as the last step for integers"
        )
    height, width = image_of(model, args, kwargs).shape[-2:]
    grid = surgery.output_grid(surgery.get(model, fqn), (height, width))
    return ConvAnatomy(
        family=FAMILY.name,
        input_size=(height, width),
        first_conv=fqn,
        stem_grid=grid,
        # Blur pooling (ResNet-AA) and plain strides round odd sides in opposite ways, and meet again in the shortcut.
        multiple=side_multiple(model, fqn, grid, args, kwargs),
    )


def _stem(model: nn.Module) -> str | None:
    modules = dict(model.named_modules())
    return next((fqn for fqn in ("conv1", "conv1.0") if isinstance(modules.get(fqn), nn.Conv2d)), None)


def _is_quantized(model: nn.Module) -> bool:
    return any(".quantized" in kind for kind in class_names(getattr(model, "conv1", None)))


FAMILY = Family(
    name="resnet",
    summary="ResNets of timm and torchvision, deep stems too",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.resnet.ResNet", "torchvision.models.resnet.ResNet"),
    describe=describe,
    knows=knows,
)
