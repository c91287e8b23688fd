"""compress and compress_: defaults, refusals, going on from a compressed model, and nothing broken on errors."""

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import rescompress as rc
from rescompress.measure.macs import count_macs
from rescompress.surgery import fingerprint
from tests.zoo import build, image, randomize


def small_cnn() -> nn.Module:
    return randomize(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ).eval()


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (lambda: timm.create_model("resnet18"), "stem_resize"),
        (lambda: timm.create_model("convnext_atto"), "stem_resize"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), "patch_resize"),
        (lambda: timm.create_model("vit_small_patch14_reg4_dinov2", depth=1), "input_resize"),
        (lambda: torchvision.models.vit_b_32(image_size=128), "patch_resize"),
    ],
)
def test_a_plain_scale_and_the_default_input(model: object, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RescompressWarning)  # 518 px in patches of 14 cannot be halved exactly
        small = rc.compress(model(), scale=0.5)
    assert [step.kind for step in rc.spec_of(small)] == [kind]


def test_a_scale_that_the_patches_do_not_fit_becomes_an_input_resize() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.warns(rc.RescompressWarning, match="224 x 224 becomes 160 x 160, a scale of 0.7143"):
        small = rc.compress(model, scale=0.75)
    assert [step.kind for step in rc.spec_of(small)] == ["input_resize"]
    assert small.pos_embed.shape[1] == 1 + 100


@pytest.mark.parametrize("scale", [0, -1, 1.5, float("nan"), float("inf"), "0.5", True])
def test_bad_scales(scale: object) -> None:
    with pytest.raises(rc.SpecError, match=r"scale must be in \(0, 1\], got"):
        rc.compress(small_cnn(), scale=scale)


def test_spec_forms(tmp_path: Path) -> None:
    model, x = small_cnn(), torch.rand(1, 3, 16, 16)
    step = rc.StemResize(scale=0.5)
    path = tmp_path / "spec.yaml"
    path.write_text(rc.Spec.of(step).to_yaml())
    for spec in (step, rc.Spec.of(step), rc.Spec.of(step).to_dict(), path, str(path)):
        assert rc.spec_of(rc.compress(model, spec, example_input=x)) == rc.Spec.of(step)
    with pytest.raises(rc.SpecError, match="either a spec or a scale"):
        rc.compress(model)
    with pytest.raises(rc.SpecError, match="either a spec or a scale"):
        rc.compress(model, step, scale=0.5)
    with pytest.raises(rc.SpecError, match="must be a Spec"):
        rc.compress(model, 3)


def test_compress_in_place() -> None:
    model, x = build("resnet18"), image("resnet18")
    copied = rc.compress(model, scale=0.5, example_input=x)
    parameters = [id(p) for p in model.parameters()]
    assert rc.compress_(model, scale=0.5, example_input=x) is model
    assert [id(p) for p in model.parameters()] == parameters  # an optimizer goes on holding them
    with torch.no_grad():
        torch.testing.assert_close(model(x), copied(x), rtol=0, atol=0)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = build("test_vit")
    before = fingerprint(model)
    spec = rc.Spec.of(rc.PatchResize(scale=0.5), rc.TokenPool(after_block=1, stride=3))
    with pytest.raises(rc.SpecError, match="does not divide the 2 x 2 token grid"):
        rc.compress_(model, spec, example_input=image("test_vit"))
    assert fingerprint(model) == before
    with pytest.raises(rc.SpecError, match="has not been compressed"):
        rc.spec_of(model)


@pytest.mark.filterwarnings("ignore:token_merge.r=1 cannot be reached")
def test_going_on_from_a_compressed_model() -> None:
    model, x = build("test_vit"), image("test_vit")
    spec = rc.Spec.of(rc.PatchResize(scale=0.5), rc.TokenMerge(r=1))
    at_once = rc.compress(model, spec, example_input=x)
    in_turn = rc.compress(rc.compress(model, spec.steps[0], example_input=x), spec.steps[1], example_input=x)
    assert rc.spec_of(in_turn) == spec
    with torch.no_grad():
        torch.testing.assert_close(in_turn(x), at_once(x), rtol=0, atol=0)
    with pytest.raises(rc.SpecError, match="must come before"):
        rc.compress(in_turn, rc.InputResize(scale=0.5), example_input=x)
    assert rc.spec_of(in_turn) == spec


