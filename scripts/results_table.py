"""Collect finished runs into the tables of recipes/README.md: python scripts/results_table.py [--runs FOLDER].

A run is a folder with a results.json, as the recipes write them. Runs of one config and different seeds are one row;
runs of it that were trained otherwise are a row of their own, whose name says by what. What stands between the two
markers in the README is replaced; the rest of it is written by hand.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rescompress.errors import InputError, RescompressError, one_line
from rescompress.lightning._configs import merged, that_train
from rescompress.lightning._module import as_spec
from rescompress.lightning.results import FILE, Result
from rescompress.measure.report import format_bytes

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "configs"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SCORES = ("test/accuracy", "test/miou")
SAME = (
    r"--config|-c|--seed_everything|--folder|--checkpoint_every",
    r"--data(\.init_args)?\.(root|workers)",
    r"--trainer\.(logger|enable_.*|accelerator)",
)
"""Options that do not change what is trained, as patterns."""


def main() -> int:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder that holds the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "recipes" / "README.md", help="file with the two markers")
    parser.add_argument(
        "--shared-machine",
        action="store_true",
        help="the runs were trained beside other work and tested again alone: leave out what the training took",
    )
    args = parser.parse_args()
    found = results(args.runs)
    done = []
    for result in found:
        if not result.finished:
            _leave_out(result, "not finished")
        elif not any(name.partition("@")[0] in SCORES for name in result.metrics):
            _leave_out(result, f"no score {' or '.join(SCORES)}")
        else:
            done.append(result)
    if not done:
        print(f"error: no finished run in {args.runs}; a run ends by writing {FILE}", file=sys.stderr)
        return 1
    try:
        written = with_tables(args.out.read_text(encoding="utf-8"), tables(done, args.out.parent, args.shared_machine))
    except (InputError, OSError) as error:
        print(f"error: {args.out}: {error}", file=sys.stderr)
        return 1
    part = args.out.with_name(f".{args.out.name}.part")
    part.write_text(written, encoding="utf-8")
    os.replace(part, args.out)
    print(f"wrote {len(done)} runs into {args.out}")
    return 0


def results(folder: Path) -> list[Result]:
    """Read every run in a folder; a broken file is named and left out."""
    found = []
    for path in sorted(folder.rglob(FILE)):
        try:
            found.append(Result.read(path))
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def _leave_out(result: Result, why: str) -> None:
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
                    _leave_out(result, "done again")
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


def with_tables(text: str, made: str) -> str:
    """Return the README with other tables.

    Raises:
        InputError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the file has no markers {BEGIN} and {END}; put them where the tables belong")
    return f"{before}{BEGIN}\n\n{made.strip()}\n\n{END}{after}"


def tables(done: list[Result], folder: Path, shared: bool = False) -> str:
    """Return tables of scores, of scores by test size and of circumstances for each recipe.

    Args:
        done: finished runs.
        folder: of the file that the tables are for; pictures go there.
        shared: the runs shared their machine with other work, so what the training took is left out.
    """
    all_rows = groups(done)
    draws = importlib.util.find_spec("matplotlib") is not None
    if not draws and any(sizes_matrices({config: runs}) for (_, config), runs in all_rows.items()):
        print("no pictures of the scores by test size: pip install 'rescompress[report]' for them", file=sys.stderr)
    parts = []
    if shared:
        parts.append(
            "The trainings shared their machine with other work, so how long they took is left out. Inference was "
            "timed afterwards, with the machine to itself, by the same command with `test` in place of `fit`."
        )
    if any(result.cost.get("memory_how") == "VmHWM" for result in done):
        parts.append(
            "On a CPU, the training peak is what training added to the memory of the process: the highest minus that "
            "before the first step (`VmHWM` minus `start_bytes`)."
        )
    for recipe in sorted({result.recipe for result in done}):
        rows = {config: runs for (of, config), runs in all_rows.items() if of == recipe}
        scores = _scores(rows, TIMES_OF_TRAINING if shared else ())
        parts.append(f"## {recipe}\n\n{scores}\n\n{_matrices(rows, folder, recipe, draws)}{_circumstances(rows)}")
    return "\n\n".join(parts)


