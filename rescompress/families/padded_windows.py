"""TinyViT, EfficientViT (MSRA) and DaViT of timm: attention in windows that the hosts fill up where they do not fit.

Wu et al., "TinyViT", https://arxiv.org/abs/2207.10666; Liu et al., "EfficientViT: Memory Efficient Vision Transformer
with Cascaded Group Attention", https://arxiv.org/abs/2305.07027; Ding et al., "DaViT",
https://arxiv.org/abs/2204.03645
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid
from rescompress.families._attention_biases import distance_indices
from rescompress.families._base import Family, class_names
from rescompress.families._windows import clipped, describe_stem, fix_size, maps_at, unchanged

_FIRST_CONVS = {
    "timm.models.davit.DaVit": "stem.conv",
    # The whole block: timm's own fusing of it with its normalisation would lose a resize inside.
    "timm.models.tiny_vit.TinyVit": "patch_embed.conv1",
    "timm.models.efficientvit_msra.EfficientVitMsra": "patch_embed.conv1",
}
_TINY = "timm.models.tiny_vit.TinyVitBlock"
_MSRA = "timm.models.efficientvit_msra.LocalWindowAttention"
_DAVIT = "timm.models.davit.SpatialBlock"
BLOCKS = (_TINY, _MSRA, _DAVIT)


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Name the first convolution; windows keep their size wherever it fits the smaller map."""
    first_conv = next(_FIRST_CONVS[name] for name in class_names(model) if name in _FIRST_CONVS)
    return describe_stem(model, args, kwargs, family=FAMILY.name, first_conv=first_conv, refit=refit)


def refit(host: nn.Module, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Shrink windows that no longer fit their maps: what the hosts fill them up with is attended to like the rest.

    TinyViT's windows of 14 would be three quarters filling on a map of 7 x 7, and cost as much as before.
    """
    kinds = dict.fromkeys(BLOCKS, unchanged)
    before, after = (maps_at(host, anatomy, size, kinds, last=(_TINY,)) for size in (anatomy.stem_grid, grid))
    for fqn, side in after.items():
        block: Any = surgery.get(host, fqn)
        old = _window(block)
        new = clipped(old, before[fqn], side)
        if _DAVIT in class_names(block):
            block.window_size = block.attn.window_size = new
            continue
        length = min(new)  # square windows only, as the hosts have them
        attention = block.attn
        for module in attention.modules():  # what it has gathered is for the table from before
            if hasattr(module, "attention_bias_cache"):
                surgery.forget_bias(module)
                module.register_load_state_dict_pre_hook(surgery.forget_bias)
        if _TINY in class_names(block):
            block.window_size = length
            attention.resolution = (length, length)
        else:
            block.resolution = min(side)
            attention.resolution = length
        if length == old[0]:
            continue
        surgery.resample(host, f"{fqn}.attn.attention_biases", "offsets", old, (length, length))
        index = distance_indices((length, length)).to(attention.attention_bias_idxs.device)
        surgery.set_parameter(host, f"{fqn}.attn.attention_bias_idxs", index)
    fix_size(host)


def _window(block: Any) -> Grid:
    size = block.attn.resolution if _MSRA in class_names(block) else block.window_size
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


FAMILY = Family(
    name="padded_windows",
    summary="TinyViT, EfficientViT (MSRA) and DaViT of timm: windows that the host fills up",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=tuple(_FIRST_CONVS),
    describe=describe,
)