def test_the_same_place_is_taken_once() -> None:
    small = rc.compress(small_cnn(), rc.StemResize(scale=0.5), example_input=torch.rand(1, 3, 32, 32))
    with pytest.raises(rc.UnsupportedModelError, match=r"resized already.* compress the original model with"):
        rc.compress(small, rc.StemResize(scale=0.5), example_input=torch.rand(1, 3, 32, 32))


def test_input_and_stem_together() -> None:
    model, x = small_cnn(), torch.rand(2, 3, 32, 32)
    spec = rc.Spec.of(rc.InputResize(scale=0.5, mode="nearest"), rc.StemResize(size=(4, 2), mode="area"))
    with torch.no_grad():
        y = model[0](nn.functional.interpolate(x, scale_factor=0.5))
        y = model[1:](nn.functional.interpolate(y, size=(4, 2), mode="area"))
        torch.testing.assert_close(rc.compress(model, spec, example_input=x)(x), y)


@pytest.mark.parametrize("make", [small_cnn, lambda: timm.create_model("resnetv2_50x1_bit").eval()])
def test_stem_and_then_input(make: object) -> None:
    model, x = make(), torch.rand(1, 3, 64, 64)
    in_turn = rc.Spec.of(rc.StemResize(scale=0.5), rc.InputResize(scale=0.5))
    small = rc.compress(model, in_turn, example_input=x)
    assert small._rescompress.anatomy.stem_grid == (8, 8)
    other = rc.compress(model, rc.Spec.of(*reversed(in_turn.steps)), example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), other(x), rtol=0, atol=0)
    with pytest.raises(rc.SpecError, match=r"input_resize\.scale=0\.5 leaves a 16 x 16 .* would enlarge to 24 x 24"):
        rc.compress(model, rc.Spec.of(rc.StemResize(size=24), rc.InputResize(scale=0.5)), example_input=x)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("size", [(32, 32), (31, 45), (64, 16)])
def test_stem_resize_is_interpolate_between_convolution_and_norm(mode: str, size: tuple[int, int]) -> None:
    model = small_cnn()
    options = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
    small = rc.compress(model, rc.StemResize(scale=0.5, mode=mode), example_input=torch.rand(1, 3, 64, 64))
    fixed = rc.compress(model, rc.StemResize(size=(5, 7), mode=mode), example_input=torch.rand(1, 3, 64, 64))
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        y = model[1:](nn.functional.interpolate(model[0](x), scale_factor=0.5, mode=mode, **options))
        torch.testing.assert_close(small(x), y)
        y = model[1:](nn.functional.interpolate(model[0](x), size=(5, 7), mode=mode, **options))
        torch.testing.assert_close(fixed(x), y)


def test_any_input_size_from_call_to_call() -> None:
    model = build("resnet18")
    small = rc.compress(model, rc.StemResize(scale=0.5), example_input=image("resnet18"))
    grids = []
    small.layer1.register_forward_hook(lambda m, args, y: grids.append(tuple(y.shape[-2:])))
    with torch.no_grad():
        for size in ((64, 64), (96, 64), (65, 131), (224, 32)):
            small(torch.rand(1, 3, *size))
    assert grids == [(8, 8), (12, 8), (8, 17), (28, 4)]


def test_scales_that_do_not_divide_are_named() -> None:
    with pytest.warns(rc.RescompressWarning, match=r"scale=0\.3 .* 32 x 32 becomes 9 x 9, a scale of 0\.2812"):
        rc.compress(small_cnn(), rc.StemResize(scale=0.3), example_input=torch.rand(1, 3, 64, 64))
    with pytest.raises(rc.SpecError, match="larger than the 32 x 32 map"):
        rc.compress(small_cnn(), rc.StemResize(size=33), example_input=torch.rand(1, 3, 64, 64))
    with pytest.raises(rc.SpecError, match="larger than the 64 x 64 image"):
        rc.compress(small_cnn(), rc.InputResize(size=65), example_input=torch.rand(1, 3, 64, 64))


