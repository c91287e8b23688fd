"""Build the model that a training config names, for its classes, channels and image size."""

import copy
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rescompress.errors import InputError, did_you_mean, one_line

Size = tuple[int, int]


def build_model(
    reference: str,
    *,
    num_classes: int,
    channels: int = 3,
    input_size: Size | None = None,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model by its reference, with a head for `num_classes`.

    Args:
        reference: timm:resnet50 (the prefix may be left out), torchvision:vit_b_16, hf:DIRECTORY_OR_ID, mmseg:CONFIG.py
            or package.module:factory.
        num_classes: of the head.
        channels: of the images.
        input_size: (height, width), for models that are built for one size.
        pretrained: whether the library's own weights are loaded.
        options: go to the constructor as they are; for mmseg they are merged into the config's `model`.

    Raises:
        InputError: there is no such model, or it cannot be built so.
    """
    source, colon, name = reference.partition(":")
    if not colon:
        source, name = "timm", source
    if not name:
        raise InputError(f"the model {reference!r} has no name; for example timm:resnet50")
    make = _SOURCES.get(source)
    if make is None:
        make = _factory
        name = reference
    try:
        return make(name, num_classes, channels, input_size, pretrained, copy.deepcopy(dict(options or {})))
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{reference} needs {error.name}, which is not installed") from error
    except Exception as error:  # each library checks its arguments in its own way
        raise InputError(f"cannot build {reference}: {type(error).__name__}: {one_line(error)}") from error


def _timm(
    name: str, classes: int, channels: int, size: Size | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"unknown model {name!r}: timm has none of this name{_nearest(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    if size is not None and config is not None and config.fixed_input_size:
        options.setdefault("img_size", size)
    model: nn.Module = timm.create_model(name, pretrained, num_classes=classes, in_chans=channels, **options)
    return model


def _torchvision(
    name: str, classes: int, channels: int, size: Size | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise InputError(
            f"unknown model {name!r}: torchvision has none of this name{_nearest(name, models.list_models())}"
        )
    if channels != 3:
        raise InputError(f"torchvision:{name} takes images of 3 channels, got channels={channels}; timm's take any")
    if pretrained:
        raise InputError(
            f"torchvision has weights of {name} for its own classes only; give initial_weights, or take timm's"
        )
    if size is not None and name.startswith("vit_"):
        if size[0] != size[1]:
            raise InputError(f"torchvision:{name} takes square images only, got {size}")
        options.setdefault("image_size", size[0])
    # Models of segmentation would download a backbone of their own accord.
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options.setdefault("weights_backbone", None)
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return model


def _hf(
    name: str, classes: int, channels: int, size: Size | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    import transformers

    hf: Any = transformers
    config = hf.AutoConfig.from_pretrained(name, num_labels=classes, **options)
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    if size is not None and isinstance(getattr(config, "image_size", None), int) and size[0] == size[1]:
        config.image_size = size[0]
    saved = (config.architectures or [""])[0]
    segments = "Segmentation" in saved
    auto = hf.AutoModelForSemanticSegmentation if segments else hf.AutoModelForImageClassification
    if pretrained:
        model: nn.Module = auto.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
        return model
    return auto.from_config(config)  # type: ignore[no-any-return]


def _mmseg(
    name: str, classes: int, channels: int, size: Size | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    import mmseg
    import mmseg.models  # fills the registry
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    file = name if name.endswith(".py") else f"{name}.py"
    shipped = Path(mmseg.__file__).parent / ".mim" / "configs"
    found = [path for path in (Path(file), shipped / file) if path.is_file()] or sorted(shipped.glob(f"*/{file}"))
    if not found:
        names = [str(path.relative_to(shipped)) for path in shipped.glob("*/*.py")]
        raise InputError(f"there is no config {name!r}, neither as a file nor in mmseg{_nearest(file, names)}")
    if channels != 3:
        options.setdefault("backbone", {}).setdefault("in_channels", channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmseg tells its defaults, and that mmcv has no compiled operators
        config: Any = Config.fromfile(found[0])
        init_default_scope(config.get("default_scope", "mmseg"))
        if not pretrained:
            config.model["pretrained"] = None
        for head in ("decode_head", "auxiliary_head"):
            heads = config.model.get(head) or []
            for one in heads if isinstance(heads, list | tuple) else [heads]:
                one["num_classes"] = classes
        config.merge_from_dict({"model": options})
        model: nn.Module = MODELS.build(config.model)
        if pretrained:
            model.init_weights()  # type: ignore[operator]
    # Lightning's sync_batchnorm makes them synchronised again where several processes train.
    return revert_sync_batchnorm(model)  # type: ignore[no-any-return]


def _factory(
    reference: str, classes: int, channels: int, size: Size | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    """Call package.module:factory, as `python -m` would find it: from the current folder, too."""
    package, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise
        known = ", ".join(_SOURCES)
        raise InputError(f"unknown model source {package!r}; known: {known}, or package.module:factory") from error
    if not hasattr(module, attribute):
        raise InputError(f"{package} has no {attribute!r}{_nearest(attribute, list(vars(module)))}")
    make = getattr(module, attribute)
    takes = inspect.signature(make).parameters
    any_option = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
    options.setdefault("num_classes", classes)
    if channels != 3 or "in_chans" in takes:
        options.setdefault("in_chans", channels)
    if pretrained:
        options.setdefault("pretrained", True)
    foreign = [option for option in options if option not in takes and not any_option]
    if foreign:
        raise InputError(f"{reference} takes no option {foreign[0]!r}{did_you_mean(foreign[0], takes)}")
    made = make(**options)
    if not isinstance(made, nn.Module):
        raise InputError(f"{reference} gives a {type(made).__name__}, not an nn.Module")
    return made


def _nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?", or nothing where no name is near: the full list would fill the screen."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; did you mean") else ""


_SOURCES: dict[str, Callable[[str, int, int, Size | None, bool, dict[str, Any]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hf,
    "mmseg": _mmseg,
}


def load_initial(model: nn.Module, path: str) -> None:
    """Load a state dict, or that of a Lightning checkpoint, into an uncompressed model; no code in the file is run.

    Raises:
        InputError: there is no such file, it is damaged, or it belongs to another model.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        hint = "; if they are of another run, do that one first" if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"cannot read the weights {path}: {error.strerror or error}{hint}") from error
    except Exception as error:  # a damaged pickle fails in any way
        raise InputError(f"{path} is no state dict or checkpoint that can be read without running code") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if isinstance(state, dict) and isinstance(found.get("state_dict"), dict):
        state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    if not isinstance(state, dict) or not state or not all(isinstance(one, torch.Tensor) for one in state.values()):
        raise InputError(f"{path} holds no state dict (names and tensors), and is no checkpoint of a Lightning run")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} holds weights of another model: {one_line(error, 400)}") from error
