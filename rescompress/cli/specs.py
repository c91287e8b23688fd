"""Make one spec of --scale, --spec, --quantize and --set."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import yaml
from torch import nn

from rescompress.compress import default_spec
from rescompress.errors import SpecError, one_line
from rescompress.families import describe
from rescompress.inputs import as_args
from rescompress.methods.quantize import LEFT
from rescompress.spec import Spec, Step, check_scale, step_type_of


def spec_without_model(
    *, scale: float | None, path: str | None, settings: Sequence[str], quantize: str | None = None
) -> Spec | None:
    """Return the spec of a file, or an empty one, changed by the settings; None for a scale, which needs the model.

    All that can be checked without the model is checked, for building one takes long.

    Raises:
        SpecError: there is nothing to do, the scale is out of range, a setting cannot be read, or the spec is wrong.
    """
    if scale is None and path is None and quantize is None and not settings:
        raise SpecError(
            "nothing to do: give --scale 0.5, --spec FILE.yaml, --quantize SCHEME or --set KIND.OPTION=VALUE"
        )
    if scale is None:
        return with_settings(_with_low_bits(Spec() if path is None else Spec.load(path), quantize), settings)
    check_scale("scale", scale)
    steps: dict[str, dict[str, Any]] = {}
    if quantize is not None:
        steps["quantize"] = {"kind": "quantize", "scheme": quantize}
    for setting in settings:
        kind, option, value = _parse(setting)
        steps.setdefault(kind, {"kind": kind})[option] = value
    for step in steps.values():
        try:
            Step.from_dict(step)
        except SpecError:
            # It may be an option of the very step that the scale stands for.
            if "scale" in step or "scale" not in {field.name for field in fields(step_type_of(step["kind"]))}:
                raise
            Step.from_dict({**step, "scale": scale})
    return None


def scaled_spec(
    model: nn.Module, example_input: Any, scale: float, settings: Sequence[str], quantize: str | None = None
) -> Spec:
    """Return the spec that a plain scale stands for on this model, changed by the settings.

    Raises:
        SpecError: a setting is ambiguous, or the spec is wrong.
        UnsupportedModelError: no family describes the model, so that a plain scale has no meaning.
    """
    args, kwargs = as_args(example_input)
    return with_settings(_with_low_bits(default_spec(describe(model, args, kwargs), scale), quantize), settings)


def _with_low_bits(spec: Spec, scheme: str | None) -> Spec:
    if scheme is None:
        return spec
    if any(step.kind == "quantize" for step in spec):
        raise SpecError(
            f"--quantize {scheme}: the spec has a quantize step already; --set quantize.scheme={scheme} changes it"
        )
    return spec + Spec.from_dict({"steps": [{"kind": "quantize", "scheme": scheme}]})


def check_calibration(spec: Spec | None, quantize: str | None, settings: Sequence[str], given: str | None) -> None:
    """Raise where a scheme asks for calibration images and none are given, or the other way round.

    Args:
        spec: what `spec_without_model` gave; where it is None, `quantize` and `settings` decide.
        quantize: --quantize.
        settings: --set.
        given: --calibration.

    Raises:
        SpecError: they do not go together.
    """
    schemes = [getattr(step, "scheme", None) for step in spec or ()]
    if spec is None:
        set_ = [value for kind, option, value in map(_parse, settings) if (kind, option) == ("quantize", "scheme")]
        schemes = set_[-1:] or [quantize]
    static = "w8a8_static" in schemes
    if static and given is None:
        raise SpecError(
            "w8a8_static needs photographs to find the ranges of activations with: give --calibration DIR, or "
            "--calibration random for noise, which shows speed and nothing about accuracy"
        )
    if given is not None and not static:
        raise SpecError(f"--calibration {given} is for --quantize w8a8_static; nothing else here looks at photographs")


def with_settings(spec: Spec, settings: Sequence[str]) -> Spec:
    """Return the spec with each KIND.OPTION=VALUE carried out; a kind that is not there yet becomes a new step.

    Raises:
        SpecError: a setting is not of this form, is ambiguous, or gives an unknown kind, option or value.
    """
    steps = [step.to_dict() for step in spec]
    for setting in settings:
        kind, option, value = _parse(setting)
        stage = step_type_of(kind).stage
        same_kind = [step for step in steps if step["kind"] == kind]
        if len(same_kind) > 1:
            raise SpecError(f"--set {setting} is ambiguous: there are {len(same_kind)} steps {kind!r}; edit the spec")
        if not same_kind:
            same_kind = [{"kind": kind}]
            # Stages may not go back: the new step comes last in its own.
            later = [index for index, step in enumerate(steps) if step_type_of(step["kind"]).stage > stage]
            steps.insert(later[0] if later else len(steps), same_kind[0])
        same_kind[0][option] = value
    return Spec.from_dict({"steps": steps})


def shortened(line: str, most: int = 4) -> str:
    """Return a line of the log on layers left as they were with the first few names; --json gives them all."""
    start, _, names = line.rpartition(": ")
    listed = names.split(", ")
    if LEFT not in start or len(listed) <= most:
        return line
    return f"{start}: {', '.join(listed[:most])} and {len(listed) - most} more"


def _parse(setting: str) -> tuple[str, str, Any]:
    name, equals, text = setting.partition("=")
    kind, dot, option = name.partition(".")
    if not (equals and dot and kind and option):
        raise SpecError(f"--set takes KIND.OPTION=VALUE, such as stem_resize.mode=nearest; got {setting!r}")
    try:
        return kind.strip(), option.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {setting!r}: the value is not YAML: {one_line(error)}") from error
