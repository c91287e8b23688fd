"""EfficientFormer and EfficientFormerV2 of timm: convolutions, then attention with biases by distance.

Li et al., "EfficientFormer", https://arxiv.org/abs/2206.01191; "Rethinking Vision Transformers for MobileNet Size and
Speed", https://arxiv.org/abs/2212.08059
"""

from typing import Any

from torch import nn

from rescompress.anatomy import ConvAnatomy
from rescompress.families._attention_biases import refit
from rescompress.families._base import Family, class_names
from rescompress.families._windows import describe_stem

V1 = "timm.models.efficientformer.EfficientFormer"
V2 = "timm.models.efficientformer_v2.EfficientFormerV2"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the first convolution of the stem.

    The map in front of the last stage must have even sides: the third stage of V2 halves it for its attention and
    doubles it again, and `forward_intermediates` of V1 takes the half of it for the size of its last map. It is an
    eighth of the stem's map: of 112 positions 48 are the nearest to a half, as 56 would leave 7 there.
    """
    fqn = "stem.conv1.conv" if V2 in class_names(model) else "stem.conv1"
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv=fqn, multiple=16, refit=refit)


FAMILY = Family(
    name="efficientformer",
    summary="EfficientFormer and EfficientFormerV2 of timm",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(V1, V2),
    describe=describe,
)
