"""What a header says of a model: its spec, inputs, preprocessing, weights and the versions that wrote it."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

import rescompress
from rescompress.compress import record_of
from rescompress.errors import ExportError, SpecError
from rescompress.inputs import Args, tensors_of
from rescompress.layers.low_bits import LowBits
from rescompress.spec import Spec


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return the spec that the model was compressed with, what each step reached, its class and its weights."""
    try:
        record = record_of(model)
        spec, log = record.spec, list(record.log)
    except SpecError:  # an uncompressed model may be written too
        spec, log = Spec(), []
    config = _config_of(model)
    weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    return {
        "spec": spec.to_dict(),
        "log": log,
        "model": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "architecture": config.get("architecture"),
            "parameters": sum(tensor.numel() for tensor in model.parameters()),
            "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights),
            "device": str(next(iter(weights)).device) if weights else "cpu",
        },
    }


def describe_inputs(inputs: Args) -> list[dict[str, Any]]:
    """Return shape and dtype of every tensor that the model takes."""
    return [
        {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for tensor in tensors_of(inputs)
    ]


def describe_preprocessing(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return how an image becomes an input: as given, else from a timm model's own config, else None.

    Raises:
        ExportError: what is given is no mapping.
    """
    if given is not None:
        if not isinstance(given, Mapping):
            raise ExportError(
                f"preprocessing must be a dict such as {{'mean': [...], 'std': [...]}}, got {_shown(given)}"
            )
        return dict(given)
    config = _config_of(model)
    if "mean" not in config or "std" not in config:
        return None
    kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {
        name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in kept if name in config
    }


def describe_versions(model: nn.Module) -> dict[str, str]:
    """Return the versions of rescompress, torch and the library that the model comes from."""
    versions = {"rescompress": rescompress.__version__, "torch": torch.__version__}
    library = type(model).__module__.partition(".")[0]
    if library not in versions:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a class of the user's own script
            versions[library] = metadata.version(library)
    if any(isinstance(module, LowBits) for module in model.modules()):
        versions |= versions_of("torchao")
    return versions


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {package: metadata.version(package) for package in packages}


def describe_labels(labels: Sequence[str] | None) -> list[str] | None:
    """Return the class names as a list.

    Raises:
        ExportError: they are no sequence, or one string instead of several.
    """
    if labels is None:
        return None
    if isinstance(labels, str | bytes | Mapping) or not isinstance(labels, Iterable):
        raise ExportError(f"labels must be a sequence of class names such as ['cat', 'dog'], got {_shown(labels)}")
    return [str(label) for label in labels]


def describe_report(report: Any) -> dict[str, Any] | None:
    """Return a report as plain data.

    Raises:
        ExportError: it is neither a mapping nor has a `to_dict`.
    """
    if report is None:
        return None
    data = report.to_dict() if hasattr(report, "to_dict") else report
    if not isinstance(data, Mapping):
        raise ExportError(f"report must be what measure or compare returned, or a dict; got {type(report).__name__}")
    return dict(data)


def _shown(value: Any) -> str:
    return f"the {type(value).__name__} {repr(value)[:40]}"


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return dict(config) if isinstance(config, Mapping) else {}
