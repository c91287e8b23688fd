"""Models of timm: `timm:resnet50`, or `timm:resnet50.a1_in1k` with the tag of a certain set of weights."""

from contextlib import nullcontext
from typing import Any

import timm
from torch import nn

from rescompress.errors import InputError, NoWeightsError, one_line
from rescompress.references import download
from rescompress.references.wanted import Wanted, nearest


def build(name: str, wanted: Wanted) -> nn.Module:
    """Build a model by its name in timm.

    Raises:
        NoWeightsError: its weights cannot be had.
        InputError: timm has no such model.
    """
    config = _config(name)
    options = wanted.options
    for option, value in (("num_classes", wanted.num_classes), ("in_chans", wanted.channels)):
        if value is not None:
            options[option] = value
    if wanted.input_size is not None and config.fixed_input_size:
        options.setdefault("img_size", wanted.input_size)
    # Who names other weights by pretrained_cfg or pretrained_cfg_overlay knows where they are.
    if wanted.pretrained and not any(option.startswith("pretrained_cfg") for option in options):
        return _pretrained(name, config, options)
    return timm.create_model(name, wanted.pretrained, **options)


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


def _pretrained(name: str, config: Any, options: dict[str, Any]) -> nn.Module:
    """Return the model with its weights, from the cache or downloaded."""
    reason = "timm knows of none"
    if config.has_weights:
        url = download.hub_url() if config.hf_hub_id else config.url
        reachable = download.reachable(url)
        reason = f"{download.host_of(url)} cannot be reached"
        if reachable or config.hf_hub_id or download.in_torch_cache(url):
            try:
                with nullcontext() if reachable or not config.hf_hub_id else download.hub_cache_only():
                    return timm.create_model(name, pretrained=True, **options)
            except Exception as error:  # a download fails in many ways
                if reachable:
                    reason = f"the download failed: {one_line(error, 120)}"
    raise NoWeightsError(f"no pretrained weights for timm:{name} ({reason})")