def _scores(rows: dict[str, list[Result]], left_out: tuple[str, ...]) -> str:
    shown = {name: cell for name, cell in COLUMNS.items() if name not in left_out}
    head = ["config", "score, mean", "spread", *shown]
    table = []
    for config, runs in rows.items():
        table.append([_named(config, runs), *_mean_and_spread(runs, "test/"), *(cell(runs) for cell in shown.values())])
        deployed = _mean_and_spread(runs, "deployed/")
        if deployed[0]:
            size = (runs[0].deployed_cost or {}).get("weight_bytes")
            note = f"{config}, deployed in low bits" + ("" if size is None else f" ({size / 1e6:.2f} MB)")
            table.append([note, *deployed, *[""] * len(shown)])
    return _markdown(head, table)


def _named(config: str, runs: list[Result]) -> str:
    """Return a row's name, with the number of images that its runs could not read."""
    skipped = max(sum((run.skipped or {}).values()) for run in runs)
    return f"{config} ({skipped} unreadable images skipped)" if skipped else config


def _mean_and_spread(runs: list[Result], split: str) -> tuple[str, str]:
    values = [_score(run, split) for run in runs if _has_score(run, split)]
    finite = [value for value in values if value is not None]
    return _mean(values), f"{min(finite):.2f} to {max(finite):.2f}" if finite else ""


def _mean(values: list[float | None]) -> str:
    """Return the mean of the finite scores, and how many there are else."""
    finite = [value for value in values if value is not None]
    if not finite:
        return "not finite" if values else ""
    lost = len(values) - len(finite)
    return f"{statistics.mean(finite):.2f}" + (f" ({lost} of {len(values)} not finite)" if lost else "")


def _score(result: Result, split: str = "test/", size: str = "") -> float | None:
    """Return accuracy or mean IoU of the test in percent; None where it is not finite, or there is none."""
    value = next((result.metrics[name] for name in _score_names(split, size) if name in result.metrics), None)
    return None if value is None else 100 * value


def _has_score(result: Result, split: str = "test/", size: str = "") -> bool:
    return any(name in result.metrics for name in _score_names(split, size))


def _score_names(split: str, size: str) -> list[str]:
    return [name.replace("test/", split) + size for name in SCORES]


def _training_peak(runs: list[Result]) -> str:
    """Return what training took: on a CPU, without the libraries that the process held before."""
    values = []
    for run in runs:
        peak, start, how = (run.cost.get(name) for name in ("training_peak_bytes", "start_bytes", "memory_how"))
        if peak is None or how == "ru_maxrss":  # the highest since the process began, whatever it did
            continue
        if how != "VmHWM":
            values.append(peak)
        elif start is not None:
            values.append(peak - start)
    return format_bytes(statistics.median(values)) if values else ""


def _median(runs: list[Result], column: str, shown: str, factor: float = 1) -> str:
    values = [run.cost[column] for run in runs if isinstance(run.cost.get(column), int | float)]
    return shown.format(statistics.median(values) * factor) if values else ""


COLUMNS: dict[str, Callable[[list[Result]], str]] = {
    "seeds": lambda runs: ", ".join(str(run.seed) for run in runs),
    "GMACs": lambda runs: "" if runs[0].macs is None else f"{runs[0].macs / 1e9:.4g}",
    "parameters": lambda runs: f"{runs[0].parameters / 1e6:.3f} M",
    "training step": lambda runs: _median(runs, "step_ms", "{:.0f} ms"),
    "training peak": lambda runs: _training_peak(runs),
    "inference, images/s": lambda runs: _median(runs, "inference_images_per_s", "{:.0f}"),
    "waited": lambda runs: _median(runs, "waited_share", "{:.1f} %", 100),
    "minutes": lambda runs: f"{statistics.median(run.seconds for run in runs) / 60:.1f}",
}
"""Behind the scores: the cell of a row of runs."""

