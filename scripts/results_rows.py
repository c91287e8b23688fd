"""Which runs are one row of the results table: those of one config that were trained alike, but for the seed."""

import json
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from rescompress.errors import RescompressError, one_line
from rescompress.lightning._configs import merged
from rescompress.lightning._module import as_spec
from rescompress.lightning._options import that_train
from rescompress.lightning.results import Result

CONFIGS = Path(__file__).resolve().parents[1] / "recipes" / "configs"
SAME = (
    r"--config|-c|--seed_everything|--folder|--checkpoint_every",
    r"--data(\.init_args)?\.(root|workers)",
    r"--trainer\.(logger|enable_.*|accelerator)",
)
"""Options that do not change what is trained, as patterns."""


def leave_out(result: Result, why: str) -> None:
    """Say which run is in no row."""
    print(f"left out, {why}: {result.recipe}/{result.config} seed {result.seed}", file=sys.stderr)


def groups(done: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return the runs of each row, by recipe and the row's name, sorted by seed.

    Of several runs of a row with one seed, the last one counts.
    """
    by_config: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in sorted(done, key=lambda result: (result.seed, result.date)):
        by_config[result.recipe, result.config].append(result)
    found: dict[tuple[str, str], list[Result]] = {}
    for (recipe, config), runs in by_config.items():
        for name, row in rows_of(runs, of_files(recipe, config)).items():
            by_seed: dict[int, Result] = {}
            for result in sorted(row, key=lambda result: (result.seed, result.date)):
                if result.seed in by_seed:
                    leave_out(result, "done again")
                by_seed[result.seed] = result
            found[recipe, name] = list(by_seed.values())
    return dict(sorted(found.items()))


def rows_of(runs: list[Result], file: dict[str, Any]) -> dict[str, list[Result]]:
    """Return the runs of one config by the names of their rows; those that were trained alike are one.

    The row of those that agree with the config's file, or else of the most, has the config's name alone, unless all of
    its commands say otherwise.

    Args:
        runs: of one config.
        file: options that the config's file sets, by name; none where there is no such file.
    """
    rows: dict[str, list[Result]] = defaultdict(list)
    alike: dict[str, list[Result]] = defaultdict(list)
    for run in runs:
        if run.options is None:  # of before they were written down: the command is all that tells them apart
            given = " ".join(f"{name}={value}" for name, value in changed(run.command))
            rows[f"{run.config} `{given}`" if given else run.config].append(run)
        else:
            alike[json.dumps(_trained(run), sort_keys=True)].append(run)
    if not alike:
        return rows

    def order(group: list[Result]) -> tuple[int, bool, int]:
        return len(_unlike_file(group[0], file)), not any(map(as_it_is, group)), -len(group)

    plain = min(alike.values(), key=order)
    for group in alike.values():
        own, usual = _trained(group[0]), _trained(plain[0])
        names = {name for name in own.keys() | usual.keys() if own.get(name) != usual.get(name)}
        if not any(map(as_it_is, group)):
            names |= _unlike_file(group[0], file) | _told(group, file)
        by = ", ".join(f"{name} {_shown(own.get(name))}" for name in sorted(names))
        rows[f"{group[0].config} ({by})" if by else group[0].config] += group
    return rows


def _trained(run: Result) -> dict[str, Any]:
    """Return what tells how a run was trained."""
    options = run.options or {}
    return {name: value for name, value in options.items() if value is not None} | {"processes": run.processes}


def of_files(recipe: str, config: str) -> dict[str, Any]:
    """Return the options that a config's files and what they extend set; none where a file is not there."""
    paths = [CONFIGS / recipe / f"{name}.yaml" for name in config.split("+")]
    if not all(path.is_file() for path in paths):
        return {}
    try:
        found = merged(paths)
        spec = as_spec((found.get("model") or {}).get("spec"))
        return that_train(found) | {"model.spec": spec and spec.to_dict()}
    except (RescompressError, OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        print(f"the runs of {recipe}/{config} are not compared with its file: {one_line(error)}", file=sys.stderr)
        return {}


def _unlike_file(run: Result, file: dict[str, Any]) -> set[str]:
    """Return the names of the options that a config's file sets and the run did not have so."""
    options = run.options or {}
    known = {name for name in file if name in options or name.startswith("trainer.callbacks.")}
    known -= {name for name in known if any(one.startswith(f"{name}.") for one in options)}  # a class, at its defaults
    return {name for name in known if not _same(name, options.get(name), file[name])}


def _told(runs: list[Result], file: dict[str, Any]) -> set[str]:
    """Return the names of the options that the runs' commands set and the config's file does not."""
    given = {name.strip("-+").replace(".init_args", "") for run in runs for name, _ in changed(run.command)}
    options = _trained(runs[0]).keys() - file.keys()
    return {name for name in options if any(name == one or name.startswith(f"{one}.") for one in given)}


def _same(name: str, one: Any, other: Any) -> bool:
    if name.endswith("class_path"):  # a file may leave out the module
        return str(one).rpartition(".")[2] == str(other).rpartition(".")[2]
    try:
        return bool(one == other or float(one) == float(other))  # YAML takes 1e-3 for a text
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def as_it_is(run: Result) -> bool:
    """Whether a run's command gives its configs and nothing else that makes another run of them."""
    files = [Path(value) for name, value in options_in(run.command) if name in ("--config", "-c")]
    return not changed(run.command) and "+".join(file.stem for file in files) == run.config


def changed(command: str) -> list[tuple[str, str]]:
    """Return the options of a command that make another run of its config: all but where things lie and how it runs."""
    return [
        (name, value) for name, value in options_in(command) if not any(re.fullmatch(pattern, name) for pattern in SAME)
    ]


def options_in(command: str) -> list[tuple[str, str]]:
    """Return the options of a command and their values."""
    words = iter(shlex.split(command)[3:])  # behind python, the script and fit or test
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--fresh", "--no-fresh"):
            found.append((name, value if equals else next(words, "")))
    return found
