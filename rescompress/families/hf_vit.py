"""Plain Vision Transformers of Hugging Face transformers, alone or as the vision tower of a larger model.

Their forwards compute the grid from the image that is given: its side divided by a `patch_size` that is kept in the
embeddings, in layers and in the config. Compressed, that number is how many pixels of the given image a token stands
for, and `image_size` stays what the caller must give. A config that changes so keeps the old number as
`uncompressed_patch_size`.

Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929
"""

from typing import Any

import torch
from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import Grid, GridAttribute, ViTAnatomy, cells
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of

UNCOMPRESSED = "uncompressed_patch_size"
"""Attribute of a changed config: its `patch_size` from before, with which the model is built anew."""

_ALWAYS = ("beit", "data2vec", "dinov2", "dinov2_with_registers", "dpt")
"""Folders of transformers whose hosts fit their position embedding to every image, without being asked to."""

_PLAIN = (
    "altclip.modeling_altclip.AltCLIPVisionModel",
    "beit.modeling_beit.BeitModel",
    "blip.modeling_blip.BlipVisionModel",
    "blip_2.modeling_blip_2.Blip2VisionModel",
    "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionModel",
    "clip.modeling_clip.CLIPVisionModel",
    "data2vec.modeling_data2vec_vision.Data2VecVisionModel",
    "deit.modeling_deit.DeiTModel",
    "dinov2.modeling_dinov2.Dinov2Backbone",
    "dinov2.modeling_dinov2.Dinov2Model",
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone",
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone",
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",
    "dpt.modeling_dpt.DPTModel",
    "ijepa.modeling_ijepa.IJepaModel",
    "instructblip.modeling_instructblip.InstructBlipVisionModel",
    "metaclip_2.modeling_metaclip_2.MetaClip2VisionModel",
    "siglip.modeling_siglip.SiglipVisionModel",
    "vit.modeling_vit.ViTModel",
    "vit_msn.modeling_vit_msn.ViTMSNModel",
)


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViTAnatomy:
    """Read the parts off the embeddings and the list of layers.

    Raises:
        UnsupportedModelError: the patches are not cut by one convolution of this model, or are not square.
    """
    height, width = image_of(model, args, kwargs).shape[-2:]
    host: Any = model
    patch_conv, conv = _patch_conv(model, host.embeddings)
    patch = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
    if patch[0] != patch[1]:
        raise UnsupportedModelError(
            f"this {type(model).__name__} cuts patches of {patch[0]} x {patch[1]} pixels; its own forward knows square "
            "ones only"
        )
    grid = cells((height, width), patch)
    table = _table(host.embeddings)
    pos_embed, stored, prefix_rows = None, grid, 0
    if table is not None:
        name, tensor = table
        prefix_rows = _class_tokens(host.embeddings)
        stored = _square(model, tensor, prefix_rows)
        # A host that fits its table to every image goes on doing so from the grid that the table was learned on.
        pos_embed = name if stored == grid or not _always_interpolates(model) else None
    blocks = _blocks(model)
    places = len(blocks) + 1
    return ViTAnatomy(
        family=FAMILY.name,
        input_size=(int(height), int(width)),
        image_size=(int(height), int(width)),
        refit=refit,
        patch_conv=patch_conv,
        patch_size=patch,
        pos_embed=pos_embed,
        pos_embed_grid=stored,
        pos_embed_prefix_tokens=prefix_rows,
        num_prefix_tokens=_class_tokens(host.embeddings) + _registers(host.embeddings),
        grid_attributes=(_patch_size_attribute(host),),
        fixed_input=False,
        dense_tokens=type(model).__name__.endswith("Backbone"),
        norm=_norm(model),
        mean_pooled=bool(getattr(host.config, "use_mean_pooling", False)) and getattr(host, "pooler", None) is not None,
        pools_all=bool(getattr(host, "use_head", False)),
        blocks=blocks,
        grids=(grid,) * places,
        num_patch_tokens=(grid[0] * grid[1],) * places,
    )


def refit(host: Any, anatomy: Any, grid: Grid) -> None:
    """Tell every part of the host how many pixels of the given image a token stands for now."""
    refit_tower(host, host, surgery.get(host, _inside(anatomy, anatomy.patch_conv)), anatomy, grid)


def refit_tower(model: Any, tower: Any, conv: nn.Module, anatomy: ViTAnatomy, grid: Grid) -> None:
    """Do so in a whole model that computes the grid of the tower inside it as well."""
    pixels = _pixels_per_token(conv, anatomy, grid)
    old = anatomy.patch_size if anatomy.image_size == anatomy.input_size else _told(tower)
    for module in model.modules():
        if _same(vars(module).get("patch_size"), old):
            module.patch_size = _like(module.patch_size, pixels)
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        if _same(getattr(config, "patch_size", None), old):
            # In place: heads outside the tower share the config and compute their maps from it.
            if not hasattr(config, UNCOMPRESSED):
                setattr(config, UNCOMPRESSED, config.patch_size)
            config.patch_size = _like(config.patch_size, pixels)
    _count_positions(tower.embeddings)


