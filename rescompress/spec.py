"""The spec: an ordered tuple of steps as plain data, to and from dict, JSON and YAML."""

import dataclasses
import importlib
import json
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rescompress.anatomy import Anatomy
from rescompress.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 1
"""Version of the layout of a spec as a dict."""

_registered: dict[str, type["Step"]] = {}


Run = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of one call of the model."""


@dataclass(frozen=True)
class Samples:
    """Inputs that a step may look at.

    Attributes:
        example: the example input, None where there is none
        calibration: inputs that stand for real ones, to find ranges with
        random: whether the calibration inputs are noise, on the user's own request
    """

    example: Run | None = None
    calibration: tuple[Run, ...] = ()
    random: bool = False


@dataclass(frozen=True)
class Applied:
    """What a step made of a model.

    Attributes:
        anatomy: what the model looks like afterwards
        notes: what the user should know of it, a line each
    """

    anatomy: Anatomy
    notes: tuple[str, ...] = ()


class Stage(IntEnum):
    """When a step runs: resolution before tokens before precision."""

    RESOLUTION = 1
    TOKENS = 2
    PRECISION = 3


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One use of a method: its options, checked where they are born, and what it does to a model.

    A concrete step sets `kind`, the stable tag that stands for it in files, and `stage`.
    """

    kind: ClassVar[str]
    stage: ClassVar[Stage]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            _registered[cls.kind] = cls

    @abstractmethod
    def apply(self, model: "nn.Module", anatomy: Anatomy) -> Anatomy:
        """Change `model` in place and return what it looks like afterwards.

        Raises:
            SpecError: the options cannot be met on this model.
            UnsupportedModelError: the method does not fit this kind of model.
        """

    def apply_with(self, model: "nn.Module", anatomy: Anatomy, samples: Samples) -> Applied:
        """Do what `apply` does; a step that looks at inputs, or has something to tell, overrides this.

        Raises:
            SpecError: the options cannot be met on this model, or the step needs samples that are not there.
            UnsupportedModelError: the method does not fit this kind of model.
        """
        return Applied(self.apply(model, anatomy))

    @abstractmethod
    def identity(self) -> "Step":
        """Return the same step with nothing to reduce: the model must compute what it computed without it."""

    def to_dict(self) -> dict[str, Any]:
        """Return `{kind: ..., option: value, ...}` with JSON-native values; options at their default are left out."""
        options: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                options[field.name] = list(value) if isinstance(value, tuple) else value
        return options

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Step":
        """Build the step that `data["kind"]` names.

        Raises:
            SpecError: no kind, an unknown kind, an unknown option, or a value out of range.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"a step must be a mapping such as {{kind: stem_resize, scale: 0.5}}, got {data!r}")
        options = dict(data)
        kind = options.pop("kind", None)
        if kind is None:
            raise SpecError(f"a step needs a 'kind', got {dict(data)!r}; known: {', '.join(step_kinds())}")
        step_type = step_type_of(kind)
        names = [field.name for field in dataclasses.fields(step_type)]
        for name in options:
            if name not in names:
                raise SpecError(f"step {kind!r} has no option {name!r}{did_you_mean(str(name), names)}")
        missing = [
            field.name
            for field in dataclasses.fields(step_type)
            if field.default is dataclasses.MISSING and field.name not in options
        ]
        if missing:
            raise SpecError(f"step {kind!r} needs the option {missing[0]!r}")
        return step_type(**options)


def step_kinds() -> list[str]:
    """Return the tag of every method: one for each file in `rescompress.methods`, and those that others registered."""
    import rescompress

    folder = Path(rescompress.__file__).parent / "methods"
    shipped = {found.name for found in pkgutil.iter_modules([str(folder)]) if not found.name.startswith("_")}
    return sorted(shipped | set(_registered))


def step_type_of(kind: str) -> type[Step]:
    """Return the step class behind a tag; its file is imported on first use.

    Raises:
        SpecError: no method has this tag.
    """
    if not isinstance(kind, str) or kind not in _registered:
        kinds = step_kinds()
        if not isinstance(kind, str) or kind not in kinds:
            raise SpecError(f"unknown method {kind!r}{did_you_mean(str(kind), kinds)}")
        # By name, not by import statement: the spec stands below the methods and must load without torch.
        importlib.import_module(f"rescompress.methods.{kind}")
    return _registered[kind]


@dataclass(frozen=True)
class Spec:
    """What to do to a model: plain, frozen, ordered data.

    Attributes:
        steps: in the order in which they run; stages never go back
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        for step in self.steps:
            if not isinstance(step, Step):
                raise SpecError(f"a spec holds steps such as StemResize(scale=0.5), got {step!r}")
        for earlier, later in zip(self.steps, self.steps[1:], strict=False):
            if later.stage < earlier.stage:
                raise SpecError(
                    f"step {later.kind!r} ({later.stage.name.lower()}) must come before {earlier.kind!r} "
                    f"({earlier.stage.name.lower()}); stages run resolution, tokens, precision"
                )

    @classmethod
    def of(cls, *steps: Step) -> Self:
        """Build a spec from its steps: `Spec.of(StemResize(scale=0.5))`."""
        return cls(steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __add__(self, other: "Spec") -> "Spec":
        return Spec(self.steps + other.steps)

    def identity(self) -> "Spec":
        """Return the spec with every step at zero reduction."""
        return Spec(tuple(step.identity() for step in self.steps))

    def to_dict(self) -> dict[str, Any]:
        """Return `{schema: 1, steps: [...]}` with JSON-native values."""
        return {"schema": SCHEMA, "steps": [step.to_dict() for step in self.steps]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            SpecError: not a spec, of another schema, or with an unknown kind, option or value.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("steps"), list):
            raise SpecError(
                f"a spec must look like {{schema: 1, steps: [{{kind: stem_resize, scale: 0.5}}]}}, got {data!r}"
            )
        unknown = set(data) - {"schema", "steps"}
        if unknown:
            raise SpecError(f"a spec has no key {min(unknown, key=str)!r}; known: schema, steps")
        if data.get("schema", SCHEMA) != SCHEMA:
            raise SpecError(
                f"spec schema {data['schema']!r} is not known to this version, which reads {SCHEMA}; "
                "upgrade rescompress"
            )
        return cls(tuple(Step.from_dict(step) for step in data["steps"]))

    def to_json(self) -> str:
        """Return the spec as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            SpecError: not JSON, or not a spec.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the spec is not JSON: {error}") from error
        return cls.from_dict(data)

    def to_yaml(self) -> str:
        """Return the spec as YAML."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read what `to_yaml` wrote.

        Raises:
            SpecError: not YAML, or not a spec.
        """
        import yaml

        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise SpecError(f"the spec is not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a spec from a .yaml, .yml or .json file.

        Raises:
            SpecError: the file cannot be read or holds no spec.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"cannot read the spec {path}: {error}") from error
        try:
            return cls.from_json(text) if Path(path).suffix == ".json" else cls.from_yaml(text)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error


# Checks of options, shared by the methods.


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def is_int(value: object, minimum: int) -> bool:
    """Whether `value` is a whole number of at least `minimum`; booleans are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_scale(option: str, value: object) -> None:
    """Raise unless `value` lies in (0, 1].

    Raises:
        SpecError: it does not.
    """
    if not is_number(value) or not 0 < value <= 1:  # type: ignore[operator]
        raise SpecError(f"{option} must be in (0, 1], got {value!r}")


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`.

    Raises:
        SpecError: it is not.
    """
    if value not in choices:
        raise SpecError(
            f"{option} must be one of {', '.join(choices)}; got {value!r}{did_you_mean(str(value), choices)}"
        )


def as_pair(option: str, value: object, minimum: int = 1) -> tuple[int, int]:
    """Return (height, width) from an int or a pair of ints.

    Raises:
        SpecError: neither, or below `minimum`.
    """
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(is_int(side, minimum) for side in pair):
        raise SpecError(f"{option} must be an int or a (height, width) of at least {minimum}, got {value!r}")
    return (int(pair[0]), int(pair[1]))
