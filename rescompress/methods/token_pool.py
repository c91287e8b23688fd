"""Pool a ViT's token grid after given blocks.

Pan et al., "Scalable Vision Transformers with Hierarchical Pooling", https://arxiv.org/abs/2103.10619
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, ViTAnatomy
from rescompress.errors import SpecError
from rescompress.layers.adopt import adopt
from rescompress.layers.pool import MODES, PooledBlock, PooledMasked, PooledSequence, TokenPool2d, TokenRepeat2d
from rescompress.layers.token_positions import argument_names, check_turns
from rescompress.methods._grid import forbid_maps
from rescompress.methods._tokens import (
    check_arguments,
    check_sequence,
    coarsen_positions,
    fix_grid,
    innermost,
    keeps_length,
    prefix_of,
    takes_only_tokens,
    vit_anatomy,
)
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
        anatomy = vit_anatomy(model, anatomy, self.kind)
        count = len(anatomy.blocks)
        stride = as_pair("token_pool.stride", self.stride)
        places = (self.after_block,) if isinstance(self.after_block, int) else self.after_block
        for place in places:
            if not -count <= place < count:
                raise SpecError(
                    f"token_pool.after_block={place} is no block of this model; it has blocks 0 to {count - 1}"
                )
        check_sequence(model, anatomy, self.kind)
        dense = keeps_length(model, anatomy)
        for block in sorted(place % count for place in places):
            anatomy = self._pool_after(model, anatomy, block, stride, dense)
        if stride != (1, 1):
            if not dense:
                forbid_maps(model, anatomy, self.kind)
            anatomy = fix_grid(model, anatomy, self.kind)
        return anatomy

    def _pool_after(
        self, model: nn.Module, anatomy: ViTAnatomy, block: int, stride: tuple[int, int], dense: bool
    ) -> ViTAnatomy:
        last = len(anatomy.blocks) - 1
        if dense and block == last:
            raise SpecError(
                f"token_pool.after_block={block}: behind the last block nothing is computed on fewer tokens in this "
                f"{type(model).__name__}, which gives its tokens as maps of the full grid"
            )
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
        if _pooled_behind(model, anatomy, block, dense):
            raise SpecError(f"token_pool.after_block={block}: tokens are pooled there already")
        if anatomy.grids[0] is not None:
            check_turns(self.kind, model, anatomy.grids[0], stride)
        grids, counts = list(anatomy.grids), list(anatomy.num_patch_tokens)
        if not dense:
            pool = TokenPool2d(grid, stride, prefix_of(anatomy, block), self.mode)
            _surround(model, anatomy, block, pool)
        for place in range(block + 1, len(grids) - dense):
            here = grids[place]
            if here is None:
                raise SpecError("token_pool must come before token_merge")
            grids[place] = coarse = (here[0] // stride[0], here[1] // stride[1])
            counts[place] = coarse[0] * coarse[1]
            if place <= last:
                self._follow(model, anatomy, place, here, stride, dense)
        return dataclasses.replace(anatomy, grids=tuple(grids), num_patch_tokens=tuple(counts))

    def _follow(
        self, model: nn.Module, anatomy: ViTAnatomy, place: int, grid: Grid, stride: tuple[int, int], dense: bool
    ) -> None:
        """Let a block behind the pooling compute on the pooled grid: its positions, and with `dense` its sequence."""
        fqn = innermost(model, anatomy.blocks[place])
        if stride != (1, 1):
            check_arguments(self.kind, surgery.get(model, fqn))
            coarsen_positions(model, fqn, grid, stride, prefix_of(anatomy, place))
        full = anatomy.grids[0]
        if full is None:
            raise SpecError("token_pool must come before token_merge")
        coarse = (grid[0] // stride[0], grid[1] // stride[1])
        total = (full[0] // coarse[0], full[1] // coarse[1])
        if dense:
            pool = TokenPool2d(grid, stride, prefix_of(anatomy, place), self.mode)
            back = TokenRepeat2d(coarse, total, prefix_of(anatomy, place))
            _surround(model, anatomy, place, back, pool, host_stride=total)
        elif stride != (1, 1) and not takes_only_tokens(surgery.get(model, fqn)):
            _surround(model, anatomy, place, host_stride=total)


def _pooled_behind(model: nn.Module, anatomy: ViTAnatomy, block: int, dense: bool) -> bool:
    """Whether an earlier step has put a pooling behind a block."""
    if not dense:
        return isinstance(getattr(surgery.get(model, anatomy.blocks[block]), "tokens_after", None), TokenPool2d)
    here, behind = (surgery.get(model, fqn) for fqn in anatomy.blocks[block : block + 2])
    return len(_poolings_before(here)) < len(_poolings_before(behind))


def _poolings_before(block: nn.Module) -> list[nn.Module]:
    before = getattr(block, "tokens_before", None)
    return list(before) if isinstance(before, nn.Sequential) else []


def _surround(
    model: nn.Module,
    anatomy: ViTAnatomy,
    place: int,
    after: nn.Module | None = None,
    before: nn.Module | None = None,
    host_stride: tuple[int, int] | None = None,
) -> None:
    """Put modules around a block, behind the poolings that earlier steps have put before it."""
    old = surgery.get(model, anatomy.blocks[place])
    core = old.inner if isinstance(old, PooledSequence) else old
    poolings = _poolings_before(old) + ([before] if before is not None else [])
    new: Any
    if takes_only_tokens(core):
        kind = PooledMasked if argument_names(core) else PooledSequence
        new = kind(core, nn.Identity(), nn.Identity())
    else:
        new = adopt(PooledBlock, core)
        new.argument_names = argument_names(core)
        new.host_grid = anatomy.grids[0]
        new.host_stride = host_stride or getattr(core, "host_stride", (1, 1))
    new.tokens_before = nn.Sequential(*poolings) if poolings else nn.Identity()
    new.tokens_after = after if after is not None else getattr(old, "tokens_after", nn.Identity())
    surgery.swap(model, anatomy.blocks[place], new)
