"""Heads of Hugging Face transformers that predict for every pixel: their maps keep their size.

The backbone inside is described by its own family. A head that brings its map to the size of the image itself, such as
UperNet's, needs nothing and is not listed here.

Ranftl et al., "Vision Transformers for Dense Prediction", https://arxiv.org/abs/2103.13413
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rescompress import surgery
from rescompress.anatomy import Anatomy, ConvAnatomy, Grid, ViTAnatomy
from rescompress.families import convolutional, hf_vit
from rescompress.families._base import Family, class_names, describe_parts, probe

_RESTORED: dict[str, tuple[str, ...]] = {
    "beit.modeling_beit.BeitBackbone": (),
    "beit.modeling_beit.BeitForSemanticSegmentation": ("decode_head",),
    "data2vec.modeling_data2vec_vision.Data2VecVisionForSemanticSegmentation": ("decode_head",),
    "depth_anything.modeling_depth_anything.DepthAnythingForDepthEstimation": (),
    "dpt.modeling_dpt.DPTForDepthEstimation": ("head.head",),
    "dpt.modeling_dpt.DPTForSemanticSegmentation": ("head",),
    "glpn.modeling_glpn.GLPNForDepthEstimation": ("head.head",),
    "mobilenet_v2.modeling_mobilenet_v2.MobileNetV2ForSemanticSegmentation": ("segmentation_head",),
    "mobilevit.modeling_mobilevit.MobileViTForSemanticSegmentation": ("segmentation_head",),
    "mobilevitv2.modeling_mobilevitv2.MobileViTV2ForSemanticSegmentation": ("segmentation_head",),
    "segformer.modeling_segformer.SegformerForSemanticSegmentation": ("decode_head",),
}
"""Class of a model: the modules whose map it returns."""

_OF_THE_IMAGE = ("head.head",)
"""Modules among these whose map has the size of the image itself, which nobody resizes to it afterwards."""


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
    """Describe the backbone, and name the modules whose maps are brought back to their size."""
    names = [name.removeprefix("transformers.models.") for name in class_names(model)]
    restored = next(_RESTORED[name] for name in names if name in _RESTORED)
    sizes = _map_sizes(model, restored, args, kwargs)
    anatomy = replace(describe_parts(model, args, kwargs), restored=restored, restored_sizes=sizes)
    if isinstance(anatomy, ViTAnatomy):
        return replace(anatomy, host="", refit=refit, dense_tokens=True, multiple=_multiple(model))
    # Other heads give a map of a stride of theirs, which the user brings to the image: there a position more or less,
    # at sizes other than the example's, is still the whole image.
    if isinstance(anatomy, ConvAnatomy) and restored == _OF_THE_IMAGE and anatomy.refit is None:
        return replace(anatomy, refit=convolutional.refuse_lost_sides)
    return anatomy


def _map_sizes(
    model: nn.Module, restored: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Grid, ...]:
    """Return the size of the map that each of these modules makes of the example; none if one makes no map."""
    found: dict[str, Grid] = {}

    def watch(clone: nn.Module, image: Tensor) -> None:
        for fqn in restored:
            surgery.get(clone, fqn).register_forward_hook(partial(record, fqn))

    def record(fqn: str, module: nn.Module, inputs: Any, output: Any) -> None:
        maps = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim == 4]
        if maps:
            found[fqn] = (int(maps[0].shape[-2]), int(maps[0].shape[-1]))

    probe(model, args, kwargs, watch)
    return tuple(found[fqn] for fqn in restored) if set(found) == set(restored) else ()


def _multiple(model: Any) -> int:
    """Return what sides of the grid must be multiples of: halved, an odd one no longer tells the size of the image."""
    factors = getattr(model.config, "reassemble_factors", None) or (1,)
    return max(1, round(1 / min(factors)))


def refit(host: Any, anatomy: Any, grid: Grid) -> None:
    """Let the ViT inside follow, and every part of the head that computes the grid anew."""
    fqn = anatomy.patch_conv.removeprefix(f"{anatomy.host}.") if anatomy.host else anatomy.patch_conv
    tower = surgery.get(host, fqn.split(".embeddings.")[0])
    hf_vit.refit_tower(host, tower, surgery.get(host, fqn), anatomy, grid)


FAMILY = Family(
    name="hf_dense",
    summary="segmentation and depth heads of transformers: BEiT, Data2Vec, SegFormer, DPT, Depth Anything, MobileViT",
    methods=("patch_resize", "stem_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=tuple(f"transformers.models.{name}" for name in _RESTORED),
    describe=describe,
)
