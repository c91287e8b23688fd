"""What a family is, how the families are found, and how a model finds its family."""

import importlib
import itertools
import math
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rescompress import surgery
from rescompress.anatomy import Anatomy, ConvAnatomy, inside
from rescompress.errors import RescompressWarning, UnsupportedModelError, one_line

Describe = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Anatomy]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model whose parts are known by name.

    Attributes:
        name: as listed by `rescompress families`
        summary: which models these are, in one line
        methods: tags of the methods that apply, the default for a plain `scale` first
        hosts: dotted class names; a model whose class or base class is one of them belongs here, and so does a model
            that holds one which reads its image. The library itself is never imported. An empty tuple makes the family
            a fallback that is asked after all others.
        describe: writes the anatomy from the model and its example arguments; raises UnsupportedModelError with the
            reason if this model is not what it seems
        knows: which of the models of these classes belong here, where not all do; the others are left to the fallbacks
    """

    name: str
    summary: str
    methods: tuple[str, ...]
    hosts: tuple[str, ...]
    describe: Describe
    knows: Callable[[nn.Module], bool] | None = None


def class_names(thing: object) -> tuple[str, ...]:
    """Return the dotted names of a thing's class and base classes, nearest first."""
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in type(thing).__mro__)


def image_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the batch of images among a model's arguments: the first tensor (B, C, H, W), or (C, H, W) in a list.

    Where the caller cuts the images into patches, an empty one as large as the first stands for them.

    Raises:
        UnsupportedModelError: there is none.
    """
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if leaf.ndim == 4:
            return leaf
    stand_in = _image_of_patches(leaves)
    if stand_in is not None:
        return stand_in
    for leaf in leaves:  # detectors take a list of images of any size
        if leaf.ndim == 3 and leaf.shape[0] in (1, 3, 4):
            return leaf[None]
    for leaf in leaves:
        if leaf.ndim == 5:
            raise UnsupportedModelError(
                f"this {type(model).__name__} takes {tuple(leaf.shape)}: videos (and other inputs of five dimensions) "
                "are not supported; compress the network inside that takes single images (B, C, H, W) by itself"
            )
    raise UnsupportedModelError(
        f"the example input of this {type(model).__name__} holds no batch of images (B, C, H, W); give one as "
        "example_input, a tensor or a tuple of arguments"
    )


def _image_of_patches(leaves: list[Tensor]) -> Tensor | None:
    """Return an empty image as large as the first of those given as patches: (B, N, P * P * C) and shapes (B, 2)."""
    for patches, shapes in itertools.permutations(leaves, 2):
        if patches.ndim == 3 and not shapes.is_floating_point() and shapes.shape == (patches.shape[0], 2):
            count, values = patches.shape[1:]
            channels = 3 if math.isqrt(values // 3) ** 2 * 3 == values else 1
            side = math.isqrt(values // channels)
            # The meta device knows no values.
            square = math.isqrt(count)
            rows, columns = (square, square) if shapes.is_meta or not len(shapes) else shapes[0].tolist()
            return patches.new_empty(patches.shape[0], channels, rows * side, columns * side, device="meta")
    return None


_registered: list[Family] = []


def register(family: Family) -> None:
    """Add a family from outside this package; it is asked before those of the package."""
    _registered.insert(0, family)


@cache
def _shipped() -> tuple[Family, ...]:
    found = []
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            found.append(importlib.import_module(f"{__package__}.{module.name}").FAMILY)
    return tuple(found)


def families() -> tuple[Family, ...]:
    """Return every family, the fallbacks last: each file of this folder gives one, called FAMILY."""
    return tuple(sorted([*_registered, *_shipped()], key=lambda family: not family.hosts))


def family_of(module: nn.Module) -> Family | None:
    """Return the family that knows this module by its class; None if only a fallback may."""
    names = class_names(module)
    for family in families():
        if any(host in names for host in family.hosts) and (family.knows is None or family.knows(module)):
            return family
    return None


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Anatomy:
    """Return the anatomy of a model from the first family that knows it, or a module in it that reads the image.

    Raises:
        UnsupportedModelError: no family does; the message says why the fallback could not either.
    """
    kwargs = kwargs or {}
    family = family_of(model)
    if family is not None:
        return family.describe(model, args, kwargs)
    return describe_parts(model, args, kwargs)


def describe_parts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
    """Return the anatomy of a module that a model calls, or what a fallback sees; for heads around other hosts.

    Raises:
        UnsupportedModelError: no family knows a part of it; the message says why the fallback could not either.
    """
    found = _hosts_inside(model, args, kwargs)
    if found:
        first, *others = found
        known = first.family.describe(surgery.get(model, first.fqn), first.args, first.kwargs)
        # Where the forward of plain convolutions is bypassed, the fallback sees more: what is made of their maps.
        if not (first.bypassed and isinstance(known, ConvAnatomy) and known.refit is None):
            _warn_of_others(model, first, others)
            height, width = image_of(model, args, kwargs).shape[-2:]
            return replace(inside(known, first.fqn), outer_size=(int(height), int(width)))
    for fallback in families():
        if not fallback.hosts:
            return fallback.describe(model, args, kwargs)
    raise UnsupportedModelError(
        f"no family describes {class_names(model)[0]}; to add one, see docs/how-to/add-a-family.md (one file)"
    )


@dataclass(frozen=True)
class Found:
    """A module of a known family that a model calls.

    Attributes:
        args: positional and, in `kwargs`, keyword arguments that its forward gets; the image alone where it is bypassed
        bypassed: whether the model calls parts of it and not its forward (`self.vit.forward_features(x)`)
    """

    fqn: str
    family: Family
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bypassed: bool


def _warn_of_others(model: nn.Module, first: Found, others: list[Found]) -> None:
    if others:
        names = ", ".join(repr(other.fqn) for other in others)
        warnings.warn(
            f"this {type(model).__name__} calls {len(others) + 1} known networks and only {first.fqn!r} is compressed; "
            f"compress by itself and put back what stays as it is: {names}",
            RescompressWarning,
            stacklevel=7,  # who calls compress
        )


def _hosts_inside(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Found]:
    """Return the modules of known families that a model calls with maps, outermost ones only, in the order of calls."""
    hosts: dict[str, Family] = {}
    for fqn, module in model.named_modules():
        inner = fqn and not any(fqn.startswith(f"{outer}.") for outer in hosts)
        family = family_of(module) if inner else None
        if family is not None:
            hosts[fqn] = family
    if not hosts:
        return []
    called: dict[str, Found] = {}

    def watch(clone: nn.Module, image: Tensor) -> None:
        called.clear()
        for fqn, family in hosts.items():
            for name in _way_to_stem(fqn, surgery.get(clone, fqn)):
                # Hooks on the clone only: it is thrown away. The outermost module is the first to be called.
                hook = _recorder(called, fqn, family, name)
                surgery.get(clone, name).register_forward_pre_hook(hook, with_kwargs=True)

    probe(model, args, kwargs, watch)
    return list(called.values())


def _recorder(called: dict[str, Found], fqn: str, family: Family, name: str) -> Callable[..., None]:
    def record(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name == fqn:
            called.setdefault(fqn, Found(fqn, family, given, named, bypassed=False))
            return
        maps = [leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, Tensor) and leaf.ndim == 4]
        if maps:
            called.setdefault(fqn, Found(fqn, family, (maps[0],), {}, bypassed=True))

    return record


def _way_to_stem(fqn: str, host: nn.Module) -> list[str]:
    """Return the names of a host, of its first convolution and of the modules between, the outermost first."""
    first = next((name for name, module in host.named_modules() if isinstance(module, nn.Conv2d)), "")
    parts = first.split(".") if first else []
    return [fqn, *(f"{fqn}.{'.'.join(parts[: end + 1])}" for end in range(len(parts)))]


def probe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Callable[[nn.Module, Tensor], None]
) -> None:
    """Run a throw-away clone that `watch`, given the clone and its image, has put hooks on.

    Raises:
        UnsupportedModelError: the model does not run on its example input.
    """
    failure = ""
    # A model that computes with values (.item(), numpy) fails on the meta device: then run it for real.
    for device in ("meta", None):
        clone = surgery.clone_shared(model, device).eval()
        moved_args, moved_kwargs = tree_map(
            lambda leaf, device=device: leaf.to(device) if device and isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        watch(clone, image_of(model, moved_args, moved_kwargs))
        try:
            with torch.no_grad():
                clone(*moved_args, **moved_kwargs)
            return
        except Exception as error:  # any code of the user's may run here; the reason is reported below
            failure = f"{type(error).__name__}: {one_line(error)}"
    raise UnsupportedModelError(
        f"{class_names(model)[0]} does not run on an input of shape {tuple(image_of(model, args, kwargs).shape)} "
        f"({failure}); pass an example_input that it takes"
    )
