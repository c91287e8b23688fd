"""BatchNorm statistics found anew: the mean over the batches, nothing else touched, nothing lost on an error."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rescompress as rc


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
    )


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [2 + 3 * torch.randn(4, 3, 17, 17, generator=generator) for _ in range(3)]


def test_statistics_are_the_mean_over_the_batches(batches: list[Tensor]) -> None:
    model = net().eval()
    rc.recalibrate(model, batches)
    with torch.no_grad():
        maps = [model[0](x) for x in batches]
        mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
        var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, var, rtol=1e-5, atol=1e-5)
    assert model[5].momentum == 0.3 and not model.training and not model[1].training


def test_labels_are_not_read_and_the_mode_stays(batches: list[Tensor]) -> None:
    alone, labelled = net(), net()
    alone.train()
    alone[3].eval()
    rc.recalibrate(alone, batches, batches=2)
    rc.recalibrate(labelled, [(x, torch.zeros(4)) for x in batches[:2]])
    torch.testing.assert_close(alone[5].running_mean, labelled[5].running_mean, rtol=0, atol=0)
    assert alone.training and not alone[3].training


def test_the_statistics_of_a_resized_model_are_mended() -> None:
    """Behind an antialiased resize maps vary less; the norm is right again after recalibration."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
    images = [torch.randn(16, 3, 16, 16) for _ in range(4)]
    rc.recalibrate(model, images)
    small = rc.compress(model.eval(), rc.StemResize(scale=0.5, antialias=True), example_input=images[0])

    def spread(net: nn.Sequential) -> float:
        with torch.no_grad():
            return float(net[1](net[0](torch.cat(images))).var((0, 2, 3)).mean())

    assert spread(model) == pytest.approx(1, abs=0.05)
    assert spread(small) < 0.5
    assert spread(rc.recalibrate(small, images)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("wrong", ["nothing", "nan", "text"])
def test_an_error_leaves_the_statistics(wrong: str, batches: list[Tensor]) -> None:
    model = rc.recalibrate(net(), batches)
    before = copy.deepcopy(model.state_dict())
    loader = {"nothing": [], "nan": [batches[0] * float("nan")], "text": [batches[0], "image.png"]}[wrong]
    with pytest.raises(rc.InputError):
        rc.recalibrate(model, loader)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_model_without_statistics_is_told() -> None:
    with pytest.raises(rc.UnsupportedModelError, match="nothing to recalibrate"):
        rc.recalibrate(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), [])
