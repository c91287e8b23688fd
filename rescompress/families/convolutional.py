"""The fallback for any other convolutional network: run it once on the meta device and watch who reads the image."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid, ImageReader
from rescompress.errors import RescompressWarning, UnsupportedModelError
from rescompress.families._base import Family, class_names
from rescompress.families._probing import Call, Restored, Trace, Trial, trace
from rescompress.layers.resize import Resize2d
from rescompress.layers.wrap import simplest_scale

_REWRITES = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which a block makes one convolution of itself."""

_IN_PIXELS = {
    "torchvision.models.optical_flow.raft.RAFT": "how far each pixel moves",
    "transformers.models.superpoint.modeling_superpoint.SuperPointForKeypointDetection": "where key points are",
    "transformers.models.efficientloftr.modeling_efficientloftr.EfficientLoFTRForKeypointMatching": (
        "where key points are"
    ),
}
"""Networks whose outputs are places, by no means that could be scaled with the map."""

_LAST_CALLS = 12
"""How many of a dense network's last modules may be the one whose map comes back at its old size."""


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the convolution that first touches the image, or the block of parallel ones that do.

    Whether the network still works on a smaller map is not asked here: compress proves it by a dry run.

    Raises:
        UnsupportedModelError: the model does not run, has no convolution, or itself reads the image in several places.
    """
    _refuse_pixels(model)
    found = trace(model, args, kwargs)
    readers = list(dict.fromkeys(call.fqn for call in found.readers))
    if not readers:
        raise UnsupportedModelError(
            f"no family describes {class_names(model)[0]}, and the probe saw no nn.Conv2d run on the image; to add a "
            "family, see docs/how-to/add-a-family.md (one file)"
        )
    stem = _stem(model, found, readers)
    stem = None if stem is None else _rewritten_block(model, found, stem)
    call = next((call for call in found.calls if call.fqn == stem), None)
    if any(other.fqn == stem and not other.reads_image for other in found.calls):
        raise UnsupportedModelError(
            f"the first convolution of this {class_names(model)[0]}, {stem!r}, runs again on maps made of its own: "
            "a resize in it would come each time; compress a model whose first convolution is its own"
        )
    if stem is None or call is None or call.made is None:
        return _several_branches(model, found, readers)
    grid = _grid(call.made)
    multiple, restored = _fitting(model, found, call, (args, kwargs)) if found.on_meta else (1, ())
    return ConvAnatomy(
        family=FAMILY.name,
        input_size=_grid(found.image),
        first_conv=stem,
        stem_grid=grid,
        multiple=multiple,
        reader=_reader(model, found, call),
        refit=refuse_lost_sides if restored else None,
        restored=tuple(one.fqn for one in restored),
        restored_sizes=tuple(one.size for one in restored),
    )


def _refuse_pixels(model: nn.Module) -> None:
    for module in model.modules():
        what = next((_IN_PIXELS[name] for name in class_names(module) if name in _IN_PIXELS), None)
        if what is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} gives {what}, in pixels of the maps that it computes on: on smaller ones its "
                "numbers would be too small; give it smaller images, and scale them up"
            )


def _stem(model: nn.Module, found: Trace, readers: list[str]) -> str | None:
    """Return the convolution that reads the image, or the block around all that do; None where there is none."""
    if len(readers) == 1:
        return readers[0]
    block = _block_around(model, readers)
    if block is not None and any(call.fqn == block for call in found.calls):
        return block
    # Others may read it in another size or a part of it: a crop, an edge map. Whether that fits, compress tries.
    first = found.readers[0]
    same = {call.fqn for call in found.readers if call.source is first.source}
    if len(same) > 1:
        return None
    others = ", ".join(repr(fqn) for fqn in readers if fqn != first.fqn)
    warnings.warn(
        f"this {type(model).__name__} reads images in {len(readers)} convolutions, and only the map of {first.fqn!r} "
        f"is made smaller; what reads another image, or another part of it, stays as it is: {others}",
        RescompressWarning,
        stacklevel=7,  # who calls compress
    )
    return first.fqn


def _several_branches(model: nn.Module, found: Trace, readers: list[str]) -> ConvAnatomy:
    """Describe a network whose branches each read the image: it is resized in front of the module that holds them.

    Raises:
        UnsupportedModelError: that is the model itself, in front of which nothing can be put, or takes something else.
    """
    block, size = _block_around(model, readers), _grid(found.image)
    if not any(call.fqn == block and call.reads_image and _grid(call.source) == size for call in found.calls):
        name = class_names(model)[0]
        raise UnsupportedModelError(
            f"{name} reads the image in {len(readers)} convolutions ({', '.join(readers[:4])}); resizing behind one of "
            "them would not fit the others. Its image can be resized in front of it, where it is part of another "
            f"module: compress torch.nn.Sequential(model) with input_resize, or give this {name.rpartition('.')[2]} "
            "smaller images"
        )
    return ConvAnatomy(
        family=FAMILY.name, input_size=size, first_conv=block or "", stem_grid=size, several_branches=True
    )


def _rewritten_block(model: nn.Module, found: Trace, stem: str) -> str:
    """Return the outermost block around the stem that its library may rewrite as one convolution; else the stem.

    timm's reparameterize_model, for one, builds that convolution from the weights in the block: a resize inside the
    block would be lost.
    """
    parts = stem.split(".")
    for length in range(1, len(parts)):
        fqn = ".".join(parts[:length])
        rewritten = any(inspect.ismethod(getattr(surgery.get(model, fqn), name, None)) for name in _REWRITES)
        if rewritten and any(call.fqn == fqn and call.made is not None for call in found.calls):
            return fqn
    return stem


def _block_around(model: nn.Module, readers: list[str]) -> str | None:
    """Return the innermost block that holds all convolutions that read the image; None if that is the model itself.

    Re-parameterised stems add up parallel convolutions; what leaves the block is one map again.
    """
    common: list[str] = []
    for names in zip(*(fqn.split(".")[:-1] for fqn in readers), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    while common and isinstance(surgery.get(model, ".".join(common)), nn.ModuleList | nn.ModuleDict):
        common.pop()  # a list is never called
    return ".".join(common) or None


def _reader(model: nn.Module, found: Trace, stem: Call) -> ImageReader | None:
    """Return the module that takes the image, where the anatomy does not say so without it."""
    read = stem
    if stem.source.shape[1] != found.image.shape[1]:
        # Space-to-depth in front of the convolution: the module that made the map which the convolution reads.
        makers = [call for call in found.calls if call.made is stem.source and call.reads_image and call.fqn]
        outer = [call for call in makers if call.source.shape[1] == found.image.shape[1]]
        read = outer[0] if outer else stem
    size, channels = _grid(read.source), int(read.source.shape[1])
    if read is stem and size == _grid(found.image) and isinstance(surgery.get(model, stem.fqn), nn.Conv2d):
        return None
    return ImageReader(name=read.fqn, channels=channels, size=size)


def refuse_lost_sides(host: Any, anatomy: ConvAnatomy, grid: Grid) -> None:
    """Let the resize of a dense network refuse sides whose old size would not come back, other than the example's."""
    stem: Any = surgery.get(host, anatomy.first_conv)
    reader: Any = stem if anatomy.reader is None else surgery.get(host, anatomy.reader.name)
    image = anatomy.input_size if anatomy.reader is None else anatomy.reader.size
    for resize, example in (
        (getattr(reader, "before", None), image),
        (getattr(stem, "after", None), anatomy.stem_grid),
    ):
        if isinstance(resize, Resize2d) and resize.whole is None:
            target = resize.target(*example)
            resize.whole = (
                simplest_scale(target[0], example[0], resize.multiple),
                simplest_scale(target[1], example[1], resize.multiple),
            )
            resize.example = example


