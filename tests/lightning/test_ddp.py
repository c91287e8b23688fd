"""Two processes train one model: the same weights on both, those of one process with both batches, one results.json."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lightning")

from rescompress.lightning import Classifier, RecipeCLI, Result
from tests.lightning.tiny import TINY, Tiny

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "seeded")]

ROOT = Path(__file__).parents[2]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    ranks = {"class_path": "tests.lightning.tiny.Ranks", "init_args": {"folder": str(tmp_path)}}
    config = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": [ranks]},
        "model": {
            "model": TINY,
            "num_classes": 4,
            "input_size": 32,
            "options": {"norm": False},
            "spec": {"steps": [{"kind": "stem_resize", "scale": 0.5}]},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        },
        "data": {"length": 36},  # 9 batches of 4; 4 of 4 on each of two
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = ["fit", "--config", str(tmp_path / "run.yaml"), "--folder"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "4"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/lightning/tiny.py"), *command, str(tmp_path / "two"), *two],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(second, first, rtol=0, atol=0)

    assert len(list(tmp_path.rglob("results.json"))) == 1
    result = Result.read(tmp_path / "two")
    assert (result.processes, result.epochs, result.steps, result.finished) == (2, 2, 8, True)

    RecipeCLI(Classifier, Tiny, args=[*command, str(tmp_path / "one"), "--data.batch_size", "8"])
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    one = Result.read(tmp_path / "one")
    assert one.steps == 8
    # 18 test images in uneven shares: each counted once.
    assert result.metrics["test/accuracy"] == pytest.approx(one.metrics["test/accuracy"], abs=1e-6)
    assert result.metrics["test/loss"] == pytest.approx(one.metrics["test/loss"], rel=1e-4)
