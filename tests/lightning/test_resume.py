"""A run that is ended at any moment and started again reaches the weights of one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning")

from rescompress.lightning import Classifier, RecipeCLI, Result, recovery
from tests.lightning.tiny import TINY, Stopped, Tiny

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "seeded")]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("tiny.py")


def config(*stops: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    """Everything that a run draws or keeps: dropout, batch norm, momentum, a schedule, augmentation, an order."""
    callbacks = [{"class_path": "tests.lightning.tiny.Stop", "init_args": stop} for stop in stops]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return {
        "seed_everything": 7,
        "checkpoint_every": 3,
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "callbacks": callbacks, **quiet, **trainer},
        "model": {
            "model": TINY,
            "num_classes": 4,
            "input_size": 32,
            "options": {"dropout": 0.3},
            "spec": {"steps": [{"kind": "stem_resize", "scale": 0.5}]},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
            "schedule": {"class_path": "rescompress.lightning.WarmupCosine", "init_args": {"warmup": 0.2}},
        },
    }


def run(path: Path, folder: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content))
    RecipeCLI(Classifier, Tiny, args=["fit", "--config", str(path), "--folder", str(folder)])


def ended_alike(one: Path, other: Path) -> None:
    first, second = (torch.load(path / "last.ckpt", weights_only=True) for path in (one, other))
    assert first["global_step"] == second["global_step"] > 0
    torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(
        first["optimizer_states"][0]["state"], second["optimizer_states"][0]["state"], rtol=0, atol=0
    )
    scores, again = (Result.read(path).metrics for path in (one, other))
    assert "val/loss" in scores and scores == again


@pytest.mark.parametrize(
    ("at", "where", "options"),
    [
        pytest.param(13, "step", {}, id="within an epoch"),
        pytest.param(2, "step", {}, id="before the first checkpoint"),
        pytest.param(16, "step", {}, id="at the last step of an epoch"),
        pytest.param(16, "validation", {}, id="in the validation"),
        pytest.param(17, "step", {}, id="at the first step of an epoch"),
        pytest.param(13, "step", {"max_epochs": None, "max_steps": 20}, id="a number of steps"),
        pytest.param(
            18,
            "validation",
            {"max_epochs": None, "max_steps": 18, "val_check_interval": 2},
            id="in the validation of the last of a number of steps",
        ),
        pytest.param(5, "step", {"accumulate_grad_batches": 2}, id="accumulated gradients"),
        pytest.param(13, "step", {"val_check_interval": 4}, id="validation within epochs"),
    ],
)
def test_an_interrupted_run_ends_at_the_same_weights(tmp_path: Path, at: int, where: str, options: Any) -> None:
    run(tmp_path / "whole.yaml", tmp_path / "whole", config(**options))
    stop = {"at": at, "where": where, "marker": str(tmp_path / "stopped")}
    with pytest.raises(Stopped):
        run(tmp_path / "broken.yaml", tmp_path / "broken", config(stop, **options))
    assert not (tmp_path / "broken" / "results.json").exists()
    run(tmp_path / "broken.yaml", tmp_path / "broken", config(stop, **options))
    ended_alike(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_is_interrupted_twice_while_gradients_accumulate(tmp_path: Path) -> None:
    """Both times from one step, which the first resumed run must not save again behind a later batch."""
    options = {"accumulate_grad_batches": 3}
    stops = [{"at": at, "where": "step", "marker": str(tmp_path / f"stopped{at}")} for at in (4, 5)]
    run(tmp_path / "whole.yaml", tmp_path / "whole", config(**options))

    for _ in stops:
        with pytest.raises(Stopped):
            run(tmp_path / "broken.yaml", tmp_path / "broken", config(*stops, **options))
    run(tmp_path / "broken.yaml", tmp_path / "broken", config(*stops, **options))

    ended_alike(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_is_interrupted_in_its_last_recalibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped

    content = config()
    content["trainer"]["callbacks"] = [{"class_path": "rescompress.lightning.Recalibrate", "init_args": {"batches": 3}}]
    run(tmp_path / "whole.yaml", tmp_path / "whole", content)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(recovery, "recalibrate", stopped)
        run(tmp_path / "broken.yaml", tmp_path / "broken", content)
    run(tmp_path / "broken.yaml", tmp_path / "broken", content)

    ended_alike(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("by", "code"),
    [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 128 + signal.SIGTERM), ("SIGINT", 128 + signal.SIGINT)],
)
def test_a_killed_process_run_again_by_the_same_command_ends_at_the_same_weights(
    by: str, code: int, tmp_path: Path
) -> None:
    stop = {"at": 13, "marker": str(tmp_path / "killed"), "kill": by}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(config(stop)))
    command = ["fit", "--config", str(tmp_path / "broken.yaml"), "--folder", str(tmp_path / "broken")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, str(SCRIPT), *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        # Whoever runs the tests in the background may have had Ctrl-C ignored, which processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert killed.returncode == code, killed.stderr
    assert torch.load(tmp_path / "broken" / "last.ckpt", weights_only=True)["global_step"] == 12
    if by != "SIGKILL":
        told = f"ended by {by}; the same command goes on from step 12 of {tmp_path / 'broken' / 'last.ckpt'}"
        assert told in killed.stderr
        assert "Traceback" not in killed.stderr

    RecipeCLI(Classifier, Tiny, args=command)
    run(tmp_path / "whole.yaml", tmp_path / "whole", config())
    ended_alike(tmp_path / "whole", tmp_path / "broken")
