"""Collect finished runs into the tables of recipes/README.md: python scripts/results_table.py [--runs FOLDER].

A run is a folder with a results.json, as the recipes write them. Runs of one config and different seeds are one row.
What stands between the two markers in the README is replaced; the rest of it is written by hand.
"""

import argparse
import os
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from rescompress.errors import InputError
from rescompress.lightning.results import FILE, Result
from rescompress.measure.report import format_bytes

ROOT = Path(__file__).resolve().parents[1]
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
    done = [result for result in found if result.finished]
    for result in found:
        if not result.finished:
            print(f"left out, not finished: {result.recipe}/{result.config} seed {result.seed}", file=sys.stderr)
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


def groups(done: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return the runs of each row, by recipe and config, sorted by seed.

    Runs with other options than their config's are a row of their own. Of several with one seed, the last one counts.
    """
    found: dict[tuple[str, str], dict[int, Result]] = defaultdict(dict)
    for result in sorted(done, key=lambda result: (result.seed, result.date)):
        options = " ".join(changed(result.command))
        row = found[result.recipe, f"{result.config} `{options}`" if options else result.config]
        if result.seed in row:
            print(f"left out, done again: {result.recipe}/{result.config} seed {result.seed}", file=sys.stderr)
        row[result.seed] = result
    return {key: list(row.values()) for key, row in sorted(found.items())}


def changed(command: str) -> list[str]:
    """Return the options of a command that make another run of its config: all but where things lie and how it runs."""
    words = iter(shlex.split(command)[3:])  # behind python, the script and fit or test
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--fresh", "--no-fresh"):
            continue
        value = value if equals else next(words, "")
        if not any(re.fullmatch(pattern, name) for pattern in SAME):
            found.append(f"{name}={value}")
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
    """Return a table of scores and one of circumstances for each recipe, and the matrix of sizes where there is one.

    Args:
        done: finished runs.
        folder: of the file that the tables are for; pictures go there.
        shared: the runs shared their machine with other work, so what the training took is left out.
    """
    all_rows = groups(done)
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
        parts.append(f"## {recipe}\n\n{scores}\n\n{_matrix(rows, folder, recipe)}{_circumstances(rows)}")
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
    values = [100 * value for run in runs if (value := _score(run, split)) is not None]
    return (f"{statistics.mean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}") if values else ("", "")


def _score(result: Result, split: str = "test/") -> float | None:
    """Return accuracy or mean IoU of the test, in [0, 1]."""
    names = (name.replace("test/", split) for name in SCORES)
    return next((value for name in names if (value := result.metrics.get(name)) is not None), None)


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


def sizes_matrix(rows: dict[str, list[Result]]) -> tuple[list[str], list[int], list[list[float | None]]]:
    """Return the configs that were tested at several sizes, those sizes, and the mean scores in percent."""
    by_config: dict[str, dict[int, list[float]]] = {}
    for config, runs in rows.items():
        found: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            for name, value in run.metrics.items():
                metric, at, size = name.partition("@")
                if at and metric in SCORES and value is not None:
                    found[int(size.partition("x")[0])].append(100 * value)
        if len(found) > 1:
            by_config[config] = found
    sizes = sorted({size for found in by_config.values() for size in found})
    scores = [
        [statistics.mean(found[size]) if size in found else None for size in sizes] for found in by_config.values()
    ]
    return list(by_config), sizes, scores


def _matrix(rows: dict[str, list[Result]], folder: Path, recipe: str) -> str:
    configs, sizes, scores = sizes_matrix(rows)
    if not configs:
        return ""
    trained = {config: rows[config][0].train_size for config in configs}
    table = [
        [config, _sides(trained[config]), *("" if value is None else f"{value:.2f}" for value in row)]
        for config, row in zip(configs, scores, strict=True)
    ]
    text = "Scores by test size (mean over the seeds):\n\n"
    text += _markdown(["config", "trained at", *(f"at {size}" for size in sizes)], table) + "\n\n"
    picture = folder / f"sizes_{recipe}.svg"
    draw(configs, sizes, scores, picture)
    return text + f"![scores of each config at each test size]({picture.name})\n\n"


def draw(configs: list[str], sizes: list[int], scores: list[list[float | None]], path: Path) -> None:
    """Draw the matrix as a heat map into an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rescompress"  # the same file for the same numbers
    from matplotlib import pyplot

    values = [[float("nan") if value is None else value for value in row] for row in scores]
    figure, axes = pyplot.subplots(figsize=(2 + 0.9 * len(sizes), 1.2 + 0.4 * len(configs)), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_yticks(range(len(configs)), configs)
    axes.set_xlabel("test size")
    for y, row in enumerate(scores):
        for x, value in enumerate(row):
            if value is not None:
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
        run = runs[0]
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
