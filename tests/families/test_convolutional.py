"""Convolutional networks: stems of every kind, sides that must be multiples, dense outputs, sizes and types."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rescompress as rc
from rescompress import families
from rescompress.layers.resize import Resize2d
from rescompress.layers.wrap import RestoredMap, simplest_scale
from tests.zoo import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

STEMS = {
    "csatv2": (128, "stem_dct", "stem_dct", (16, 16), 1),
    "dla46_c": (128, "base_layer.0", None, (128, 128), 32),
    "fastvit_t8": (64, "stem.0", "stem.0", (32, 32), 1),
    "hrnet_w18_small": (128, "conv1", None, (64, 64), 16),
    "mobileone_s0": (64, "stem", "stem", (32, 32), 1),
    "repvgg_a0": (64, "stem", "stem", (32, 32), 1),
    "repvit_m1": (64, "stem.conv1", "stem.conv1", (32, 32), 1),
    "resnetaa50": (128, "conv1", None, (64, 64), 16),
    "test_nfnet": (64, "stem.conv1", None, (32, 32), 1),
    "tresnet_m": (64, "body.conv1.conv", "body.s2d", (16, 16), 1),
    "vgg11": (64, "features.0", None, (64, 64), 1),
}
"""Model: image side, what the map is resized behind, what the image is resized in front of, grid, multiple."""


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", STEMS)
def test_stems(name: str) -> None:
    side, stem, reader, grid, multiple = STEMS[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    anatomy = families.describe(model, (torch.empty(1, 3, side, side, device="meta"),))
    assert (anatomy.first_conv, anatomy.stem_grid, anatomy.multiple) == (stem, grid, multiple)
    assert (None if anatomy.reader is None else anatomy.reader.name) == reader


@pytest.mark.parametrize("step", [rc.StemResize, rc.InputResize])
@pytest.mark.parametrize("name", ["csatv2", "repvgg_a0", "tresnet_m"])
def test_blocks_and_space_to_depth(name: str, step: type[rc.Step]) -> None:
    model = randomize(timm.create_model(name, num_classes=10)).eval()
    x = noise(2, 3, STEMS[name][0], STEMS[name][0])
    torch.testing.assert_close(rc.compress(model, step(scale=1.0), example_input=x)(x), model(x), rtol=0, atol=0)
    small = rc.compress(model, step(scale=0.5), example_input=x)
    assert list(small.state_dict()) == list(model.state_dict())
    ratio = rc.measure(small, x, latency=False, peak_memory=False, training=False).macs
    assert ratio < 0.4 * rc.measure(model, x, latency=False, peak_memory=False, training=False).macs


def test_input_resize_in_front_of_space_to_depth_resizes_the_image() -> None:
    model = randomize(timm.create_model("tresnet_m", num_classes=10)).eval()
    x = noise(1, 3, 64, 64)
    small = rc.compress(model, rc.InputResize(scale=0.5, antialias=False), example_input=x)
    halved = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(small(x), model(halved))


@pytest.mark.parametrize("name", ["repvgg_a0", "repvit_m1", "mobileone_s0"])
def test_reparameterized_after_compressing(name: str) -> None:
    model = randomize(timm.create_model(name, num_classes=10)).eval()
    x = noise(1, 3, 64, 64)
    small = rc.compress(model, scale=0.5, example_input=x)
    fused = timm.utils.reparameterize_model(small)
    assert len(list(fused.modules())) < len(list(small.modules()))
    torch.testing.assert_close(fused(x), small(x), rtol=1e-4, atol=1e-4)


def test_multiples_hold_for_sizes_other_than_the_example() -> None:
    """HRNet on 128 pixels works at any scale by luck of powers of two; on 160 it needs multiples of 16."""
    model = timm.create_model("hrnet_w18_small", num_classes=10).eval()
    small = rc.compress(model, scale=0.5, example_input=torch.rand(1, 3, 128, 128))
    for size in ((160, 160), (96, 224)):
        assert small(torch.rand(1, 3, *size)).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet18", "repvgg_a0", "test_efficientnet", "tresnet_m"])
@pytest.mark.parametrize("step", [rc.StemResize, rc.InputResize])
def test_sizes_batches_and_types(name: str, step: type[rc.Step]) -> None:
    model = randomize(timm.create_model(name, num_classes=10)).eval()
    x = noise(2, 3, 64, 64)
    small = rc.compress(model, step(scale=0.5), example_input=x)
    y = small(x)
    torch.testing.assert_close(small(x[:1]), y[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small(x[:0]), model(x[:0]))
    other = noise(1, 3, 96, 64)
    alone = rc.compress(model, step(scale=0.5), example_input=other)
    torch.testing.assert_close(small(other), alone(other))
    last = copy.deepcopy(small).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-4)
    for dtype, bound in ((torch.float16, 0.01), (torch.bfloat16, 0.1)):
        halved = rc.compress(copy.deepcopy(model).to(dtype), step(scale=0.5), example_input=x.to(dtype))
        assert halved(x.to(dtype)).dtype == dtype
        for low in (halved, copy.deepcopy(small).to(dtype)):
            assert (low(x.to(dtype)).float() - y).abs().max() < bound * y.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (small(x).float() - y).abs().max() < 0.1 * y.abs().max()


OPTIONS = {
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "dilated": {"padding": 2, "dilation": 2},
    "grouped": {"padding": 1, "groups": 3},
    "same": {"padding": "same"},
    "uneven strides": {"stride": (2, 1)},
}


@pytest.mark.filterwarnings("ignore:stem_resize.scale=0.5 cannot be reached exactly")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stem_convolutions_with_options(options: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.AdaptiveAvgPool2d(1))
    x = noise(2, 3, 30, 41)
    small = rc.compress(model, rc.StemResize(scale=0.5), example_input=x)
    expected = F.interpolate(model[0](x), scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(small(x), model[1:](expected))


class UNet(nn.Module):
    """Two skips; `fits` brings maps to the skips' size; `added` adds the image to what comes out."""

    def __init__(self, fits: bool = False, added: bool = False) -> None:
        super().__init__()
        self.fits, self.added = fits, added
        self.down = nn.ModuleList(self._block(i, o) for i, o in ((3, 8), (8, 16), (16, 32)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in ((32, 16), (16, 8)))
        self.joined = nn.ModuleList(self._block(i, o) for i, o in ((32, 16), (16, 8)))
        self.head = nn.Conv2d(8, 4, 1)

    def _block(self, i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        skips = [self.down[0](image)]
        skips.append(self.down[1](F.max_pool2d(skips[0], 2)))
        x = self.down[2](F.max_pool2d(skips[1], 2))
        for up, joined in zip(self.up, self.joined, strict=True):
            skip = skips.pop()
            x = up(x)
            x = joined(torch.cat([F.interpolate(x, size=skip.shape[2:]) if self.fits else x, skip], 1))
        return self.head(x) + image[:, :1] if self.added else self.head(x)


@pytest.mark.parametrize("step", [rc.StemResize, rc.InputResize])
@pytest.mark.parametrize(
    ("model", "size", "multiple"),
    [(UNet(), (64, 96), 4), (UNet(fits=True), (57, 75), 1), (UNet(added=True), (32, 48), 4)],
    ids=["u-net", "odd sides", "image added"],
)
def test_dense_outputs_keep_their_size(
    model: UNet, size: tuple[int, int], multiple: int, step: type[rc.Step], recwarn: pytest.WarningsRecorder
) -> None:
    x = noise(1, 3, *size)
    small = rc.compress(model, step(scale=0.5), example_input=x)
    anatomy = small._rescompress.anatomy
    assert (anatomy.multiple, anatomy.restored, anatomy.restored_sizes) == (multiple, ("head",), (size,))
    assert not [w for w in recwarn if "an output has shape" in str(w.message)]
    assert list(small.state_dict()) == list(model.state_dict())
    small.load_state_dict(model.state_dict())
    for shape in (size, (32, 32), (64, 48)):
        y = noise(2, 3, *shape)
        assert small(y).shape == model(y).shape


def test_dense_sizes_that_would_not_come_back_are_refused() -> None:
    small = rc.compress(UNet(), scale=0.5, example_input=noise(1, 3, 64, 64))
    with pytest.raises(ValueError, match="would not come back at a side of 44"):
        small(noise(1, 3, 64, 44))


class EarlySkip(nn.Module):
    """Concatenates the image with a map of its stem: nothing can be made smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.cat([self.stem(x), x], 1)).mean((2, 3))


def test_a_skip_from_before_the_reduction_is_refused() -> None:
    with pytest.raises(rc.UnsupportedModelError, match="does not work on the smaller grid"):
        rc.compress(EarlySkip(), scale=0.5, example_input=noise(1, 3, 64, 64))


def test_restored_maps_in_every_container_and_call_after_call() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"out": x, "aux": [x[..., ::2, ::2]], "score": x.mean((2, 3))}

    restored = RestoredMap(Heads(), (149, 20))
    restored.shrink((149, 20), (74, 10))
    for _ in range(2):
        made = restored(noise(1, 2, 74, 10))
        assert made["out"].shape[2:] == (149, 20) and made["aux"][0].shape[2:] == (74, 10)
        assert made["score"].shape == (1, 2)
    assert restored(noise(1, 2, 32, 32))["out"].shape[2:] == (64, 64)


@pytest.mark.parametrize(
    ("new", "old", "multiple", "scale"),
    [(74, 149, 1, 1 / 2), (78, 112, 1, 7 / 10), (48, 112, 16, 1 / 2), (48, 112, 1, 3 / 7), (9, 9, 1, 1.0)],
)
def test_the_simplest_scale_that_fits(new: int, old: int, multiple: int, scale: float) -> None:
    assert simplest_scale(new, old, multiple) == pytest.approx(scale)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_antialiasing_in_half_precision(mode: str, dtype: torch.dtype) -> None:
    resize, x = Resize2d((0.5, 0.5), mode=mode, antialias=True), noise(1, 3, 16, 12).to(dtype)
    torch.testing.assert_close(torch.jit.script(resize)(x), resize(x.float()).to(dtype))


class AutoEncoder(nn.Module):
    """Strides of 2 down and up; gives the image back, and with `code` what it was encoded as."""

    def __init__(self, code: bool = False) -> None:
        super().__init__()
        self.code = code
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        z = self.encoder(x)
        return {"out": self.decoder(z), "z": z} if self.code else self.decoder(z)


@pytest.mark.filterwarnings("ignore:.*an output has shape")
@pytest.mark.parametrize("step", [rc.StemResize, rc.InputResize])
def test_outputs_are_restored_one_by_one(step: type[rc.Step]) -> None:
    model, x = randomize(AutoEncoder(code=True)).eval(), noise(2, 3, 64, 64)
    small = rc.compress(model, step(scale=0.5), example_input=x)
    assert small._rescompress.anatomy.restored == ("decoder",)
    made = small(x)
    assert made["out"].shape == x.shape and made["z"].shape[2:] == (8, 8)
    plain = rc.compress(model.encoder, step(scale=0.5), example_input=x)
    torch.testing.assert_close(made["z"], plain(x))
    restored = F.interpolate(model.decoder(made["z"]), size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(made["out"], restored)


def test_two_heads_are_both_restored() -> None:
    class TwoHeads(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.depth = nn.Conv2d(4, 1, 1)

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(image)
            return y, self.depth(y)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 4, 3, 1, 1)
            self.b = nn.Conv2d(8, 2, 3, 1, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(self.stem(x)), self.b(self.stem(x))

    x = noise(1, 3, 64, 64)
    for model, names in ((TwoHeads(), ("head",)), (Apart(), ("b", "a"))):
        small = rc.compress(model, scale=0.5, example_input=x)
        assert small._rescompress.anatomy.restored == names
        for made in small(x):
            assert made.shape[2:] == x.shape[2:]


@pytest.mark.parametrize(
    ("model", "example", "others"),
    [(UNet(fits=True), 61, (60, 64, 96, 33)), (UNet(fits=True), 64, (65, 62)), (AutoEncoder(), 64, (60, 96, 62, 68))],
    ids=["odd example", "even example", "strides"],
)
@pytest.mark.parametrize("step", [rc.StemResize, rc.InputResize])
@pytest.mark.filterwarnings("ignore:.* cannot be reached exactly")
def test_dense_outputs_have_their_size_or_are_refused(
    model: nn.Module, example: int, others: tuple[int, ...], step: type[rc.Step]
) -> None:
    """An example of 61 px leaves 30, and so does an image of 60: 30 cannot stand for both."""
    small = rc.compress(model, step(scale=0.5), example_input=noise(1, 3, example, example))
    refused = []
    for side in (example, *others):
        x = noise(1, 3, side, side)
        try:
            assert small(x).shape == model(x).shape
        except ValueError as error:
            assert "would not come back" in str(error)
            refused.append(side)
    assert example not in refused and 96 not in refused and len(refused) < 4


def test_pyramids_shrink_with_their_first_map() -> None:
    """Features that still have the image's size are no predictions: every level shrinks alike."""
    model = timm.create_model("vgg11", features_only=True, out_indices=(0, 1, 2))
    x = noise(1, 3, 64, 64)
    with pytest.warns(rc.RescompressWarning, match="an output has shape"):
        small = rc.compress(model, scale=0.5, example_input=x)
    assert [made.shape[-1] for made in small(x)] == [side // 2 for side in (y.shape[-1] for y in model(x))]


def test_dense_outputs_that_cannot_be_restored_are_refused() -> None:
    class Functional(nn.Module):
        """Makes its map without a module that could be wrapped."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.weight = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.ones(4, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.stem(x), self.weight, padding=1)

    with pytest.raises(rc.UnsupportedModelError, match=r"predicts for every pixel of the image\. Name the module"):
        rc.compress(Functional(), scale=0.5, example_input=noise(1, 3, 64, 64))
