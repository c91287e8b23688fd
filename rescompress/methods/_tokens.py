"""What token_pool and token_merge share: where a ViT's blocks are, what they take, and their inner position tables."""

import dataclasses
from typing import Any

import torch
from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, ViTAnatomy
from rescompress.errors import UnsupportedModelError
from rescompress.layers.adopt import Adopted, class_name
from rescompress.layers.pool import OneGrid, PooledSequence
from rescompress.layers.token_positions import KNOWN, SEVERAL_SEQUENCES, StridedBias, argument_names, strided
from rescompress.methods._grid import fix_input

MAP_READERS = ("timm.models._features.FeatureGetterNet",)
"""Wrappers that give the tokens of blocks as maps: timm's features_only=True."""


def vit_anatomy(model: nn.Module, anatomy: Anatomy, kind: str) -> ViTAnatomy:
    """Return the anatomy as that of a ViT.

    Raises:
        UnsupportedModelError: it is none.
    """
    if not isinstance(anatomy, ViTAnatomy):
        raise UnsupportedModelError(
            f"{kind} needs a Vision Transformer, and {type(model).__name__} is a {anatomy.family} network: "
            "use stem_resize or input_resize"
        )
    if anatomy.given_patches:
        raise UnsupportedModelError(
            f"{kind} does not fit this {type(model).__name__}: each of its sequences has the grid of its own image and "
            "padding behind, so no one pooling or number of merges fits them; use patch_resize or input_resize"
        )
    return anatomy


def keeps_length(model: nn.Module, anatomy: ViTAnatomy) -> bool:
    """Whether every block must give back as many tokens as it got."""
    return anatomy.dense_tokens or class_name(model) in MAP_READERS


def fix_grid(model: nn.Module, anatomy: ViTAnatomy, kind: str) -> ViTAnatomy:
    """Let a host that takes images of any size take those of one grid only, by its own check or by one of ours."""
    if anatomy.fixed_input or anatomy.size_check is not None:
        return fix_input(model, anatomy, kind)
    fqn = anatomy.image_entry or anatomy.patch_conv
    # What a stem of several convolutions, or a linear layer, gives is not the map of the patches.
    grid = None if anatomy.image_entry or anatomy.conv_stem else anatomy.grids[0]
    surgery.swap(model, fqn, OneGrid(surgery.get(model, fqn), grid, anatomy.input_size, kind))
    return dataclasses.replace(anatomy, fixed_input=True)


def prefix_of(anatomy: ViTAnatomy, block: int) -> int:
    """Return how many prefix tokens the sequence has inside a block."""
    return anatomy.num_prefix_tokens if block >= anatomy.prefix_from_block else 0


def innermost(model: nn.Module, fqn: str) -> str:
    """Return the FQN of the host's own block in `fqn`, or of what has adopted it, inside a pooling around it."""
    return f"{fqn}.inner" if isinstance(surgery.get(model, fqn), PooledSequence) else fqn


def takes_only_tokens(block: nn.Module) -> bool:
    """Whether a block's forward takes the sequence, perhaps a mask, and nothing else."""
    return not isinstance(block, Adopted) and argument_names(block) in ((), ("attn_mask", "is_causal"))


def check_sequence(model: nn.Module, anatomy: ViTAnatomy, kind: str) -> None:
    """Refuse a model whose blocks take several sequences.

    Raises:
        UnsupportedModelError: they do.
    """
    name = class_name(surgery.get(model, innermost(model, anatomy.blocks[0])))
    if name in SEVERAL_SEQUENCES:
        raise UnsupportedModelError(
            f"{kind} cannot shorten what blocks of class {name} take: {SEVERAL_SEQUENCES[name]}"
        )


def check_arguments(kind: str, block: nn.Module) -> None:
    """Refuse a block with an argument of unknown meaning, which may depend on positions.

    Raises:
        UnsupportedModelError: it has one.
    """
    unknown = [name for name in argument_names(block) if name not in KNOWN]
    if unknown:
        raise UnsupportedModelError(
            f"{kind}: blocks of class {class_name(block)} take an argument {unknown[0]!r}, of which it is not known "
            "how it goes with fewer tokens"
        )


def coarsen_positions(model: nn.Module, fqn: str, grid: Grid, stride: Grid, num_prefix_tokens: int) -> bool:
    """Let what a block itself holds of relative positions follow to every stride-th patch of its grid.

    The learned tables stay as they are: pooled tokens read the entries for the distances of their windows. Returns
    whether there was anything.

    Raises:
        UnsupportedModelError: an index is laid out for another grid than the block's.
    """
    coarse = (grid[0] // stride[0], grid[1] // stride[1])
    found = False
    for name, module in list(surgery.get(model, fqn).named_modules()):
        part = f"{fqn}.{name}" if name else fqn
        if isinstance(getattr(module, "relative_position_index", None), torch.Tensor):
            _coarsen_index(model, part, module, grid, stride, coarse)
            found = True
        elif hasattr(module, "get_rel_indices") and hasattr(module, "rel_indices"):
            value = _offsets(coarse, stride).to(module.qk.weight)
            surgery.set_parameter(model, f"{part}.rel_indices", value)
            found = True
        elif hasattr(module, "generate_relative_position_index") and not isinstance(module, StridedBias):
            surgery.swap(model, part, StridedBias(module, grid, stride, num_prefix_tokens))
            found = True
    return found


def _coarsen_index(model: nn.Module, fqn: str, module: Any, grid: Grid, stride: Grid, coarse: Grid) -> None:
    index = module.relative_position_index
    side = round(index.numel() ** 0.5)
    extra = side - grid[0] * grid[1]
    if side * side != index.numel() or not 0 <= extra <= 1:
        raise UnsupportedModelError(
            f"token_pool: the relative positions in {fqn!r} are laid out for {side} tokens, not for a {grid[0]} x "
            f"{grid[1]} grid"
        )
    kept = strided(grid, stride, extra, index.device)
    pooled = index.view(side, side)[kept][:, kept]
    surgery.set_parameter(model, f"{fqn}.relative_position_index", pooled if index.ndim == 2 else pooled.flatten())
    if "relative_position_index" not in module._non_persistent_buffers_set:
        surgery.keep_loading(model, f"{fqn}.relative_position_index", "computed", grid, coarse)
    module.window_size = coarse
    if hasattr(module, "bias_shape"):
        module.bias_shape = (len(kept), len(kept), module.bias_shape[-1])


def _offsets(grid: Grid, stride: Grid) -> torch.Tensor:
    """Return column offset, row offset and squared distance between all tokens, in cells of the host: (1, N, N, 3)."""
    rows = torch.arange(grid[0]).repeat_interleave(grid[1]) * stride[0]
    columns = torch.arange(grid[1]).repeat(grid[0]) * stride[1]
    down, right = rows[None, :] - rows[:, None], columns[None, :] - columns[:, None]
    return torch.stack([right, down, right**2 + down**2], dim=-1)[None]
