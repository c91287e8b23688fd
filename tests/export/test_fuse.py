"""Batch norms are fused where the graph proves it, the outputs stay, and everything else is left alone."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from rescompress.export.checking import Case
from rescompress.export.fuse import fuse


def randomized(model):
    """Give norms statistics and affine weights that a wrong fusion would show."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


def cases(model, x):
    return [Case("the example", x.shape[0], ((x,), {}), model(x))]


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: timm.create_model("resnet18"), 20),
        (lambda: torchvision.models.resnet18(), 20),  # shares its ReLU
        (lambda: timm.create_model("mobilenetv2_035"), 52),  # BatchNormAct2d: the activation stays
    ],
)
def test_all_norms_of_a_network_are_fused_and_the_outputs_stay(build, count):
    torch.manual_seed(0)
    model = randomized(build())
    x = torch.randn(2, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    fused, fusion = fuse(model, cases(model, x))

    assert (len(fusion.pairs), fusion.reason) == (count, None)
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    wanted = model(x)
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


class Pair(nn.Module):
    """A convolution and its norm, in which `forward` decides what else reads them."""

    def __init__(self, **options):
        super().__init__()
        self.norm = nn.BatchNorm2d(4, **options)  # before its convolution, as no rule of order expects
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.norm(self.conv(x))


class ReadTwice(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class RunTwice(Pair):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(2 * x)


class Between(Pair):
    def forward(self, x):
        return self.norm(self.conv(x).relu())


class Parametrized(Pair):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)


class OwnNorm(Pair):
    def __init__(self):
        super().__init__()
        self.norm = type(
            "Norm", (nn.BatchNorm2d,), {"forward": lambda self, x: super(type(self), self).forward(x) + 1}
        )(4)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.3}])
def test_one_pair_is_fused_whatever_its_options(options):
    model = randomized(Pair(**options)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    fused, fusion = fuse(model, cases(model, x))

    assert fusion.pairs == (("conv", "norm"),)
    torch.testing.assert_close(fused.conv(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "build", [ReadTwice, RunTwice, Between, Parametrized, OwnNorm, lambda: Pair(track_running_stats=False)]
)
def test_what_cannot_be_proved_is_left_as_it_is(build):
    model = build().eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)

    fused, fusion = fuse(model, cases(model, x))

    assert fused is model
    assert fusion.pairs == () and fusion.reason


def test_a_fusion_that_changes_the_outputs_is_not_used():
    model = randomized(Pair())
    x = torch.randn(2, 3, 8, 8)
    wrong = [Case("the example", 2, ((x,), {}), model(x) + 1)]

    fused, fusion = fuse(model, wrong)

    assert fused is model
    assert "differ" in fusion.reason
