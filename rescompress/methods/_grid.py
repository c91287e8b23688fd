"""Give a ViT another grid of patches: its position embedding and the numbers that its host keeps must follow."""

import dataclasses

import torch
from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, GridAttribute, ViTAnatomy, cells
from rescompress.errors import SpecError, UnsupportedModelError
from rescompress.layers.given_patches import ResizedPatches
from rescompress.layers.patches import ResizedEmbedding
from rescompress.layers.resize import Resize2d


def pixels_per_token(image_side: int, grid_side: int) -> int | None:
    """Return the whole p nearest to image_side / grid_side with image_side // p == grid_side, if there is one."""
    candidates = [p for p in range(1, image_side + 1) if image_side // p == grid_side]
    return min(candidates, key=lambda p: abs(p - image_side / grid_side), default=None)


def pixels_per_patch(given: Grid, resized: Grid, patch: Grid) -> Grid | None:
    """Return how many pixels of the given image make one patch of the resized one; None if that is no whole number."""
    sides = [
        patch[axis] * given[axis] // resized[axis] for axis in (0, 1) if patch[axis] * given[axis] % resized[axis] == 0
    ]
    return (sides[0], sides[1]) if len(sides) == 2 else None


def follow(model: nn.Module, anatomy: Anatomy, grid: Grid) -> None:
    """Let what was laid out over the old grid follow to a new one: the host's own tables, and maps of dense outputs."""
    if anatomy.grid is None or grid == anatomy.grid:
        return
    if anatomy.refit is not None:
        anatomy.refit(surgery.get(model, anatomy.host), anatomy, grid)
    for index, fqn in enumerate(anatomy.restored):
        size = anatomy.restored_sizes[index] if anatomy.restored_sizes else None
        surgery.restore_map(model, fqn, anatomy.grid, grid, size, anatomy.multiple)
    _tell_reductions(model, anatomy.grid[0] / grid[0])


def _tell_reductions(model: nn.Module, factor: float) -> None:
    """Let timm's list of features say how many pixels of the given image their positions stand for now."""
    entries: dict[int, dict[str, object]] = {}
    for module in model.modules():
        listed = vars(module).get("feature_info")
        listed = getattr(listed, "info", listed)
        if isinstance(listed, list | tuple):
            entries.update((id(entry), entry) for entry in listed if isinstance(entry, dict))
    for entry in entries.values():
        reduction = entry.get("reduction")
        if isinstance(reduction, int | float):
            scaled = reduction * factor
            entry["reduction"] = round(scaled) if abs(scaled - round(scaled)) < 1e-6 else scaled


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
        if not new.fixed_input and new.image_size != new.input_size and not _cuts_like_the_host(new):
            _tell_grid(model, new)
    return new


def _cuts_like_the_host(anatomy: ViTAnatomy) -> bool:
    """Whether a host that takes any image may be told larger patches instead of a resized image; it checks, or pads."""
    pixels = pixels_per_patch(anatomy.input_size, anatomy.image_size, anatomy.patch_size)
    if pixels is None:
        return False
    return anatomy.pads_image or not (anatomy.input_size[0] % pixels[0] or anatomy.input_size[1] % pixels[1])


def _tell_grid(model: nn.Module, anatomy: ViTAnatomy) -> None:
    if anatomy.grid_method is None or anatomy.image_entry is not None:
        return
    scale = (anatomy.image_size[0] / anatomy.input_size[0], anatomy.image_size[1] / anatomy.input_size[1])
    filled: Grid = (1, 1)
    if anatomy.pads_image:
        owner = surgery.get(model, surgery.split(anatomy.grid_method)[0])
        filled = getattr(owner, "patch_size", anatomy.patch_size)
    surgery.set_attribute(model, anatomy.grid_method, GridOfResized(Resize2d(scale), anatomy.patch_size, filled))


class GridOfResized:
    """Stands in for a host's method that gives the grid of an image's features, where the image is resized inside."""

    def __init__(self, resize: Resize2d, patch: Grid, filled: Grid) -> None:
        self.resize = resize
        self.patch = patch
        self.filled = filled

    def __call__(self, img_size: Grid) -> Grid:
        """Return the grid of an image that is filled up to multiples of `filled`, resized and cut into patches."""
        rows, columns = cells((img_size[0], img_size[1]), self.filled, pads=True)
        return cells(self.resize.target(rows * self.filled[0], columns * self.filled[1]), self.patch)


def put_in_front(model: nn.Module, fqn: str, kind: str, resize: nn.Module) -> None:
    """Resize the image that enters the module `fqn`, which is no convolution.

    Raises:
        UnsupportedModelError: an earlier step resizes it already.
    """
    module = surgery.get(model, fqn)
    if isinstance(module, ResizedEmbedding):
        raise UnsupportedModelError(
            f"{fqn!r} is resized already; a model takes {kind} once: compress the original model with the scale wanted "
            "in the end"
        )
    surgery.swap(model, fqn, ResizedEmbedding(module, resize))


def resize_given_patches(
    model: nn.Module, anatomy: ViTAnatomy, scale: float, patch: int, how: tuple[str, bool] | None = None
) -> ViTAnatomy:
    """Resize images that enter as patches by the scale of their grids, cut patches of this side, return the anatomy.

    The host resamples its position embedding for every image. `how` is the mode and whether it is antialiased, by
    default as an earlier step says.
    """
    host = surgery.get(model, anatomy.host)
    earlier = {key: hook for key, hook in host._forward_pre_hooks.items() if isinstance(hook, ResizedPatches)}
    given, before, usual = anatomy.patch_size[0], 1.0, ("bilinear", True)
    for key, hook in earlier.items():
        given, before, usual = hook.given, hook.scale, (hook.mode, hook.antialias)
        del host._forward_pre_hooks[key], host._forward_pre_hooks_with_kwargs[key]
    resize = ResizedPatches(given, patch, before * scale, *(how or usual))
    host.register_forward_pre_hook(resize, with_kwargs=True)
    shape = cells(anatomy.input_size, (given, given))
    # Not on the meta device, under which transformers loads models.
    target = resize.target(torch.tensor([shape], device="cpu"), resize.length(shape[0] * shape[1]))
    rows, columns = target[0].tolist()
    places = len(anatomy.grids)
    return dataclasses.replace(
        anatomy,
        image_size=(rows * patch, columns * patch),
        patch_size=(patch, patch),
        grids=((rows, columns),) * places,
        num_patch_tokens=(rows * columns,) * places,
    )


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
    if getattr(owner, name, None) is None:  # a host without a fixed size keeps none, or its refit writes it
        return
    stored = anatomy.pos_embed_grid[0] * anatomy.pos_embed_grid[1]
    if attribute.holds == "patch":
        value: object = anatomy.patch_size
    elif attribute.holds.startswith("pixels_per_token"):
        sides: list[int | None] = list(anatomy.patch_size)
        if anatomy.image_size != anatomy.input_size:
            if not anatomy.fixed_input and not _cuts_like_the_host(anatomy):
                return  # set_grid has told the host its grid in another way
            sides = [pixels_per_token(image, side) for image, side in zip(anatomy.input_size, grid, strict=True)]
        if None in sides:
            return  # only informative then; a required one has been checked above
        value = sides[0] if attribute.holds == "pixels_per_token" else tuple(sides)
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
