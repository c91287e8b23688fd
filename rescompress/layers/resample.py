"""Resample a patch embedding to another patch size.

Beyer et al., "FlexiViT: One Model for All Patch Sizes", https://arxiv.org/abs/2212.08013
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.layers.resize import ResizedConv2d

Grid = tuple[int, int]


def resample_patch_kernel(kernel: Tensor, patch_size: Grid) -> Tensor:
    """Resize a patch-embedding kernel by the pseudo-inverse of bicubic image resizing (PI-resize).

    A larger kernel gives on the enlarged patch what the old one gave on the patch. A kernel that this function made
    larger is made smaller again without loss; any other is made smaller in the least-squares sense of the paper.

    Shape:
        - Input: (C_out, C_in, P, Q)
        - Output: (C_out, C_in, *patch_size)
    """
    old = (kernel.shape[-2], kernel.shape[-1])
    if old == patch_size or kernel.is_meta:
        return kernel if old == patch_size else kernel.new_empty(*kernel.shape[:2], *patch_size)
    with torch.no_grad():
        weight = kernel.double()
        if patch_size[0] <= old[0] and patch_size[1] <= old[1]:
            up_h, up_w = resize_matrix(patch_size[0], old[0], weight), resize_matrix(patch_size[1], old[1], weight)
            small = up_h.T @ weight @ up_w
            remade = torch.linalg.pinv(up_h).T @ small @ torch.linalg.pinv(up_w)
            if (remade - weight).abs().max() <= 1e-4 * weight.abs().max():
                return small.to(kernel.dtype)
        # The resize is separable, so its pseudo-inverse is that of the rows times that of the columns.
        rows = torch.linalg.pinv(resize_matrix(old[0], patch_size[0], weight))
        columns = torch.linalg.pinv(resize_matrix(old[1], patch_size[1], weight))
        resized: Tensor = rows.T @ weight @ columns
        return resized.to(kernel.dtype)


def resize_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """Return the (new, old) matrix of antialiased bicubic resizing along one side."""
    # The whole identity as one image: columns of one pixel are resized wrongly by torch 2.15's antialiased kernel.
    basis = torch.eye(old, dtype=torch.float64, device=like.device)[None, None]
    matrix: Tensor = F.interpolate(basis, size=(new, old), mode="bicubic", align_corners=False, antialias=True)
    return matrix[0, 0]


class PatchConv2d(ResizedConv2d):
    """A patch embedding of another patch size that also loads checkpoints of the old one.

    Shape:
        - Input: (B, in_channels, H, W)
        - Output: (B, out_channels, H // P, W // Q)
    """

    @classmethod
    def from_patch_conv(cls, conv: nn.Conv2d, patch_size: Grid) -> "PatchConv2d":
        """Build from a patch embedding with its kernel resampled; the bias and any resizing are shared."""
        new = cls.from_conv(conv, before=getattr(conv, "before", None), after=getattr(conv, "after", None))
        if not isinstance(new, cls):  # from_conv is a constructor of cls; this tells the type checker
            raise TypeError(f"{type(new).__name__} is no {cls.__name__}")
        new.kernel_size = new.stride = patch_size
        old_size = (conv.weight.shape[2], conv.weight.shape[3])
        new.earlier_sizes = (*conv.earlier_sizes, old_size) if isinstance(conv, PatchConv2d) else (old_size,)
        kernel = resample_patch_kernel(conv.weight.detach(), patch_size)
        new.weight = nn.Parameter(kernel, requires_grad=conv.weight.requires_grad)
        return new

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.earlier_sizes: tuple[Grid, ...] = ()

    def _resample(self, kernel: Tensor) -> Tensor:
        """Resample a kernel by the way that this one has come, from where its size stands on that way."""
        size, own = (kernel.shape[2], kernel.shape[3]), (self.weight.shape[2], self.weight.shape[3])
        if size == own:
            return kernel
        start = self.earlier_sizes.index(size) + 1 if size in self.earlier_sizes else len(self.earlier_sizes)
        for step in (*self.earlier_sizes[start:], own):
            kernel = resample_patch_kernel(kernel, step)
        return kernel

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        kernel = state_dict.get(prefix + "weight")
        if isinstance(kernel, Tensor) and kernel.ndim == 4 and kernel.shape[:2] == self.weight.shape[:2]:
            state_dict[prefix + "weight"] = self._resample(kernel)
        super()._load_from_state_dict(state_dict, prefix, *args)