def test_vit_input_resize_equals_the_original_at_that_size() -> None:
    model = randomize(timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2)).eval()
    small = rc.compress(model, rc.InputResize(size=64, mode="bicubic"), example_input=torch.rand(1, 3, 96, 96))
    model.set_input_size(img_size=64)
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        y = nn.functional.interpolate(x, size=(64, 64), mode="bicubic", antialias=True)
        torch.testing.assert_close(small(x), model(y), rtol=1e-5, atol=1e-5)
    for size, nearest in ((70, "64 or 80"), (15, "16")):
        with pytest.raises(rc.SpecError, match=f"no multiple of the 16 px patches; nearest: {nearest}$"):
            rc.compress(build("test_vit"), rc.InputResize(size=size), example_input=torch.rand(1, 3, 96, 96))


def test_vit_input_resize_with_dynamic_images() -> None:
    model = randomize(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True)).eval()
    small = rc.compress(model, rc.InputResize(scale=0.5), example_input=torch.rand(1, 3, 128, 96))
    half = copy.deepcopy(model)
    half.set_input_size(img_size=32)
    with torch.no_grad():
        for size in ((128, 96), (64, 64), (64, 160)):
            x = torch.rand(1, 3, *size)
            y = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
            torch.testing.assert_close(small(x), half(y), rtol=1e-5, atol=1e-5)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).mean((2, 3))


class Fixed(nn.Module):
    """A network that bakes its map's size in, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


class Skip(nn.Module):
    """Joins a map from behind the first convolution with the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x], 1)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class PlainViT(nn.Module):
    """A ViT of a class that no family knows; `positions` reads as many rows of its table as there are tokens."""

    def __init__(self, positions: Callable[[nn.Embedding, int], Tensor], rows: int = 16) -> None:
        super().__init__()
        self.positions = positions
        self.patch, self.table = nn.Conv2d(3, 8, 8, 8), nn.Embedding(rows, 8)
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.block(x + self.positions(self.table, x.shape[1])).mean(1))


def sliced(table: nn.Embedding, count: int) -> Tensor:
    return table.weight[:count]


def looked_up(table: nn.Embedding, count: int) -> Tensor:
    return table(torch.arange(count, device=table.weight.device))


def indexed(table: nn.Embedding, count: int) -> Tensor:
    return table.weight.to(torch.float64)[torch.arange(count, device=table.weight.device)].float()


def interpolated(table: nn.Embedding, count: int) -> Tensor:
    side = round(count**0.5)
    return nn.functional.interpolate(table.weight.T.reshape(1, 8, 4, 4), size=(side, side)).flatten(2).mT


def along_sides(table: nn.Embedding, count: int) -> Tensor:
    side = torch.arange(round(count**0.5), device=table.weight.device)
    return (table(side)[:, None] + table(side)[None]).flatten(0, 1)


@pytest.mark.parametrize("step", [rc.StemResize, rc.InputResize])
@pytest.mark.parametrize("rows", [16, 30])
@pytest.mark.parametrize("positions", [sliced, looked_up, indexed])
def test_positions_of_other_places_are_refused(positions: object, rows: int, step: type[rc.Step]) -> None:
    """The first 4 of 16 positions are the top row of the old grid, and no grid of 2 x 2; yet the network runs."""
    with pytest.raises(rc.UnsupportedModelError, match=r"reads 4 of the 16 rows of 'table.weight'.*add-a-family\.md"):
        rc.compress(PlainViT(positions, rows).eval(), step(scale=0.5), example_input=torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("positions", [interpolated, along_sides])
def test_positions_that_follow_the_grid_are_taken(positions: object) -> None:
    model, x = PlainViT(positions).eval(), torch.rand(1, 3, 32, 32)
    small = rc.compress(model, rc.InputResize(scale=0.5, antialias=False), example_input=x)
    halved = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(halved))


