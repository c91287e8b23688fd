"""scripts/results_table.py puts finished runs into the README, and nothing else."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lightning")

from rescompress.errors import InputError
from rescompress.lightning import RecipeCLI
from rescompress.lightning.results import FILE, Result
from scripts import results_rows
from scripts import results_table as script
from tests.lightning.tiny_runs import CONFIG, at_home, cli
from tests.lightning.tiny_runs import write as write_config

__all__ = ["at_home"]

pytestmark = pytest.mark.filterwarnings("ignore")

RUN = Result(
    recipe="small",
    config="resnet",
    seed=0,
    command="python recipes/small.py fit --config resnet.yaml",
    date="2026-11-21T12:00:00+00:00",
    finished=True,
    epochs=10,
    steps=4680,
    seconds=300.0,
    model="recipes.small_models:small_resnet",
    spec=None,
    deploy=None,
    train_size=(28, 28),
    test_size=(28, 28),
    metrics={"test/accuracy": 0.91},
    macs=9_280_000,
    parameters=77_850,
    cost={"step_ms": 20.4, "waited_share": 0.01},
    deployed_cost=None,
    processes=1,
    hardware={"cpu": "A CPU", "gpu": None, "threads": 1, "cores": 2},
    versions={"python": "3.11", "torch": "2.15"},
)
README = f"# Recipes\n\nby hand\n\n{script.BEGIN}\n\nold\n\n{script.END}\n\nthe end\n"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "README.md").write_text(README)
    monkeypatch.setattr(results_rows, "CONFIGS", tmp_path / "configs")
    return tmp_path / "runs"


def fit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> RecipeCLI:
    """Train by a command, which stands in the results."""
    monkeypatch.setattr(sys, "argv", ["recipes/tiny.py", "fit", *arguments])
    return cli("fit", *arguments)


def rows_in(text: str) -> dict[str, str]:
    """Return the seeds of each row of scores."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[0] == "config")
    scores = lines[lines.index(head) + 2 : next(at for at, line in enumerate(lines) if "hardware" in line)]
    return {line[0]: line[head.index("seeds")] for line in scores}


def write(runs: Path, *results: Result) -> None:
    for result in results:
        result.write(runs / result.recipe / result.config / f"seed{result.seed}")


