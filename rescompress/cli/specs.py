"""Make one spec of --scale, --spec and --set."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import yaml
from torch import nn

from rescompress.compress import default_spec
from rescompress.errors import SpecError, one_line
from rescompress.families import describe
from rescompress.inputs import as_args
from rescompress.spec import Spec, Step, check_scale, step_type_of


def spec_without_model(*, scale: float | None, path: str | None, settings: Sequence[str]) -> Spec | None:
    """Return the spec of a file, or an empty one, changed by the settings; None for a scale, which needs the model.

    All that can be checked without the model is checked, for building one takes long.

    Raises:
        SpecError: there is nothing to do, the scale is out of range, a setting cannot be read, or the spec is wrong.
    """
    if scale is None and path is None and not settings:
        raise SpecError("nothing to do: give --scale 0.5, --spec FILE.yaml or --set KIND.OPTION=VALUE")
    if scale is None:
        return with_settings(Spec() if path is None else Spec.load(path), settings)
    check_scale("scale", scale)
    steps: dict[str, dict[str, Any]] = {}
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


def scaled_spec(model: nn.Module, example_input: Any, scale: float, settings: Sequence[str]) -> Spec:
    """Return the spec that a plain scale stands for on this model, changed by the settings.

    Raises:
        SpecError: a setting is ambiguous, or the spec is wrong.
        UnsupportedModelError: no family describes the model, so that a plain scale has no meaning.
    """
    args, kwargs = as_args(example_input)
    return with_settings(default_spec(describe(model, args, kwargs), scale), settings)


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


def _parse(setting: str) -> tuple[str, str, Any]:
    name, equals, text = setting.partition("=")
    kind, dot, option = name.partition(".")
    if not (equals and dot and kind and option):
        raise SpecError(f"--set takes KIND.OPTION=VALUE, such as stem_resize.mode=nearest; got {setting!r}")
    try:
        return kind.strip(), option.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {setting!r}: the value is not YAML: {one_line(error)}") from error
