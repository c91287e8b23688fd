"""Resize the map that leaves the first convolution, between it and its normalisation.

Morlier et al., "Input Resolution Downsizing as a Compression Technique", https://arxiv.org/abs/2504.03749
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rescompress.anatomy import Anatomy, ConvAnatomy
from rescompress.errors import SpecError, UnsupportedModelError
from rescompress.layers.resize import MODES, Resize2d
from rescompress.methods._grid import follow
from rescompress.methods._resizing import asked, check_resize_options, put_resize, refuse_larger, warn_if_not_reached
from rescompress.spec import Stage, Step


@dataclass(frozen=True, kw_only=True)
class StemResize(Step):
    """Make everything behind the first convolution compute on a smaller map; cost falls with the square of the scale.

    Attributes:
        scale: output side over input side of the map, in (0, 1]; works for any input size
        size: instead of a scale, the side of the map in pixels, an int or a (height, width), whatever the input
        mode: "bilinear", "nearest" (the paper's), "bicubic" or "area"
        antialias: low-pass filter before bilinear or bicubic sampling

    Raises:
        SpecError: neither or both of scale and size, or a value out of range.
    """

    kind: ClassVar[str] = "stem_resize"
    stage: ClassVar[Stage] = Stage.RESOLUTION

    scale: float | None = None
    size: int | tuple[int, int] | None = None
    mode: str = "bilinear"
    antialias: bool = False

    def __post_init__(self) -> None:
        check_resize_options(self, MODES)

    def identity(self) -> "StemResize":
        """Return the step that inserts a resize which leaves every map as it is."""
        return StemResize(scale=1.0, mode=self.mode, antialias=self.antialias)

    def apply(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Put the resize behind the first convolution."""
        if not isinstance(anatomy, ConvAnatomy):
            raise UnsupportedModelError(
                f"stem_resize needs a convolutional network, and {type(model).__name__} is a {anatomy.family}: its "
                "first convolution cuts the patches; use patch_resize, input_resize, token_pool or token_merge"
            )
        if anatomy.several_branches:
            raise UnsupportedModelError(
                f"the branches of this {type(model).__name__} each read the image or its size, and a map behind one of "
                "them alone would not fit the others; use input_resize"
            )
        scale = None if self.scale is None else (float(self.scale), float(self.scale))
        resize = Resize2d(scale, self.size, self.mode, self.antialias, anatomy.multiple)  # type: ignore[arg-type]
        before = anatomy.stem_grid
        after = resize.target(*before)
        refuse_larger(self, before, after, f"map that leaves {anatomy.first_conv!r}", anatomy.multiple)
        if after != before and any(side % anatomy.multiple for side in after):
            raise SpecError(
                f"{asked(self)} does not fit this {type(model).__name__}: its sides must be multiples of "
                f"{anatomy.multiple}"
            )
        warn_if_not_reached("stem_resize", self.scale, before, after)
        put_resize(model, anatomy.first_conv, "stem_resize", after=resize)
        follow(model, anatomy, after)
        return dataclasses.replace(anatomy, stem_grid=after)
