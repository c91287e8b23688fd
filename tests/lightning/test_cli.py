"""The recipes' command line: one YAML is one run in its own folder, with config, checkpoint and results."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rescompress as rc
from rescompress.errors import InputError, NoWeightsError, RescompressWarning

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ProgressBar

from rescompress.lightning import Classifier, ImageData, Result, load_model, main
from rescompress.lightning._configs import with_extended
from rescompress.lightning.results import FILE
from tests.lightning.tiny import TINY, Tiny
from tests.lightning.tiny_runs import CONFIG, at_home, cli, write

__all__ = ["at_home"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("at_home", "one_thread", "seeded"),
]


def test_a_run_leaves_its_config_checkpoint_logs_and_results(caplog: pytest.LogCaptureFixture) -> None:
    cli("fit", "--config", write("half.yaml", CONFIG))
    folder = Path("runs/tiny/half/seed5")
    assert {"config.yaml", "last.ckpt", "cost.csv", FILE} <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("events.out.tfevents.*"))
    header = (folder / "logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "val/accuracy", "val/loss", "train/learning_rate"} <= set(header.split(","))

    result = Result.read(folder)
    assert (result.recipe, result.config, result.seed) == ("tiny", "half", 5)
    assert (result.finished, result.epochs, result.steps, result.processes) == (True, 1, 8, 1)
    assert result.model == TINY
    assert rc.Spec.from_dict(result.spec or {}) == rc.Spec.of(rc.StemResize(scale=0.5))
    assert set(result.metrics) == {"val/loss", "val/accuracy", "test/loss", "test/accuracy"}
    model = load_model(folder / "last.ckpt")
    images, labels = zip(*((batch.images, batch.labels) for batch in Tiny(seed=5).batches("test")), strict=True)
    accuracy = (model(torch.cat(images)).argmax(1) == torch.cat(labels)).float().mean()
    assert result.metrics["test/accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    assert result.parameters == sum(one.numel() for one in model.parameters())
    assert result.macs == rc.measure(model, torch.rand(1, 3, 32, 32), latency=False, peak_memory=False).macs
    assert result.versions["torch"] == torch.__version__
    assert result.test_size == (32, 32)
    assert {"step_ms", "images_per_s", "waited_share", "training_peak_bytes"} <= result.cost.keys()
    assert result.command == "python recipes/tiny.py"
    assert result.seconds > 0

    # The module that LightningCLI made comes back from the file alone, with its optimizer.
    torch.load(folder / "last.ckpt", weights_only=True)
    loaded = Classifier.load_from_checkpoint(folder / "last.ckpt").eval()
    torch.testing.assert_close(loaded.model(images[0]), model(images[0]), rtol=0, atol=0)
    assert isinstance(loaded.configure_optimizers(), torch.optim.SGD)
    assert loaded.hparams["seed"] == 5

    # The same command once more: nothing is left to train.
    caplog.set_level("INFO")
    weights = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    cli("fit", "--config", "half.yaml")
    assert "going on from runs/tiny/half/seed5/last.ckpt, step 8" in caplog.text
    again = Result.read(folder)
    assert (again.steps, again.metrics["test/accuracy"]) == (8, result.metrics["test/accuracy"])
    torch.testing.assert_close(
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"], weights, rtol=0, atol=0
    )

    # `test` writes the results of the checkpoint.
    (folder / FILE).unlink()
    cli("test", "--config", "half.yaml")
    tested = Result.read(folder)
    assert (tested.steps, tested.finished, tested.seconds) == (8, True, pytest.approx(again.seconds))
    assert tested.metrics == again.metrics == result.metrics

    # What is put away does not come back.
    cli("fit", "--config", "half.yaml", "--fresh", "--trainer.max_epochs", "2")
    assert Result.read(folder).steps == 16


def test_a_run_that_its_own_callback_stops_is_finished() -> None:
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 100.0}}
    trainer = {**CONFIG["trainer"], "max_epochs": 9, "callbacks": [stop]}
    config = ("fit", "--config", write("early.yaml", {**CONFIG, "trainer": trainer}), "--folder", "a")
    cli(*config)
    first = Result.read("a")
    assert (first.finished, first.epochs) == (True, 2)

    cli(*config)  # nothing is left to train
    again = Result.read("a")
    assert (replace(again, cost={}), again.cost["step_ms"]) == (replace(first, cost={}), first.cost["step_ms"])

    cli(*config, "--trainer.max_time", "00:00:00:00", "--fresh")
    assert not Result.read("a").finished


def test_extends_belongs_into_a_config() -> None:
    write("base.yaml", CONFIG)
    write("three.yaml", {"extends": "base.yaml", "trainer": {"max_epochs": 3}})
    with pytest.raises(InputError, match="--extends belongs into a config"):
        cli("fit", "--config", "base.yaml", "--extends", "three.yaml")
    assert with_extended(["--conf", "three.yaml"]) == ["--config", "base.yaml", "--config", "three.yaml"]


def test_a_config_builds_on_another_one() -> None:
    write("_base.yaml", CONFIG)
    write(
        "quarter.yaml",
        {"extends": "_base.yaml", "model": {"spec": {"steps": [{"kind": "stem_resize", "scale": 0.25}]}}},
    )
    Path("more").mkdir()
    write("more/three.yaml", {"extends": "../quarter.yaml", "trainer": {"max_epochs": 3}})
    made = cli("fit", "--config", "more/three.yaml", "--trainer.fast_dev_run", "1", "--trainer.max_epochs=4")
    assert made.config_name == "three"
    assert made.model.spec == rc.Spec.of(rc.StemResize(scale=0.25))
    assert made.config["fit"]["trainer"]["max_epochs"] == 4
    assert isinstance(made.model.loss, torch.nn.CrossEntropyLoss)

    assert with_extended(["fit", "--config=more/three.yaml", "--x", "1"]) == [
        *["fit", "--config", "more/../_base.yaml"],
        *["--config", "more/../quarter.yaml", "--config", "more/three.yaml", "--x", "1"],
    ]
    write("loop.yaml", {"extends": "loop.yaml"})
    with pytest.raises(InputError, match=r"loop\.yaml extends itself"):
        with_extended(["--config", "loop.yaml"])
    write("lost.yaml", {"extends": "none.yaml"})
    with pytest.raises(InputError, match=r"there is no config lots\.yaml; did you mean 'lost\.yaml'\?"):
        with_extended(["--config", "lots.yaml"])
    with pytest.raises(InputError, match=r"there is no config none\.yaml, which .*lost\.yaml extends"):
        with_extended(["--config", "lost.yaml"])


def test_a_run_without_training_tests_what_another_run_of_its_seed_left() -> None:
    original = {**CONFIG["model"], "spec": None}
    folder = ["--folder", "runs/original/seed5"]
    cli("fit", "--config", write("original.yaml", {**CONFIG, "model": original}), *folder, "--trainer.max_epochs", "2")
    write(
        "untrained.yaml",
        {**CONFIG, "model": {**CONFIG["model"], "initial_weights": "runs/original/seed{seed}/last.ckpt"}},
    )
    made = cli("fit", "--config", "untrained.yaml", "--trainer.max_epochs", "0")
    result = Result.read("runs/tiny/untrained/seed5")
    assert (result.finished, result.epochs, result.steps) == (True, 0, 0)
    assert result.metrics.keys() >= {"test/loss", "test/accuracy"}
    weights = load_model("runs/original/seed5/last.ckpt").state_dict()
    torch.testing.assert_close(made.model.model.state_dict(), weights, rtol=0, atol=0)


def test_a_dry_run_does_without_what_other_runs_leave() -> None:
    model = {**CONFIG["model"], "initial_weights": "runs/a/seed{seed}/last.ckpt"}
    distill = {"class_path": "rescompress.lightning.Distill", "init_args": {"teacher": "runs/b/last.ckpt"}}
    trainer = {**CONFIG["trainer"], "callbacks": [distill]}
    write("distilled.yaml", {**CONFIG, "model": model, "trainer": trainer})
    with pytest.warns(RescompressWarning) as told:
        cli("fit", "--config", "distilled.yaml", "--trainer.fast_dev_run", "1")
    for path in ("runs/a/seed5/last.ckpt", "runs/b/last.ckpt"):
        assert any(f"there is no file {path}: this dry run does without it" in str(one.message) for one in told)
    with pytest.raises(InputError, match=r"there is no weights file runs/a/seed5/last.ckpt.*do that one first"):
        cli("fit", "--config", "distilled.yaml")


def test_a_dry_run_does_without_pretrained_weights_that_cannot_be_had() -> None:
    """With the teacher that the original is, too; timm knows of no weights of this network."""
    distill = {"class_path": "rescompress.lightning.Distill"}
    trainer = {**CONFIG["trainer"], "callbacks": [distill]}
    model = {**CONFIG["model"], "model": "timm:mobilenetv4_conv_small_035", "pretrained": True}
    config = ("fit", "--config", write("tuned.yaml", {**CONFIG, "model": model, "trainer": trainer}))

    with pytest.warns(RescompressWarning, match="no pretrained weights for timm:mobile.*: this dry run begins"):
        cli(*config, "--trainer.fast_dev_run", "1")
    with pytest.raises(NoWeightsError, match="initial_weights: FILE"):
        cli(*config)


def test_weights_of_a_run_that_has_not_finished_are_told_of() -> None:
    original = {**CONFIG, "model": {name: value for name, value in CONFIG["model"].items() if name != "spec"}}
    first = ("fit", "--config", write("original.yaml", original), "--folder", "a")
    model = {**CONFIG["model"], "initial_weights": "a/last.ckpt"}
    second = ("fit", "--config", write("child.yaml", {**CONFIG, "model": model}), "--trainer.max_epochs", "0")

    cli(*first, "--trainer.limit_train_batches", "0.5")
    with pytest.warns(RescompressWarning, match="the run that a/last.ckpt is of has not finished"):
        cli(*second, "--folder", "b")
    cli(*first, "--fresh")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cli(*second, "--folder", "c")

    assert not [one for one in told if "has not finished" in str(one.message)]


def test_files_that_were_skipped_are_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiny, "skipped", property(lambda data: {"train": 2}))

    cli("fit", "--config", write("half.yaml", CONFIG), "--folder", "a", "--trainer.max_steps", "1")

    assert Result.read("a").skipped == {"train": 2}


def test_checkpoints_can_be_left_out() -> None:
    args = ("--folder", "a", "--trainer.enable_checkpointing", "false", "--trainer.max_steps", "1")
    cli("fit", "--config", write("half.yaml", CONFIG), *args)
    assert Result.read("a").steps == 1
    assert not Path("a/last.ckpt").exists()


def test_low_bits_are_tested_beside_the_model() -> None:
    model = {**CONFIG["model"], "options": {"width": 16}, "deploy": {"steps": [{"kind": "quantize", "scheme": "w8"}]}}
    cli("fit", "--config", write("w8.yaml", {**CONFIG, "model": model}), "--folder", "a")
    result = Result.read("a")
    assert {"test/accuracy", "deployed/accuracy"} <= result.metrics.keys()
    assert result.deployed_cost is not None
    assert 0 < result.deployed_cost["weight_bytes"] < 4 * result.parameters / 2
    assert result.deployed_cost["inference_images_per_s"] > 0
    assert result.cost["inference_images_per_s"] != result.deployed_cost["inference_images_per_s"]


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str, data_class: type[ImageData] = Tiny, **options: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(Classifier, data_class, args=[*arguments], **options)
        assert stop.value.code == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    config = ("--config", write("half.yaml", CONFIG))
    assert "num_classes=9, and the model is built with num_classes=4; set model.num_classes to 9" in fails(
        "fit", *config, "--data.classes", "9", "--folder", "a"
    )
    assert "there is no checkpoint b/last.ckpt" in fails("test", *config, "--folder", "b")
    assert "did you mean 'resnet50'" in fails("fit", *config, "--model.model", "timm:resnet5o")
    assert "begin with a file of weights by initial_weights: FILE" in fails(
        "fit", *config, "--model.model", "timm:mobilenetv4_conv_small_035", "--model.pretrained", "true"
    )
    assert "seed_everything must be in 0 to 2**32 - 1, got -1" in fails("fit", *config, "--seed_everything=-1")
    # Also where the config names the class, which jsonargparse makes by trying what fits.
    distill = {"class_path": "rescompress.lightning.Distill", "init_args": {"temperature": -1.0}}
    callbacks = ("--config", write("cold.yaml", {"trainer": {"callbacks": [distill]}}))
    assert "temperature must be" in fails("fit", *config, *callbacks)
    elpv = {"class_path": "rescompress.lightning.ELPV", "init_args": {"labels": "levels"}}
    data = ("--config", write("elpv.yaml", {**CONFIG, "data": elpv}))
    assert "did you mean 'level'" in fails("fit", *data, data_class=ImageData, subclass_mode_data=True)
    Path("c").mkdir()
    Path("c/last.ckpt").write_bytes(b"PK half")
    assert "c/last.ckpt is damaged" in (line := fails("fit", *config, "--folder", "c"))
    assert line.endswith("to begin anew, say --fresh")
    # A run goes on with the spec that it began with.
    cli("fit", *config, "--folder", "d", "--trainer.limit_train_batches", "1")
    assert "another compression: model was compressed by" in fails(
        "fit",
        *config,
        "--folder",
        "d",
        "--trainer.max_epochs",
        "2",
        "--model.spec",
        json.dumps({"steps": [{"kind": "stem_resize", "scale": 0.75}]}),
    )


def test_processes_that_lose_each_other_point_to_the_error_that_made_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*args: Any, **options: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")

    monkeypatch.setattr(Classifier, "training_step", lost)
    with pytest.raises(SystemExit, match="1"):
        main(Classifier, Tiny, args=["fit", "--config", write("half.yaml", CONFIG), "--folder", "a"])
    assert "error: the processes have lost each other ([gloo" in capsys.readouterr().err

    monkeypatch.setattr(Classifier, "training_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error of the user's own code is not hidden
        main(Classifier, Tiny, args=["fit", "--config", "half.yaml", "--folder", "b"])


def test_wrong_options_are_named_without_a_page_of_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    config = ("--config", write("half.yaml", CONFIG))
    typo = write("typo.yaml", {**CONFIG, "modle": {"num_classes": 3}})
    for arguments, named in (
        (("fit", *config, "--trainer.max_epoks", "3"), "did you mean 'trainer.max_epochs'?"),
        (("fit", *config, "--model.optimiser.class_path", "SGD"), "did you mean 'model.optimizer'?"),
        (("fit", *config, "--model.num_classes", "ten"), "model.num_classes"),
        (("fit", "--config", typo), "did you mean 'model.num_classes'?"),
        (("fitt", *config), "fitt"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(Classifier, Tiny, args=[*arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert named in said and "fit --help" in said
        assert len(said.splitlines()) < 10


def test_a_config_that_is_no_yaml_is_named_with_line_and_column() -> None:
    Path("base.yaml").write_text("trainer:\n  logger: {a: 1\n")
    write("top.yaml", {"extends": "base.yaml"})
    fault = "line 3, column 1: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'; mend it"

    for config, named in (("base.yaml", "base.yaml"), ("top.yaml", "base.yaml, which top.yaml extends")):
        with pytest.raises(InputError) as raised:
            cli("fit", "--config", config)
        assert str(raised.value) == f"cannot read the config {named}: {fault}"
    Path("base.yaml").write_bytes(b"a: \xff")
    with pytest.raises(InputError, match=r"cannot read the config base\.yaml, which top\.yaml extends: 'utf-8' codec"):
        cli("fit", "--config", "top.yaml")


def test_a_run_shows_a_progress_bar_unless_told_otherwise() -> None:
    quiet = CONFIG["trainer"]
    shown = {name: value for name, value in quiet.items() if name != "enable_progress_bar"}

    for options, bars in ((shown, 1), (quiet, 0)):
        trainer = cli("--config", write("bar.yaml", {**CONFIG, "trainer": options}), run=False).trainer
        assert sum(isinstance(callback, ProgressBar) for callback in trainer.callbacks) == bars
