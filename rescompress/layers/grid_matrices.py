"""Resample the weights of layers that mix the positions of a grid, and tables over the distances in it.

A mixing layer on the smaller grid lifts its map to the old grid, computes what it did there, and projects the result
back by the pseudo-inverse of the lifting, as patches are resized by Beyer et al., "FlexiViT",
https://arxiv.org/abs/2212.08013.
"""

import torch
from torch import Tensor

from rescompress.layers.resample import resize_matrix

Grid = tuple[int, int]

LAYOUTS = ("columns", "rows", "square", "offsets")
"""How a tensor belongs to a grid of H x W positions:

- columns: (out, H * W), the weight of a linear layer that reads every position
- rows: (H * W, ...), the weight or bias of one that writes every position
- square: (H * W, H * W), the weight of one that does both
- offsets: (heads, H * W), a table over the distances |dy| < H and |dx| < W
"""


def positions(shape: tuple[int, ...], layout: str) -> int:
    """Return how many positions a tensor of this shape has."""
    return shape[0] if layout == "rows" else shape[-1]


def resample_matrix(table: Tensor, layout: str, old: Grid, new: Grid) -> Tensor:
    """Resample a tensor of one of `LAYOUTS` from the old grid to the new one.

    Shape:
        - Input: as `LAYOUTS` says for the `old` grid
        - Output: the same for the `new` grid
    """
    if table.is_meta:
        shape = list(table.shape)
        for axis in {"columns": (-1,), "rows": (0,), "square": (0, -1), "offsets": (-1,)}[layout]:
            shape[axis] = new[0] * new[1]
        return table.new_empty(shape)
    values = table.detach().to("cpu", torch.float64)
    if layout == "offsets":
        sampled = torch.kron(_distances(old[0], new[0]), _distances(old[1], new[1]))
        return (values @ sampled.T).to(table)
    if layout in ("columns", "square"):
        values = values @ torch.kron(_lift(old[0], new[0]), _lift(old[1], new[1]))
    if layout in ("rows", "square"):
        values = torch.kron(_project(old[0], new[0]), _project(old[1], new[1])) @ values
    return values.to(table)


def _lift(old: int, new: int) -> Tensor:
    """Return the (old, new) matrix that takes a line of the new grid to the old one."""
    like = torch.empty(0)
    return resize_matrix(new, old, like) if new <= old else torch.linalg.pinv(resize_matrix(old, new, like))


def _project(old: int, new: int) -> Tensor:
    """Return the (new, old) matrix that takes a line of the old grid to the new one."""
    like = torch.empty(0)
    return torch.linalg.pinv(resize_matrix(new, old, like)) if new <= old else resize_matrix(old, new, like)


def _distances(old: int, new: int) -> Tensor:
    """Return the (new, old) matrix that samples a table over distances: d cells of the new grid are d * old / new.

    Bicubic and low-passed; the table goes on below 0 as its own mirror image, and ends at its last distance.
    """
    factor = old / new
    wanted = torch.arange(new, dtype=torch.float64)[:, None] * factor
    known = torch.arange(1 - old, old, dtype=torch.float64)[None]
    weights = _cubic((known - wanted) / max(1.0, factor))
    mirrored = weights[:, old - 1 :].clone()
    mirrored[:, 1:] += weights[:, : old - 1].flip(1)
    return mirrored / mirrored.sum(1, keepdim=True)


def _cubic(t: Tensor) -> Tensor:
    """Return Keys' cubic kernel with a = -1/2, the one of antialiased resizing."""
    t = t.abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
