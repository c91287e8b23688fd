"""Give a ViT another grid of patches: its position embedding and the numbers that its host keeps must follow."""

import dataclasses
from functools import reduce

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Grid, GridAttribute, ViTAnatomy
from rescompress.errors import SpecError
from rescompress.layers.resample import PosEmbedLoader, resample_pos_embed


def pixels_per_token(image_side: int, grid_side: int) -> int | None:
    """Return the whole number p nearest to image_side / grid_side with image_side // p == grid_side, if there is one."""
    candidates = [p for p in range(1, image_side + 1) if image_side // p == grid_side]
    return min(candidates, key=lambda p: abs(p - image_side / grid_side), default=None)


def can_express(anatomy: ViTAnatomy, grid: Grid) -> bool:
    """Whether the host can be told this grid."""
    if not any(attribute.required for attribute in anatomy.grid_attributes):
        return True
    sides = [pixels_per_token(image, side) for image, side in zip(anatomy.input_size, grid, strict=True)]
    return sides[0] is not None and sides[0] == sides[1]


def set_grid(model: nn.Module, anatomy: ViTAnatomy, grid: Grid, patch_size: Grid) -> ViTAnatomy:
    """Resample the position embedding to `grid`, write the host's attributes, and return the new anatomy.

    Raises:
        SpecError: the host cannot express the grid.
    """
    if not can_express(anatomy, grid):
        raise SpecError(
            f"{type(model).__name__} cannot have a {grid[0]} x {grid[1]} grid: it computes its grid as image side // "
            f"patch size with one whole patch size; its image is {anatomy.input_size[0]} x {anatomy.input_size[1]}"
        )
    if anatomy.pos_embed is not None and anatomy.pos_embed_grid != grid:
        old = anatomy.pos_embed_grid
        prefix = anatomy.pos_embed_prefix_tokens
        tensor = surgery.get_parameter(model, anatomy.pos_embed)
        surgery.set_parameter(model, anatomy.pos_embed, resample_pos_embed(tensor.detach(), old, grid, prefix))
        owner, name = surgery.split(anatomy.pos_embed)
        surgery.get(model, owner).register_load_state_dict_pre_hook(PosEmbedLoader(name, old, grid, prefix))
    if anatomy.grid != grid:
        for attribute in anatomy.grid_attributes:
            _write(model, attribute, anatomy, grid)
    places = len(anatomy.grids)
    return dataclasses.replace(
        anatomy,
        patch_size=patch_size,
        pos_embed_grid=grid,
        grids=(grid,) * places,
        num_patch_tokens=(grid[0] * grid[1],) * places,
    )


def _write(model: nn.Module, attribute: GridAttribute, anatomy: ViTAnatomy, grid: Grid) -> None:
    owner_fqn, name = surgery.split(attribute.name)
    owner = reduce(getattr, owner_fqn.split("."), model) if owner_fqn else model
    if getattr(owner, name) is None:  # a host without a fixed size keeps none
        return
    tokens = grid[0] * grid[1]
    sides = [pixels_per_token(image, side) for image, side in zip(anatomy.input_size, grid, strict=True)]
    if attribute.holds.startswith("pixels_per_token"):
        if sides[0] is None or sides[1] is None:
            return  # only informative then; a required one has been checked above
        value: object = sides[0] if attribute.holds == "pixels_per_token" else (sides[0], sides[1])
    else:
        value = {"grid": grid, "num_tokens": tokens, "num_tokens_and_prefix": tokens + anatomy.num_prefix_tokens}[
            attribute.holds
        ]
    setattr(owner, name, value)
