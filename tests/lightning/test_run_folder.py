"""The folder of a run: what a later start goes on with, what it refuses, and what it writes there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import rescompress as rc
from rescompress.errors import InputError

pytest.importorskip("lightning")

from rescompress.lightning import Result
from rescompress.lightning._folder import RunFolder
from rescompress.lightning.results import FILE
from tests.lightning.tiny import Stopped
from tests.lightning.tiny_runs import CONFIG, at_home, cli, write

__all__ = ["at_home"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("at_home", "one_thread", "seeded"),
]


def test_the_saved_config_is_the_same_run() -> None:
    first = cli("fit", "--config", write("half.yaml", CONFIG), "--folder", "a", "--trainer.fast_dev_run", "1")
    assert not Path("a").exists()  # a dry run leaves nothing behind
    cli("fit", "--config", "half.yaml", "--folder", "a", "--trainer.limit_train_batches", "1")
    again = cli("fit", "--config", "a/config.yaml", "--folder", "b", "--trainer.fast_dev_run", "1")
    assert again.model.spec == first.model.spec == rc.Spec.of(rc.StemResize(scale=0.5))
    assert isinstance(again.model.loss, torch.nn.CrossEntropyLoss)
    assert again.model.loss.label_smoothing == 0.1
    assert again.datamodule.seed == again.model.seed == 5
    saved = yaml.safe_load(Path("a/config.yaml").read_text())
    assert saved["model"]["spec"] == CONFIG["model"]["spec"]


def test_the_saved_config_goes_on_with_the_run_in_its_folder() -> None:
    cli("fit", "--config", write("half.yaml", CONFIG))
    folder = Path("runs/tiny/half/seed5")
    date = Result.read(folder).date

    again = cli("fit", "--config", str(folder / "config.yaml"))

    assert (again.config_name, again.folder) == ("half", folder)
    assert Result.read(folder).date == date  # nothing was left to train
    assert list(Path("runs/tiny").iterdir()) == [Path("runs/tiny/half")]


def test_a_folder_keeps_to_the_options_that_its_run_was_begun_with() -> None:
    config = ("fit", "--config", write("half.yaml", CONFIG), "--folder", "a")
    cli(*config)
    first = Result.read("a")

    with pytest.raises(InputError, match=r"data.train_size was 32 and is 64, model.optimizer.lr was 0.01 and is 9.0; "):
        cli(*config, "--model.optimizer.init_args.lr", "9", "--data.train_size", "64")
    with pytest.raises(InputError, match=r"model.tune was all and is norms_and_classifier.*--folder.*--fresh"):
        cli(*config, "--model.tune", "norms_and_classifier")
    with pytest.raises(InputError, match=r"trainer.callbacks.Recalibrate.batches was None and is 3"):
        cli(*config, "--trainer.callbacks+=rescompress.lightning.Recalibrate", "--trainer.callbacks.batches=3")
    with pytest.raises(InputError, match=r"trainer.max_epochs was 1 and is 0"):
        cli(*config, "--trainer.max_epochs", "0")
    assert Result.read("a") == first

    cli(*config, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "3", "--checkpoint_every", "4")
    assert Result.read("a").steps == 16


def test_scores_of_another_checkpoint_are_not_the_runs(caplog: pytest.LogCaptureFixture) -> None:
    config = ("--config", write("half.yaml", CONFIG), "--trainer.limit_train_batches", "2")
    for folder, seed in (("a", "1"), ("b", "2")):
        cli("fit", *config, "--folder", folder, "--seed_everything", seed)
    first = Result.read("a")
    caplog.set_level("INFO")

    test = ("test", *config, "--folder", "a", "--seed_everything", "1")
    cli(*test, "--ckpt_path", "b/last.ckpt")
    assert "not written into a/results.json: they are of b/last.ckpt" in caplog.text
    cli(*test, "--data.test_size", "64")
    assert "other options: data.test_size was 32 and is 64" in caplog.text
    assert Result.read("a") == first

    cli(*test, "--ckpt_path", "a/last.ckpt")
    assert "wrote a/results.json" in caplog.text


def test_a_later_test_changes_scores_and_on_the_same_machine_the_cost_of_inference() -> None:
    config = ("--config", write("half.yaml", CONFIG), "--folder", "a")
    cli("fit", *config)
    first = Result.read("a")
    other = {"metrics": first.metrics | {"test/accuracy": -1.0}, "cost": dict.fromkeys(first.cost, -1)}
    elsewhere = replace(first, **other, hardware={"gpu": "A GPU"}, processes=8)
    for command in ("test", "fit"):
        elsewhere.write("a")
        cli(command, *config)
        assert Result.read("a") == replace(elsewhere, metrics=first.metrics)

    replace(first, **other).write("a")
    cli("test", *config)
    again = Result.read("a")
    measured = {name for name, value in again.cost.items() if value != -1}
    assert measured == {name for name in first.cost if name.startswith("inference_")}
    assert again.cost["inference_images_per_s"] > 0
    assert replace(again, cost={}) == replace(first, cost={})


def test_a_run_that_is_begun_anew_leaves_the_earlier_one_whole() -> None:
    config = ("fit", "--config", write("half.yaml", CONFIG))
    folder = Path("runs/tiny/half/seed5")
    cli(*config)
    first, events = Result.read(folder), {path.name for path in folder.glob("events.out.tfevents.*")}

    cli(*config, "--fresh", "--model.optimizer.init_args.lr", "0.02")

    assert Result.read(folder).date >= first.date
    assert not events & {path.name for path in folder.iterdir()}
    assert events <= {path.name for path in (folder / "earlier").iterdir()}
    assert Result.read(folder / "earlier") == first
    again = cli("fit", "--config", str(folder / "earlier" / "config.yaml"), "--trainer.max_epochs", "2")
    assert again.folder == folder / "earlier"
    assert Result.read(again.folder).steps == 2 * first.steps


def test_a_run_that_is_begun_from_another_ones_checkpoint_goes_on_with_its_own() -> None:
    config = ("fit", "--config", write("half.yaml", CONFIG), "--trainer.max_epochs")
    cli(*config, "1", "--folder", "a")
    begin = (*config, "2", "--folder", "b", "--ckpt_path", "a/last.ckpt")
    stop = {"class_path": "tests.lightning.tiny.Stop", "init_args": {"at": 12, "marker": "stopped"}}
    stopping = ("--config", write("stop.yaml", {"trainer": {"callbacks": [stop]}}))

    with pytest.raises(Stopped):
        cli(*begin, *stopping, "--checkpoint_every", "1")
    at = torch.load("b/last.ckpt", weights_only=True)["global_step"]
    again = cli(*begin, *stopping, "--checkpoint_every", "1")

    assert 8 < at <= 12
    assert again._earlier == at
    assert Result.read("b").steps == 16
    cli(*config, "3", "--folder", "a")
    with pytest.raises(InputError, match=r"in a has a checkpoint of its own and was not begun from b/last.ckpt; leave"):
        cli(*config, "4", "--folder", "a", "--ckpt_path", "b/last.ckpt")
    for own in ("b/last.ckpt", "b/earlier/last.ckpt"):
        with pytest.raises(InputError, match=f"--fresh puts {own} away; leave it out, or give another --folder"):
            cli(*begin[:-1], own, "--fresh")


def test_a_second_process_does_not_train_in_the_same_folder() -> None:
    config = ("fit", "--config", write("half.yaml", CONFIG), "--folder")
    with RunFolder("a").locked():
        with pytest.raises(InputError, match="another process trains in a; wait for its end, or give --folder"):
            cli(*config, "a")
        cli(*config, "b")  # another folder is free
    cli(*config, "a")
    with RunFolder("a").locked():  # a run that has ended, by an error too, gives its folder back
        pass


def test_a_checkpoint_of_another_model_is_refused() -> None:
    config = ("--config", write("half.yaml", CONFIG))
    cli("fit", *config, "--folder", "a", "--trainer.max_steps", "1")

    with pytest.raises(InputError, match=r"weights of another model than this tests\.lightning\.tiny:tiny_net: .* is "):
        cli("test", *config, "--folder", "b", "--ckpt_path", "a/last.ckpt", "--model.options", "{width: 6}")


def test_what_is_measured_on_another_machine_is_not_beside_the_training() -> None:
    config = ("--config", write("half.yaml", CONFIG), "--folder", "a")
    cli("fit", *config)
    checkpoint = torch.load("a/last.ckpt", weights_only=True)
    checkpoint["callbacks"]["LastCheckpoint"]["run"] |= {"hardware": {"gpu": "A GPU"}, "processes": 8}
    torch.save(checkpoint, "a/last.ckpt")
    Path("a", FILE).unlink()

    cli("test", *config)

    result, row = Result.read("a"), checkpoint["callbacks"]["CostMonitor"]["rows"][-1]
    assert (result.hardware, result.processes) == ({"gpu": "A GPU"}, 8)
    measured = ("inference_step_ms", "inference_images_per_s", "inference_peak_bytes")
    assert {name: result.cost[name] for name in measured} == {name: row[name] for name in measured}


def test_results_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="cannot read none"):
        Result.read("none")
    Path(FILE).write_text(json.dumps({"recipe": "small"}))
    with pytest.raises(InputError, match=r"results\.json is no results\.json of this version: KeyError"):
        Result.read(".")
