"""Plain Vision Transformers of timm and torchvision: class, distillation and register tokens, any pooling head.

Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, GridAttribute, ViTAnatomy, cells
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of
from rescompress.families._timm import sequence
from rescompress.families._vit import pair, patch_embedding

TIMM = "timm.models.vision_transformer.VisionTransformer"
HYBRID = "timm.layers.hybrid_embed.HybridEmbed"
TORCHVISION = "torchvision.models.vision_transformer.VisionTransformer"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes."""
    height, width = image_of(model, args, kwargs).shape[-2:]
    return (_describe_timm if TIMM in class_names(model) else _describe_torchvision)(model, (height, width))


def _describe_timm(model: Any, input_size: Grid) -> ViTAnatomy:
    hybrid = HYBRID in class_names(model.patch_embed)
    prefix = model.num_prefix_tokens
    mean = model.attn_pool is None and model.global_pool == "avg"
    return ViTAnatomy(
        family=FAMILY.name,
        pos_embed=None if model.pos_embed is None else "pos_embed",
        pos_embed_prefix_tokens=0 if model.no_embed_class else prefix,
        num_prefix_tokens=prefix,
        norm="norm",
        mean_pooled=mean and not model.pool_include_prefix,
        pools_all=model.attn_pool is not None or model.global_pool == "avgmax" or (mean and model.pool_include_prefix),
        **(_hybrid_embedding if hybrid else patch_embedding)(model, input_size),
    )


def _hybrid_embedding(model: Any, input_size: Grid) -> dict[str, Any]:
    """Return what timm's HybridEmbed tells: a convolutional network makes the patches."""
    embed = model.patch_embed
    stride = pair(embed.feat_ratio(as_scalar=False))
    grid = cells(input_size, stride)
    return {
        "input_size": input_size,
        "image_size": input_size,
        "patch_conv": _first_conv(model, "patch_embed.backbone"),
        "patch_size": stride,
        "conv_stem": True,
        "pads_image": bool(embed.dynamic_img_pad),
        "pos_embed_grid": embed.grid_size or grid,
        "grid_attributes": (
            GridAttribute(name="patch_embed.grid_size", holds="grid"),
            GridAttribute(name="patch_embed.num_patches", holds="num_tokens"),
        ),
        "grid_method": "patch_embed.dynamic_feat_size",
        "fixed_input": not model.dynamic_img_size,
        "refit": refit_hybrid,
        **sequence("blocks", model.blocks, grid),
    }


def refit_hybrid(host: Any, anatomy: Anatomy, grid: Grid) -> None:
    """Tell timm's HybridEmbed which map its backbone makes of the image now."""
    embed = host.patch_embed
    features = (grid[0] * embed.patch_size[0], grid[1] * embed.patch_size[1])
    embed.feature_size = features
    embed.feature_ratio = (anatomy.input_size[0] // features[0], anatomy.input_size[1] // features[1])


def _first_conv(model: nn.Module, stem: str) -> str:
    name: str
    for name, module in surgery.get(model, stem).named_modules(prefix=stem):
        if isinstance(module, nn.Conv2d):
            return name
    raise UnsupportedModelError(f"the stem {stem!r} of this {type(model).__name__} holds no convolution")


def _describe_torchvision(model: Any, input_size: Grid) -> ViTAnatomy:
    conv, patch = model.conv_proj, model.patch_size
    grid = surgery.output_grid(conv, input_size)
    stem = not isinstance(conv, nn.Conv2d)
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=input_size,
        image_size=input_size,
        patch_conv=_first_conv(model, "conv_proj") if stem else "conv_proj",
        patch_size=(patch, patch) if stem else pair(conv.kernel_size),
        conv_stem=stem,
        pos_embed="encoder.pos_embedding",
        pos_embed_grid=grid,
        pos_embed_prefix_tokens=1,
        num_prefix_tokens=1,
        grid_attributes=(
            # The host computes its grid as image_size // patch_size: no other value will do.
            GridAttribute(name="patch_size", holds="pixels_per_token", required=True),
            GridAttribute(name="seq_length", holds="num_tokens_and_prefix"),
        ),
        norm="encoder.ln",
        **sequence("encoder.layers", model.encoder.layers, grid),
    )


FAMILY = Family(
    name="vit",
    summary="plain Vision Transformers of timm (DeiT, DINOv2, SigLIP, CLIP, hybrids, ViTamin, ...) and torchvision",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=(TIMM, TORCHVISION),
    describe=describe,
)