TIMES_OF_TRAINING = ("training step", "waited", "minutes")


def sizes_matrices(rows: dict[str, list[Result]]) -> dict[tuple[int, ...], dict[str, list[list[float | None]]]]:
    """Return the scores of the rows that were tested at several sizes, by all those sizes and the row's name.

    They are in percent, a list for each size with that of each run.
    """
    found: dict[tuple[int, ...], dict[str, list[list[float | None]]]] = defaultdict(dict)
    for config, runs in rows.items():
        names = {name.partition("@") for run in runs for name in run.metrics}
        sizes = tuple(sorted({int(size) for metric, at, size in names if at and metric in SCORES}))
        if len(sizes) > 1:
            found[sizes][config] = [
                [_score(run, size=f"@{size}") for run in runs if _has_score(run, size=f"@{size}")] for size in sizes
            ]
    return dict(sorted(found.items()))


def _matrices(rows: dict[str, list[Result]], folder: Path, recipe: str, draws: bool) -> str:
    text = ""
    for sizes, scores in sizes_matrices(rows).items():
        table = [[config, _trained_at(rows[config]), *map(_mean, values)] for config, values in scores.items()]
        text += "Scores by test size (mean over the seeds):\n\n"
        text += _markdown(["config", "trained at", *(f"at {size}" for size in sizes)], table) + "\n\n"
        if draws:
            picture = folder / f"sizes_{recipe}_{'_'.join(map(str, sizes))}.svg"
            draw(scores, sizes, picture)
            text += f"![scores of each config at each test size]({picture.name})\n\n"
    return text


def _trained_at(runs: list[Result]) -> str:
    """Return the size of the images that a row's model was trained on, or the sides where there were several."""
    sides = next((run.train_sizes for run in runs if run.train_sizes is not None), None)
    if sides is None:
        return _sides(runs[0].train_size)
    return _sides((sides[0], sides[0])) if len(sides) == 1 else ", ".join(map(str, sides))


def draw(scores: dict[str, list[list[float | None]]], sizes: tuple[int, ...], path: Path) -> None:
    """Draw the mean scores of configs at sizes as a heat map into an SVG file; needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rescompress"  # the same file for the same numbers
    matplotlib.rcParams["svg.fonttype"] = "none"  # numbers that can be searched and copied
    from matplotlib import pyplot

    means = [
        [statistics.mean(finite) if (finite := [one for one in at if one is not None]) else float("nan") for at in row]
        for row in scores.values()
    ]
    figure, axes = pyplot.subplots(figsize=(2 + 0.9 * len(sizes), 1.2 + 0.4 * len(scores)), layout="constrained")
    image = axes.imshow(means, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_xlabel("test size")
    for y, row in enumerate(means):
        for x, value in enumerate(row):
            if value == value:  # not NaN
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="white", fontsize=8)
    figure.colorbar(image, label="score, %")
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    part.replace(path)


def _circumstances(rows: dict[str, list[Result]]) -> str:
    head = ["config", "command of one seed", "hardware", "versions", "date"]
    table = []
    for config, runs in rows.items():
        run = next(filter(as_it_is, runs), runs[0])
        table.append([config, f"`{run.command}`", _hardware(run), _versions(run.versions), run.date[:10]])
    return _markdown(head, table)


def _hardware(run: Result) -> str:
    """Return what a run was trained on, each process having one device."""
    found = run.hardware
    name = found.get("gpu") or f"{found.get('cpu')}, {found.get('threads')} of {found.get('cores')} cores"
    machines = found.get("machines") or 1
    many = f"{run.processes} x " if run.processes > 1 else ""
    return f"{many}{name}{f', on {machines} machines' if machines > 1 else ''}"


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "lightning", "timm") if name in found)


def _sides(size: tuple[int, int] | None) -> str:
    return "" if size is None else f"{size[0]} x {size[1]}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