def table_of(runs: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    readme = runs.parent / "README.md"
    monkeypatch.setattr("sys.argv", ["results_table.py", f"--runs={runs}", f"--out={readme}", *options])
    assert script.main() == 0
    return readme.read_text()


def test_seeds_are_one_row_with_mean_and_spread(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(runs, RUN, replace(RUN, seed=1, metrics={"test/accuracy": 0.93}))

    text = table_of(runs, monkeypatch)

    assert "| resnet | 92.00 | 91.00 to 93.00 | 0, 1 | 0.00928 | 0.078 M | 20 ms |" in text
    assert text.startswith("# Recipes\n\nby hand\n") and text.endswith("the end\n") and "old" not in text


def test_what_training_took_beside_other_work_can_be_left_out(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(runs, RUN)
    times = ("20 ms", "1.0 %", "5.0")

    table = table_of(runs, monkeypatch)
    assert all(f"| {cell} |" in table for cell in (*times, "91.00"))
    table = table_of(runs, monkeypatch, "--shared-machine")
    assert "| 91.00 |" in table and "shared their machine" in table
    assert not any(f"| {cell} |" in table for cell in times)


def test_skipped_images_are_told_of(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(runs, RUN, replace(RUN, seed=1, skipped={"train": 2, "val": 1}))

    assert "| resnet (3 unreadable images skipped) |" in table_of(runs, monkeypatch)


def test_other_options_are_another_row(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(RUN, seed=1, command=f"{RUN.command} --seed_everything 1 --trainer.max_epochs 1")

    write(runs, RUN, replace(short, metrics={"test/accuracy": 0.5}))
    text = table_of(runs, monkeypatch)

    assert "| resnet | 91.00 | 91.00 to 91.00 | 0 |" in text
    assert "| resnet `--trainer.max_epochs=1` | 50.00 | 50.00 to 50.00 | 1 |" in text


def test_weights_to_begin_with_are_other_options(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(runs, replace(RUN, command=f"{RUN.command} --data.root elsewhere --model.initial_weights other.ckpt"))

    assert "| resnet `--model.initial_weights=other.ckpt` | 91.00 |" in table_of(runs, monkeypatch)


@pytest.mark.parametrize(
    ("how", "shown"), [("VmHWM", "500.00 MB"), ("cuda", "1.50 GB"), ("ru_maxrss", ""), ("none", "")]
)
def test_the_training_peak_is_what_training_added(
    how: str, shown: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = None if how == "none" else 1_500_000_000
    cost = {"training_peak_bytes": peak, "start_bytes": 1_000_000_000, "memory_how": how}
    write(runs, replace(RUN, cost=cost))

    text = table_of(runs, monkeypatch)

    assert f"| 0.078 M |  | {shown} |  |" in text
    assert ("(`VmHWM` minus `start_bytes`)" in text) == (how == "VmHWM")


def test_the_number_of_devices_is_shown(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = {"gpu": "A GPU", "machines": 2}
    write(runs, replace(RUN, hardware=hardware, processes=8), replace(RUN, config="other"))

    text = table_of(runs, monkeypatch)

    assert "| 8 x A GPU, on 2 machines |" in text
    assert "| A CPU, 1 of 2 cores |" in text


def test_of_one_seed_the_last_run_counts(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RUN.write(runs / "first")
    replace(RUN, date="2026-11-22T12:00:00+00:00", metrics={"test/accuracy": 0.95}).write(runs / "again")

    assert "| resnet | 95.00 | 95.00 to 95.00 | 0 |" in table_of(runs, monkeypatch)
    assert "done again: small/resnet seed 0" in capsys.readouterr().err


def test_unfinished_and_broken_runs_are_left_out(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(runs, RUN, replace(RUN, config="killed", finished=False))
    (runs / "small" / "broken").mkdir()
    (runs / "small" / "broken" / "results.json").write_text("{")

    text = table_of(runs, monkeypatch)

    said = capsys.readouterr().err
    assert "killed" not in text and "small/killed seed 0" in said
    assert "broken" not in text and "broken/results.json" in said


def test_low_bits_have_a_row_of_their_own(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"test/accuracy": 0.91, "deployed/accuracy": 0.9}
    write(runs, replace(RUN, metrics=metrics, deployed_cost={"weight_bytes": 80_000}))

    assert "| resnet, deployed in low bits (0.08 MB) | 90.00 | 90.00 to 90.00 |" in table_of(runs, monkeypatch)


def sized(config: str, scores: dict[int, float | None], **options: Any) -> Result:
    metrics = {f"test/accuracy@{size}": value for size, value in scores.items()}
    return replace(RUN, config=config, metrics=metrics, **options)


def test_several_test_sizes_give_a_matrix_and_a_heat_map(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    write(runs, sized("mixed", {14: 0.812, 28: 0.9}, train_sizes=(14, 21, 28)), sized("native", {14: 0.3, 28: 0.92}))

    text = table_of(runs, monkeypatch)

    assert "| config | trained at | at 14 | at 28 |" in text
    assert "| mixed | 14, 21, 28 | 81.20 | 90.00 |" in text
    assert "| native | 28 x 28 | 30.00 | 92.00 |" in text
    assert "![scores of each config at each test size](sizes_small_14_28.svg)" in text
    picture = (runs.parent / "sizes_small_14_28.svg").read_text()
    texts = re.findall(r"<text [^>]*>([^<]+)</text>", picture)
    assert texts[:4] == ["14", "28", "test size", "mixed"]
    assert [text for text in texts if re.fullmatch(r"\d+\.\d", text)] == ["81.2", "90.0", "30.0", "92.0"]


def test_each_set_of_test_sizes_has_a_table_and_a_picture(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    write(runs, sized("cnn", {14: 0.8, 28: 0.9}), sized("vit", {16: 0.7, 32: 0.8}), RUN)

    text = table_of(runs, monkeypatch)

    for row in ("at 14 | at 28", "cnn | 28 x 28 | 80.00 | 90.00", "at 16 | at 32", "vit | 28 x 28 | 70.00 | 80.00"):
        assert f"| {row} |" in text
    pictures = {path.name for path in runs.parent.glob("*.svg")}
    assert pictures == {"sizes_small_14_28.svg", "sizes_small_16_32.svg"}
    assert pictures == set(re.findall(r"\((\w+\.svg)\)", text))


def test_without_matplotlib_there_are_the_tables(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(runs, sized("cnn", {14: 0.8, 28: 0.9}), sized("vit", {16: 0.7, 32: 0.8}), RUN)

    text = table_of(runs, monkeypatch)

    (said,) = capsys.readouterr().err.splitlines()
    assert "pip install 'rescompress[report]'" in said
    assert "| cnn | 28 x 28 | 80.00 | 90.00 |" in text and "svg" not in text


def test_scores_that_are_not_finite_are_told_of(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    broken = {"test/accuracy": None, "test/accuracy@14": None, "test/accuracy@28": 0.9}
    whole = {"test/accuracy": 0.9, "test/accuracy@14": 0.8, "test/accuracy@28": 0.9}
    write(runs, replace(RUN, metrics=broken), replace(RUN, config="vit", metrics=broken))
    write(runs, replace(RUN, config="vit", seed=1, metrics=whole))

    text = table_of(runs, monkeypatch)

    assert "| resnet | not finite |  | 0 |" in text
    assert "| vit | 90.00 (1 of 2 not finite) | 90.00 to 90.00 | 0, 1 |" in text
    assert "| resnet | 28 x 28 | not finite | 90.00 |" in text
    assert "| vit | 28 x 28 | 80.00 (1 of 2 not finite) | 90.00 |" in text


def test_runs_without_a_score_are_left_out(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(runs, RUN, replace(RUN, config="other", metrics={"test/loss": 0.1}))

    assert rows_in(table_of(runs, monkeypatch)) == {"resnet": "0"}
    assert "no score test/accuracy or test/miou: small/other seed 0" in capsys.readouterr().err


OPTIONS = {"model.optimizer.lr": 0.003, "trainer.max_epochs": 10, "model.tune": "all", "model.spec": None}


def trained(seed: int, command: str = "--config resnet.yaml", **options: Any) -> Result:
    own = OPTIONS | {name.replace("__", "."): value for name, value in options.items()}
    return replace(RUN, seed=seed, command=f"python recipes/small.py fit {command}", options=own)


def test_runs_that_were_trained_otherwise_are_another_row_whatever_their_command(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"trainer__max_epochs": 1}
    write(runs, trained(0), trained(1), trained(2, "--config runs/a/config.yaml --folder b", **short))
    write(runs, trained(3, "--config resnet.yaml --trainer.max_epochs=1", **short))
    write(runs, trained(4, "--config runs/a/config.yaml", **short, model__optimizer__lr=0.5))

    assert rows_in(table_of(runs, monkeypatch)) == {
        "resnet": "0, 1",
        "resnet (trainer.max_epochs 1)": "2, 3",
        "resnet (model.optimizer.lr 0.5, trainer.max_epochs 1)": "4",
    }


def test_the_row_that_agrees_with_the_configs_file_has_its_name_alone(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = runs.parent / "configs" / "small"
    configs.mkdir(parents=True)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": "1e-2"}}
    (configs / "_base.yaml").write_text(yaml.safe_dump({"model": {"optimizer": sgd}, "trainer": {"max_epochs": 2}}))
    (configs / "resnet.yaml").write_text("{extends: _base.yaml, trainer: {max_epochs: 20}}")
    now = {"model__optimizer__lr": 0.01, "trainer__max_epochs": 20}
    write(runs, trained(0), trained(1), trained(2, "--config runs/a/config.yaml", **now))
    write(runs, trained(3, "--config runs/b/config.yaml", **(now | {"trainer__max_epochs": 3})))

    assert rows_in(table_of(runs, monkeypatch)) == {
        "resnet (model.optimizer.lr 0.003, trainer.max_epochs 10)": "0, 1",
        "resnet": "2",
        "resnet (trainer.max_epochs 3)": "3",
    }


def test_a_row_alone_is_not_taken_for_what_its_config_says(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs.parent / "configs" / "small").mkdir(parents=True)
    (runs.parent / "configs" / "small" / "vit.yaml").write_text("{trainer: {max_epochs: 20}}")
    write(
        runs, trained(0, "--config resnet.yaml --model.tune=norms_and_classifier", model__tune="norms_and_classifier")
    )
    write(runs, replace(trained(0, "--config runs/small/vit/seed0/config.yaml"), config="vit"))

    assert rows_in(table_of(runs, monkeypatch)) == {
        "resnet (model.tune norms_and_classifier)": "0",
        "vit (trainer.max_epochs 10)": "0",
    }


def test_runs_of_before_options_were_written_down_go_by_their_command(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ("python recipes/small.py fit --config resnet.yaml", "--trainer.max_epochs 1")
    old = [replace(RUN, seed=1), replace(RUN, seed=2, command=" ".join(config))]
    write(runs, trained(0), *old, trained(3, "--config resnet.yaml --trainer.max_epochs=1", trainer__max_epochs=1))
    for one in old:  # as they were
        path = runs / "small" / "resnet" / f"seed{one.seed}" / FILE
        new = ("options", "train_sizes")
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in new})
        )

    assert rows_in(table_of(runs, monkeypatch)) == {
        "resnet": "0, 1",
        "resnet `--trainer.max_epochs=1`": "2",
        "resnet (trainer.max_epochs 1)": "3",
    }


def test_the_number_of_processes_tells_runs_apart(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(runs, trained(0), trained(1), replace(trained(2), processes=8))  # batches are of each process

    assert rows_in(table_of(runs, monkeypatch)) == {"resnet": "0, 1", "resnet (processes 8)": "2"}


BY_RECIPE = pytest.mark.usefixtures("at_home", "one_thread", "seeded")
"""For tests of what the runs of a recipe's command line write down for the table."""


@BY_RECIPE
def test_the_config_of_a_run_with_other_options_gives_the_row_of_that_run(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ("--config", write_config("half.yaml", CONFIG))
    fit(monkeypatch, *config, "--seed_everything=1")
    fit(monkeypatch, *config, "--trainer.max_steps=2", "--model.optimizer.init_args.lr=0.5", "--folder", "runs/a")
    fit(monkeypatch, "--config", "runs/a/config.yaml", "--folder", "runs/b", "--seed_everything=6")
    fit(monkeypatch, *config, "--ckpt_path", "runs/a/last.ckpt", "--folder", "runs/c")

    rows = rows_in(table_of(runs, monkeypatch))

    assert rows == {
        "half": "1",
        "half (model.optimizer.lr 0.5, trainer.max_steps 2)": "5, 6",
        "half (ckpt_path runs/a/last.ckpt)": "5",
    }


@BY_RECIPE
def test_seeds_that_begin_with_runs_of_their_own_are_one_row(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 1}}
    first = ("--config", write_config("first.yaml", {**short, "model": {**CONFIG["model"], "spec": None}}))
    model = {**CONFIG["model"], "initial_weights": "runs/tiny/first/seed{seed}/last.ckpt"}
    second = ("--config", write_config("second.yaml", {**short, "model": model}))
    for seed in ("1", "2"):
        fit(monkeypatch, *first, "--seed_everything", seed)
    fit(monkeypatch, *second, "--seed_everything=1")

    again = fit(monkeypatch, "--config=runs/tiny/second/seed1/config.yaml", "--seed_everything=2", "--folder=runs/b")

    assert again.model.hparams["initial_weights"] == "runs/tiny/first/seed2/last.ckpt"
    assert rows_in(table_of(runs, monkeypatch)) == {"first": "1, 2", "second": "1, 2"}


@BY_RECIPE
def test_a_run_whose_saved_config_has_its_seed_in_place_is_the_same_run(caplog: pytest.LogCaptureFixture) -> None:
    short = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 1}}
    first = write_config("first.yaml", {**short, "model": {**CONFIG["model"], "spec": None}})
    cli("fit", "--config", first, "--folder", "a")
    Path("a/last.ckpt").rename("weights5.ckpt")
    model = {**CONFIG["model"], "initial_weights": "weights{seed}.ckpt"}
    config = ("--config", write_config("second.yaml", {**short, "model": model}), "--folder", "b")
    cli("fit", *config)
    caplog.clear()
    saved = Path("b/config.yaml")
    assert "weights{seed}.ckpt" in saved.read_text()
    caplog.set_level("INFO")

    cli("test", *config)
    saved.write_text(saved.read_text().replace("{seed}", "5"))  # as it was written before
    cli("test", *config)

    assert caplog.text.count("wrote b/results.json") == 2


@BY_RECIPE
def test_the_name_of_a_run_tells_all_its_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("more").mkdir()
    write_config("base.yaml", CONFIG)
    half = ("--config", write_config("more/half.yaml", {"extends": "../base.yaml"}))
    fast = ("--config", write_config("fast.yaml", {"trainer": {"max_steps": 1}}))

    made = fit(monkeypatch, *half, *fast)
    again = fit(monkeypatch, "--config", "runs/tiny/half+fast/seed5/config.yaml")

    assert made.folder == again.folder == Path("runs/tiny/half+fast/seed5")
    assert Result.read(made.folder).config == again.config_name == "half+fast"


@BY_RECIPE
def test_a_later_test_adds_the_sizes_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = {"class_path": "rescompress.lightning.ResolutionSchedule"}
    sizes = {"sizes": [32, 16], "mode": "mixed", "level": "none"}
    trainer = {**CONFIG["trainer"], "max_steps": 2, "callbacks": [{**schedule, "init_args": sizes}]}
    config = ("--config", write_config("mixed.yaml", {**CONFIG, "trainer": trainer}), "--folder", "a")
    fit(monkeypatch, *config)
    first = Result.read("a")
    assert first.train_sizes == (16, 32)
    assert first.options is not None and first.options["trainer.callbacks.ResolutionSchedule.sizes"] == [32, 16]

    replace(first, train_sizes=None, options=None).write("a")
    cli("test", *config)
    assert (Result.read("a").train_sizes, Result.read("a").options) == ((16, 32), None)

    replace(first, train_sizes=(8, 16)).write("a")
    cli("test", *config)
    assert (Result.read("a").train_sizes, Result.read("a").options) == ((8, 16), first.options)


def test_no_finished_run_is_said(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.mkdir()
    monkeypatch.setattr("sys.argv", ["results_table.py", f"--runs={runs}"])

    assert script.main() == 1
    assert "no finished run" in capsys.readouterr().err


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(InputError, match="no markers"):
        script.with_tables("# Recipes\n", "tables")
