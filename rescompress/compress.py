"""compress, compress_ and spec_of: carry out a spec on a model, and refuse what cannot be proved harmless."""

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from rescompress import surgery
from rescompress.anatomy import Anatomy, ConvAnatomy, ViTAnatomy
from rescompress.errors import RescompressWarning, SmallerGridError, SpecError, UnsupportedModelError, one_line
from rescompress.families import _hf_config, describe
from rescompress.families._base import image_of
from rescompress.inputs import as_args, default_args, tensors_of
from rescompress.self_check import apply_steps, same_random_numbers, self_check
from rescompress.spec import Samples, Spec, Stage, Step, check_scale

Model = TypeVar("Model", bound=nn.Module)
SpecLike = Spec | Step | str | Path | Mapping[str, Any]

_RECORD = "_rescompress"


@dataclass(frozen=True)
class Record:
    """What compress leaves on a model, as its attribute `_rescompress`.

    Attributes:
        spec: all steps carried out so far
        anatomy: what the model looks like now, so that later steps can go on from here
        log: what each step did, a line or more: the grid before and after, layers that were left as they were
        folded: whether `fold` has rewritten the model for deployment since
        channels: of the example's image; None where it is not known
    """

    spec: Spec
    anatomy: Anatomy
    log: tuple[str, ...]
    folded: bool = False
    channels: int | None = None


def compress(
    model: Model,
    spec: SpecLike | None = None,
    *,
    scale: float | None = None,
    example_input: Any = None,
    calibration: Iterable[Any] | str | None = None,
) -> Model:
    """Return a compressed copy of `model`; the model itself is untouched.

    Before anything is returned, the steps are tried at zero reduction, where the model must give its own outputs, and
    as asked for, where it must run and give outputs of the same kind.

    Args:
        model: a model of any family (`rescompress families`), in any mode, on any device.
        spec: a Spec, a Step, a dict, or the path of a .yaml or .json file.
        scale: instead of a spec, output side over input side of the grid that the network computes on, in (0, 1]:
            StemResize for convolutional networks, PatchResize for ViTs, or InputResize where the patches do not fit
            or several branches read the image.
        example_input: a tensor or a tuple of arguments as for torch.export; by default from the model's own config,
            else 1 x 3 x 224 x 224.
        calibration: inputs that stand for real ones, each given like `example_input`, for steps that find ranges of
            activations; or "random" for noise, which shows speed and nothing about accuracy.

    Raises:
        SpecError: the spec is wrong, does not fit this model, or changes nothing.
        UnsupportedModelError: the model is of no known kind, or would not compute what it computed.
    """
    # Parameters made under inference mode could never be trained.
    with torch.inference_mode(False):
        resolved, anatomy, samples = _checked(model, spec, scale, example_input, calibration, few=True)
        try:
            copied = surgery.deep_copy(model)
        except Exception as error:  # whatever a foreign __deepcopy__ raises
            raise UnsupportedModelError(
                f"this {type(model).__name__} cannot be copied ({one_line(error)}); use compress_, which changes the "
                "model itself, or torch.nn.utils.parametrizations instead of the old weight_norm"
            ) from error
        return carry_out(copied, resolved, anatomy, samples)


def compress_(
    model: Model,
    spec: SpecLike | None = None,
    *,
    scale: float | None = None,
    example_input: Any = None,
    calibration: Iterable[Any] | str | None = None,
) -> Model:
    """Compress `model` in place and return it; arguments and errors are those of `compress`.

    An error leaves the model as it was.
    """
    with torch.inference_mode(False):
        # With all calibration batches, for what fails on the model itself would leave it half done.
        resolved, anatomy, samples = _checked(model, spec, scale, example_input, calibration, few=False)
        return carry_out(model, resolved, anatomy, samples)


def spec_of(model: nn.Module) -> Spec:
    """Return the spec that a compressed model was made with.

    Raises:
        SpecError: the model has not been compressed.
    """
    return record_of(model).spec


