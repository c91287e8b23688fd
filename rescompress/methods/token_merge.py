"""Merge the most similar tokens in every block of a ViT.

Bolya et al., "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461
"""

import dataclasses
import warnings
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, ViTAnatomy
from rescompress.errors import RescompressWarning, SpecError, UnsupportedModelError
from rescompress.layers.adopt import class_name
from rescompress.layers.merging.base import MeanOfMerged, MergingBlock
from rescompress.layers.merging.general import GeneralMergeBlock
from rescompress.layers.merging.table import ATTENTIONS, BLOCKS, REFUSED, attention_of, merging_block, needs_places
from rescompress.methods._grid import forbid_maps
from rescompress.methods._heads import ALL, MEAN, reading_of, warn_of_readers
from rescompress.methods._tokens import fix_grid, innermost, keeps_length, prefix_of, vit_anatomy
from rescompress.spec import Stage, Step, check_scale, is_int


@dataclass(frozen=True, kw_only=True)
class TokenMerge(Step):
    """Merge `r` pairs of similar patch tokens in each block, with proportional attention for what they become.

    Attributes:
        r: pairs merged in every block, or one number for each block; never more than half of the tokens at a time
        keep: instead of r, the share of patch tokens that leaves the last block, in (0, 1], lost evenly over the blocks

    Raises:
        SpecError: neither or both of r and keep, or a value out of range.
    """

    kind: ClassVar[str] = "token_merge"
    stage: ClassVar[Stage] = Stage.TOKENS

    r: int | tuple[int, ...] | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if (self.r is None) == (self.keep is None):
            raise SpecError(f"token_merge takes either r or keep, got r={self.r!r} and keep={self.keep!r}")
        if self.keep is not None:
            check_scale("token_merge.keep", self.keep)
        elif isinstance(self.r, list | tuple):
            if not self.r or not all(is_int(value, 0) for value in self.r):
                raise SpecError(f"token_merge.r must be a whole number of at least 0 or a list of them, got {self.r!r}")
            object.__setattr__(self, "r", tuple(self.r))
        elif not is_int(self.r, 0):
            raise SpecError(f"token_merge.r must be a whole number of at least 0 or a list of them, got {self.r!r}")

    def identity(self) -> "TokenMerge":
        """Return the step that puts in blocks which merge nothing."""
        numbers = self.r if isinstance(self.r, tuple) else (self.r,)
        return self if self.keep == 1 or (self.keep is None and not any(numbers)) else TokenMerge(r=0)

    def schedule(self, num_patch_tokens: int, num_blocks: int) -> list[int]:
        """Return how many pairs each block merges.

        Raises:
            SpecError: a list of another length than the model is deep, or a share that cannot be reached by merging
                at most half of the tokens in each block.
        """
        steps, left = self._asked(num_patch_tokens, num_blocks), num_patch_tokens
        for i, step in enumerate(steps):
            steps[i] = min(step, left // 2)
            left -= steps[i]
        if self.keep is not None and left > num_patch_tokens - round(num_patch_tokens * (1 - self.keep)):
            raise SpecError(
                f"token_merge.keep={self.keep} cannot be reached: {num_patch_tokens} tokens in {num_blocks} blocks, at "
                f"most half of them at a time, leave {left / num_patch_tokens:.3f} when merged evenly; use r as a list"
            )
        return steps

    def _asked(self, num_patch_tokens: int, num_blocks: int) -> list[int]:
        """Return how many pairs each block is asked to merge, whether or not it has so many.

        Raises:
            SpecError: a list of another length than the model is deep.
        """
        if self.keep is not None:
            lost = round(num_patch_tokens * (1 - self.keep))
            return [round(lost * (i + 1) / num_blocks) - round(lost * i / num_blocks) for i in range(num_blocks)]
        if isinstance(self.r, tuple):
            if len(self.r) != num_blocks:
                raise SpecError(f"token_merge.r lists {len(self.r)} numbers, but the model has {num_blocks} blocks")
            return list(self.r)
        return [self.r or 0] * num_blocks

    def apply(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Put merging blocks in the place of the old ones, from the first that merges to the last of the model."""
        anatomy = vit_anatomy(model, anatomy, self.kind)
        start = _start(anatomy)
        names = [innermost(model, fqn) for fqn in anatomy.blocks]
        blocks = [surgery.get(model, fqn) for fqn in names]
        _refuse_unknown(blocks[start:])
        dense = keeps_length(model, anatomy)
        steps, counts = self._plan(anatomy, start, dense)
        if (self.keep is None or self.keep < 1) and self.r != 0 and not any(steps):
            raise SpecError(f"token_merge with {self.to_dict()} merges nothing in this model; use a larger r")
        first = next((i for i, r in enumerate(steps) if r), None)
        travel = 3 if any(needs_places(block) for block in blocks[start:]) else 1
        reading = reading_of(model, anatomy) if first is not None and not dense else ""
        weigh = reading == MEAN and anatomy.norm is not None
        last = len(blocks) - 1
        full = anatomy.grids[0]
        for i in range(start if first is None else first, len(blocks)):
            grid = anatomy.grids[i]
            if grid is None or full is None:
                raise SpecError("token_merge is in the model already; put all merging into one step")
            new = merging_block(blocks[i], prefix_of(anatomy, i))
            new.r, new.num_prefix_tokens, new.grid = steps[i], prefix_of(anatomy, i), grid
            new.dense, new.places = dense, needs_places(blocks[i])
            new.repeats = i == last and reading == ALL
            new.weighs = i == last and reading == MEAN and not weigh
            new.comes_in = travel if first is not None and i > first and not dense else 0
            new.goes_out = 0 if first is None or dense else travel if i < last else int(weigh)
            if isinstance(new, GeneralMergeBlock):
                new.host_grid = full
            surgery.swap(model, names[i], new)
        if weigh and anatomy.norm is not None:
            norm = surgery.get(model, anatomy.norm)
            surgery.swap(model, anatomy.norm, MeanOfMerged(norm, prefix_of(anatomy, len(blocks))))
        if first is None:
            return anatomy
        warn_of_readers(model, anatomy, reading)
        if not dense:
            forbid_maps(model, anatomy, self.kind)
        if travel > 1:  # places are counted on one grid
            anatomy = fix_grid(model, anatomy, self.kind)
        grids = tuple(grid if i <= first else None for i, grid in enumerate(anatomy.grids))
        return dataclasses.replace(anatomy, grids=grids, num_patch_tokens=tuple(counts))

    def _plan(self, anatomy: ViTAnatomy, start: int, dense: bool) -> tuple[list[int], list[int]]:
        """Return the pairs merged in each block, and the patch tokens that enter each block and leave the last.

        Where each block gives all tokens back, it merges again what the blocks before it have merged, and counts are
        of the tokens that a block computes on.
        """
        before = anatomy.num_patch_tokens
        depth = len(anatomy.blocks)
        if self.keep is not None and len(set(before[:depth])) > 1:
            raise SpecError(
                "token_merge.keep does not go with token_pool, which changes the number of tokens; use r instead"
            )
        if isinstance(self.r, tuple) and len(self.r) == depth and any(self.r[:start]):
            raise SpecError(
                f"token_merge.r merges in block {next(i for i, r in enumerate(self.r) if r)}, but tokens can only be "
                f"merged from block {start} on: before it they are pooled, or the model puts prefix tokens in; its "
                f"first {start} numbers must be 0"
            )
        skipped = 0 if isinstance(self.r, tuple) else start  # a list names these blocks too
        asked = [0] * skipped + self._asked(before[start], depth - skipped)
        steps = [0] * skipped + self.schedule(before[start], depth - skipped)
        counts, left = list(before[: start + 1]), before[start]
        if dense:
            asked, total = list(accumulate(asked)), list(accumulate(steps))
            steps = [min(merged, tokens // 2) for merged, tokens in zip(total, before, strict=False)]
            counts = [tokens - r for tokens, r in zip(before, steps, strict=False)]
            self._warn_of_fewer(asked, steps, f"the last block computes on {counts[-1]} of {before[-1]} patch tokens")
            return steps, [*counts, before[depth]]
        for r in steps[start:]:
            left -= r
            counts.append(left)
        self._warn_of_fewer(asked, steps, f"{left} of {before[start]} patch tokens leave the last block")
        return steps, counts

    def _warn_of_fewer(self, asked: list[int], steps: list[int], reached: str) -> None:
        """Say what is reached where blocks merge fewer pairs than they were asked to."""
        fewer = [i for i, (wanted, r) in enumerate(zip(asked, steps, strict=True)) if r < wanted]
        if not fewer:
            return
        given = f"r={self.r}" if self.keep is None else f"keep={self.keep}"
        warnings.warn(
            f"token_merge.{given} cannot be reached in {len(fewer)} of {len(steps)} blocks, first in block {fewer[0]}: "
            f"at most half of the tokens merge at a time, so {reached}",
            RescompressWarning,
            stacklevel=2,
        )


def _start(anatomy: ViTAnatomy) -> int:
    """Return the first block that may merge: poolings need a grid, and prefix tokens must be there or never come."""
    before = anatomy.num_patch_tokens[: len(anatomy.blocks)]
    pooled = max((i for i in range(1, len(before)) if before[i] != before[i - 1]), default=0)
    joined = anatomy.prefix_from_block if anatomy.prefix_from_block < len(before) else 0
    return max(pooled, joined)


def _refuse_unknown(blocks: list[nn.Module]) -> None:
    for block in blocks:
        if isinstance(block, MergingBlock):
            raise SpecError("token_merge is in the model already; put all merging into one step")
        name = class_name(block)
        if name in REFUSED:
            raise UnsupportedModelError(f"token_merge cannot merge in blocks of class {name}: {REFUSED[name]}")
        if name not in BLOCKS:
            raise UnsupportedModelError(
                f"token_merge does not know blocks of class {name}; it knows {', '.join(BLOCKS)}"
            )
        attention = class_name(attention_of(block))
        if attention not in ATTENTIONS:
            raise UnsupportedModelError(
                f"token_merge needs the keys of the attention and does not know {attention}; it knows "
                f"{', '.join(ATTENTIONS)}"
            )
