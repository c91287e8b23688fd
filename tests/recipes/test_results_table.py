"""scripts/results_table.py puts finished runs into the README, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from rescompress.errors import InputError
from rescompress.lightning.results import Result
from scripts import results_table as script

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
def runs(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "runs"


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


def test_several_test_sizes_give_a_matrix_and_a_heat_map(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    mixed = replace(RUN, config="mixed", metrics={"test/accuracy@14": 0.8, "test/accuracy@28": 0.9})

    write(runs, mixed, replace(mixed, config="native", metrics={"test/accuracy@14": 0.3, "test/accuracy@28": 0.92}))
    text = table_of(runs, monkeypatch)

    assert "| mixed | 28 x 28 | 80.00 | 90.00 |" in text
    assert "![scores of each config at each test size](sizes_small.svg)" in text
    assert (runs.parent / "sizes_small.svg").read_text().startswith("<?xml")


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
