"""compress, compress_ and spec_of: carry out a spec on a model, and refuse what cannot be proved harmless."""

import copy
import traceback
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from rescompress import surgery
from rescompress.anatomy import Anatomy, ConvAnatomy, ViTAnatomy
from rescompress.errors import RescompressWarning, SpecError, UnsupportedModelError
from rescompress.families import describe
from rescompress.inputs import as_args, default_input
from rescompress.spec import Samples, Spec, Step, check_scale

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
    """

    spec: Spec
    anatomy: Anatomy
    log: tuple[str, ...]


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
            StemResize for convolutional networks, PatchResize for ViTs, or InputResize where the patches do not fit.
        example_input: a tensor or a tuple of arguments as for torch.export; by default from the model's own config,
            else 1 x 3 x 224 x 224.
        calibration: inputs that stand for real ones, each given like `example_input`, for steps that find ranges of
            activations; or "random" for noise, which shows speed and nothing about accuracy.

    Raises:
        SpecError: the spec is wrong, does not fit this model, or changes nothing.
        UnsupportedModelError: the model is of no known kind, or would not compute what it computed.
    """
    args, kwargs = _example(model, example_input)
    anatomy = _anatomy_of(model, args, kwargs)
    resolved = _resolve(spec, scale, anatomy)
    samples = samples_of(args, kwargs, calibration)
    self_check(model, resolved, anatomy, args, kwargs, samples)
    return carry_out(copy.deepcopy(model), resolved, anatomy, samples)


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
    args, kwargs = _example(model, example_input)
    anatomy = _anatomy_of(model, args, kwargs)
    resolved = _resolve(spec, scale, anatomy)
    samples = samples_of(args, kwargs, calibration)
    self_check(model, resolved, anatomy, args, kwargs, samples)
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
        return Spec.from_dict({"steps": [{"kind": "stem_resize", "scale": scale}]})
    if isinstance(anatomy, ViTAnatomy):
        patches = [patch / scale for patch in anatomy.patch_size]
        fits = all(
            abs(patch - round(patch)) < 1e-6 and side % round(patch) == 0
            for patch, side in zip(patches, anatomy.input_size, strict=True)
        )
        return Spec.from_dict({"steps": [{"kind": "patch_resize" if fits else "input_resize", "scale": scale}]})
    raise SpecError(f"a plain scale has no meaning for a {anatomy.family} network; give a spec")


def samples_of(args: tuple[Any, ...], kwargs: dict[str, Any], calibration: Iterable[Any] | str | None) -> Samples:
    """Return the example and the calibration inputs as steps take them.

    Raises:
        SpecError: the calibration is neither inputs nor "random", or is empty.
    """
    example = (args, kwargs)
    if calibration is None:
        return Samples(example)
    if calibration == "random":

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
    return Samples(example, batches)


def self_check(
    model: nn.Module,
    spec: Spec,
    anatomy: Anatomy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    samples: Samples | None = None,
) -> None:
    """Try a spec on clones that share the model's weights: at zero reduction, then as it is.

    Raises:
        SpecError: a step does not fit this model or changes nothing in it.
        UnsupportedModelError: the outputs at zero reduction differ from the model's own, or the reduced model fails.
    """
    samples = Samples((args, kwargs)) if samples is None else samples
    reference = _run(surgery.clone_shared(model), args, kwargs, "the model itself does not run on its example input")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RescompressWarning)  # they are given once, when the model itself is changed
        reduced = surgery.clone_shared(model)
        _apply(reduced, spec, anatomy, samples)
        identity = surgery.clone_shared(model)
        _apply(identity, spec.identity(), anatomy, samples)
    kinds = " + ".join(step.kind for step in spec)
    same = _run(identity, args, kwargs, f"{kinds} at zero reduction breaks this {type(model).__name__}")
    difference = _difference(reference, same)
    if difference is not None:  # rounding or a real change? In double precision they are far apart
        difference = _difference_in_double(model, spec.identity(), anatomy, args, kwargs)
    if difference is not None:
        raise UnsupportedModelError(
            f"{kinds} at zero reduction changes what this {type(model).__name__} computes ({difference}); "
            "it is refused rather than returned wrong"
        )
    small = _run(reduced, args, kwargs, f"this {type(model).__name__} does not work on the smaller grid of {kinds}")
    problem = _not_alike(reference, small)
    if problem is not None:
        raise UnsupportedModelError(f"{kinds} gives outputs of another kind on this {type(model).__name__}: {problem}")


