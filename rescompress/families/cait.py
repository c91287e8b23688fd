"""CaiT of timm: a ViT without a class token, which joins in class-attention blocks at the end.

Touvron et al., "Going deeper with Image Transformers", https://arxiv.org/abs/2103.17239
"""

from typing import Any

from torch import nn

from rescompress.anatomy import ViTAnatomy
from rescompress.families._base import Family, image_of
from rescompress.families._timm import patches, sequence


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes; the blocks are those of the patch tokens."""
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    parts = patches(model, "patch_embed", (height, width))
    return ViTAnatomy(
        family=FAMILY.name,
        pos_embed="pos_embed",
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=1,
        prefix_from_block=len(host.blocks),
        pools_all=True,
        **parts,
        **sequence("blocks", host.blocks, parts["pos_embed_grid"]),
    )


FAMILY = Family(
    name="cait",
    summary="CaiT of timm: class attention behind the blocks of the patch tokens",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=("timm.models.cait.Cait",),
    describe=describe,
)
