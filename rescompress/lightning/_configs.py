"""Configs that build on other ones (`extends: other.yaml`, relative to the file; chains allowed) or name their seed."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from rescompress.errors import InputError

_namespace: Any = Namespace  # its constructor has no types

_FLAGS = ("--config", "-c")

_OTHER_RUNS = ("initial_weights", "teacher")
"""Options that name what another run leaves."""


def with_extended(arguments: list[str]) -> list[str]:
    """Return the arguments with a --config for each file that a config extends, before its own.

    Raises:
        InputError: such a file is not there, or extends itself.
    """
    found: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, _, value = argument.partition("=")
        if flag not in _FLAGS:
            found.append(argument)
            continue
        value = value or next(rest, "")
        for path in _chain(Path(value), ()):
            found += ["--config", str(path)]
    return found


def _chain(path: Path, extending: tuple[Path, ...]) -> list[Path]:
    """Return a config behind what it extends."""
    if path in extending:
        raise InputError(f"the config {path} extends itself")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        by = f", which {extending[-1]} extends" if extending else ""
        raise InputError(f"there is no config {path}{by}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return [path]  # jsonargparse says what is wrong with it
    base = data.get("extends") if isinstance(data, dict) else None
    return [path] if base is None else [*_chain(path.parent / str(base), (*extending, path)), path]


def with_seed(config: Any, seed: int) -> Any:
    """Return a parsed config with the seed in place of {seed} in all texts, such as paths of runs of the same seed."""
    if isinstance(config, str):
        return config.replace("{seed}", str(seed))
    if isinstance(config, Namespace):
        return _namespace(**{name: with_seed(value, seed) for name, value in vars(config).items()})
    if isinstance(config, dict):
        return {name: with_seed(value, seed) for name, value in config.items()}
    return [with_seed(value, seed) for value in config] if isinstance(config, list) else config


def without_missing(config: Any) -> tuple[Any, list[str]]:
    """Return a parsed config without the files of other runs that are not there yet, and which they are."""
    if isinstance(config, list):
        made = [without_missing(value) for value in config]
        return [value for value, _ in made], [name for _, names in made for name in names]
    if not isinstance(config, Namespace):
        return config, []
    left: dict[str, Any] = {}
    missing: list[str] = []
    for name, value in vars(config).items():
        if name in _OTHER_RUNS and isinstance(value, str) and not Path(value).exists():
            left[name] = None
            missing.append(value)
        else:
            left[name], more = without_missing(value)
            missing += more
    return _namespace(**left), missing
