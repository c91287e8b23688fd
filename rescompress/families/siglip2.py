"""Vision models of SigLIP 2 in its NaFlex form: they are given patches, of images of any shape.

Tschannen et al., "SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic Understanding, Localization,
and Dense Features", https://arxiv.org/abs/2502.14786

Checkpoints of SigLIP 2 for one size are of the SigLIP class in transformers, and of its family here.
"""

from dataclasses import replace
from typing import Any, cast

from torch import nn

from rescompress.anatomy import ViTAnatomy, cells, inside
from rescompress.families._base import Family, class_names, image_of

_MODELING = "transformers.models.siglip2.modeling_siglip2"
TOWER = f"{_MODELING}.Siglip2VisionModel"
CLASSIFIER = f"{_MODELING}.Siglip2ForImageClassification"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the tower; a classifier pools by the mask that it is given, so it is the host then."""
    host: Any = model
    if CLASSIFIER in class_names(model):
        tower = describe(host.vision_model, args, kwargs)
        return replace(cast(ViTAnatomy, inside(tower, "vision_model")), host="")
    height, width = image_of(model, args, kwargs).shape[-2:]
    size = (int(height), int(width))
    side = int(host.config.patch_size)
    grid = cells(size, (side, side))
    blocks = tuple(f"encoder.layers.{i}" for i in range(len(host.encoder.layers)))
    places = len(blocks) + 1
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=size,
        image_size=size,
        given_patches=True,
        patch_conv="embeddings.patch_embedding",
        patch_layout="hwc",
        patch_size=(side, side),
        # The host resamples its own for every image.
        pos_embed=None,
        pos_embed_grid=grid,
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=0,
        fixed_input=False,
        norm="post_layernorm",
        pools_all=True,
        blocks=blocks,
        grids=(grid,) * places,
        num_patch_tokens=(grid[0] * grid[1],) * places,
    )


FAMILY = Family(
    name="siglip2",
    summary="vision models of SigLIP 2 for images of any shape, given as patches (NaFlex; transformers)",
    methods=("patch_resize", "input_resize", "quantize"),
    hosts=(TOWER, CLASSIFIER),
    describe=describe,
)
