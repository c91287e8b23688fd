"""Tables of attention biases by distance, |dy| and |dx|, as LeViT and EfficientFormer of timm hold them."""

import math
from typing import Any

import torch
from torch import Tensor

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid

ATTENTIONS = (
    "timm.models.levit.Attention",
    "timm.models.levit.AttentionDownsample",
    "timm.models.efficientformer.Attention",
    "timm.models.efficientformer_v2.Attention2d",
    "timm.models.efficientformer_v2.Attention2dDownsample",
)
"""The classes that hold such tables."""


def refit(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Resample every table of biases, and write anew the indices into it and the grids that modules keep.

    Between the stem's map and a table lie convolutions of stride 2 that round up.
    """
    for fqn, module in list(host.named_modules()):
        if isinstance(getattr(module, "attention_biases", None), Tensor):
            _refit_attention(host, fqn, module, anatomy.stem_grid, grid)
        elif isinstance(getattr(module, "resolution", None), tuple):  # subsampling of a sequence of tokens
            module.resolution = _behind(module.resolution, anatomy.stem_grid, grid)


def _refit_attention(host: Any, fqn: str, module: Any, stem: Grid, new_stem: Grid) -> None:
    old = _resolution(module)
    new = _behind(old, stem, new_stem)
    surgery.resample(host, f"{fqn}.attention_biases", "offsets", old, new)
    stride = 1
    if hasattr(module, "resolution"):
        module.resolution = new
        module.N = new[0] * new[1]
        queries = module.attention_bias_idxs.shape[0]
        stride = 1 if queries == old[0] * old[1] else 2
        if hasattr(module, "resolution2"):
            module.resolution2 = (-(-new[0] // 2), -(-new[1] // 2))
            module.N2 = module.resolution2[0] * module.resolution2[1]
    indices = distance_indices(new, stride).to(module.attention_bias_idxs.device)
    surgery.set_parameter(host, f"{fqn}.attention_bias_idxs", indices)
    if "attention_bias_idxs" not in module._non_persistent_buffers_set:
        surgery.keep_loading(host, f"{fqn}.attention_bias_idxs", "computed", old, new)
    surgery.forget_bias(module)
    module.register_load_state_dict_pre_hook(surgery.forget_bias)


def _resolution(module: Any) -> Grid:
    """Return the grid of an attention's keys; a host that keeps none has a square one."""
    if hasattr(module, "resolution"):
        return (int(module.resolution[0]), int(module.resolution[1]))
    side = round(module.attention_biases.shape[1] ** 0.5)
    return (side, side)


def _behind(old: Grid, stem: Grid, new_stem: Grid) -> Grid:
    """Return what convolutions of stride 2 make of the new stem's grid where they made `old` of the old one's."""
    halved = 2 ** round(math.log2(stem[0] / old[0]))
    return (-(-new_stem[0] // halved), -(-new_stem[1] // halved))


def distance_indices(grid: Grid, stride: int = 1) -> Tensor:
    """Return which row of a table over distances belongs to each pair of a query, every `stride` cells, and a key.

    Shape:
        - Output: (queries, H * W)
    """
    rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
    keys = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
    queries = torch.stack(torch.meshgrid(rows[::stride], columns[::stride], indexing="ij")).flatten(1)
    apart = (queries[:, :, None] - keys[:, None, :]).abs()
    return apart[0] * grid[1] + apart[1]
