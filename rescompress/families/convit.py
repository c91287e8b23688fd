"""ConViT of timm: blocks whose heads start out as convolutions, by the distances between patches.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
https://arxiv.org/abs/2103.10697
"""

from typing import Any

import torch
from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import Grid, ViTAnatomy
from rescompress.families._base import Family, class_names, image_of
from rescompress.families._timm import patches, sequence

GPSA = "timm.models.convit.GPSA"


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the model's own attributes; the class token joins behind the blocks that count distances."""
    host: Any = model
    height, width = image_of(model, args, kwargs).shape[-2:]
    parts = patches(model, "patch_embed", (height, width))
    grid = parts["pos_embed_grid"]
    return ViTAnatomy(
        family=FAMILY.name,
        refit=refit,
        pos_embed="pos_embed" if host.use_pos_embed else None,
        pos_embed_prefix_tokens=0,
        num_prefix_tokens=1,
        prefix_from_block=host.local_up_to_layer,
        norm="norm",
        mean_pooled=host.global_pool == "avg",
        **parts,
        **sequence("blocks", host.blocks, grid),
    )


def refit(host: Any, anatomy: ViTAnatomy, grid: Grid) -> None:
    """Lay out the distances that the attention reads over the new grid, counted in patches of the trained one.

    The learned weights say how attention falls off with them. The host's own would count the patches of the new grid:
    a head that looks at what is beside a patch would then look twice as far.
    """
    old = anatomy.grids[0] or grid
    for fqn, module in list(host.named_modules()):
        if class_names(module)[0] == GPSA:
            steps = _steps(module.rel_indices, old)
            trained = (steps[0] * old[0], steps[1] * old[1])
            surgery.set_parameter(host, f"{fqn}.rel_indices", distances(trained, grid).to(module.qk.weight))
    host.num_patches = grid[0] * grid[1]


def _steps(indices: Tensor, grid: Grid) -> tuple[float, float]:
    """Return how many patches of the trained grid lie between two of this one: 1 where nothing has been resized yet."""
    if indices.is_meta or indices.shape[1] != grid[0] * grid[1]:  # the host fills it in its first forward
        return (1.0, 1.0)
    down = float(indices[0, 0, grid[1], 1]) if grid[0] > 1 else 1.0
    right = float(indices[0, 0, 1, 0]) if grid[1] > 1 else 1.0
    return (down, right)


def distances(trained: tuple[float, float], grid: Grid) -> Tensor:
    """Return dx, dy and dx^2 + dy^2 from each patch to each, counted in patches of the trained grid.

    Shape:
        - Output: (1, H * W, H * W, 3)
    """
    rows = torch.arange(grid[0], dtype=torch.float64) * (trained[0] / grid[0])
    columns = torch.arange(grid[1], dtype=torch.float64) * (trained[1] / grid[1])
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    dy, dx = y[None] - y[:, None], x[None] - x[:, None]
    return torch.stack([dx, dy, dx**2 + dy**2], dim=-1)[None]


FAMILY = Family(
    name="convit",
    summary="ConViT of timm: attention gated by the distances between patches",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=("timm.models.convit.ConVit",),
    describe=describe,
)
