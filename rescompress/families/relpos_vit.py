"""Plain Vision Transformers of timm with biases by relative position: BEiT, BEiT v2 and VisionTransformerRelPos.

Bao et al., "BEiT", https://arxiv.org/abs/2106.08254; Liu et al., "Swin Transformer V2", https://arxiv.org/abs/2111.09883,
for biases that a small network makes of logarithms of distances.
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, Grid, ViTAnatomy
from rescompress.families._base import Family, image_of
from rescompress.families._vit import patch_embedding
from rescompress.families._windows import without_table
from rescompress.layers.rotary import SpacedLogCoords

TABLE = "relative_position_bias_table"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes."""
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    return ViTAnatomy(
        family=FAMILY.name,
        pos_embed=None if getattr(host, "pos_embed", None) is None else "pos_embed",
        pos_embed_prefix_tokens=host.num_prefix_tokens,
        num_prefix_tokens=host.num_prefix_tokens,
        norm="norm",
        mean_pooled=host.global_pool == "avg",
        refit=refit,
        **patch_embedding(host, (height, width)),
    )


def refit(host: nn.Module, anatomy: Anatomy, grid: Grid) -> None:
    """Resample the tables of biases to the distances that there are on the new grid, and their indices."""
    old = anatomy.grid
    if old is None:
        return
    for fqn, module in list(host.named_modules()):
        owner: Any = module
        if getattr(module, TABLE, None) is not None:
            with without_table(module):
                owner.set_window_size(grid)
            extra = owner._parameters[TABLE].shape[0] - (2 * old[0] - 1) * (2 * old[1] - 1)
            surgery.resample(host, f"{fqn}.{TABLE}" if fqn else TABLE, "relative", old, grid, extra)
        elif hasattr(module, "rel_coords_log"):
            if owner.mode == "cr":  # counted in steps; those of Swin are over the window's side
                earlier = vars(owner).get("_init_buffers")
                before = earlier.spacing if isinstance(earlier, SpacedLogCoords) else (1.0, 1.0)
                spacing = (before[0] * old[0] / grid[0], before[1] * old[1] / grid[1])
                owner._init_buffers = SpacedLogCoords(owner, spacing)
            owner.set_window_size(grid)


FAMILY = Family(
    name="relpos_vit",
    summary="plain Vision Transformers of timm with relative-position biases (BEiT, BEiT v2, vit_relpos, vit_srelpos)",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=("timm.models.beit.Beit", "timm.models.vision_transformer_relpos.VisionTransformerRelPos"),
    describe=describe,
)
