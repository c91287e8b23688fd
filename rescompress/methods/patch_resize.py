"""Cut a ViT's image into larger (or smaller) patches by pseudo-inverse resizing of the patch embedding.

Beyer et al., "FlexiViT: One Model for All Patch Sizes", https://arxiv.org/abs/2212.08013
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, ViTAnatomy, cells
from rescompress.errors import RescompressWarning, SpecError, UnsupportedModelError
from rescompress.layers.patches import PatchLinear
from rescompress.layers.resample import PatchConv2d
from rescompress.methods._grid import can_express, resize_given_patches, set_grid
from rescompress.methods._resizing import warn_if_not_reached
from rescompress.spec import Stage, Step, as_pair, check_scale


@dataclass(frozen=True, kw_only=True)
class PatchResize(Step):
    """Make fewer tokens of the same image: cost of the blocks falls with the square of the scale, or faster.

    The position embedding is resampled to the new grid; class, distillation and register tokens are kept.

    Attributes:
        scale: side of the new token grid over that of the old one, in (0, 1]
        patch_size: instead of a scale, the new patch in pixels, an int or a (height, width); smaller is allowed

    Raises:
        SpecError: neither or both of scale and patch_size, or a value out of range.
    """

    kind: ClassVar[str] = "patch_resize"
    stage: ClassVar[Stage] = Stage.RESOLUTION

    scale: float | None = None
    patch_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.scale is None) == (self.patch_size is None):
            raise SpecError(
                f"patch_resize takes either a scale or a patch_size, got scale={self.scale!r} and "
                f"patch_size={self.patch_size!r}"
            )
        if self.scale is not None:
            check_scale("patch_resize.scale", self.scale)
        else:
            object.__setattr__(self, "patch_size", as_pair("patch_resize.patch_size", self.patch_size))

    def identity(self) -> "PatchResize":
        """Return the step that puts in the same kernel and the same position embedding."""
        return PatchResize(scale=1.0)

    def apply(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Resample the patch embedding and the position embedding."""
        if not isinstance(anatomy, ViTAnatomy):
            raise UnsupportedModelError(
                f"patch_resize needs a Vision Transformer, and {type(model).__name__} is a {anatomy.family} network: "
                "use stem_resize or input_resize"
            )
        if anatomy.grid is None or len(set(anatomy.grids)) > 1:
            raise SpecError("patch_resize must come before steps that change the tokens")
        conv = surgery.get(model, anatomy.patch_conv)
        if anatomy.conv_stem:
            raise UnsupportedModelError(
                f"patch_resize does not fit this {type(model).__name__}: its patches are made by a stem of several "
                "convolutions, which has no kernel that could be made larger; use input_resize"
            )
        layout = anatomy.patch_layout
        linear = layout is not None and (type(conv) is nn.Linear or isinstance(conv, PatchLinear))
        if not linear and (not isinstance(conv, nn.Conv2d) or tuple(conv.kernel_size) != tuple(conv.stride)):
            raise UnsupportedModelError(f"{anatomy.patch_conv!r} is no convolution whose stride is its kernel")
        if anatomy.given_patches and layout is not None:
            return self._apply_given(model, anatomy, layout)
        image = anatomy.image_size
        patch_size = self._target_patch(anatomy, image)
        grid = cells(image, patch_size, anatomy.pads_image)
        if min(grid) < 1:
            raise SpecError(f"patch_resize.patch_size={patch_size} is larger than the {image[0]} x {image[1]} image")
        warn_if_not_reached(self.kind, self.scale, anatomy.grid, grid)
        if not anatomy.pads_image and (image[0] % patch_size[0] or image[1] % patch_size[1]):
            warnings.warn(
                f"patches of {patch_size[0]} x {patch_size[1]} px do not fill the {image[0]} x {image[1]} image: "
                f"{image[0] % patch_size[0]} rows and {image[1] % patch_size[1]} columns at its end are not read",
                RescompressWarning,
                stacklevel=2,
            )
        if isinstance(conv, nn.Linear) and layout is not None:
            resampled: nn.Module = PatchLinear.from_patch_linear(conv, anatomy.patch_size, patch_size, layout)
        else:
            resampled = PatchConv2d.from_patch_conv(conv, patch_size)  # type: ignore[arg-type]
        surgery.swap(model, anatomy.patch_conv, resampled)
        return set_grid(model, anatomy, grid, patch_size, image)

    def _apply_given(self, model: nn.Module, anatomy: ViTAnatomy, layout: str) -> Anatomy:
        old = anatomy.patch_size
        patch = (round(old[0] / self.scale),) * 2 if self.scale else as_pair("patch_resize.patch_size", self.patch_size)
        if patch[0] != patch[1] or patch[0] < old[0]:
            raise SpecError(
                f"patch_resize.patch_size={self.patch_size}: a {type(model).__name__} is given patches of {old[0]} px, "
                "which can be made into larger square ones only"
            )
        linear: nn.Linear = surgery.get(model, anatomy.patch_conv)  # type: ignore[assignment]
        surgery.swap(model, anatomy.patch_conv, PatchLinear.from_patch_linear(linear, old, patch, layout))
        made = resize_given_patches(model, anatomy, old[0] / patch[0], patch[0])
        warn_if_not_reached(self.kind, self.scale, anatomy.grid or (0, 0), made.grid or (0, 0))
        return made

    def _target_patch(self, anatomy: ViTAnatomy, image: Grid) -> Grid:
        if self.patch_size is not None:
            return as_pair("patch_resize.patch_size", self.patch_size)
        if self.scale is None or self.scale == 1.0:
            return anatomy.patch_size
        # Nearest grid first, then the smaller one, then the patch that leaves the least unread, then the nearest patch.
        # timm's embeddings for any size check for whole patches, and a host that cuts them itself needs whole ones.
        whole = not anatomy.pads_image and (
            anatomy.patch_layout is not None or (anatomy.size_check is not None and not anatomy.fixed_input)
        )
        sides = []
        for axis in (0, 1):
            side, old = image[axis], cells(image, anatomy.patch_size, anatomy.pads_image)[axis]
            ranked = []
            for patch in range(anatomy.patch_size[axis], side + 1):
                new = cells((side, side), (patch, patch), anatomy.pads_image)
                if whole and side % patch:
                    continue
                if not new[0] % anatomy.multiple and (image[0] != image[1] or can_express(anatomy, new)):
                    unread = 0 if anatomy.pads_image else side % patch
                    off = abs(patch - anatomy.patch_size[axis] / self.scale)
                    ranked.append((round(abs(new[0] / old - self.scale), 9), new[0], unread, off, patch))
            if not ranked:
                raise SpecError(
                    f"patch_resize.scale={self.scale} finds no grid with sides that are multiples of "
                    f"{anatomy.multiple} in a {image[0]} x {image[1]} image"
                )
            sides.append(min(ranked)[-1])
        return (sides[0], sides[1])
