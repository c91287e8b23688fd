"""Give a ViT another grid of patches: its position embedding and the numbers that its host keeps must follow."""

import dataclasses

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, GridAttribute, ViTAnatomy
from rescompress.errors import SpecError, UnsupportedModelError


def pixels_per_token(image_side: int, grid_side: int) -> int | None:
    """Return the whole p nearest to image_side / grid_side with image_side // p == grid_side, if there is one."""
    candidates = [p for p in range(1, image_side + 1) if image_side // p == grid_side]
    return min(candidates, key=lambda p: abs(p - image_side / grid_side), default=None)


def follow(model: nn.Module, anatomy: Anatomy, grid: Grid) -> None:
    """Let what was laid out over the old grid follow to a new one: the host's own tables, and maps of dense outputs."""
    if anatomy.grid is None or grid == anatomy.grid:
        return
    if anatomy.refit is not None:
        anatomy.refit(surgery.get(model, anatomy.host), anatomy, grid)
    for fqn in anatomy.restored:
        surgery.restore_map(model, fqn, anatomy.grid, grid)


def can_express(anatomy: ViTAnatomy, grid: Grid) -> bool:
    """Whether the host can be told this grid."""
    if any(side % anatomy.multiple for side in grid):
        return False
    if not any(attribute.required for attribute in anatomy.grid_attributes):
        return True
    sides = [pixels_per_token(image, side) for image, side in zip(anatomy.input_size, grid, strict=True)]
    return sides[0] is not None and sides[0] == sides[1]


def set_grid(model: nn.Module, anatomy: ViTAnatomy, grid: Grid, patch_size: Grid, image_size: Grid) -> ViTAnatomy:
    """Resample the position embedding to `grid`, write the host's attributes, and return the new anatomy.

    Raises:
        SpecError: the host cannot express the grid.
    """
    if any(side % anatomy.multiple for side in grid):
        raise SpecError(
            f"{type(model).__name__} cannot have a {grid[0]} x {grid[1]} grid: its sides must be multiples of "
            f"{anatomy.multiple}"
        )
    if not can_express(anatomy, grid):
        raise SpecError(
            f"{type(model).__name__} cannot have a {grid[0]} x {grid[1]} grid: it computes its grid as image side // "
            f"patch size with one whole patch size; its image is {anatomy.input_size[0]} x {anatomy.input_size[1]}"
        )
    new = dataclasses.replace(
        anatomy,
        image_size=image_size,
        patch_size=patch_size,
        pos_embed_grid=_pos_embed_grid(anatomy, grid),
        grids=(grid,) * len(anatomy.grids),
        num_patch_tokens=(grid[0] * grid[1],) * len(anatomy.grids),
    )
    if anatomy.pos_embed is not None and new.pos_embed_grid != anatomy.pos_embed_grid:
        surgery.resample(
            model,
            anatomy.pos_embed,
            "tokens",
            anatomy.pos_embed_grid,
            new.pos_embed_grid,
            anatomy.pos_embed_prefix_tokens,
        )
    follow(model, anatomy, grid)
    if grid != anatomy.grid:
        for attribute in anatomy.grid_attributes:
            _write(model, attribute, new, grid)
    return new


def _pos_embed_grid(anatomy: ViTAnatomy, grid: Grid) -> Grid:
    """Return the grid that the position embedding is to be stored in.

    Where the host resamples it for every image, it stays the grid of the host's own reference image.
    """
    if anatomy.fixed_input or anatomy.grids[0] is None:
        return grid
    rows, columns = (
        max(1, round(stored * new / old))
        for stored, new, old in zip(anatomy.pos_embed_grid, grid, anatomy.grids[0], strict=True)
    )
    return (rows, columns)


def _write(model: nn.Module, attribute: GridAttribute, anatomy: ViTAnatomy, grid: Grid) -> None:
    owner_fqn, name = surgery.split(attribute.name)
    owner = surgery.get(model, owner_fqn)
    if getattr(owner, name) is None:  # a host without a fixed size keeps none
        return
    stored = anatomy.pos_embed_grid[0] * anatomy.pos_embed_grid[1]
    if attribute.holds.startswith("pixels_per_token"):
        sides: list[int | None] = list(anatomy.patch_size)
        if anatomy.image_size != anatomy.input_size:
            sides = [pixels_per_token(image, side) for image, side in zip(anatomy.input_size, grid, strict=True)]
        if None in sides:
            return  # only informative then; a required one has been checked above
        value: object = sides[0] if attribute.holds == "pixels_per_token" else tuple(sides)
    elif attribute.holds == "grid":
        value = anatomy.pos_embed_grid
    else:
        value = stored + (anatomy.num_prefix_tokens if attribute.holds == "num_tokens_and_prefix" else 0)
    surgery.set_attribute(model, attribute.name, value)


class NoSingleGrid:
    """Stands in for a host's method that gives the grid of its features, where they form no single grid any more."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, *args: object, **kwargs: object) -> Grid:
        raise RuntimeError(
            f"after {self.kind} the features of the blocks form no single grid, so they cannot be given as maps; "
            "ask for tokens (in timm: output_fmt='NLC')"
        )


def forbid_maps(model: nn.Module, anatomy: ViTAnatomy, kind: str) -> None:
    """Make the host raise where it would reshape fewer tokens than it expects into a map of nonsense."""
    if anatomy.grid_method is not None:
        surgery.set_attribute(model, anatomy.grid_method, NoSingleGrid(kind))


def fix_input(model: nn.Module, anatomy: ViTAnatomy, kind: str) -> ViTAnatomy:
    """Make a host that takes images of any size check for the one size whose grid `kind` has been built for.

    A sequence does not tell the grid that it came from: 32 x 128 pixels make as many tokens as 64 x 64.

    Raises:
        UnsupportedModelError: the host has no such check.
    """
    if anatomy.fixed_input:
        return anatomy
    if anatomy.size_check is None:
        raise UnsupportedModelError(
            f"{kind} needs images of one size: this {type(model).__name__} takes any, and a sequence of tokens does "
            "not tell the grid that it came from; build the model for one size"
        )
    owner, name = surgery.split(anatomy.size_check)
    surgery.set_attribute(model, f"{owner}.img_size", anatomy.input_size)
    surgery.set_attribute(model, f"{owner}.{name}", True)
    return dataclasses.replace(anatomy, fixed_input=True)
