"""Resample what a model lays out over a grid, position embeddings and tables of relative positions, to another grid.

A loader keeps checkpoints of the old grid loadable. Liu et al., "Swin Transformer V2", https://arxiv.org/abs/2111.09883,
for bicubic resampling of relative-position biases.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers import grid_matrices

Grid = tuple[int, int]

LAYOUTS = ("tokens", "map", "map_last", "relative", "computed", "mixing", *grid_matrices.LAYOUTS)
"""How a tensor is laid out over a grid of H x W positions, `extra` rows of it belonging to no position:

- tokens: (..., extra + H * W, C), the extra rows first: prefix tokens
- map: (..., H, W)
- map_last: (..., H, W, C)
- relative: ((2H - 1) * (2W - 1) + extra, heads), the extra rows last: class token to tokens and back
- computed: any shape; made from the grid and never learned, so that a checkpoint's is ignored
- mixing: (extra * H * H, ...), the weight, (extra * H * H, extra, H, 1) or (..., 1, H), or bias of a convolution that
  reads one line of H positions and writes `extra` matrices of scores from position to position; H = W
- those of `grid_matrices`, weights that mix positions and tables over distances
"""


def resample_table(table: Tensor, layout: str, old: Grid, new: Grid, extra: int = 0) -> Tensor:
    """Resize a table by antialiased bicubic interpolation; its extra rows are kept.

    Shape:
        - Input: as `LAYOUTS` says for the `old` grid
        - Output: the same for the `new` grid
    """
    if old == new:
        return table
    with torch.no_grad():
        if layout == "map":
            return _resize(table, new)
        if layout == "map_last":
            return _resize(table.movedim(-1, -3), new).movedim(-3, -1).contiguous()
        if layout == "tokens":
            prefix, rows = table[..., :extra, :], table[..., extra:, :]
            planes = rows.reshape(*rows.shape[:-2], *old, rows.shape[-1]).movedim(-1, -3)
            rows = _resize(planes, new).movedim(-3, -1).reshape(*rows.shape[:-2], new[0] * new[1], rows.shape[-1])
            return torch.cat([prefix, rows], dim=-2)
        if layout == "relative":
            distances = (2 * old[0] - 1, 2 * old[1] - 1)
            kept = distances[0] * distances[1]
            planes = table[:kept].reshape(*distances, -1).movedim(-1, 0)
            rows = _resize(planes, (2 * new[0] - 1, 2 * new[1] - 1)).movedim(0, -1).reshape(-1, table.shape[-1])
            return torch.cat([rows, table[kept:]])
        if layout == "mixing":
            return _resample_mixing(table, old[0], new[0], extra)
        if layout in grid_matrices.LAYOUTS:
            return grid_matrices.resample_matrix(table, layout, old, new)
    raise ValueError(f"a table of layout {layout!r} cannot be resampled")


def _resample_mixing(table: Tensor, old: int, new: int, groups: int) -> Tensor:
    planes = table.reshape(groups, old, old, -1).movedim(-1, 1)
    made = _resize(planes, (new, new)).movedim(1, -1).reshape(groups * new * new, *table.shape[1:])
    if table.ndim == 1:
        return made
    column = table.shape[-1] == 1
    line = made.squeeze(-1 if column else -2)
    read = grid_matrices.resample_matrix(line.flatten(0, -2), "columns", (old, 1), (new, 1)).reshape(
        *line.shape[:-1], new
    )
    return read.unsqueeze(-1 if column else -2)


def _resize(planes: Tensor, new: Grid) -> Tensor:
    # float32: half precision has no antialiased kernel on every device
    flat = planes.float().reshape(1, -1, *planes.shape[-2:])
    flat = F.interpolate(flat, size=new, mode="bicubic", align_corners=False, antialias=True)
    return flat.reshape(*planes.shape[:-2], *new).to(planes.dtype)


def _rows(layout: str, grid: Grid) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) if layout == "relative" else grid[0] * grid[1]


class TableLoader:
    """State-dict hook: lets a resampled table load checkpoints of the grid from before.

    Register with `owner.register_load_state_dict_pre_hook`. A checkpoint with as many rows as the old or the new grid
    is taken to have that grid; any other is taken to have the old one's aspect. Where a model has been compressed
    twice, what the first compression made is so left to the loader of the second.
    """

    def __init__(self, name: str, layout: str, old: Grid, new: Grid, extra: int) -> None:
        self.name = name
        self.layout = layout
        self.old = old
        self.new = new
        self.extra = extra

    def __call__(self, module: nn.Module, state_dict: dict[str, object], prefix: str, *args: object) -> None:
        """Resample `state_dict[prefix + name]` in the dict if its shape is not the module's."""
        loaded, own = state_dict.get(prefix + self.name), getattr(module, self.name)
        if not isinstance(loaded, Tensor) or loaded.shape == own.shape:
            return
        if self.layout == "computed":
            state_dict[prefix + self.name] = own
        elif (grid := self._grid_of(loaded)) is not None:
            state_dict[prefix + self.name] = resample_table(loaded, self.layout, grid, self.new, self.extra)

    def _grid_of(self, loaded: Tensor) -> Grid | None:
        """Return the grid that a loaded table is laid out for; None where its shape tells none."""
        if self.layout == "map":
            return (loaded.shape[-2], loaded.shape[-1])
        if self.layout == "map_last":
            return (loaded.shape[-3], loaded.shape[-2])
        if self.layout == "mixing":
            side = round((loaded.shape[0] / self.extra) ** 0.5)
            return (side, side) if self.extra * side**2 == loaded.shape[0] else None
        if self.layout in grid_matrices.LAYOUTS:
            rows = grid_matrices.positions(tuple(loaded.shape), self.layout)
        else:
            rows = loaded.shape[0 if self.layout == "relative" else -2] - self.extra
        if rows == _rows(self.layout, self.old):
            return self.old
        if rows == _rows(self.layout, self.new):
            return self.new
        for height in range(1, rows + 1):
            grid = (height, max(1, round(height * self.old[1] / self.old[0])))
            if _rows(self.layout, grid) >= rows:
                return grid if _rows(self.layout, grid) == rows else None
        return None