def _example(model: nn.Module, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("a TorchScript module cannot be changed; compress the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"compress takes an nn.Module, got {type(model).__name__}")
    return as_args(default_input(model) if example_input is None else example_input)


def _anatomy_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
    record = getattr(model, _RECORD, None)
    return record.anatomy if isinstance(record, Record) else describe(model, args, kwargs)


def _resolve(spec: SpecLike | None, scale: float | None, anatomy: Anatomy) -> Spec:
    if (spec is None) == (scale is None):
        raise SpecError(f"compress takes either a spec or a scale, got spec={spec!r} and scale={scale!r}")
    if scale is not None:
        return default_spec(anatomy, scale)
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
    earlier = record if isinstance(record, Record) else Record(Spec(), anatomy, ())
    whole = earlier.spec + spec  # raises before anything is changed if the stages would go back
    anatomy, log = _apply(model, spec, anatomy, Samples() if samples is None else samples)
    setattr(model, _RECORD, Record(whole, anatomy, earlier.log + log))
    return model


def _apply(model: nn.Module, spec: Spec, anatomy: Anatomy, samples: Samples) -> tuple[Anatomy, tuple[str, ...]]:
    log: list[str] = []
    for step in spec:
        before = surgery.fingerprint(model)
        applied = step.apply_with(model, anatomy, samples)
        if surgery.fingerprint(model) == before:
            raise SpecError(f"{step.to_dict()} changed nothing in this {type(model).__name__}")
        told = applied.notes or (_change(anatomy, applied.anatomy),)
        log.extend(f"{step.kind}: {line}" for line in told)
        anatomy = applied.anatomy
    return anatomy, tuple(log)


def _change(before: Anatomy, after: Anatomy) -> str:
    """Say in one line what a step did to the grid."""
    if isinstance(before, ViTAnatomy) and isinstance(after, ViTAnatomy) and before.grids[0] == after.grids[0]:
        return f"{before.num_patch_tokens[-1]} -> {after.num_patch_tokens[-1]} patch tokens leave the last block"
    old, new = before.grid, after.grid
    if old is None or new is None:
        return "the grid is dissolved"
    return f"grid {old[0]} x {old[1]} -> {new[0]} x {new[1]}, scale {(new[0] * new[1] / (old[0] * old[1])) ** 0.5:.4g}"


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failing: str) -> Any:
    try:
        with torch.no_grad():
            return model.eval()(*args, **kwargs)
    except Exception as error:  # the host's own code runs here and may raise anything
        shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reason = " ".join(str(error).split())[:300] or _where(error)
        raise UnsupportedModelError(f"{failing} (inputs {shapes}): {type(error).__name__}: {reason}") from error


def _difference_in_double(
    model: nn.Module, identity: Spec, anatomy: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    def double(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = tree_map(double, (args, kwargs))
    original = copy.deepcopy(model).double()  # not a shared clone: double() would convert the model's own weights
    failing = f"this {type(model).__name__} does not run in double precision"
    reference = _run(original, args, kwargs, failing)
    _apply(original, identity, anatomy, Samples((args, kwargs)))
    return _difference(reference, _run(original, args, kwargs, failing))


def _where(error: BaseException) -> str:
    """Return the line of the host's code that raised, for errors without a message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno})"


def _difference(reference: Any, other: Any) -> str | None:
    """Say how far two outputs are apart, or None where they agree to 1e-6 of the size of their largest value."""
    old, old_structure = tree_flatten(reference)
    new, new_structure = tree_flatten(other)
    if old_structure != new_structure:
        return f"the outputs are nested differently: {old_structure} against {new_structure}"
    for a, b in zip(old, new, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if a.is_meta or not a.is_floating_point() or a.numel() == 0:
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return "other values than before are infinite or NaN"
        gap = (a - b).double().abs()[finite].max().item() if finite.any() else 0.0
        size = max(1.0, a.double().abs()[finite].max().item()) if finite.any() else 1.0
        if gap > 1e-6 * size:
            return f"largest difference {gap:.3g} in values of size {size:.3g}"
    return None


def _not_alike(reference: Any, small: Any) -> str | None:
    """Say why the reduced model's outputs are no replacement for the original's; grids and sequences may be shorter."""
    old, old_structure = tree_flatten(reference)
    new, new_structure = tree_flatten(small)
    if old_structure != new_structure:
        return f"nested as {new_structure} instead of {old_structure}"
    for a, b in zip(old, new, strict=True):
        if not isinstance(a, Tensor):
            continue
        same_shape = a.shape == b.shape if a.ndim <= 2 else (a.ndim == b.ndim and a.shape[0] == b.shape[0])
        if not same_shape:
            return f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not a.is_meta and a.is_floating_point() and bool(a.isfinite().all()) and not bool(b.isfinite().all()):
            return "infinite or NaN values where the original has none"
    return None