def _count_positions(embeddings: Any) -> None:
    """Let what counts the rows of the position embedding follow its new size."""
    table = _table(embeddings)
    if table is None:
        return
    rows = int(table[1].shape[-2])
    owner = getattr(embeddings, "patch_embeddings", embeddings)
    if hasattr(owner, "num_patches"):
        owner.num_patches = rows - _class_tokens(embeddings)
    if hasattr(embeddings, "num_positions"):
        embeddings.num_positions = rows
    if isinstance(getattr(embeddings, "position_embedding", None), nn.Embedding):
        embeddings.position_embedding.num_embeddings = rows
    ids = embeddings._buffers.get("position_ids")
    if ids is not None and ids.shape[-1] != rows:
        embeddings._buffers["position_ids"] = torch.arange(rows, device=ids.device, dtype=ids.dtype).expand(1, -1)


def _pixels_per_token(conv: Any, anatomy: Any, grid: Grid) -> int:
    """Return the side in pixels of the given image that a token stands for."""
    if isinstance(getattr(conv, "before", nn.Identity()), nn.Identity):
        return int(conv.kernel_size[0])
    side, count = anatomy.input_size[0], grid[0]
    fitting = [pixels for pixels in range(1, side + 1) if side // pixels == count]
    return min(fitting, key=lambda pixels: abs(pixels - side / count))


def _patch_size_attribute(host: Any) -> GridAttribute:
    """Return where the host keeps its `patch_size`; it knows square patches of whole pixels only."""
    patches = getattr(host.embeddings, "patch_embeddings", None)
    owner = "embeddings.patch_embeddings" if hasattr(patches, "patch_size") else "embeddings"
    pair = isinstance(getattr(surgery.get(host, owner), "patch_size", None), list | tuple)
    holds = "pixels_per_token_pair" if pair else "pixels_per_token"
    return GridAttribute(name=f"{owner}.patch_size", holds=holds, required=True)


def _told(host: Any) -> Grid:
    """Return what the host holds for the size of a patch, after an earlier resizing of its image."""
    owner, name = surgery.split(_patch_size_attribute(host).name)
    value = getattr(surgery.get(host, owner), name, host.config.patch_size)
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _same(value: Any, pair: Grid) -> bool:
    if isinstance(value, list | tuple):
        return tuple(value) == tuple(pair)
    return value is not None and value == pair[0] == pair[1]


def _like(value: Any, pixels: int) -> Any:
    return type(value)((pixels, pixels)) if isinstance(value, list | tuple) else pixels


def _inside(anatomy: Any, fqn: str) -> str:
    return fqn.removeprefix(f"{anatomy.host}.") if anatomy.host else fqn


def _patch_conv(model: nn.Module, embeddings: Any) -> tuple[str, nn.Conv2d]:
    for name in ("patch_embeddings.projection", "patch_embeddings", "patch_embedding"):
        try:
            conv = embeddings.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(conv, nn.Conv2d) and tuple(conv.kernel_size) == tuple(conv.stride) and conv.kernel_size[0] > 1:
            return f"embeddings.{name}", conv
    raise UnsupportedModelError(
        f"{type(model).__name__} cuts its patches with {class_names(embeddings)[0]}; only one convolution whose stride "
        "is its kernel can be resized"
    )


def _table(embeddings: Any) -> tuple[str, Tensor] | None:
    """Return the name and the value, (..., rows, C), of the learned position embedding; None if there is none."""
    for name in ("position_embeddings", "position_embedding"):
        held = getattr(embeddings, name, None)
        if isinstance(held, nn.Embedding):
            return f"embeddings.{name}.weight", held.weight
        if isinstance(held, Tensor):
            return f"embeddings.{name}", held
    return None


def _class_tokens(embeddings: Any) -> int:
    names = ("cls_token", "class_embedding", "distillation_token")
    return sum(getattr(embeddings, name, None) is not None for name in names)


def _registers(embeddings: Any) -> int:
    """Return the number of register tokens, which have no position."""
    registers = getattr(embeddings, "register_tokens", None)
    return int(registers.shape[1]) if isinstance(registers, Tensor) else 0


def _square(model: nn.Module, table: Tensor, prefix: int) -> Grid:
    rows = int(table.shape[-2]) - prefix
    side = round(max(rows, 0) ** 0.5)
    if side * side != rows:
        raise UnsupportedModelError(
            f"the position embedding of this {type(model).__name__} has {rows} rows for patches, which form no square "
            "grid, as its own interpolation takes them to"
        )
    return (side, side)


def _always_interpolates(model: nn.Module) -> bool:
    return any(
        name.split(".")[:2] == ["transformers", "models"] and name.split(".")[2] in _ALWAYS
        for name in class_names(model)
    )


def _norm(model: nn.Module) -> str | None:
    """Return the name of the norm that all tokens pass; CLIP's takes the class token alone, behind the sequence."""
    names = ("layernorm", "norm") if _class_tokens(model.embeddings) else ("layernorm", "norm", "post_layernorm")
    return next((name for name in names if hasattr(model, name)), None)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    for name in ("layers", "encoder.layers", "encoder.layer", "model.layer", "layer"):
        try:
            blocks = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            return tuple(f"{name}.{child}" for child, _ in blocks.named_children())
    raise UnsupportedModelError(f"this {type(model).__name__} keeps its layers where no known version does")


FAMILY = Family(
    name="hf_vit",
    summary="plain ViTs of transformers (ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP, SigLIP, BLIP, ...), vision towers too",
    methods=("patch_resize", "input_resize", "token_pool", "token_merge", "quantize"),
    hosts=tuple(f"transformers.models.{name}" for name in _PLAIN),
    describe=describe,
)
