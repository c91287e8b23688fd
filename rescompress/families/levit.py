"""LeViT of timm, with and without its distillation head: attention biases by distance behind a stem of convolutions.

Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference",
https://arxiv.org/abs/2104.01136
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy
from rescompress.errors import UnsupportedModelError
from rescompress.families._attention_biases import refit
from rescompress.families._base import Family
from rescompress.families._windows import describe_stem


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the first convolution of the stem, with its norm: timm fuses the two, and a resize between would be lost.

    Raises:
        UnsupportedModelError: the stem is another network.
    """
    fqn = "stem.conv1"
    try:
        surgery.get(model, fqn)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has a network of its own as its stem; known is LeViT's stem of convolutions"
        ) from error
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv=fqn, refit=refit)


FAMILY = Family(
    name="levit",
    summary="LeViT of timm, distilled or not",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("timm.models.levit.Levit",),
    describe=describe,
)
