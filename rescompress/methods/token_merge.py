"""Merge the most similar tokens in every block of a ViT.

Bolya et al., "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, ViTAnatomy
from rescompress.errors import SpecError, UnsupportedModelError
from rescompress.layers.merge_blocks import ATTENTIONS, MERGE_BLOCKS, MeanOfMerged
from rescompress.methods._grid import forbid_maps
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
        return TokenMerge(r=0)

    def schedule(self, num_patch_tokens: int, num_blocks: int) -> list[int]:
        """Return how many pairs each block merges.

        Raises:
            SpecError: a list of another length than the model is deep, or a share that cannot be reached by merging
                at most half of the tokens in each block.
        """
        if self.keep is not None:
            wanted = round(num_patch_tokens * (1 - self.keep))
            steps = [round(wanted * (i + 1) / num_blocks) - round(wanted * i / num_blocks) for i in range(num_blocks)]
        elif isinstance(self.r, tuple):
            if len(self.r) != num_blocks:
                raise SpecError(f"token_merge.r lists {len(self.r)} numbers, but the model has {num_blocks} blocks")
            steps = list(self.r)
        else:
            steps = [self.r or 0] * num_blocks
        left = num_patch_tokens
        for i, step in enumerate(steps):
            steps[i] = min(step, left // 2)
            left -= steps[i]
        if self.keep is not None and left > num_patch_tokens - wanted:
            raise SpecError(
                f"token_merge.keep={self.keep} cannot be reached: {num_patch_tokens} tokens in {num_blocks} blocks, at "
                f"most half of them at a time, leave {left / num_patch_tokens:.3f} when merged evenly; use r as a list"
            )
        return steps

    def apply(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Put merging blocks in the place of the old ones, from the first that merges to the last of the model."""
        if not isinstance(anatomy, ViTAnatomy):
            raise UnsupportedModelError(
                f"token_merge needs a Vision Transformer, and {type(model).__name__} is a {anatomy.family} network: "
                "use stem_resize or input_resize"
            )
        blocks = [surgery.get(model, fqn) for fqn in anatomy.blocks]
        _refuse_unknown(blocks)
        steps, counts = self._plan(anatomy)
        if (self.keep is None or self.keep < 1) and self.r != 0 and not any(steps):
            raise SpecError(f"token_merge with {self.to_dict()} merges nothing in this model; use a larger r")
        first = next((i for i, r in enumerate(steps) if r), None)
        weigh = anatomy.mean_pooled and anatomy.norm is not None and first is not None
        last = len(blocks) - 1
        for i, block in enumerate(blocks):
            if first is not None and i < first:
                continue
            merge_block = MERGE_BLOCKS[_class_name(block)].from_block(
                block,
                steps[i],
                anatomy.num_prefix_tokens,
                size_comes_in=first is not None and i > first,
                size_goes_out=i < last or weigh,
            )
            surgery.swap(model, anatomy.blocks[i], merge_block)
        if weigh and anatomy.norm is not None:
            norm = surgery.get(model, anatomy.norm)
            surgery.swap(model, anatomy.norm, MeanOfMerged(norm, anatomy.num_prefix_tokens))
        if first is None:
            return anatomy
        forbid_maps(model, anatomy, self.kind)
        grids = tuple(grid if i <= first else None for i, grid in enumerate(anatomy.grids))
        return dataclasses.replace(anatomy, grids=grids, num_patch_tokens=tuple(counts))

    def _plan(self, anatomy: ViTAnatomy) -> tuple[list[int], list[int]]:
        """Return the pairs merged in each block, and the patch tokens that enter each block and leave the last."""
        before = anatomy.num_patch_tokens
        if self.keep is not None and len(set(before)) > 1:
            raise SpecError(
                "token_merge.keep does not go with token_pool, which changes the number of tokens; use r instead"
            )
        wanted = self.schedule(before[0], len(anatomy.blocks))
        if len(set(before)) == 1:
            left = before[0]
            counts = [left := left - r for r in wanted]
            return wanted, [before[0], *counts]
        # Poolings need a grid: merging may only begin behind the last of them.
        last_pooled = max(i for i in range(1, len(before)) if before[i] != before[i - 1])
        if any(wanted[:last_pooled]):
            if isinstance(self.r, tuple):
                raise SpecError(
                    f"token_merge.r merges before the tokens are pooled behind block {last_pooled - 1}; merging "
                    f"dissolves the grid that pooling needs: its first {last_pooled} numbers must be 0"
                )
            wanted = [0] * last_pooled + [self.r or 0] * (len(wanted) - last_pooled)
        counts, left = list(before), before[last_pooled]
        for i in range(last_pooled, len(wanted)):
            wanted[i] = min(wanted[i], left // 2)
            left -= wanted[i]
            counts[i + 1] = left
        return wanted, counts


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _refuse_unknown(blocks: list[nn.Module]) -> None:
    for block in blocks:
        if isinstance(block, tuple(MERGE_BLOCKS.values())):
            raise SpecError("token_merge is in the model already; put all merging into one step")
        name = _class_name(block)
        if name not in MERGE_BLOCKS:
            raise UnsupportedModelError(
                f"token_merge does not know blocks of class {name}; it knows {', '.join(MERGE_BLOCKS)}"
            )
        attn = getattr(block, "attn", getattr(block, "self_attention", None))
        if _class_name(attn) not in ATTENTIONS:
            raise UnsupportedModelError(
                f"token_merge needs the keys of the attention and does not know {_class_name(attn)}; "
                f"it knows {', '.join(ATTENTIONS)}"
            )
