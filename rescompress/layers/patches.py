"""Patch embeddings that are linear layers on patches which the host has cut, and the image resized in front of them.

Beyer et al., "FlexiViT: One Model for All Patch Sizes", https://arxiv.org/abs/2212.08013
"""

from typing import Any

from torch import Tensor, nn

from rescompress.layers.resample import resample_patch_kernel
from rescompress.layers.wrap import Wrapped

Grid = tuple[int, int]


class PatchLinear(nn.Linear):
    """A linear patch embedding of another patch size that also loads checkpoints of the old one.

    Shape:
        - Input: (..., P * Q * in_channels), laid out as `layout` says: "hwc" or "chw"
        - Output: (..., out_features)
    """

    @classmethod
    def from_patch_linear(cls, linear: nn.Linear, old: Grid, new: Grid, layout: str) -> "PatchLinear":
        """Build from a patch embedding with its weight resampled as a kernel; the bias is shared."""
        channels = linear.in_features // (old[0] * old[1])
        made = cls(channels * new[0] * new[1], linear.out_features, bias=linear.bias is not None, device="meta")
        made.layout, made.patch_size = layout, new
        made.earlier_sizes = (*(linear.earlier_sizes if isinstance(linear, PatchLinear) else ()), old)
        made.weight = nn.Parameter(
            _resample(linear.weight.detach(), old, new, layout), requires_grad=linear.weight.requires_grad
        )
        made._parameters["bias"] = linear._parameters["bias"]
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layout = "hwc"
        self.patch_size: Grid = (1, 1)
        self.earlier_sizes: tuple[Grid, ...] = ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == self.out_features:
            state_dict[prefix + "weight"] = self._brought(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _brought(self, weight: Tensor) -> Tensor:
        """Resample a weight by the way that this one has come, from where its size stands on that way."""
        channels = self.in_features // (self.patch_size[0] * self.patch_size[1])
        sizes = [*self.earlier_sizes, self.patch_size]
        counts = [channels * size[0] * size[1] for size in sizes]
        if weight.shape[1] == self.in_features or weight.shape[1] not in counts:
            return weight
        start = counts.index(weight.shape[1])
        for old, new in zip(sizes[start:], sizes[start + 1 :], strict=False):
            weight = _resample(weight, old, new, self.layout)
        return weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, patch_size={self.patch_size}, layout={self.layout!r}"


def _resample(weight: Tensor, old: Grid, new: Grid, layout: str) -> Tensor:
    if layout == "hwc":
        kernel = weight.unflatten(1, (*old, -1)).permute(0, 3, 1, 2)
        return resample_patch_kernel(kernel, new).permute(0, 2, 3, 1).flatten(1).contiguous()
    return resample_patch_kernel(weight.unflatten(1, (-1, *old)), new).flatten(1).contiguous()


class ResizedEmbedding(Wrapped):
    """A patch embedding that cuts the image itself, with the image resized in front of it; else it is as it was.

    Shape:
        - Input: an image (B, C, H, W), resized by `before`; further arguments pass through
        - Output: the inner module's

    Raises:
        ValueError: patches that have been cut elsewhere cannot be resized.
    """

    def __init__(self, inner: nn.Module, before: nn.Module) -> None:
        super().__init__(inner)
        self.before = before

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError(
                "this model resizes its image, and was given patches that have been cut already; give images "
                "(B, C, H, W), or let the loader make fewer patches"
            )
        return self.inner(self.before(x), *args, **kwargs)

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        """Return the grid that an image of this size makes."""
        before: Any = self.before
        inner: Any = self.inner
        grid: Grid = inner.dynamic_feat_size(before.target(img_size[0], img_size[1]))
        return grid

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What the host or a later step sets, such as the patch size, is meant for the module that reads it.
        if name not in ("inner", "before", "training") and not name.startswith("_") and hasattr(self, "inner"):
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)
