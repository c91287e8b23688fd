"""Runs of a recipe over data that are made in memory, in the current folder."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rescompress.lightning import Classifier, RecipeCLI
from tests.lightning.tiny import TINY, Tiny

CONFIG: dict[str, Any] = {
    "seed_everything": 5,
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    },
    "model": {
        "model": TINY,
        "num_classes": 4,
        "input_size": 32,
        "spec": {"steps": [{"kind": "stem_resize", "scale": 0.5}]},
        "loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
    },
}


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs go to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes/tiny.py"])


def write(name: str, content: dict[str, Any]) -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


def cli(*args: str, **options: Any) -> RecipeCLI:
    return RecipeCLI(Classifier, Tiny, args=list(args), **options)
