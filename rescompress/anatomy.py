"""Where the parts of a model are: frozen data that families write and methods read and thread on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Grid = tuple[int, int]
"""(height, width) of a map of pixels or tokens."""


Refit = Callable[[Any, Any, Grid], None]
"""refit(host, anatomy, grid): make what a host lays out over its grid fit a new one; `anatomy` is that from before."""


def cells(image: Grid, patch: Grid, pads: bool = False) -> Grid:
    """Return the grid of patches that an image is cut into: whole ones, or with `pads` the filled-up last ones too."""
    if pads:
        return (-(-image[0] // patch[0]), -(-image[1] // patch[1]))
    return (image[0] // patch[0], image[1] // patch[1])


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What every family knows of a model.

    Attributes:
        family: name of the family that wrote this, as `rescompress families` lists it
        input_size: (height, width) in pixels of the image that the described module was given
        outer_size: that of the model's own example, where the host is inside it and gets an image of another size
        host: FQN of the module that the family describes: the empty name is the model itself, another one a backbone
            or an encoder inside it
        multiple: what the sides of a smaller grid must be multiples of, for maps that meet again after other strides
        refit: makes the host's tables and windows fit another grid than they were built for; None where it has none
        restored: FQNs of modules that make a map (B, C, H, W) for dense prediction, which keeps its size
        restored_sizes: the sizes of these maps with the example, in the same order; empty where they are not known
    """

    family: str
    input_size: Grid
    host: str = ""
    multiple: int = 1
    refit: Refit | None = None
    restored: tuple[str, ...] = ()
    restored_sizes: tuple[Grid, ...] = ()
    outer_size: Grid | None = None

    @property
    def example_size(self) -> Grid:
        """(height, width) of the model's own example image."""
        return self.outer_size or self.input_size

    @property
    def grid(self) -> Grid | None:
        """The grid that the body of the network computes on; None where there is none any more."""
        return None


_NAMES = ("first_conv", "patch_conv", "image_entry", "pos_embed", "grid_method", "size_check", "norm")


def inside(anatomy: Anatomy, host: str) -> Anatomy:
    """Return the anatomy of a model that holds what is described as its module `host`: every name gets that prefix."""

    def longer(fqn: str) -> str:
        return f"{host}.{fqn}" if fqn else host

    changes: dict[str, Any] = {"host": longer(anatomy.host), "restored": tuple(map(longer, anatomy.restored))}
    for name in _NAMES:
        fqn = getattr(anatomy, name, None)
        if fqn is not None:
            changes[name] = longer(fqn)
    if isinstance(anatomy, ConvAnatomy) and anatomy.reader is not None:
        changes["reader"] = replace(anatomy.reader, name=longer(anatomy.reader.name))
    if isinstance(anatomy, ViTAnatomy):
        changes["blocks"] = tuple(map(longer, anatomy.blocks))
        changes["grid_attributes"] = tuple(replace(part, name=longer(part.name)) for part in anatomy.grid_attributes)
    return replace(anatomy, **changes)


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """The module that takes the image itself: in front of it the image can be resized.

    Attributes:
        name: its FQN
        channels: of the map that it takes
        size: (height, width) of that map; a detector has resized the image before
    """

    name: str
    channels: int
    size: Grid


@dataclass(frozen=True, kw_only=True)
class ConvAnatomy(Anatomy):
    """A network whose stem makes a map that shrinks from stage to stage: convolutions, or attention in windows.

    Attributes:
        first_conv: FQN of the convolution that first touches the image, or of the block of convolutions that do
        stem_grid: grid of the map that leaves it, after any resizing
        reader: what takes the image, where that is not first_conv, a single convolution, at input_size: space-to-depth
            in front of it, a block, a host that has resized the image before
        several_branches: whether `first_conv` is a whole network whose branches each read the image, or its size, so
            that no single map could be resized behind a stem; `stem_grid` is then the grid of the image that they read
    """

    first_conv: str
    stem_grid: Grid
    reader: ImageReader | None = None
    several_branches: bool = False

    @property
    def grid(self) -> Grid:
        return self.stem_grid


