"""What families of timm's models have in common: patches cut by its PatchEmbed, blocks of one sequence length."""

from typing import Any

from torch import nn

from rescompress.anatomy import Grid, GridAttribute, cells
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import class_names


def patches(model: nn.Module, embed: str, input_size: Grid) -> dict[str, Any]:
    """Return what a ViTAnatomy says of the patches that timm's PatchEmbed `embed` cuts.

    Raises:
        UnsupportedModelError: the model cuts them in another way.
    """
    module: Any = model.get_submodule(embed)
    conv = getattr(module, "proj", None)
    if class_names(module)[0] != "timm.layers.patch_embed.PatchEmbed" or not isinstance(conv, nn.Conv2d):
        raise UnsupportedModelError(
            f"{type(model).__name__} cuts patches with {class_names(module)[0]}; only timm's PatchEmbed, one "
            "convolution, and in a VisionTransformer its HybridEmbed, a stem of several, can be resized"
        )
    patch, pads = (conv.kernel_size[0], conv.kernel_size[1]), bool(module.dynamic_img_pad)
    grid = cells(input_size, patch, pads)
    return {
        "input_size": input_size,
        "image_size": input_size,
        "patch_conv": f"{embed}.proj",
        "patch_size": patch,
        "pads_image": pads,
        # A dynamic model resamples its position embedding from its own grid at run time; that need not be the image's.
        "pos_embed_grid": module.grid_size or grid,
        "grid_attributes": (
            GridAttribute(name=f"{embed}.patch_size", holds="pixels_per_token_pair"),
            GridAttribute(name=f"{embed}.grid_size", holds="grid"),
            GridAttribute(name=f"{embed}.num_patches", holds="num_tokens"),
        ),
        "grid_method": f"{embed}.dynamic_feat_size",
        "fixed_input": bool(module.strict_img_size),
        "size_check": f"{embed}.strict_img_size",
    }


def sequence(fqn: str, blocks: nn.Module, grid: Grid) -> dict[str, Any]:
    """Return what a ViTAnatomy says of blocks that share one sequence length."""
    names = tuple(f"{fqn}.{name}" for name, _ in blocks.named_children())
    places = len(names) + 1
    return {"blocks": names, "grids": (grid,) * places, "num_patch_tokens": (grid[0] * grid[1],) * places}


def resize_embed(embed: Any, image: Grid | None, grid: Grid) -> None:
    """Tell timm's PatchEmbed the grid that it makes now, and the map that it gets unless that is the image itself."""
    if image is not None:
        embed.img_size = image
    embed.grid_size = grid
    embed.num_patches = grid[0] * grid[1]
