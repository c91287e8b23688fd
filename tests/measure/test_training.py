import copy

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress.errors import MeasureError
from rescompress.measure import count_macs, count_training_macs


def test_a_layer_costs_its_product_and_those_of_both_gradients():
    layers = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    first, second = 4 * 7 * 5, 4 * 5 * 3
    # The images need no gradient, so the first layer is spared one product.
    assert count_training_macs(layers, torch.zeros(4, 7)) == 2 * first + 3 * second


def test_frozen_weights_need_no_gradient_of_their_own():
    layers = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    layers[1].requires_grad_(False)
    assert count_training_macs(layers, torch.zeros(4, 7)) == 2 * 4 * 7 * 5 + 2 * 4 * 5 * 3


@pytest.mark.parametrize(("name", "first"), [("resnet18", "conv1"), ("vit_tiny_patch16_224", "patch_embed.proj")])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_training_step_costs_three_forward_passes_but_for_the_gradient_of_the_images(name, first, scale):
    timm = pytest.importorskip("timm")
    model, images = timm.create_model(name), torch.zeros(2, 3, 224, 224)
    if scale < 1:
        model = rc.compress(model, scale=scale, example_input=images[:1])
    count = count_macs(model, images)
    spared = next(module.macs for module in count.modules if module.fqn == first)
    assert count_training_macs(model, images) == 3 * count.macs - spared


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).eval()
    before = copy.deepcopy(model.state_dict())
    count_training_macs(model, torch.zeros(2, 3, 8, 8))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_trained_is_told():
    with pytest.raises(MeasureError, match="no output of Linear depends on a parameter"):
        count_training_macs(nn.Linear(2, 2).requires_grad_(False), torch.zeros(1, 2))
    with pytest.raises(MeasureError, match="Linear does not run a training step"):
        count_training_macs(nn.Linear(2, 2), torch.zeros(1, 3))
