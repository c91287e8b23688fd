"""ViTs of timm that are made for images of any size: NaFlexVit and the vision towers of Gemma 4, Qwen3-VL and DeepSeek.

Dehghani et al., "Patch n' Pack: NaViT", https://arxiv.org/abs/2307.06304; Bai et al., "Qwen3-VL Technical Report",
https://arxiv.org/abs/2511.21631

Their positions are the indices of patches, at whatever size of image, and their learned position embeddings are
resampled while they run: on another grid nothing has to be laid out anew.
"""

from dataclasses import replace
from typing import Any, cast

from torch import nn

from rescompress.anatomy import Anatomy, Grid, GridAttribute, ViTAnatomy, cells, inside
from rescompress.families._base import Family, class_names, image_of
from rescompress.families._timm import sequence
from rescompress.families._vit import pair, patch_embedding

NAFLEX = "timm.models.naflexvit.NaFlexVit"
GEMMA = "timm.models.gemma4_vit.Gemma4VitEncoder"
CLASSIFIERS = (
    "timm.models.gemma4_vit.Gemma4VitClassifier",
    "timm.models.qwen3_vit.Qwen3VitClassifier",
    "timm.models.deepseek_vit.DeepseekVitClassifier",
)
ENCODERS = (GEMMA, "timm.models.qwen3_vit.Qwen3VitEncoder", "timm.models.deepseek_vit.DeepseekVitEncoder")

_INTERPOLATOR = (
    GridAttribute(name="embeds.patch_interpolator.base_patch_size", holds="patch"),
    GridAttribute(name="embeds.patch_interpolator.resampler.orig_size", holds="patch"),
)


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes."""
    host: Any = model
    names = class_names(model)
    height, width = image_of(model, args, kwargs).shape[-2:]
    size = (int(height), int(width))
    if NAFLEX in names:
        return _describe_naflex(host, size)
    if any(classifier in names for classifier in CLASSIFIERS):
        anatomy = cast(ViTAnatomy, inside(_describe_encoder(host.encoder, size), "encoder"))
        copies = tuple(GridAttribute(name=name, holds="patch") for name in ("patch_size",) if hasattr(host, name))
        return replace(
            anatomy,
            grid_attributes=anatomy.grid_attributes + copies,
            mean_pooled=not host.encoder_pool and host.global_pool == "avg",
        )
    return _describe_encoder(host, size)


def _describe_encoder(host: Any, input_size: Grid) -> ViTAnatomy:
    return _describe_gemma(host, input_size) if GEMMA in class_names(host) else _describe_tower(host, input_size)


def _describe_naflex(host: Any, input_size: Grid) -> ViTAnatomy:
    embeds = host.embeds
    patch, pads, linear = pair(embeds.patch_size), bool(embeds.dynamic_img_pad), bool(embeds.is_linear)
    grid = cells(input_size, patch, pads)
    mean = host.attn_pool is None and host.global_pool == "avg"
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=input_size,
        image_size=input_size,
        patch_conv="embeds.proj",
        patch_layout=("hwc" if embeds.channels_last else "chw") if linear else None,
        image_entry="embeds" if linear else None,
        patch_size=patch,
        pads_image=pads,
        pos_embed=None,
        pos_embed_grid=grid,
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=host.num_prefix_tokens,
        # A host that cuts the patches itself does so by this attribute.
        grid_attributes=(
            GridAttribute(name="embeds.patch_size", holds="patch" if linear else "pixels_per_token_pair"),
            *(_INTERPOLATOR if linear and embeds.patch_interpolator is not None else ()),
        ),
        grid_method="embeds.dynamic_feat_size",
        fixed_input=False,
        norm="norm",
        mean_pooled=mean and not host.pool_include_prefix,
        pools_all=host.attn_pool is not None or host.global_pool == "avgmax" or (mean and host.pool_include_prefix),
        refit=refit_naflex,
        **sequence("blocks", host.blocks, grid),
    )


def refit_naflex(host: Any, anatomy: Anatomy, grid: Grid) -> None:
    """Forget the matrices that NaFlex keeps for patches of other sizes: they resample kernels of the old one."""
    if host.embeds.patch_interpolator is not None:
        host.embeds.patch_interpolator.resampler._pinv_cache_map.clear()


def _describe_gemma(host: Any, input_size: Grid) -> ViTAnatomy:
    patch = pair(host.patch_size)
    grid = cells(input_size, patch)
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=input_size,
        image_size=input_size,
        patch_conv="patch_embed.input_proj",
        patch_layout="chw",
        image_entry="patch_embed",
        patch_size=patch,
        # The soft tokens are means over squares of this side.
        multiple=host.pooling_kernel_size if host.global_pool == "soft" else 1,
        pos_embed=None,
        pos_embed_grid=grid,
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=0,
        grid_attributes=(
            GridAttribute(name="patch_embed.patch_size", holds="patch"),
            GridAttribute(name="patch_size", holds="patch"),
        ),
        fixed_input=False,
        dense_tokens=True,
        mean_pooled=host.global_pool == "avg",
        **sequence("blocks", host.blocks, grid),
    )


def _describe_tower(host: Any, input_size: Grid) -> ViTAnatomy:
    merger = getattr(host, "merger", None)
    return ViTAnatomy(
        family=FAMILY.name,
        multiple=1 if merger is None else merger.merge_size,
        pos_embed=None,
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=0,
        norm="norm" if hasattr(host, "norm") else None,
        dense_tokens=True,
        mean_pooled=host.global_pool == "avg",
        **patch_embedding(host, input_size),
    )


FAMILY = Family(
    name="flex_vit",
    summary="ViTs of timm for images of any size (NaFlexVit, and the towers of Gemma 4, Qwen3-VL and DeepSeek)",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=(NAFLEX, *CLASSIFIERS, *ENCODERS),
    describe=describe,
)
