"""Pool a ViT's token grid after given blocks.

Pan et al., "Scalable Vision Transformers with Hierarchical Pooling", https://arxiv.org/abs/2103.10619
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, ViTAnatomy
from rescompress.errors import SpecError, UnsupportedModelError
from rescompress.layers.pool import MODES, TokenPool2d
from rescompress.methods._grid import fix_input, forbid_maps
from rescompress.spec import Stage, Step, as_pair, check_choice, is_int


@dataclass(frozen=True, kw_only=True)
class TokenPool(Step):
    """Shorten the sequence by pooling its grid; blocks before the pooling keep all tokens.

    Attributes:
        after_block: index of the block, or several, behind which the grid is pooled; 0 is the first block, -1 the last
        stride: tokens pooled per side, an int or a (height, width)
        mode: "avg" or "max"

    Raises:
        SpecError: a value out of range.
    """

    kind: ClassVar[str] = "token_pool"
    stage: ClassVar[Stage] = Stage.TOKENS

    after_block: int | tuple[int, ...]
    stride: int | tuple[int, int] = 2
    mode: str = "avg"

    def __post_init__(self) -> None:
        listed = isinstance(self.after_block, list | tuple)
        places = tuple(self.after_block) if listed else (self.after_block,)  # type: ignore[arg-type]
        if not places or not all(is_int(place, -10_000) for place in places):
            raise SpecError(f"token_pool.after_block must be a block index or a list of them, got {self.after_block!r}")
        if len(set(places)) != len(places):
            raise SpecError(f"token_pool.after_block names a block twice: {list(places)}")
        object.__setattr__(self, "after_block", places[0] if len(places) == 1 else places)
        as_pair("token_pool.stride", self.stride)
        if not isinstance(self.stride, int):
            object.__setattr__(self, "stride", tuple(self.stride))
        check_choice("token_pool.mode", self.mode, MODES)

    def identity(self) -> "TokenPool":
        """Return the step that puts in poolings of one token each."""
        return TokenPool(after_block=self.after_block, stride=1, mode=self.mode)

    def apply(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Put the poolings behind their blocks."""
        if not isinstance(anatomy, ViTAnatomy):
            raise UnsupportedModelError(
                f"token_pool needs a Vision Transformer, and {type(model).__name__} is a {anatomy.family} network: "
                "use stem_resize or input_resize"
            )
        count = len(anatomy.blocks)
        stride = as_pair("token_pool.stride", self.stride)
        places = (self.after_block,) if isinstance(self.after_block, int) else self.after_block
        for place in places:
            if not -count <= place < count:
                raise SpecError(
                    f"token_pool.after_block={place} is no block of this model; it has blocks 0 to {count - 1}"
                )
        for block in sorted(place % count for place in places):
            anatomy = self._pool_after(model, anatomy, block, stride)
        if stride != (1, 1):
            forbid_maps(model, anatomy, self.kind)
            anatomy = fix_input(model, anatomy, self.kind)
        return anatomy

    def _pool_after(self, model: nn.Module, anatomy: ViTAnatomy, block: int, stride: tuple[int, int]) -> ViTAnatomy:
        grid = anatomy.grids[block + 1]
        if grid is None:
            raise SpecError(
                f"token_pool.after_block={block}: there is no grid left after token_merge; pool in an earlier block "
                "and put token_pool before token_merge"
            )
        if grid[0] % stride[0] or grid[1] % stride[1]:
            shown = stride[0] if stride[0] == stride[1] else stride
            raise SpecError(
                f"token_pool.stride={shown} does not divide the {grid[0]} x {grid[1]} token grid after block {block}"
            )
        pool = TokenPool2d(grid, stride, anatomy.num_prefix_tokens, self.mode)
        parent = surgery.get(model, surgery.split(anatomy.blocks[block])[0])
        name = f"pool_after_{block}"
        if name in parent._modules:
            raise SpecError(f"token_pool.after_block={block}: tokens are pooled there already")
        surgery.insert_after(model, anatomy.blocks[block], name, pool)
        grids, counts = list(anatomy.grids), list(anatomy.num_patch_tokens)
        for place in range(block + 1, len(grids)):
            here = grids[place]
            if here is None:
                raise SpecError("token_pool must come before token_merge")
            grids[place] = (here[0] // stride[0], here[1] // stride[1])
            counts[place] = here[0] // stride[0] * (here[1] // stride[1])
        return dataclasses.replace(anatomy, grids=tuple(grids), num_patch_tokens=tuple(counts))
