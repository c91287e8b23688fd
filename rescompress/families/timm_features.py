"""timm's extractors of features, which take the modules out of a model of any family (`features_only=True`)."""

import dataclasses
from typing import Any

from torch import nn

from rescompress.anatomy import Anatomy, ConvAnatomy, Refit, inside
from rescompress.families import _attention_biases, byobnet, convolutional, gcvit, maxvit, nest, padded_windows, swin
from rescompress.families._base import Family, family_of
from rescompress.families._windows import named

_GETTER = "timm.models._features.FeatureGetterNet"

_REFITS: dict[tuple[str, ...], Refit] = {
    swin.STAGES: swin.refit_timm,
    maxvit.BLOCKS: maxvit.refit_timm,
    (gcvit.STAGE,): gcvit.refit,
    (nest.LEVEL,): nest.refit,
    padded_windows.BLOCKS: padded_windows.refit,
    _attention_biases.ATTENTIONS: _attention_biases.refit,
    byobnet.KINDS: byobnet.refit,
}
"""What refits the modules of these classes, in whatever host they are."""


def _whole(model: nn.Module) -> tuple[str, Family] | None:
    """Return the name and the family of the model that an extractor keeps whole, if it is one that a family knows."""
    for name in ("model", "body"):
        inner = getattr(model, name, None)
        family = family_of(inner) if isinstance(inner, nn.Module) else None
        if family is not None:
            return name, family
    return None


def knows(model: nn.Module) -> bool:
    """Whether what is extracted from is anything but a convolutional network."""
    return _whole(model) is not None or any(named(model, *kinds) for kinds in _REFITS)


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
    """Describe the whole model that is left, or the modules that have been taken out of it."""
    whole = _whole(model)
    if whole is not None:  # the forward of a `model` is never called, but the modules that it calls are
        name, family = whole
        return inside(family.describe(getattr(model, name), args, kwargs), name)
    anatomy: ConvAnatomy = convolutional.describe(model, args, kwargs)
    kinds, refit = next((kinds, refit) for kinds, refit in _REFITS.items() if named(model, *kinds))
    multiple = nest.blocks_a_side(model) if kinds == (nest.LEVEL,) else 1
    return dataclasses.replace(anatomy, refit=refit, multiple=multiple)


FAMILY = Family(
    name="timm_features",
    summary="timm's extractors of features (features_only=True) of any but convolutional networks",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(
        _GETTER,
        "timm.models._features.FeatureDictNet",
        "timm.models._features.FeatureHookNet",
    ),
    describe=describe,
    knows=knows,
)