def record_of(model: nn.Module) -> Record:
    """Return what compress left on a model.

    Raises:
        SpecError: the model has not been compressed.
    """
    record = getattr(model, _RECORD, None)
    if not isinstance(record, Record):
        raise SpecError(f"this {type(model).__name__} has not been compressed: it carries no spec")
    return record


def default_spec(anatomy: Anatomy, scale: float) -> Spec:
    """Return the spec that a plain `scale` stands for on this kind of model.

    Raises:
        SpecError: scale is not in (0, 1].
    """
    # By name: methods and their options are data here, as in a file.
    check_scale("scale", scale)
    if isinstance(anatomy, ConvAnatomy):
        kind = "input_resize" if anatomy.several_branches else "stem_resize"
        return Spec.from_dict({"steps": [{"kind": kind, "scale": scale}]})
    if isinstance(anatomy, ViTAnatomy):
        patches = [patch / scale for patch in anatomy.patch_size]
        fits = not anatomy.conv_stem and all(
            abs(patch - round(patch)) < 1e-6 and side % round(patch) == 0
            for patch, side in zip(patches, anatomy.input_size, strict=True)
        )
        return Spec.from_dict({"steps": [{"kind": "patch_resize" if fits else "input_resize", "scale": scale}]})
    raise SpecError(f"a plain scale has no meaning for a {anatomy.family} network; give a spec")


def _checked(
    model: nn.Module,
    spec: SpecLike | None,
    scale: float | None,
    example_input: Any,
    calibration: Iterable[Any] | str | None,
    few: bool,
) -> tuple[Spec, Anatomy, Samples]:
    """Return what is to be done, once it has been tried on clones and its warnings have been given.

    With `few`, it is tried with the first calibration batch alone, which is enough to see whether the steps work.
    """
    args, kwargs = _example(model, example_input)
    wanted = _wanted(spec, scale)
    with same_random_numbers():
        anatomy = _anatomy_of(model, args, kwargs, wanted)
    resolved = wanted if isinstance(wanted, Spec) else default_spec(anatomy, wanted)
    samples = samples_of(args, kwargs, calibration)
    tried = replace(samples, calibration=samples.calibration[:1]) if few else samples
    anatomy, messages = _tried(model, resolved, anatomy, args, kwargs, tried)
    # Before the model is touched: a caller may turn warnings into errors, and an error must leave it as it was.
    for message in messages:
        warnings.warn(message, RescompressWarning, stacklevel=4)
    return resolved, anatomy, samples


def _tried(
    model: nn.Module, spec: Spec, anatomy: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Samples
) -> tuple[Anatomy, list[str]]:
    """Return the anatomy with which the spec passes the self-check, and its warnings.

    Where maps of other strides meet again (HRNet, U-Nets), a network takes only multiples of its largest stride. What
    the multiple is shows in trying: the smallest one with which the network works on the smaller grid.
    """
    try:
        return anatomy, self_check(model, spec, anatomy, args, kwargs, samples)
    except SmallerGridError as refusal:
        if isinstance(anatomy, ConvAnatomy) and anatomy.multiple == 1:
            for multiple in (2, 4, 8, 16, 32, 64):
                rounded = replace(anatomy, multiple=multiple)
                with contextlib.suppress(UnsupportedModelError, SpecError):  # no grid of its own is such a multiple
                    return rounded, self_check(model, spec, rounded, args, kwargs, samples)
        raise refusal


def samples_of(args: tuple[Any, ...], kwargs: dict[str, Any], calibration: Iterable[Any] | str | None) -> Samples:
    """Return the example and the calibration inputs as steps take them.

    Raises:
        SpecError: the calibration is neither inputs nor "random", or it or one of its batches is empty.
    """
    example = (args, kwargs)
    if calibration is None:
        return Samples(example)
    if isinstance(calibration, str) and calibration == "random":

        def noise(leaf: Any) -> Any:
            return torch.randn_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return Samples(example, (tree_map(noise, example),), random=True)
    if isinstance(calibration, str | Tensor | nn.Module) or not isinstance(calibration, Iterable):
        raise SpecError(
            f"calibration must be an iterable of inputs or 'random', got {type(calibration).__name__}"
            + (f" {calibration!r}" if isinstance(calibration, str) else "; put a single batch into a list")
        )
    batches = tuple(as_args(batch) for batch in calibration)
    if not batches:
        raise SpecError("calibration is empty; give at least one batch of inputs")
    for number, batch in enumerate(batches):
        if all(tensor.numel() == 0 for tensor in tensors_of(batch)):
            raise SpecError(f"calibration batch {number} holds no values, so no range shows in it; leave it out")
    return Samples(example, batches)


