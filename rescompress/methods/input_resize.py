"""Resize the image inside the model: the baseline that every other method must be compared with.

Tan and Le, "EfficientNet", https://arxiv.org/abs/1905.11946 (resolution as one of the dimensions of cost)
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, ConvAnatomy, Grid, ViTAnatomy
from rescompress.errors import SpecError, UnsupportedModelError
from rescompress.layers.resize import MODES, Resize2d
from rescompress.methods._grid import (
    can_express,
    follow,
    pixels_per_patch,
    put_in_front,
    resize_given_patches,
    set_grid,
)
from rescompress.methods._resizing import asked, check_resize_options, put_resize, refuse_larger, warn_if_not_reached
from rescompress.spec import Stage, Step, as_pair


@dataclass(frozen=True, kw_only=True)
class InputResize(Step):
    """Shrink the image in front of the first convolution; a ViT's position embedding is resampled to the new grid.

    The caller goes on giving images of the old size.

    Attributes:
        scale: side of the resized image over that of the given one, in (0, 1]
        size: instead of a scale, the side of the resized image in pixels, an int or a (height, width)
        mode: "bilinear", "nearest", "bicubic" or "area"
        antialias: low-pass filter before bilinear or bicubic sampling, as image loaders do; None means wherever the
            mode has one

    Raises:
        SpecError: neither or both of scale and size, or a value out of range.
    """

    kind: ClassVar[str] = "input_resize"
    stage: ClassVar[Stage] = Stage.RESOLUTION

    scale: float | None = None
    size: int | tuple[int, int] | None = None
    mode: str = "bilinear"
    antialias: bool | None = None

    def __post_init__(self) -> None:
        check_resize_options(self, MODES, optional_antialias=True)

    def identity(self) -> "InputResize":
        """Return the step that inserts a resize which leaves every image as it is."""
        return InputResize(scale=1.0, mode=self.mode, antialias=self.antialias)

    def _resize(self, scale: tuple[float, float] | None, size: Grid | None, multiple: int = 1) -> Resize2d:
        antialias = self.mode in ("bilinear", "bicubic") if self.antialias is None else self.antialias
        return Resize2d(scale, size, self.mode, antialias, multiple)

    def apply(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Put the resize in front of the first convolution."""
        if isinstance(anatomy, ConvAnatomy):
            return self._apply_conv(model, anatomy)
        if isinstance(anatomy, ViTAnatomy):
            return self._apply_vit(model, anatomy)
        raise UnsupportedModelError(f"input_resize does not know how to resize a {anatomy.family}")

    def _apply_conv(self, model: nn.Module, anatomy: ConvAnatomy) -> Anatomy:
        scale = None if self.scale is None else (float(self.scale), float(self.scale))
        # A stem of stride 2 makes of a multiple of 32 pixels a multiple of 16 positions.
        reader = anatomy.reader
        size = anatomy.input_size if reader is None else reader.size
        stride = max(1, round(size[0] / anatomy.stem_grid[0]))
        multiple = anatomy.multiple * stride if anatomy.multiple > 1 else 1
        resize = self._resize(scale, self.size, multiple)  # type: ignore[arg-type]  # check_resize_options made it a pair
        image = resize.target(*size)
        refuse_larger(self, size, image, "image", multiple)
        warn_if_not_reached(self.kind, self.scale, size, image)
        conv = surgery.get(model, anatomy.first_conv)
        if anatomy.several_branches:
            grid = image
        elif reader is None:
            grid = surgery.output_grid(conv, image)
        else:
            names = dict.fromkeys((reader.name, anatomy.first_conv))
            grid = surgery.map_grid(tuple(surgery.get(model, name) for name in names), reader.channels, image)
        after = getattr(conv, "after", None)
        if isinstance(after, Resize2d):  # a stem_resize came first
            smaller = after.target(*grid)
            if smaller[0] > grid[0] or smaller[1] > grid[1]:
                raise SpecError(
                    f"{asked(self)} leaves a {grid[0]} x {grid[1]} map, which the stem_resize before it would enlarge "
                    f"to {smaller[0]} x {smaller[1]}; a resize may not add cost: shrink the image less, or the map more"
                )
            grid = smaller
        if image != size and any(side % anatomy.multiple for side in grid):
            raise SpecError(
                f"{asked(self)} leaves a {grid[0]} x {grid[1]} map behind the stem of this {type(model).__name__}, "
                f"whose sides must be multiples of {anatomy.multiple}; take a multiple of {multiple} pixels"
            )
        put_resize(model, anatomy.first_conv if reader is None else reader.name, self.kind, before=resize)
        follow(model, anatomy, grid)
        return dataclasses.replace(anatomy, stem_grid=grid)

    def _apply_vit(self, model: nn.Module, anatomy: ViTAnatomy) -> Anatomy:
        if anatomy.grid is None or len(set(anatomy.grids)) > 1:
            raise SpecError("input_resize must come before steps that change the tokens")
        if anatomy.given_patches:
            return self._apply_given(model, anatomy)
        grid = self._target_grid(anatomy)
        image = (grid[0] * anatomy.patch_size[0], grid[1] * anatomy.patch_size[1])
        refuse_larger(self, anatomy.input_size, image, "image")
        if self.scale == 1.0:
            resize = self._resize((1.0, 1.0), None)
            grid, image = anatomy.grid, anatomy.image_size
        else:
            warn_if_not_reached(self.kind, self.scale, anatomy.input_size, image)
            scale = (image[0] / anatomy.input_size[0], image[1] / anatomy.input_size[1])
            # By the scale where that says the same, so that the host may be told of another image size afterwards.
            exact = pixels_per_patch(anatomy.input_size, image, anatomy.patch_size) is not None
            resize = self._resize(scale, None) if exact or not anatomy.fixed_input else self._resize(None, image)
        if anatomy.image_entry is None:
            put_resize(model, anatomy.patch_conv, self.kind, before=resize)
        else:
            put_in_front(model, anatomy.image_entry, self.kind, resize)
        return set_grid(model, anatomy, grid, anatomy.patch_size, image)

    def _apply_given(self, model: nn.Module, anatomy: ViTAnatomy) -> Anatomy:
        if self.scale is None:
            raise SpecError(
                f"input_resize.size={self.size}: a {type(model).__name__} is given images of any shape, so no one size "
                "fits them; give a scale"
            )
        antialias = self._resize((1.0, 1.0), None).antialias
        made = resize_given_patches(model, anatomy, self.scale, anatomy.patch_size[0], (self.mode, antialias))
        warn_if_not_reached(self.kind, self.scale, anatomy.grid or (0, 0), made.grid or (0, 0))
        return made

    def _target_grid(self, anatomy: ViTAnatomy) -> Grid:
        """Return the grid of whole patches nearest to what was asked for, the smaller one of two as near."""
        sides = []
        for axis, patch in enumerate(anatomy.patch_size):
            if self.scale is None:
                size = as_pair("input_resize.size", self.size)[axis]
                if size % patch:
                    below = size // patch * patch
                    nearest = f"{below} or {below + patch}" if below else str(patch)
                    raise SpecError(
                        f"input_resize.size={self.size} is no multiple of the {patch} px patches; nearest: {nearest}"
                    )
                sides.append(size // patch)
            else:
                image = anatomy.input_size[axis]
                wanted = image * self.scale
                square = anatomy.input_size[0] == anatomy.input_size[1]
                grids = [
                    g
                    for g in range(1, image // patch + 1)
                    if g % anatomy.multiple == 0 and (not square or can_express(anatomy, (g, g)))
                ]
                if not grids:
                    raise SpecError(
                        f"input_resize.scale={self.scale} finds no grid with sides that are multiples of "
                        f"{anatomy.multiple} in a {anatomy.input_size[0]} x {anatomy.input_size[1]} image"
                    )
                sides.append(min(grids, key=lambda g, p=patch, w=wanted: (abs(g * p - w), g)))  # type: ignore[misc]
        return (sides[0], sides[1])
