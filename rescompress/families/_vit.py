"""What the families of plain Vision Transformers share: timm's patch embedding, the sequence of blocks, rotary tables.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", https://arxiv.org/abs/2104.09864
"""

from typing import Any

from torch import nn

from rescompress import surgery
from rescompress.anatomy import Grid, cells
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import class_names
from rescompress.families._timm import patches, sequence
from rescompress.layers.rotary import SpacedRotary

_INDEXED = {
    "timm.layers.pos_embed_sincos.RotaryEmbeddingCat": SpacedRotary.from_axial,
    "timm.layers.pos_embed_sincos.RotaryEmbeddingMixed": SpacedRotary.from_mixed,
    "timm.layers.pos_embed_sincos.RotaryEmbeddingMRope": SpacedRotary.from_multimodal,
}


def pair(sides: tuple[int, ...]) -> Grid:
    """Return (height, width) of a kernel."""
    return (sides[0], sides[1])


def patch_embedding(model: Any, input_size: Grid) -> dict[str, Any]:
    """Return the fields of a ViTAnatomy that timm's PatchEmbed, called `patch_embed`, and `blocks` tell.

    Raises:
        UnsupportedModelError: the patches are cut by something else.
    """
    parts = patches(model, "patch_embed", input_size)
    grid = cells(input_size, parts["patch_size"], parts["pads_image"])
    return {**parts, **sequence("blocks", model.blocks, grid)}


def refit_rotary(owner: nn.Module, name: str, old: Grid, new: Grid) -> None:
    """Let the rotary table `name` of `owner` span on a new grid what it spanned on the old one.

    Coordinates that are normalised by the grid, or scaled to a reference grid, do so by themselves once they are told
    of the new one. Indices of rows and columns get as far apart as the larger patches are.

    Raises:
        UnsupportedModelError: the table is of no kind that is known, or its indices are jittered in training.
    """
    rope: Any = getattr(owner, name)
    if rope is None:
        return
    kind = class_names(rope)[0]
    from_rope = _INDEXED.get(kind)
    if isinstance(rope, SpacedRotary):
        rope.spacing = (rope.spacing[0] * old[0] / new[0], rope.spacing[1] * old[1] / new[1])
    elif from_rope is not None and getattr(rope, "grid_type", "index") == "index" and not _referenced(rope):
        if rope.aug_active:
            raise UnsupportedModelError(
                f"the {type(rope).__name__} of this model shifts, jitters or rescales the indices of its tokens in "
                "training, which would be lost on another grid; build the model without rope_*_coords"
            )
        surgery.swap(owner, name, from_rope(rope, (old[0] / new[0], old[1] / new[1]), new))
    elif not hasattr(rope, "update_feat_shape"):
        raise UnsupportedModelError(f"the rotary embedding {kind} is not known, so it cannot be laid out anew")
    rope = getattr(owner, name)
    if rope.feat_shape is not None:
        rope.update_feat_shape(new)


def _referenced(rope: Any) -> bool:
    return getattr(rope, "ref_feat_shape", None) is not None
