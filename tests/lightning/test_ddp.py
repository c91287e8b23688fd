"""Two processes train one model: the same weights on both, those of one process with both batches, one results.json.

They go on after an interruption as one process does, and score each image once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lightning")

from lightning.pytorch import Trainer

from rescompress.lightning import Classifier, RecipeCLI, Result, Segmenter
from tests.lightning.tiny import TINY, Tiny

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "seeded")]

ROOT = Path(__file__).parents[2]


def run_script(name: str, *arguments: str) -> None:
    """Run a script of this folder, which starts the processes."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/lightning" / name), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
    run_script("tiny.py", *command, str(tmp_path / "two"), *two)
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


def has_mmseg() -> bool:
    try:
        import mmseg.evaluation  # noqa: F401
    except ImportError:  # OpenCV without the system's libGL raises it, too
        return False
    return True


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Return the folder that ddp_runs.py wrote into, and what each process told."""
    folder = tmp_path_factory.mktemp("ranks")
    segments = ["segments"] if has_mmseg() else []
    run_script("ddp_runs.py", str(folder), *segments)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_that_are_interrupted_end_at_the_same_weights(ranks: tuple[Path, list[dict]]) -> None:
    folder, told = ranks

    for rank, found in enumerate(told):
        assert (found["stopped"], found["resumed_at"], found["steps"]) == (True, 6, 12)
        ended = torch.load(folder / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(ended["resumed"], ended["whole"], rtol=0, atol=0)


def test_two_processes_count_a_file_once_that_both_have_skipped(ranks: tuple[Path, list[dict]]) -> None:
    assert [found["skipped"] for found in ranks[1]] == [{"train": 3}, {"train": 3}]


def test_two_processes_count_the_pixels_of_each_image_once(ranks: tuple[Path, list[dict]]) -> None:
    pytest.importorskip("mmseg", exc_type=ImportError)
    module = Segmenter(TINY, num_classes=3, input_size=32, options={"dense": True})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}

    (alone,) = Trainer(accelerator="cpu", **quiet).test(module, Tiny(classes=3, dense=True, length=18), verbose=False)

    assert 0 < alone["test/pixel_accuracy"] < 1
    scores = {name: value for name, value in alone.items() if name != "test/loss"}
    for found in ranks[1]:
        assert {name: found["scores"][name] for name in scores} == pytest.approx(scores, abs=1e-6)
