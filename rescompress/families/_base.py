"""What a family is, how the families are found, and how a model finds its family."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rescompress import surgery
from rescompress.anatomy import Anatomy, inside
from rescompress.errors import UnsupportedModelError, one_line

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

    Raises:
        UnsupportedModelError: there is none.
    """
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if leaf.ndim == 4:
            return leaf
    for leaf in leaves:  # detectors take a list of images of any size
        if leaf.ndim == 3 and leaf.shape[0] in (1, 3, 4):
            return leaf[None]
    raise UnsupportedModelError(
        f"the example input of this {type(model).__name__} holds no batch of images (B, C, H, W); give one as "
        "example_input, a tensor or a tuple of arguments"
    )


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
    found = _host_inside(model, args, kwargs)
    if found is not None:
        fqn, family, inner_args, inner_kwargs = found
        anatomy = inside(family.describe(surgery.get(model, fqn), inner_args, inner_kwargs), fqn)
        image = image_of(model, args, kwargs)
        return replace(anatomy, input_size=(int(image.shape[-2]), int(image.shape[-1])))
    for fallback in families():
        if not fallback.hosts:
            return fallback.describe(model, args, kwargs)
    raise UnsupportedModelError(
        f"no family describes {class_names(model)[0]}; to add one, see docs/how-to/add-a-family.md (one file)"
    )


Found = tuple[str, Family, tuple[Any, ...], dict[str, Any]]


def _host_inside(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found | None:
    """Return the first module of a known family that a model calls, outermost first, and what it is called with."""
    hosts: dict[str, Family] = {}
    for fqn, module in model.named_modules():
        inner = fqn and not any(fqn.startswith(f"{outer}.") for outer in hosts)
        family = family_of(module) if inner else None
        if family is not None:
            hosts[fqn] = family
    if not hosts:
        return None
    called: list[Found] = []

    def watch(clone: nn.Module, image: Tensor) -> None:
        called.clear()
        for fqn, family in hosts.items():
            # Hooks on the clone only: it is thrown away.
            surgery.get(clone, fqn).register_forward_pre_hook(
                lambda _, given, named, fqn=fqn, family=family: called.append((fqn, family, given, named)),
                with_kwargs=True,
            )

    probe(model, args, kwargs, watch)
    return called[0] if called else None


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
