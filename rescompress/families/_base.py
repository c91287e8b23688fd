"""What a family is, how the families are found, and how a model finds its family."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rescompress.anatomy import Anatomy
from rescompress.errors import UnsupportedModelError

Describe = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Anatomy]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model whose parts are known by name.

    Attributes:
        name: as listed by `rescompress families`
        summary: which models these are, in one line
        methods: tags of the methods that apply, the default for a plain `scale` first
        hosts: dotted class names; a model whose class or base class is one of them belongs here. The library itself
            is never imported. An empty tuple makes the family a fallback that is asked after all others.
        describe: writes the anatomy from the model and its example arguments; raises UnsupportedModelError with the
            reason if this model is not what it seems
    """

    name: str
    summary: str
    methods: tuple[str, ...]
    hosts: tuple[str, ...]
    describe: Describe


def class_names(thing: object) -> tuple[str, ...]:
    """Return the dotted names of a thing's class and base classes, nearest first."""
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in type(thing).__mro__)


def image_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the batch of images among a model's arguments: the first tensor (B, C, H, W).

    Raises:
        UnsupportedModelError: there is none.
    """
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim == 4:
            return leaf
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


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Anatomy:
    """Return the anatomy of a model from the first family that knows it.

    Raises:
        UnsupportedModelError: no family does; the message says why the fallback could not either.
    """
    names = class_names(model)
    for family in families():
        if not family.hosts or any(host in names for host in family.hosts):
            return family.describe(model, args, kwargs or {})
    raise UnsupportedModelError(
        f"no family describes {names[0]}; to add one, see docs/how-to/add-a-family.md (one file)"
    )
