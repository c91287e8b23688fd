"""timm's VisionTransformerSAM: a plain ViT that attends in windows or globally, with decomposed relative positions.

Kirillov et al., "Segment Anything", https://arxiv.org/abs/2304.02643; Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection", https://arxiv.org/abs/2203.16527
"""

import math
from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, ViTAnatomy
from rescompress.families._base import Family, image_of
from rescompress.families._vit import patch_embedding, refit_rotary


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes."""
    height, width = image_of(model, args, kwargs).shape[-2:]
    parts = patch_embedding(model, (height, width))
    return ViTAnatomy(
        family=FAMILY.name,
        pos_embed=None,  # a map (1, H, W, C) and not a sequence: refit resamples it
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=0,
        refit=refit,
        **parts,
    )


def refit(host: Any, anatomy: Anatomy, grid: Grid) -> None:
    """Resample what is laid out over the grid or a window; windows go on covering the same part of the image."""
    old = anatomy.grid
    if old is None:
        return
    scale = math.sqrt(grid[0] * grid[1] / (old[0] * old[1]))
    if host.pos_embed is not None:
        stored = (int(host.pos_embed.shape[1]), int(host.pos_embed.shape[2]))
        # The host resamples it for other images: it keeps the grid of the host's own reference image.
        rows, columns = (max(1, round(s * n / o)) for s, n, o in zip(stored, grid, old, strict=True))
        surgery.resample(host, "pos_embed", "map_last", stored, (rows, columns))
    windows = {block.window_size for block in host.blocks} - {0}
    refit_rotary(host, "rope_global", old, grid)
    for window in windows:  # the constructor makes them all alike
        smaller = max(1, round(window * scale))
        refit_rotary(host, "rope_window", (window, window), (smaller, smaller))
    for name, block in host.blocks.named_children():
        window = block.window_size
        if window:
            block.window_size = max(1, round(window * scale))
        if block.attn.use_rel_pos:
            _resample_distances(host, f"blocks.{name}.attn", window, block.window_size, (old, grid))


def _resample_distances(host: nn.Module, attn: str, window: int, smaller: int, grids: tuple[Grid, Grid]) -> None:
    for axis, table in enumerate(("rel_pos_h", "rel_pos_w")):
        rows = surgery.get_parameter(host, f"{attn}.{table}").shape[0]
        # A table (2 * side - 1, C) may be that of another image, which the host interpolates while it runs.
        side = (rows + 1) // 2
        new = smaller if window else max(1, round(side * grids[1][axis] / grids[0][axis]))
        surgery.resample(host, f"{attn}.{table}", "tokens", (1, rows), (1, 2 * new - 1))


FAMILY = Family(
    name="sam_vit",
    summary="the image encoders of Segment Anything in timm (samvit_base, large, huge): windows, relative positions",
    methods=("patch_resize", "input_resize", "quantize"),
    hosts=("timm.models.vision_transformer_sam.VisionTransformerSAM",),
    describe=describe,
)
