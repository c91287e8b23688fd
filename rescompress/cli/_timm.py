"""Models of timm: `timm:resnet50`, or `timm:resnet50.a1_in1k` with the tag of a certain set of weights."""

from typing import Any

import timm.data
from torch import nn

from rescompress.cli import console, download
from rescompress.cli.models import Loaded, Request, build, nearest, say_random
from rescompress.errors import InputError, one_line

_data: Any = timm.data  # half of it has no types


def load(name: str, request: Request) -> Loaded:
    """Build a model by its name in timm.

    Raises:
        InputError: timm has no such model, or cannot build it so.
    """
    reference = f"timm:{name}"
    config = _config(name)
    options: dict[str, Any] = {}
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    if request.input_size is not None and config.fixed_input_size:
        options["img_size"] = request.input_size
    model, weights = _with_weights(reference, name, config, options, request)
    data = _data.resolve_data_config({}, model=model)
    channels, *own_size = data["input_size"]
    if channels != 3:
        raise InputError(f"{reference} takes images of {channels} channels; only photographs (3) can be run")
    size = request.input_size or (int(own_size[0]), int(own_size[1]))
    data["input_size"] = (channels, *size)
    return Loaded(
        reference=reference,
        model=model,
        input_size=size,
        transform=_data.create_transform(**data),
        preprocessing={
            key: list(value) if isinstance(value, tuple) else value
            for key, value in data.items()
            if key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        },
        labels=_labels(model),
        weights=weights,
    )


def _config(name: str) -> Any:
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise InputError(f"unknown model {name!r}: timm has none of this name{_suggestion(base)}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        config = None
    if config is None:
        raise InputError(f"timm has no weights {name!r}{nearest(name, timm.list_pretrained(f'{base}.*'))}")
    return config


def _suggestion(name: str) -> str:
    try:
        from torchvision.models import list_models
    except ImportError:
        return nearest(name, timm.list_models())
    if name in list_models():
        return f"; did you mean 'torchvision:{name}'?"
    return nearest(name, timm.list_models())


def _with_weights(
    reference: str, name: str, config: Any, options: dict[str, Any], request: Request
) -> tuple[nn.Module, str]:
    reason: str | None = None
    if request.wants_pretrained:
        reason = "timm knows of none"
        if config.has_weights:
            model, reason = _pretrained(name, config, options)
            if model is not None:
                if options.get("num_classes", config.num_classes) != config.num_classes:
                    console.warning(f"the head for {options['num_classes']} classes is new and random")
                return model, "pretrained"
    model = build(reference, lambda: timm.create_model(name, **options))
    if request.weights is not None:
        return model, request.weights
    say_random(reference, reason)
    return model, "random"


def _pretrained(name: str, config: Any, options: dict[str, Any]) -> tuple[nn.Module | None, str]:
    """Return the model with its weights, from the cache or downloaded, or None and why it cannot be had."""
    url = download.hub_url() if config.hf_hub_id else config.url
    try:
        if download.reachable(url) or (not config.hf_hub_id and download.in_torch_cache(url)):
            return timm.create_model(name, pretrained=True, **options), ""
        if config.hf_hub_id:
            with download.hub_cache_only():
                return timm.create_model(name, pretrained=True, **options), ""
    except Exception as error:  # a download fails in many ways, and none of them ends the run
        if download.reachable(url):
            return None, f"the download failed: {one_line(error, 120)}"
    return None, f"{download.host_of(url)} cannot be reached"


def _labels(model: nn.Module) -> tuple[str, ...] | None:
    subset = _data.infer_imagenet_subset(model)
    if not subset:
        return None
    info = _data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
