"""timm's Eva: EVA, EVA02, DINOv3, Perception Encoder, Sapiens2 and ViTs with rotary position embeddings.

Fang et al., "EVA-02", https://arxiv.org/abs/2303.11331; Siméoni et al., "DINOv3", https://arxiv.org/abs/2508.10104
"""

from typing import Any

from torch import nn

from rescompress.anatomy import Anatomy, Grid, ViTAnatomy
from rescompress.families._base import Family, image_of
from rescompress.families._vit import patch_embedding, refit_rotary


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes."""
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    return ViTAnatomy(
        family=FAMILY.name,
        pos_embed=None if host.pos_embed is None else "pos_embed",
        pos_embed_prefix_tokens=0 if host.no_embed_class else host.num_prefix_tokens,
        num_prefix_tokens=host.num_prefix_tokens,
        norm="norm",
        mean_pooled=host.attn_pool is None and host.global_pool == "avg",
        pools_all=host.attn_pool is not None or host.global_pool == "avgmax",
        refit=refit,
        **patch_embedding(host, (height, width)),
    )


def refit(host: Any, anatomy: Anatomy, grid: Grid) -> None:
    """Let the rotary table span on the new grid what it spanned on the old one."""
    if anatomy.grid is not None:
        refit_rotary(host, "rope", anatomy.grid, grid)


FAMILY = Family(
    name="eva",
    summary="ViTs of timm with rotary position embeddings (EVA, EVA02, DINOv3, PE, Sapiens2, RoPE-ViT, ...)",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=("timm.models.eva.Eva",),
    describe=describe,
)
