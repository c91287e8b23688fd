"""Models of other people: known hosts in wrappers and subclasses, and networks that no family was written for."""

import warnings
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

import rescompress as rc
from tests.zoo import randomize

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def vit(kind: type[VisionTransformer] = VisionTransformer, **options: Any) -> VisionTransformer:
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return randomize(kind(**sizes | options)).eval()


def resnet() -> ResNet:
    return randomize(ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5)).eval()


class Resizing(nn.Module):
    """Gives the network inside images of one size, whatever it gets."""

    def __init__(self, net: nn.Module, side: int = 64) -> None:
        super().__init__()
        self.net = net
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.interpolate(x, size=(self.side, self.side)))


@pytest.mark.parametrize("side", [48, 100, 160])
@pytest.mark.parametrize(
    ("make", "step"),
    [
        pytest.param(vit, rc.PatchResize(scale=0.5), id="vit patches"),
        pytest.param(vit, rc.InputResize(scale=0.5), id="vit image"),
        pytest.param(lambda: vit(dynamic_img_size=True), rc.InputResize(scale=0.5), id="vit of any size"),
        pytest.param(resnet, rc.StemResize(scale=0.5), id="resnet stem"),
        pytest.param(resnet, rc.InputResize(scale=0.5), id="resnet image"),
    ],
)
@torch.no_grad()
def test_a_host_that_gets_images_of_another_size_than_the_model(make: Any, step: rc.Step, side: int) -> None:
    net, x = make(), torch.rand(2, 3, side, side)
    alone = rc.compress(net, step, example_input=torch.rand(1, 3, 64, 64))
    inside = rc.compress(Resizing(net), step, example_input=x)
    torch.testing.assert_close(inside(x), Resizing(alone)(x))
    assert inside._rescompress.log == alone._rescompress.log
    # What is done next begins with an example of the model's size, not of the host's.
    assert rc.compress(inside, rc.Quantize(scheme="w8"), example_input=x)(x).shape == (2, 5)


class Gated(VisionTransformer):
    """Slices a table of its own by the length of the sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = nn.Parameter(torch.randn(1, 65, 1))

    def forward_features(self, x: Tensor, **options: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        x = self.blocks(x * self.gate[:, : x.shape[1]])
        return self.norm(x)


@pytest.mark.parametrize("step", [rc.PatchResize(scale=0.5), rc.InputResize(scale=0.5)], ids=lambda step: step.kind)
def test_a_subclass_that_reads_a_table_of_positions_in_part_is_refused(step: rc.Step) -> None:
    with pytest.raises(rc.UnsupportedModelError, match=r"17 of the 65 rows of 'gate'"):
        rc.compress(vit(Gated), step, example_input=torch.rand(1, 3, 64, 64))


class Averaging(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].mean(1))


class Same(VisionTransformer):
    """A subclass that reads nothing in another way."""


def test_a_subclass_with_a_head_of_its_own_is_not_trusted_to_read_merged_tokens() -> None:
    x = torch.rand(1, 3, 64, 64)
    with pytest.warns(rc.RescompressWarning, match=r"Averaging reads the tokens .*a merged token counts once there"):
        rc.compress(vit(Averaging), rc.TokenMerge(r=4), example_input=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rc.compress(vit(Same), rc.TokenMerge(r=4), example_input=x)


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.conv(x).relu()
        return x.mean((2, 3))


def test_a_first_convolution_that_runs_again_on_its_own_maps_is_refused() -> None:
    with pytest.raises(rc.UnsupportedModelError, match="runs again on maps made of its own"):
        rc.compress(Again(), scale=0.5, example_input=torch.rand(1, 3, 32, 32))


class Siamese(nn.Module):
    """One network for two images is no such case: both calls read an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.conv(x).relu() - self.conv(y).relu()).mean((2, 3))


def test_one_network_for_two_images_is_compressed_for_both() -> None:
    x, y = torch.rand(2, 1, 3, 32, 32)
    small = rc.compress(Siamese().eval(), scale=0.5, example_input=(x, y))
    assert small(x, x).abs().max() == 0
    assert small(x, y).abs().max() > 0


class TwoEncoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.depth = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, colour: Tensor, depth: Tensor) -> Tensor:
        return self.colour(colour).mean((2, 3)) + self.depth(depth).mean((2, 3))


def test_the_encoder_that_stays_as_it_is_is_named() -> None:
    example = (torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32))
    with pytest.warns(rc.RescompressWarning, match=r"only the map of 'colour.0' is made smaller.*: 'depth.0'"):
        rc.compress(TwoEncoders(), scale=0.5, example_input=example)


@torch.no_grad()
def test_a_resnet_whose_stem_was_built_anew_is_left_to_the_probe() -> None:
    net = resnet()
    net.conv1 = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, net.conv1.out_channels, 3, padding=1))
    small = rc.compress(net.eval(), scale=0.5, example_input=torch.rand(1, 3, 64, 64))
    assert small._rescompress.anatomy.family == "convolutional"
    assert small(torch.rand(2, 3, 64, 64)).shape == (2, 5)


class KeyPoints(nn.Module):
    """Places by arg-max: they come out in positions of the smaller map, which nothing but a warning can help."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body(x)
        found = maps.flatten(2).argmax(2)
        return torch.stack([found % maps.shape[3], found // maps.shape[3]], -1)


def test_whole_numbers_that_may_be_places_are_warned_of() -> None:
    with pytest.warns(rc.RescompressWarning, match=r"\(1, 5, 2\) holds whole numbers; if they are places in a map"):
        rc.compress(KeyPoints(), scale=0.5, example_input=torch.rand(1, 3, 64, 64))


def test_detectors_of_key_points_are_refused() -> None:
    hf = pytest.importorskip("transformers", minversion="5")
    model = hf.SuperPointForKeypointDetection(
        hf.SuperPointConfig(encoder_hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8)
    )
    with pytest.raises(rc.UnsupportedModelError, match="where key points are"):
        rc.compress(model.eval(), scale=0.5, example_input=torch.rand(1, 3, 64, 64))