def test_the_image_is_resized_in_front_of_branches() -> None:
    model, x = nn.Sequential(TwoReaders()), torch.rand(2, 3, 32, 32)
    small = rc.compress(model, scale=0.5, example_input=x)
    assert rc.spec_of(small).steps[0].kind == "input_resize"
    halved = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    torch.testing.assert_close(small(x), model(halved))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TwoReaders(), r"reads the image in 2 convolutions \(a, b\).*compress torch\.nn\.Sequential\(model\)"),
        (Fixed(), "does not work on the smaller grid of stem_resize .* mat1 and mat2"),
        (Skip(), "does not work on the smaller grid"),
        (Dense(), "saw no nn.Conv2d run"),
        (nn.Sequential(nn.Conv2d(4, 2, 1)), "does not run on an input of shape"),
    ],
)
def test_models_that_would_break_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(rc.UnsupportedModelError, match=message):
        rc.compress(model, scale=0.5, example_input=torch.rand(1, 3, 16, 16))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(rc.UnsupportedModelError, match=r"takes an nn\.Module, got str"):
        rc.compress("resnet50", scale=0.5)
    scripted = torch.jit.script(small_cnn())
    with pytest.raises(rc.UnsupportedModelError, match="TorchScript"):
        rc.compress(scripted, scale=0.5)


@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "nf_regnet_b0", "tf_efficientnetv2_b0"])
def test_convolutions_with_a_forward_of_their_own(name: str) -> None:
    """Weight standardisation and SAME padding are kept: the probe's network is proved, not assumed."""
    model = randomize(timm.create_model(name)).eval()
    x = torch.rand(1, 3, 64, 64)
    same = rc.compress(model, rc.StemResize(scale=1.0), example_input=x)
    small = rc.compress(model, rc.StemResize(scale=0.5), example_input=x)
    assert list(small.state_dict()) == list(model.state_dict())
    copy.deepcopy(small).load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)
        assert small(x).shape == model(x).shape


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.warns(rc.RescompressWarning, match="only shapes were checked"):
        small = rc.compress(model, scale=0.5)
    assert small(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_half_precision_and_channels_last() -> None:
    model = build("resnet18").to(torch.bfloat16).to(memory_format=torch.channels_last)
    x = image("resnet18").to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    small = rc.compress(model, scale=0.5, example_input=x)
    assert small.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert small(x).dtype == torch.bfloat16


class Noisy(nn.Module):
    """Draws random numbers in every call, as heads that start an iteration from some do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(self.conv(x)) + torch.randn(())).mean((2, 3))


@pytest.mark.filterwarnings("ignore:token_merge.r=1 cannot be reached")
@pytest.mark.parametrize(
    ("model", "x", "spec"),
    [
        (build("test_vit"), image("test_vit"), rc.Spec.of(rc.PatchResize(scale=0.5), rc.TokenMerge(r=1))),
        (Noisy(), torch.rand(1, 3, 32, 32), rc.Spec.of(rc.StemResize(scale=0.5))),
    ],
    ids=["vit", "a host that draws numbers"],
)
def test_random_state_is_left_alone(model: nn.Module, x: Tensor, spec: rc.Spec) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rc.compress(model, spec, example_input=x)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_rounding_is_told_from_a_change() -> None:
    """Attention by another kernel differs by more than 1e-6 in half precision; in double precision it does not."""
    model = build("torchvision vit_b_16").to(torch.bfloat16)
    small = rc.compress(model, rc.TokenMerge(r=1))
    assert all(p.dtype == torch.bfloat16 for p in [*model.parameters(), *small.parameters()])


class PlainList(nn.Module):
    """Runs its convolution through a plain list, which surgery by name cannot reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1)
        self.steps = [self.conv1, nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x.mean((2, 3))


class SideBranch(nn.Module):
    """A small branch decides on the contrast of the image; the network itself reads the image behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.body = nn.Conv2d(3, 1, 3, 2), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.gate(x).mean((2, 3), keepdim=True).sigmoid()).mean((2, 3))


class NormalisedTwoReaders(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.2)


class Labels(nn.Module):
    """Returns whole numbers, and other ones as soon as its convolution is of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return (y if type(self.conv) is nn.Conv2d else -y).argmax(1)


class Changing(nn.Module):
    """Gives other outputs from call to call, whatever torch's random state is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + random.random()).mean((2, 3))


class Counts(nn.Module):
    """Writes into a buffer, and into its input, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x.mul_(2)).mean((2, 3))


class NoTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> str:
        return str(self.conv(x).shape[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (PlainList(), "never calls its module 'conv1'"),
        (SideBranch(), "saves nothing in this SideBranch"),
        (NormalisedTwoReaders(), "in 2 convolutions"),
        (Labels(), "at zero reduction changes what"),
        (Changing(), "other outputs from call to call"),
        (NoTensors(), "no tensors that could be compared"),
    ],
)
def test_what_cannot_be_proved_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(rc.UnsupportedModelError, match=message):
        rc.compress(model, scale=0.5, example_input=torch.rand(1, 3, 32, 32))


def test_buffers_and_inputs_are_left_alone() -> None:
    model, x = Counts(), torch.rand(1, 3, 32, 32)
    before = x.clone()
    small = rc.compress(model, scale=0.5, example_input=x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert model.calls == 0 and small.calls == 0


def test_weights_of_zero_do_not_blind_the_check() -> None:
    """A fresh torchvision ViT returns zeros, whatever its blocks do."""
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32)
    assert not model.heads.head.weight.any()
    small = rc.compress(model, rc.TokenMerge(r=1), example_input=torch.rand(1, 3, 32, 32))
    assert not small.heads.head.weight.any()  # the stand-ins were the clones' own

    class Skipping(rc.TokenMerge):
        kind = "skipping_for_test"

        def apply(self, model: nn.Module, anatomy: object) -> object:
            new = super().apply(model, anatomy)
            model.encoder.layers[0].mlp = nn.Identity()
            return new

        def identity(self) -> rc.Step:
            return Skipping(r=0)

    with pytest.raises(rc.UnsupportedModelError, match="at zero reduction changes what"):
        rc.compress(model, Skipping(r=1), example_input=torch.rand(1, 3, 32, 32))


def test_warnings_as_errors_leave_the_model_as_it_was() -> None:
    model = small_cnn()
    before = fingerprint(model)
    spec = rc.Spec.of(rc.StemResize(size=8), rc.InputResize(scale=0.63))
    with pytest.raises(rc.RescompressWarning, match="cannot be reached exactly"):
        rc.compress_(model, spec, example_input=torch.rand(1, 3, 64, 64))
    assert fingerprint(model) == before


def test_a_checkpoint_loads_by_the_way_that_the_kernel_came() -> None:
    model = randomize(timm.create_model("vit_tiny_patch16_224", img_size=448, depth=1)).eval()
    spec = rc.Spec.of(rc.PatchResize(patch_size=28), rc.PatchResize(patch_size=32))
    small = rc.compress(model, spec)
    loaded = copy.deepcopy(small)
    loaded.load_state_dict(model.state_dict())
    for key, value in small.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_going_on_needs_the_same_example_size() -> None:
    small = rc.compress(small_cnn(), rc.StemResize(scale=0.5), example_input=torch.rand(1, 3, 64, 64))
    again = rc.compress(small, rc.InputResize(scale=0.5))  # its example is made of the size on record
    assert again._rescompress.anatomy.input_size == (64, 64)
    with pytest.raises(rc.SpecError, match="with an example of 64 x 64 pixels, got one of 128 x 128"):
        rc.compress(small, rc.InputResize(scale=0.5), example_input=torch.rand(1, 3, 128, 128))


@pytest.mark.parametrize("example", [(), {"size": 3}, torch.rand(3)])
def test_examples_without_an_image(example: object) -> None:
    for model in (build("resnet18"), build("test_vit"), small_cnn()):
        with pytest.raises(rc.UnsupportedModelError, match="holds no batch of images"):
            rc.compress(model, scale=0.5, example_input=example)


def test_under_inference_mode_the_copy_can_be_trained() -> None:
    model = build("test_vit")
    with torch.inference_mode():
        small = rc.compress(model, scale=0.5, example_input=torch.rand(1, 3, 64, 64))
    small(torch.rand(1, 3, 64, 64)).sum().backward()
    assert small.patch_embed.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize(("size", "gmacs"), [(96, 3.036), (80, 2.145), (64, 1.416), (56, 1.166)])
def test_published_counts_of_resnet_50(size: int, gmacs: float) -> None:
    """GMACs of ResNet-50 by the side of the map behind its first convolution, at 224 x 224."""
    model = torchvision.models.resnet50().eval()
    small = rc.compress(model, rc.StemResize(size=size, mode="nearest"))
    assert round(count_macs(small, torch.rand(1, 3, 224, 224)).macs / 1e9, 3) == gmacs


