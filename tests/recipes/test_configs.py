"""Every config of the recipes is found, says its own command, and runs two steps on small data in the real layout."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.lightning import layouts

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted(path for path in RECIPES.glob("configs/*/*.yaml") if not path.name.startswith("_"))
CLASSES = 3


def number_of(recipe: str) -> int:
    return sum(path.parent.name == recipe for path in CONFIGS)


def test_all_configs_are_found() -> None:
    found = {recipe: number_of(recipe) for recipe in ("imagenet", "cityscapes", "medical", "small")}

    assert found == {"imagenet": 62, "cityscapes": 12, "medical": 11, "small": 23}
    assert sum(found.values()) == len(CONFIGS)


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_the_first_line_is_its_command(path: Path) -> None:
    recipe = path.parent.name

    first = path.read_text(encoding="utf-8").splitlines()[0]

    assert first == f"# python recipes/{recipe}.py fit --config recipes/configs/{recipe}/{path.name}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the root of a small data set for each recipe, and for the configs that read another one."""
    root = tmp_path_factory.mktemp("data")
    return {
        "imagenet": layouts.image_folders(root / "imagenet", classes=CLASSES, train=3, val=2),
        "cityscapes": layouts.cityscapes(root / "cityscapes", size=(96, 192)),
        "medical": layouts.medmnist(root / "medmnist", images=(12, 9, 9), sizes=(224,)),
        "small": layouts.fashion_mnist(root / "fashion_mnist", train=40, test=20),
        "elpv": layouts.elpv(root / "elpv"),
        "shards": layouts.shards(root / "shards"),
    }


def small(recipe: str, root: Path) -> list[str]:
    """Return the options that make a run small; what a config is about stays as it is."""
    common = [f"--data.root={root}", "--data.batch_size=2", "--data.test_batch_size=2", "--data.workers=0"]
    return (
        common
        + {
            "imagenet": [f"--model.num_classes={CLASSES}", "--model.pretrained=false"],
            "cityscapes": [
                "--model.input_size=[64,128]",
                "--data.train_size=[64,128]",
                "--data.test_size=[96,192]",
                "--data.full_size=[96,192]",
            ],
            "medical": [],
            "small": [],
        }[recipe]
    )


def weights_of_original(path: Path, folder: Path) -> list[str]:
    """Return the option that names the weights a config begins with, where it does, after writing such a file."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "initial_weights" not in config.get("model", {}):
        return []
    from recipes import small_models

    model = small_models.small_vit() if config["extends"] == "_vit.yaml" else small_models.small_resnet()
    torch.save(model.state_dict(), folder / "original.pt")
    return [f"--model.initial_weights={folder / 'original.pt'}"]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_two_steps(
    path: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if path.parent.name == "cityscapes":
        pytest.importorskip("mmseg", exc_type=ImportError)
    recipe = path.parent.name
    other = next((data for data in ("elpv", "shards") if data in path.stem), recipe)
    classes = [f"--data.num_classes={CLASSES}"] if other == "shards" else []
    options = [*small(recipe, folders[other]), *classes, *weights_of_original(path, tmp_path)]
    argv = [str(RECIPES / f"{recipe}.py"), "fit", f"--config={path}", *options, "--trainer.fast_dev_run=2"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES.parent))

    runpy.run_path(argv[0], run_name="__main__")

    assert "test/" in capsys.readouterr().out
