"""Every config of the recipes is found, says its own command, and runs two steps on small data in the real layout."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning")

import rescompress as rc
from rescompress.lightning import RecipeCLI
from rescompress.references.models import build_model
from rescompress.references.wanted import Wanted
from tests.lightning import layouts

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted(path for path in RECIPES.glob("configs/*/*.yaml") if not path.name.startswith("_"))
CLASSES = 3


def number_of(recipe: str) -> int:
    return sum(path.parent.name == recipe for path in CONFIGS)


def test_all_configs_are_found() -> None:
    found = {recipe: number_of(recipe) for recipe in ("imagenet", "cityscapes", "medical", "small")}

    assert found == {"imagenet": 63, "cityscapes": 12, "medical": 11, "small": 23}
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


def merged(path: Path) -> dict[str, Any]:
    """Return what a config says, with what it builds on below it."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = config.pop("extends", None)
    return config if base is None else over(merged(path.parent / base), config)


def over(base: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    below = {name: value for name, value in base.items() if isinstance(value, dict)}
    found = {name: over(below.get(name, {}), value) for name, value in config.items() if isinstance(value, dict)}
    return {**base, **config, **found}


def small(recipe: str, root: Path) -> list[str]:
    """Return the options that make a run small; what a config is about stays as it is."""
    common = [f"--data.root={root}", "--data.batch_size=2", "--data.test_batch_size=2", "--data.workers=0"]
    return (
        common
        + {
            "imagenet": [f"--model.num_classes={CLASSES}", "--model.pretrained=false"],
            "cityscapes": [
                "--model.pretrained=false",
                "--model.input_size=[64,128]",
                "--data.train_size=[64,128]",
                "--data.test_size=[96,192]",
                "--data.full_size=[96,192]",
            ],
            "medical": [],
            "small": [],
        }[recipe]
    )


def weights_of_original(path: Path, folder: Path, options: list[str]) -> list[str]:
    """Return the option that names the weights a config begins with, where it does, after writing such a file."""
    model = merged(path)["model"]
    if "initial_weights" not in model:
        return []
    classes = CLASSES if f"--model.num_classes={CLASSES}" in options else model["num_classes"]
    built = build_model(
        model["model"],
        Wanted(num_classes=classes, channels=model.get("channels", 3), options=model.get("options", {})),
    )
    torch.save(built.state_dict(), folder / "original.pt")
    return [f"--model.initial_weights={folder / 'original.pt'}"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RecipeCLI]:
    """What the recipes' command lines made: their modules and trainers."""
    made: list[RecipeCLI] = []
    begin = RecipeCLI.__init__

    def kept(self: RecipeCLI, *args: Any, **options: Any) -> None:
        made.append(self)
        begin(self, *args, **options)

    monkeypatch.setattr(RecipeCLI, "__init__", kept)
    return made


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_two_steps(
    path: Path,
    folders: dict[str, Path],
    runs: list[RecipeCLI],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """What the config is about is in the run: its model, spec, weights and callbacks, and the test in low bits."""
    if path.parent.name == "cityscapes":
        pytest.importorskip("mmseg", exc_type=ImportError)
    recipe = path.parent.name
    other = next((data for data in ("elpv", "shards") if data in path.stem), recipe)
    options = small(recipe, folders[other])
    if other == "shards":
        options.append(f"--data.num_classes={CLASSES}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES.parent))
    options += weights_of_original(path, tmp_path, options)
    argv = [str(RECIPES / f"{recipe}.py"), "fit", f"--config={path}", *options, "--trainer.fast_dev_run=2"]
    monkeypatch.setattr(sys, "argv", argv)

    runpy.run_path(argv[0], run_name="__main__")

    config, (run,) = merged(path), runs
    wanted, written = config["model"], capsys.readouterr().out
    assert run.model.hparams["model"] == wanted["model"]
    if "spec" in wanted:
        assert rc.spec_of(run.model.model) == rc.Spec.from_dict(wanted["spec"])
    else:
        with pytest.raises(rc.SpecError, match="has not been compressed"):
            rc.spec_of(run.model.model)
    assert "test/" in written
    assert ("deployed/" in written) == ("deploy" in wanted) == path.stem.endswith("_w8a8")
    frozen = [parameter for parameter in run.model.model.parameters() if not parameter.requires_grad]
    assert bool(frozen) == (wanted.get("tune", "all") != "all")
    assert (run.model.hparams["initial_weights"] is None) == ("initial_weights" not in wanted)
    callbacks = {type(callback).__name__ for callback in run.trainer.callbacks}
    named = {one["class_path"].rpartition(".")[2] for one in config["trainer"].get("callbacks", [])}
    assert named <= callbacks
