"""Collect finished runs into the tables of recipes/README.md: python scripts/results_table.py [--runs FOLDER].

A run is a folder with a results.json, as the recipes write them. Runs of one config and different seeds are one row;
runs of it that were trained otherwise are a row of their own, whose name says by what. What stands between the two
markers in the README is replaced; the rest of it is written by hand.
"""

import argparse
import importlib.util
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from rescompress.errors import InputError, WriteError  # noqa: E402
from rescompress.files import whole, write_whole  # noqa: E402
from rescompress.lightning.results import FILE, Result  # noqa: E402
from rescompress.measure.report import format_bytes  # noqa: E402
from scripts.results_rows import as_it_is, groups, leave_out  # noqa: E402

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SCORES = ("test/accuracy", "test/miou")


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
            leave_out(result, "not finished")
        elif not any(name.partition("@")[0] in SCORES for name in result.metrics):
            leave_out(result, f"no score {' or '.join(SCORES)}")
        else:
            done.append(result)
    if not done:
        print(f"error: no finished run in {args.runs}; a run ends by writing {FILE}", file=sys.stderr)
        return 1
    try:
        made = tables(done, args.out.parent, args.shared_machine)
        write_whole(args.out, with_tables(args.out.read_text(encoding="utf-8"), made))
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (InputError, OSError) as error:
        print(f"error: {args.out}: {error}", file=sys.stderr)
        return 1
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
    with whole(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})
    pyplot.close(figure)


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
