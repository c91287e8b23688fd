"""Rotary position embeddings whose tokens lie further apart than one step: the same image on a smaller grid.

Su et al., "RoFormer", https://arxiv.org/abs/2104.09864; Heo et al., "Rotary Position Embedding for Vision Transformer",
https://arxiv.org/abs/2403.13298
"""

from collections.abc import Callable, Sequence
from typing import Any, List, Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from torch import Tensor, nn

Grid = tuple[int, int]
Spacing = tuple[float, float]


class SpacedRotary(nn.Module):
    """A rotary embedding over the indices of rows and columns, with the tokens of a grid `spacing` indices apart.

    A token of the new grid stands for the patch that covers several old ones, and gets the index of their middle:
    (i + 1/2) * spacing - 1/2. So the grid spans what the old one spanned, whatever the image's size.

    Shape:
        - get_embed: (H * W, 2 * dim), sines before cosines; with learned frequencies (depth, heads, H * W, 2 * dim)

    Attributes:
        kind: "axial" (each frequency goes with one axis), "mixed" (learned for both axes, per block and head) or
            "multimodal" (axial, and interleaved with a time axis that stays 0)
        spacing: old steps per new step, rows and columns
        feat_shape: the grid where none is given
    """

    def __init__(self, kind: str, spacing: Spacing, feat_shape: Sequence[int]) -> None:
        super().__init__()
        self.kind = kind
        self.spacing = spacing
        self.feat_shape: Grid = (feat_shape[0], feat_shape[1])
        self.offset = 0.0
        self.columns_first = False
        self.rotate_half = False
        self.dim = 0
        self.bands: Optional[Tensor]  # noqa: UP045
        self.register_buffer("bands", None, persistent=False)
        self.axis: Optional[Tensor]  # noqa: UP045
        self.register_buffer("axis", None, persistent=False)
        self.freqs: Optional[nn.Parameter]  # noqa: UP045
        self.register_parameter("freqs", None)

    @classmethod
    def from_axial(cls, rope: Any, spacing: Spacing, feat_shape: Sequence[int]) -> "SpacedRotary":
        """Build from timm's RotaryEmbeddingCat on indices."""
        new = cls("axial", spacing, feat_shape)
        new.offset, new.columns_first = float(rope.grid_offset), rope.grid_indexing == "xy"
        new.rotate_half, new.dim, new.bands = bool(rope.rotate_half), rope.dim, rope.bands
        return new

    @classmethod
    def from_mixed(cls, rope: Any, spacing: Spacing, feat_shape: Sequence[int]) -> "SpacedRotary":
        """Build from timm's RotaryEmbeddingMixed, whose parameter is shared."""
        new = cls("mixed", spacing, feat_shape)
        new.columns_first, new.dim = rope.grid_indexing == "xy", rope.dim
        new._parameters["freqs"] = rope.freqs
        return new

    @classmethod
    def from_multimodal(cls, rope: Any, spacing: Spacing, feat_shape: Sequence[int]) -> "SpacedRotary":
        """Build from timm's RotaryEmbeddingMRope."""
        new = cls("multimodal", spacing, feat_shape)
        new.rotate_half, new.dim, new.bands, new.axis = True, rope.dim, rope.inv_freq, rope.axis
        return new

    def update_feat_shape(self, feat_shape: Sequence[int]) -> None:
        """Take another grid where none is given; the spacing stays."""
        self.feat_shape = (feat_shape[0], feat_shape[1])

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that should not decay."""
        return {"freqs"} if self.kind == "mixed" else set()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpacedRotary":
        # Frequencies are multiplied by large indices: half precision would be off by whole turns.
        bands = self.bands
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.bands
        if bands is not None and moved is not None and moved.element_size() < 4:
            self.bands = bands.to(moved.device)
        return self

    def _side(self, side: int, step: float, device: torch.device) -> Tensor:
        return (torch.arange(side, device=device, dtype=torch.float32) + 0.5) * step - 0.5 + self.offset

    def _indices(self, shape: List[int], device: torch.device) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        rows = self._side(shape[0], self.spacing[0], device)
        columns = self._side(shape[1], self.spacing[1], device)
        y = rows[:, None].expand(shape[0], shape[1]).flatten()
        x = columns[None, :].expand(shape[0], shape[1]).flatten()
        return y, x

    def _angles(self, shape: List[int]) -> Tensor:  # noqa: UP006
        freqs, bands, axis = self.freqs, self.bands, self.axis
        if freqs is not None:
            y, x = self._indices(shape, freqs.device)
            first, second = (x, y) if self.columns_first else (y, x)
            learned = freqs.float()
            return first[:, None] * learned[0].unsqueeze(-2) + second[:, None] * learned[1].unsqueeze(-2)
        if bands is None:
            raise ValueError("a rotary embedding without learned frequencies has bands")
        y, x = self._indices(shape, bands.device)
        if axis is not None:
            return torch.stack([torch.zeros_like(y), y, x], dim=-1).index_select(-1, axis) * bands
        first, second = (x, y) if self.columns_first else (y, x)
        return torch.cat([first[:, None] * bands, second[:, None] * bands], dim=-1)

    def _spread(self, values: Tensor) -> Tensor:
        return torch.cat([values, values], dim=-1) if self.rotate_half else values.repeat_interleave(2, dim=-1)

    def get_embed(
        self,
        shape: Optional[List[int]] = None,  # noqa: UP006, UP045
        dtype: Optional[torch.dtype] = None,  # noqa: UP045
    ) -> Tensor:
        """Return sines and cosines of the angles by which queries and keys are turned at each token of a grid."""
        grid = [self.feat_shape[0], self.feat_shape[1]] if shape is None else [shape[0], shape[1]]
        angles = self._angles(grid)
        embed = torch.cat([self._spread(angles.sin()), self._spread(angles.cos())], dim=-1)
        freqs = self.freqs
        if dtype is not None:
            return embed.to(dtype)
        return embed if freqs is None else embed.to(freqs.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, spacing={self.spacing}, feat_shape={self.feat_shape}"


class SpacedLogCoords:
    """Stands in for `_init_buffers` of timm's RelPosMlp on logarithms of distances: they count in old steps.

    Shape:
        - makes `rel_coords_log`: (2H - 1, 2W - 1, 2), sign(d) * log(1 + |d| * spacing)
    """

    def __init__(self, module: Any, spacing: Spacing) -> None:
        self.module = module
        self.spacing = spacing

    def __call__(self) -> None:
        type(self.module)._init_buffers(self.module)
        made = self.module.rel_coords_log
        rows, columns = (
            torch.arange(1 - side, side, device=made.device, dtype=torch.float32) * step
            for side, step in zip(self.module.window_size, self.spacing, strict=True)
        )
        distances = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        made.copy_(distances.sign() * torch.log1p(distances.abs()))
