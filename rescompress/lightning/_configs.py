"""Configs: those that build on other ones, name their seed or the files of other runs, and are saved with a run.

`extends: other.yaml` is relative to the file; chains are allowed.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from rescompress.errors import InputError, one_line
from rescompress.references.wanted import nearest

_namespace: Any = Namespace  # its constructor has no types

SAVED = "config.yaml"

_OTHER_RUNS = ("initial_weights", "teacher")
"""Options that name what another run leaves."""

_RUN = "# run: "


def with_extended(arguments: list[str]) -> list[str]:
    """Return the arguments with a --config for each file that a config extends, before its own.

    Raises:
        InputError: a config is not there, is no YAML or extends itself; or --extends is given.
    """
    found: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, _, value = argument.partition("=")
        if flag.startswith("--e") and "--extends".startswith(flag):  # argparse takes the beginning of a name as well
            raise InputError("--extends belongs into a config; here, give --config twice, the second goes on top")
        if flag != "-c" and not (flag.startswith("--co") and "--config".startswith(flag)):
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
    by = f", which {extending[-1]} extends" if extending else ""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = nearest(path.name, [one.name for one in path.parent.glob("*.yaml")])
        raise InputError(f"there is no config {path}{by}{hint}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the config {path}{by}: {_fault(error)}; mend it") from error
    except OSError:
        return [path]  # jsonargparse says what is wrong with it
    base = data.get("extends") if isinstance(data, dict) else None
    return [path] if base is None else [*_chain(path.parent / str(base), (*extending, path)), path]


def _fault(error: UnicodeDecodeError | yaml.YAMLError) -> str:
    """Return where a file is no YAML, and why."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark  # which counts from 0, and does not know the file's name
        why = ", ".join(one for one in (error.context, error.problem) if one)
        return f"line {mark.line + 1}, column {mark.column + 1}: {why}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position + 1}: {error.reason}"
    return one_line(error)


def with_seed(config: Any, seed: int) -> Any:
    """Return a parsed config with the seed in place of {seed} in all texts, such as paths of runs of the same seed."""
    if isinstance(config, str):
        return config.replace("{seed}", str(seed))
    if isinstance(config, Namespace):
        return _namespace(**{name: with_seed(value, seed) for name, value in vars(config).items()})
    if isinstance(config, dict):
        return {name: with_seed(value, seed) for name, value in config.items()}
    return [with_seed(value, seed) for value in config] if isinstance(config, list) else config


def seedless(path: str, seed: int) -> str:
    """Return the path of another run's file with {seed} in place of the seed, where that run is of the same one."""
    return re.sub(rf"seed{seed}(?!\d)", "seed{seed}", path)


def other_runs(config: Any) -> list[str]:
    """Return the files of other runs that a parsed config names."""
    if isinstance(config, list):
        return [name for one in config for name in other_runs(one)]
    if not isinstance(config, Namespace):
        return []
    own = [value for name, value in vars(config).items() if name in _OTHER_RUNS and isinstance(value, str)]
    return own + [name for value in vars(config).values() for name in other_runs(value)]


def without(config: Any, path: str) -> Any:
    """Return a parsed config that does not name a file of another run."""
    if isinstance(config, list):
        return [without(one, path) for one in config]
    if not isinstance(config, Namespace):
        return config
    kept = {name: None if name in _OTHER_RUNS and value == path else value for name, value in vars(config).items()}
    return _namespace(**{name: without(value, path) for name, value in kept.items()})


def run_name(files: list[Path]) -> str:
    """Return the name of the run of some configs: their own, joined by +.

    A config that is saved in a run's folder sets everything, so that run's name stands for it and for all before it.

    Args:
        files: that were read, each behind those that it extends.
    """
    names: list[str] = []
    rest = list(files)
    while rest:
        path = rest[-1]
        whole = saved_name(path)
        names.insert(0, whole or path.stem)
        if whole:
            break
        del rest[-len(_chain(path, ())) :]
    return "+".join(names) or "default"


def merged(files: Iterable[Path]) -> dict[str, Any]:
    """Return what configs and those that they extend say, the later ones on top, as plain data; no defaults.

    Raises:
        InputError: one is not there or is no YAML.
        OSError: one cannot be read.
    """
    found: dict[str, Any] = {}
    for path in files:
        for one in _chain(path, ()):
            data = yaml.safe_load(one.read_text(encoding="utf-8"))
            found = _over(found, data if isinstance(data, dict) else {})
    return found


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    return base | {
        name: _over(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in top.items()
    }


def saved(text: str, run: str) -> str:
    """Return what config.yaml of a run's folder holds: the dumped config, and the run's name in its first line."""
    return f"{_RUN}{run}\n{text}"


def saved_name(path: Path) -> str | None:
    """Return the name of the run in whose folder a config lies; None for any other config."""
    if path.name != SAVED or not path.is_file():
        return None
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.removeprefix(_RUN) if first.startswith(_RUN) else None