def _fitting(
    model: nn.Module, found: Trace, stem: Call, example: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[int, tuple[Restored, ...]]:
    """Return what the sides of the stem's map must be multiples of, and the modules whose maps must come back if any.

    The prediction for every pixel of an image must keep its size, and so must a map that meets one from before the
    reduction: the image itself, added or concatenated at the end.
    """
    trial = Trial(model, stem.fqn, _grid(stem.made if stem.made is not None else stem.source), example)
    multiple = trial.multiple()
    old = _shapes(found.outputs)
    dense = _dense_outputs(found)
    small = [] if multiple is None else _shapes(trial.outputs(trial.half(multiple)))
    if not dense or dense <= _kept(old, small):
        return multiple or 1, ()
    restored: tuple[Restored, ...] = ()
    right: set[int] = dense & _kept(old, small)
    behind = found.calls[next(i for i, call in enumerate(found.calls) if call is stem) + 1 :]
    behind = [call for call in behind if call.fqn not in ("", stem.fqn)]
    made = [Restored(call.fqn, _grid(call.made)) for call in behind if call.made is not None]
    for candidate in list(dict.fromkeys(reversed(made)))[: _LAST_CALLS * len(dense)]:
        tried = (*restored, candidate)
        fitting = trial.multiple(tried)
        if fitting is None:
            continue
        half = trial.half(fitting)
        kept = _kept(old, _shapes(trial.outputs(half, tried)))
        # What is no prediction for every pixel, such as the code of an autoencoder, stays on the smaller grid.
        if dense & kept > right and kept - dense <= _kept(old, _shapes(trial.outputs(half, restored))) - dense:
            restored, right = tried, dense & kept
        if right == dense:
            for one in restored:  # a head behind another one that is restored sees a map of the old size already
                fewer = tuple(other for other in restored if other is not one)
                if fewer and dense <= _kept(old, _shapes(trial.outputs(half, fewer))):
                    restored = fewer
            return trial.stride(fitting, restored), restored
    return multiple or 1, ()


def _dense_outputs(found: Trace) -> set[int]:
    """Return the places of the outputs that predict for every pixel of the image: those of its own size.

    Among outputs of other sizes, only those made after maps had shrunk: a pyramid of features begins with a map that
    still has the image's size, and each of its levels shrinks.
    """
    outputs = [leaf for leaf in tree_leaves(found.outputs) if isinstance(leaf, Tensor)]
    image = found.image.shape[-2:]
    dense = {i for i, leaf in enumerate(outputs) if leaf.ndim == 4 and leaf.shape[-2:] == image}
    if len(dense) == len(outputs):
        return dense
    maps = [call.made for call in found.calls if call.made is not None]
    shrunk = next((i for i, made in enumerate(maps) if made.shape[-1] < image[-1]), len(maps))
    return {i for i in dense if not any(outputs[i] is made for made in maps[:shrunk])}


def _kept(old: list[torch.Size], new: list[torch.Size]) -> set[int]:
    """Return the places of the outputs that have their old shape; none where the network did not run."""
    return {i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a == b} if len(old) == len(new) else set()


def _shapes(outputs: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _grid(made: Tensor) -> Grid:
    return (int(made.shape[-2]), int(made.shape[-1]))


FAMILY = Family(
    name="convolutional",
    summary="any other convolutional network, probed by one run (RegNet, ConvNeXt, MobileNet, EfficientNet, ...)",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(),
    describe=describe,
)