def _example(model: nn.Module, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("a TorchScript module cannot be changed; compress the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"compress takes an nn.Module, got {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise UnsupportedModelError(f"{name!r} has no shape yet; run the model once on an input before compressing")
    record = getattr(model, _RECORD, None)
    if isinstance(record, Record) and record.folded:
        raise SpecError("this model has been folded for deployment; compress the model that it was folded from")
    if example_input is None:
        size = record.anatomy.example_size if isinstance(record, Record) else None
        return default_args(model, size)
    return as_args(example_input)


def _anatomy_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Spec | float) -> Anatomy:
    record = getattr(model, _RECORD, None)
    if not isinstance(record, Record):
        try:
            return describe(model, args, kwargs)
        except UnsupportedModelError:
            if not isinstance(wanted, Spec) or any(step.stage < Stage.PRECISION for step in wanted):
                raise
            # Precision asks for layers, not for a grid that could be made smaller.
            height, width = image_of(model, args, kwargs).shape[-2:]
            return Anatomy(family="any", input_size=(height, width))
    size, recorded = tuple(image_of(model, args, kwargs).shape[-2:]), record.anatomy.example_size
    if size != recorded:
        raise SpecError(
            f"this {type(model).__name__} was compressed with an example of {recorded[0]} x {recorded[1]} pixels, got "
            f"one of {size[0]} x {size[1]}; give the same size to go on from there"
        )
    return record.anatomy


def _wanted(spec: SpecLike | None, scale: float | None) -> Spec | float:
    """Return the spec as one, or the scale that is given instead."""
    if (spec is None) == (scale is None):
        raise SpecError(f"compress takes either a spec or a scale, got spec={spec!r} and scale={scale!r}")
    if scale is not None:
        return scale
    if isinstance(spec, Step):
        spec = Spec.of(spec)
    elif isinstance(spec, str | Path):
        spec = Spec.load(spec)
    elif isinstance(spec, Mapping):
        spec = Spec.from_dict(spec)
    if not isinstance(spec, Spec):
        raise SpecError(f"spec must be a Spec, a Step, a dict or a path, got {type(spec).__name__}")
    if not spec.steps:
        raise SpecError("the spec has no steps, so it would change nothing; give at least one")
    return spec


def carry_out(model: Model, spec: Spec, anatomy: Anatomy, samples: Samples | None = None) -> Model:
    """Apply a spec in place, without any check of the outcome, and leave the record on the model.

    Raises:
        SpecError: a step does not fit this model or changes nothing in it, or stages would go back.
        UnsupportedModelError: a method does not fit this kind of model.
    """
    record = getattr(model, _RECORD, None)
    earlier = record if isinstance(record, Record) else Record(Spec(), anatomy, (), channels=_channels(model, samples))
    whole = earlier.spec + spec  # raises before anything is changed if the stages would go back
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RescompressWarning)  # the check has given them
        anatomy, log = apply_steps(model, spec, anatomy, samples)
    if _hf_config.is_pretrained(model):
        _hf_config.write(model, [_hf_config.part("", whole, anatomy)])
        log += _hf_config.lines(spec, anatomy)
    setattr(model, _RECORD, Record(whole, anatomy, earlier.log + log, channels=earlier.channels))
    return model


def _channels(model: nn.Module, samples: Samples | None) -> int | None:
    """Return the number of channels of the example's image, before steps change what takes it."""
    if samples is None or samples.example is None:
        return None
    return int(image_of(model, *samples.example).shape[1])
