"""Make one spec of --scale, --spec and --set."""

from collections.abc import Sequence
from typing import Any

import yaml
from torch import nn

from rescompress.compress import default_spec
from rescompress.errors import SpecError
from rescompress.families import describe
from rescompress.inputs import as_args
from rescompress.spec import Spec, step_type_of


def make_spec(
    model: nn.Module, example_input: Any, *, scale: float | None, path: str | None, settings: Sequence[str]
) -> Spec:
    """Return the spec of a plain scale, of a file, or an empty one, changed by the settings.

    Raises:
        SpecError: there is nothing to do, a setting cannot be read, or the spec is wrong.
        UnsupportedModelError: no family describes the model, so that a plain scale has no meaning.
    """
    if scale is None and path is None and not settings:
        raise SpecError("nothing to do: give --scale 0.5, --spec FILE.yaml or --set KIND.OPTION=VALUE")
    if path is not None:
        spec = Spec.load(path)
    elif scale is not None:
        args, kwargs = as_args(example_input)
        spec = default_spec(describe(model, args, kwargs), scale)
    else:
        spec = Spec()
    return with_settings(spec, settings)


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
        raise SpecError(f"--set {setting!r}: the value is not YAML: {' '.join(str(error).split())}") from error