@dataclass(frozen=True, kw_only=True)
class GridAttribute:
    """An attribute in which a ViT's host keeps a copy of its grid.

    Attributes:
        name: FQN of the attribute
        holds: "pixels_per_token" (an int), "pixels_per_token_pair", "patch" (the pair of the patches themselves,
            whatever is resized in front of them), "grid", "num_tokens" or "num_tokens_and_prefix"
        required: whether the host computes the grid from it, so that a grid that it cannot express is impossible
    """

    name: str
    holds: str
    required: bool = False


@dataclass(frozen=True, kw_only=True)
class ViTAnatomy(Anatomy):
    """A plain Vision Transformer: one sequence length from the first block to the last.

    Attributes:
        image_size: (height, width) of the image that reaches the patches: input_size until it is resized
        patch_conv: FQN of the convolution that cuts the image into patches, or of the first one of a stem that does,
            or of the linear layer that reads patches which the host has cut
        patch_layout: how pixels and channels of a patch follow each other in what that linear layer reads, "hwc" or
            "chw"; None where it is a convolution
        image_entry: FQN of the module that takes the image where that is not `patch_conv`
        given_patches: whether the caller cuts the image, and gives sequences of patches of images of any shape
        conv_stem: whether a stem of several convolutions makes the patches, so that no kernel could be made larger
        size_check: FQN of the host's attribute that, when true, makes it take images of its `img_size` only
        pads_image: whether the host fills up the last patches instead of leaving their pixels unread
        patch_size: its kernel, (height, width) in pixels
        pos_embed: FQN of the learned position embedding, (1, P + H * W, C) or (1, H * W, C); None if there is none
        pos_embed_prefix_tokens: number of rows at its start that belong to prefix tokens
        num_prefix_tokens: class, distillation and register tokens at the start of the sequence
        blocks: FQNs of the transformer blocks, first to last
        grids: grid of the patch tokens that enter each block, then of those that leave the last one;
            None where merging has dissolved the grid
        num_patch_tokens: number of patch tokens at the same places
        pos_embed_grid: grid that the position embedding is laid out for
        grid_attributes: attributes of the host that must follow when the grid of the patches changes
        grid_method: FQN of the host's method that says which grid its intermediate features form; None if there is none
        fixed_input: whether the host takes images of one size only
        norm: FQN of the norm that follows the last block; None if there is none
        mean_pooled: whether the head takes the mean over the patch tokens
        pools_all: whether it reads all tokens in another way: pooling by attention, class attention, mean and maximum,
            a mean that counts prefix tokens
        dense_tokens: whether something behind the blocks reads the tokens of one or several blocks as maps of the full
            grid (heads of segmentation, spatial mergers): token_pool and token_merge then shorten the sequence inside
            each block only, and every block gives back as many tokens as it got
        prefix_from_block: index of the first block whose input holds the prefix tokens: 0, unless they join later
            (ConViT), and the number of blocks where they join behind the last (CaiT, XCiT)
    """

    image_size: Grid
    patch_conv: str
    patch_size: Grid
    pos_embed: str | None
    pos_embed_grid: Grid
    pos_embed_prefix_tokens: int
    num_prefix_tokens: int
    blocks: tuple[str, ...]
    grids: tuple[Grid | None, ...]
    num_patch_tokens: tuple[int, ...]
    grid_attributes: tuple[GridAttribute, ...] = ()
    grid_method: str | None = None
    fixed_input: bool = True
    size_check: str | None = None
    pads_image: bool = False
    norm: str | None = None
    mean_pooled: bool = False
    pools_all: bool = False
    conv_stem: bool = False
    patch_layout: str | None = None
    image_entry: str | None = None
    given_patches: bool = False
    dense_tokens: bool = False
    prefix_from_block: int = 0

    @property
    def grid(self) -> Grid | None:
        return self.grids[0]
