"""Plain Vision Transformers of timm and torchvision: class, distillation and register tokens, any pooling head.

Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import GridAttribute, ViTAnatomy, cells
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of

TIMM = "timm.models.vision_transformer.VisionTransformer"
TORCHVISION = "torchvision.models.vision_transformer.VisionTransformer"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes."""
    height, width = image_of(model, args, kwargs).shape[-2:]
    return (_describe_timm if TIMM in class_names(model) else _describe_torchvision)(model, (height, width))


def _describe_timm(model: Any, input_size: tuple[int, int]) -> ViTAnatomy:
    conv = getattr(model.patch_embed, "proj", None)
    if class_names(model.patch_embed)[0] != "timm.layers.patch_embed.PatchEmbed" or not isinstance(conv, nn.Conv2d):
        raise UnsupportedModelError(
            f"{type(model).__name__} cuts patches with {class_names(model.patch_embed)[0]}; only timm's PatchEmbed, "
            "one convolution, can be resized"
        )
    # A dynamic model resamples its position embedding from its own grid at run time; that need not be the image's.
    patch, pads = _pair(conv.kernel_size), bool(model.patch_embed.dynamic_img_pad)
    grid = cells(input_size, patch, pads)
    embedded = model.patch_embed.grid_size or grid
    prefix = model.num_prefix_tokens
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=input_size,
        image_size=input_size,
        patch_conv="patch_embed.proj",
        patch_size=patch,
        pads_image=pads,
        pos_embed=None if model.pos_embed is None else "pos_embed",
        pos_embed_grid=embedded,
        pos_embed_prefix_tokens=0 if model.no_embed_class else prefix,
        num_prefix_tokens=prefix,
        grid_attributes=(
            GridAttribute(name="patch_embed.patch_size", holds="pixels_per_token_pair"),
            GridAttribute(name="patch_embed.grid_size", holds="grid"),
            GridAttribute(name="patch_embed.num_patches", holds="num_tokens"),
        ),
        grid_method="patch_embed.dynamic_feat_size",
        fixed_input=bool(model.patch_embed.strict_img_size),
        size_check="patch_embed.strict_img_size",
        norm="norm",
        mean_pooled=model.attn_pool is None and model.global_pool == "avg" and not model.pool_include_prefix,
        **_sequence("blocks", model.blocks, grid),
    )


def _describe_torchvision(model: Any, input_size: tuple[int, int]) -> ViTAnatomy:
    conv = model.conv_proj
    if not isinstance(conv, nn.Conv2d):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a convolutional stem ({type(conv).__name__}); only a single patch convolution "
            "can be resized"
        )
    grid = surgery.output_grid(conv, input_size)
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=input_size,
        image_size=input_size,
        patch_conv="conv_proj",
        patch_size=_pair(conv.kernel_size),
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
        **_sequence("encoder.layers", model.encoder.layers, grid),
    )


def _sequence(fqn: str, blocks: nn.Module, grid: tuple[int, int]) -> dict[str, Any]:
    names = tuple(f"{fqn}.{name}" for name, _ in blocks.named_children())
    places = len(names) + 1
    return {"blocks": names, "grids": (grid,) * places, "num_patch_tokens": (grid[0] * grid[1],) * places}


def _pair(kernel: tuple[int, ...]) -> tuple[int, int]:
    return (kernel[0], kernel[1])


FAMILY = Family(
    name="vit",
    summary="plain Vision Transformers of timm (DeiT, DeiT-3, DINOv2, SigLIP, CLIP, AugReg, ...) and torchvision",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=(TIMM, TORCHVISION),
    describe=describe,
)
