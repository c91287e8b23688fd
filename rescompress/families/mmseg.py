"""Segmentors of mmseg: a backbone that reads the image, a neck, and a decode head whose map keeps its size."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rescompress import surgery
from rescompress.anatomy import Anatomy, ConvAnatomy, Grid, inside
from rescompress.errors import UnsupportedModelError
from rescompress.families import _base, convolutional
from rescompress.families._base import Family, class_names, image_of, probe

_STEM_BLOCKS = {"mmseg.models.backbones.erfnet.ERFNet": "encoder.0"}
"""Backbones whose image is read by a convolution and a pooling side by side, and the block that joins their maps."""

_SIZED_BY_THE_IMAGE = {"mmseg.models.backbones.ddrnet.DDRNet", "mmseg.models.backbones.pidnet.PIDNet"}
"""Backbones with one stem that compute the size of a map behind it from that of the image."""

_FIXED_POOLS = {"mmseg.models.decode_heads.lraspp_head.LRASPPHead": "image_pool.0"}
"""Heads with a pooling window in positions, and where it is: it has to cover the same part of a smaller map."""


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
    """Run the segmentor once: see who reads the image, and how large the map of its last decode head is.

    A backbone whose branches each read the image (BiSeNet, ICNet, CGNet) or its size (DDRNet, PIDNet) is resized in
    front; any other behind its stem, or as the family of the backbone says. The head's map has a stride of its own and
    the segmentor resizes it to the image or to the labels: at image sizes other than the example's it may come back
    with a position more or less, and still covers the image. Predictions for every pixel are checked (`convolutional`).

    Raises:
        UnsupportedModelError: it has no single backbone, or does not run.
    """
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no single backbone that reads the image, but encoders that each take it at a "
            "size of their own; only segmentors with a backbone can be resized"
        )
    heads = getattr(model, "decode_head", None)
    head = f"decode_head.{len(heads) - 1}" if isinstance(heads, nn.ModuleList) else "decode_head"
    backbone = surgery.get(model, "backbone")
    anatomy: Anatomy | None = None
    if any(_base.family_of(module) is not None for module in backbone.modules()):
        anatomy = inside(_base.describe(backbone, (image_of(model, args, kwargs),)), "backbone")
    watched = _watch(model, head, args, kwargs)
    anatomy = anatomy or _describe_convolutional(model, watched, args, kwargs)
    if watched.map_size is not None:
        anatomy = replace(anatomy, restored=(head,), restored_sizes=(watched.map_size,))
    pool = next((_FIXED_POOLS[name] for name in class_names(surgery.get(model, head)) if name in _FIXED_POOLS), None)
    if pool is not None and anatomy.refit is None:
        anatomy = replace(anatomy, host="", refit=_fit_pool)
    return anatomy


class _Watched(TorchFunctionMode):
    """Notes the operators that read the image, or what arithmetic and padding made of it, while the backbone runs.

    Attributes:
        images: the image and what is as good as it
        readers: names of the operators that read one of them
        map_size: of the map that the decode head made; None as long as it has made none
    """

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.readers: list[str] = []
        self.map_size: Grid | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if isinstance(out, Tensor) and any(leaf is image for leaf in given for image in self.images):
            name = getattr(func, "__name__", str(func)).strip("_")
            if name in ("pad", "add", "radd", "sub", "mul", "rmul", "div", "truediv", "to", "float", "contiguous"):
                self.images.append(out)
            else:
                self.readers.append(name)
        return out


def _watch(model: nn.Module, head: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Watched:
    found = _Watched()

    def watch(clone: nn.Module, image: Tensor) -> None:
        found.__init__()  # type: ignore[misc]  # a second run starts anew
        backbone: Any = surgery.get(clone, "backbone")
        decoder: Any = surgery.get(clone, head)
        read, decode = backbone.forward, decoder.forward

        def reading(*inputs: Any) -> Any:
            found.images.append(inputs[0])
            with found:
                return read(*inputs)

        def decoding(*features: Any, **options: Any) -> Any:
            made = decode(*features, **options)
            maps = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.ndim == 4]
            if maps:
                found.map_size = (int(maps[0].shape[-2]), int(maps[0].shape[-1]))
            return made

        # On the clone only, which is thrown away. The segmentor calls the head's forward past any hooks.
        backbone.forward, decoder.forward = reading, decoding

    probe(model, args, kwargs, watch)
    return found


def _describe_convolutional(
    model: nn.Module, watched: _Watched, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ConvAnatomy:
    backbone = surgery.get(model, "backbone")
    image = image_of(model, args, kwargs)
    size = (int(image.shape[-2]), int(image.shape[-1]))
    block = next((_STEM_BLOCKS[name] for name in class_names(backbone) if name in _STEM_BLOCKS), None)
    if block is not None:
        stem = f"backbone.{block}"
        grid = surgery.output_grid(surgery.get(model, stem), size)
        return ConvAnatomy(family=FAMILY.name, input_size=size, first_conv=stem, stem_grid=grid)
    if len(watched.readers) > 1 or _SIZED_BY_THE_IMAGE & set(class_names(backbone)):
        return ConvAnatomy(
            family=FAMILY.name, input_size=size, first_conv="backbone", stem_grid=size, several_branches=True
        )
    return replace(convolutional.describe(model, args, kwargs), family=FAMILY.name)


def _fit_pool(host: Any, anatomy: Anatomy, grid: Grid) -> None:
    """Let the head's pooling window and its stride, in positions, cover the same part of the smaller map."""
    for fqn in anatomy.restored:
        name = next(_FIXED_POOLS[name] for name in class_names(_unwrapped(host, fqn)) if name in _FIXED_POOLS)
        pool: Any = surgery.get(host, f"{fqn}.{name}")
        for attribute in ("kernel_size", "stride"):
            sides = getattr(pool, attribute)
            sides = (sides, sides) if isinstance(sides, int) else sides
            old = anatomy.grid or grid
            fitted = tuple(max(1, side * new // before) for side, new, before in zip(sides, grid, old, strict=True))
            surgery.set_attribute(host, f"{fqn}.{name}.{attribute}", fitted)


def _unwrapped(host: nn.Module, fqn: str) -> Any:
    module: Any = surgery.get(host, fqn)
    return getattr(module, "inner", module)


FAMILY = Family(
    name="mmseg",
    summary="segmentors of mmseg whose backbone is convolutional or hierarchical (ResNet, HRNet, Swin, SegFormer, ...)",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=("mmseg.models.segmentors.base.BaseSegmentor",),
    describe=describe,
)
