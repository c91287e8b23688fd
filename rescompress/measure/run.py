"""Measure everything about one model, or about two side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rescompress.errors import MeasureError
from rescompress.inputs import as_args, tensors_of
from rescompress.measure.latency import Latency, Progress, SpeedUp, time_models
from rescompress.measure.macs import count_macs, parameter_count
from rescompress.measure.memory import live_activation_bytes, weight_bytes
from rescompress.measure.peak import PeakMemory
from rescompress.measure.peak import peak_memory as measure_peak
from rescompress.measure.report import Comparison, Report
from rescompress.measure.sandbox import device_of


def measure(
    model: nn.Module,
    example_input: Any,
    *,
    name: str | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    latency: bool = True,
    peak_memory: bool = True,
    training: bool = True,
    budget_s: float = 1.5,
    progress: Progress | None = None,
) -> Report:
    """Measure what a model costs in evaluation mode (and in one training step) without changing it.

    Args:
        model: any module, on the device where it is to be measured
        example_input: a tensor, a tuple of arguments, or a pair (args, kwargs), as for `torch.export.export`
        name: what to call the model in tables; its class if not given
        batch_sizes: for the latency; the example input is repeated
        latency: time it
        peak_memory: measure the memory that a pass really takes, which starts a process for a model on the CPU
        training: find the peak of live activations of a training step as well
        budget_s: seconds of timed passes per batch size
        progress: called with one line before each thing that takes long

    Raises:
        MeasureError: the model does not run on the example input.
        InputError: the example input is of no kind that is known, or the budget is not positive.
    """
    named = {name or type(model).__name__: model}
    reports, _ = _measure(named, example_input, batch_sizes, latency, peak_memory, training, budget_s, progress)
    return reports[0]


def compare(
    original: nn.Module,
    compressed: nn.Module,
    example_input: Any,
    *,
    names: tuple[str, str] = ("original", "compressed"),
    batch_sizes: Sequence[int] = (1, 8),
    latency: bool = True,
    peak_memory: bool = True,
    training: bool = True,
    budget_s: float = 1.5,
    progress: Progress | None = None,
) -> Comparison:
    """Measure two models on the same input; their passes are timed in turn, so that the ratio holds under drift.

    Args:
        original: the model before
        compressed: the model after
        example_input: a tensor, a tuple of arguments, or a pair (args, kwargs), as for `torch.export.export`
        names: what to call them in tables; two different names
        batch_sizes: for the latency; the example input is repeated
        latency: time them
        peak_memory: measure the memory that a pass really takes, which starts a process for a model on the CPU
        training: find the peak of live activations of a training step as well
        budget_s: seconds of timed passes per model and batch size
        progress: called with one line before each thing that takes long

    Raises:
        MeasureError: one of the models does not run on the example input, or both names are the same.
        InputError: the example input is of no kind that is known, or the budget is not positive.
    """
    if names[0] == names[1]:
        raise MeasureError(f"two models to compare need two names, got {names[0]!r} twice")
    named = {names[0]: original, names[1]: compressed}
    (before, after), speed_ups = _measure(
        named, example_input, batch_sizes, latency, peak_memory, training, budget_s, progress
    )
    return Comparison(before=before, after=after, speed_ups=speed_ups)


def _measure(
    models: Mapping[str, nn.Module],
    example_input: Any,
    batch_sizes: Sequence[int],
    latency: bool,
    peak_memory: bool,
    training: bool,
    budget_s: float,
    progress: Progress | None,
) -> tuple[list[Report], tuple[SpeedUp, ...]]:
    timed: dict[str, list[Latency]] = {name: [] for name in models}
    shared_notes: list[str] = []
    parts = {name: _static(name, model, example_input, training, progress) for name, model in models.items()}
    if latency:
        try:
            timed, shared_notes = time_models(
                models, example_input, batch_sizes=batch_sizes, budget_s=budget_s, progress=progress
            )
        except MeasureError as error:
            shared_notes = [str(error)]
    reports = []
    for name, model in models.items():
        notes = [*parts[name].pop("notes"), *shared_notes]
        peak = _peak(name, model, example_input, notes, progress) if peak_memory else None
        reports.append(Report(**parts[name], peak=peak, latencies=tuple(timed[name]), notes=tuple(notes)))
    first, last = timed[next(iter(models))], timed[list(models)[-1]]
    return reports, tuple(SpeedUp.between(old, new) for old, new in zip(first, last, strict=True))


def _static(
    name: str, model: nn.Module, example_input: Any, training: bool, progress: Progress | None
) -> dict[str, Any]:
    """Return the fields of the report that need no clock."""
    args = as_args(example_input)
    if progress is not None:
        progress(f"counting {name}")
    count = count_macs(model, example_input)
    notes: list[str] = []
    floats = (tensor for tensor in model.parameters() if tensor.is_floating_point())
    return {
        "name": name,
        "input_shapes": tuple(tuple(int(side) for side in tensor.shape) for tensor in tensors_of(args)),
        "device": str(device_of(model, args)),
        "dtype": str(next((tensor.dtype for tensor in floats), torch.get_default_dtype())).removeprefix("torch."),
        "macs": count.macs,
        "uncounted": count.uncounted,
        "parameters": parameter_count(model),
        "weight_bytes": weight_bytes(model),
        "inference_live_bytes": _live(model, example_input, False, notes),
        "training_live_bytes": _live(model, example_input, True, notes) if training else None,
        "modules": count.modules,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
        "notes": notes,
    }


def _live(model: nn.Module, example_input: Any, training: bool, notes: list[str]) -> int | None:
    try:
        return live_activation_bytes(model, example_input, training=training)
    except MeasureError as error:
        notes.append(f"no live activations of {'a training step' if training else 'inference'}: {error}")
        return None


def _peak(
    name: str, model: nn.Module, example_input: Any, notes: list[str], progress: Progress | None
) -> PeakMemory | None:
    if progress is not None:
        progress(f"measuring the memory of {name}")
    try:
        return measure_peak(model, example_input)
    except MeasureError as error:
        notes.append(f"no measured peak memory: {error}")
        return None