def test_dense_outputs_that_shrink_are_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1))
    with pytest.warns(rc.RescompressWarning, match=r"an output has shape \(1, 4, 8, 8\) instead of \(1, 4, 16, 16\)"):
        rc.compress(model, scale=0.5, example_input=torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.full((1, 3, 64, 64), float("nan")), "example input of this .* holds no finite value"),
        (torch.rand(0, 3, 64, 64), r"example input of this .* holds no image: its shape is \(0, 3, 64, 64\)"),
    ],
)
def test_examples_that_prove_nothing_are_refused(example: Tensor, message: str) -> None:
    for model in (build("test_vit"), small_cnn()):
        with pytest.raises(rc.UnsupportedModelError, match=message):
            rc.compress(model, scale=0.5, example_input=example)


def test_outputs_that_prove_nothing_are_refused() -> None:
    model = small_cnn()
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(rc.UnsupportedModelError, match=r"output 0 of this Sequential, .* holds no finite value"):
        rc.compress(model, scale=0.5, example_input=torch.rand(1, 3, 32, 32))


def test_pooling_behind_the_last_block_saves_nothing() -> None:
    """A head that reads the class token alone would give the very same outputs at the very same cost."""
    model = build("test_vit")
    with pytest.raises(rc.UnsupportedModelError, match=r"token_pool saves nothing .*in front of blocks that compute"):
        rc.compress(model, rc.TokenPool(after_block=-1, stride=2), example_input=image("test_vit"))
    same = rc.compress(model, rc.TokenPool(after_block=-1, stride=1), example_input=image("test_vit"))
    torch.testing.assert_close(same(image("test_vit")), model(image("test_vit")))


class CroppedBranch(nn.Module):
    """Its map has one size whatever the stem's, as behind an adaptive pooling: the stem alone costs less."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(8), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.pool(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (build("test_vit"), rc.Spec.of(rc.PatchResize(scale=0.5), rc.TokenPool(after_block=-1, stride=2))),
        (CroppedBranch(), rc.Spec.of(rc.InputResize(scale=0.5), rc.StemResize(scale=0.5))),
    ],
    ids=["pooling behind the last block", "stem in front of an adaptive pooling"],
)
def test_a_step_that_saves_nothing_beside_others_is_refused(model: nn.Module, spec: rc.Spec) -> None:
    """The whole spec costs less; refused is the step that has no part in it."""
    x = torch.rand(1, 3, 64, 64)
    rc.compress(model, spec.steps[0], example_input=x)
    with pytest.raises(rc.UnsupportedModelError, match=rf"{spec.steps[1].kind}.* saves nothing .* before this step"):
        rc.compress(model, spec, example_input=x)


def test_errors_of_the_smaller_grid_name_the_place_and_the_remedy() -> None:
    class Asserting(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(self.conv(x).shape[2] == 8, "")
            return super().forward(x)

    with pytest.raises(rc.UnsupportedModelError, match=r"mat1 and mat2 .*add-a-family\.md"):
        rc.compress(Fixed(), scale=0.5, example_input=torch.rand(1, 3, 16, 16))
    with pytest.raises(rc.UnsupportedModelError, match=r"torch\._assert\(.*\(test_compress\.py, line"):
        rc.compress(Asserting(), scale=0.5, example_input=torch.rand(1, 3, 16, 16))


def test_videos_are_said_to_be_unsupported() -> None:
    with pytest.raises(rc.UnsupportedModelError, match=r"takes \(1, 4, 3, 32, 32\): videos .* are not supported"):
        rc.compress(small_cnn(), scale=0.5, example_input=torch.rand(1, 4, 3, 32, 32))


def test_quantized_resnets_are_told_from_float_ones() -> None:
    model = torchvision.models.quantization.resnet18(quantize=False)
    quantized = type("ConvReLU2d", (nn.Module,), {"__module__": "torch.ao.nn.intrinsic.quantized"})
    model.conv1 = quantized()  # as quantize=True leaves it, which needs an engine that not every machine has
    with pytest.raises(rc.UnsupportedModelError, match=r"is quantized already: .* compress the float model"):
        rc.compress(model, scale=0.5)
