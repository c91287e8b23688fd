"""Quantize whole models: files are as small as their bits, checkpoints load, wrong use is refused."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress import surgery
from rescompress.compress import record_of
from rescompress.export import read_header
from rescompress.layers.int4_linear import Int4WeightLinear
from rescompress.layers.kernels import choose_kernel
from rescompress.layers.low_bits import LowBits
from rescompress.layers.packed_conv import Int8StaticConv2d
from rescompress.layers.quantized_conv import Int8DynamicConv2d, Int8WeightConv2d
from rescompress.layers.quantized_linear import Int8DynamicLinear, Int8WeightLinear
from rescompress.measure import count_macs
from rescompress.measure.memory import weight_bytes
from rescompress.methods.quantize import Quantize

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

CONVOLUTIONAL = ("w8", "w8a8", "w8a8_static")


def residual_net() -> nn.Module:
    """A small residual network, whose first block has a chain of three convolutions."""
    model = timm.create_model("resnet10t", num_classes=11).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm zeroes the last one of each block
    return model


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return residual_net()


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=11, img_size=64).eval()


IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def low_bits(model: nn.Module, scheme: str, **options: Any) -> nn.Module:
    return rc.compress(
        model, Quantize(scheme=scheme, **options), example_input=IMAGES[:1], calibration=[IMAGES[:2], IMAGES[2:]]
    )


@pytest.mark.parametrize(
    ("kind", "scheme", "most"),
    [
        ("network", "w8", 0.03),
        ("network", "w8a8", 0.04),
        ("network", "w8a8_static", 0.06),
        ("transformer", "w8", 0.03),
        ("transformer", "w8a8", 0.05),
        ("transformer", "w8a8_static", 0.08),
        ("transformer", "w4", 0.35),
    ],
)
def test_a_whole_model_scripts_saves_small_and_reloads(
    kind: str, scheme: str, most: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = low_bits(model, scheme)
    with torch.no_grad():
        wanted, found = model(IMAGES), small(IMAGES)
        assert 0 < (found - wanted).norm() < most * wanted.norm()
        torch.jit.save(torch.jit.script(small), tmp_path / "small.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "small.pt")(IMAGES), found, rtol=1e-5, atol=1e-5)
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            torch.testing.assert_close(other(IMAGES), found, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    layers = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    lowered = weight_bytes(model) - weight_bytes(small)
    share = {"w4": 3.3, "w8": 2.6}.get(scheme, 2.6)  # bytes saved of the four of each weight
    assert lowered > share * 0.8 * layers
    assert (tmp_path / "small.pt").stat().st_size < weight_bytes(small) * 1.05 + 600_000
    assert rc.spec_of(small) == rc.Spec.of(Quantize(scheme=scheme))
    assert rc.Spec.from_json(rc.spec_of(small).to_json()) == rc.spec_of(small)


@pytest.mark.parametrize("scheme", CONVOLUTIONAL)
def test_a_checkpoint_from_before_loads_after(network: nn.Module, scheme: str) -> None:
    trained = residual_net()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    small = low_bits(network, scheme)
    assert small.load_state_dict(trained.state_dict()) == ([], [])  # strictly
    direct = low_bits(trained, scheme)
    if scheme != "w8a8_static":  # whose ranges are still the first network's
        torch.testing.assert_close(small(IMAGES), direct(IMAGES), rtol=1e-4, atol=1e-4)
    for name, value in direct.state_dict().items():
        if not name.endswith("ranges"):
            torch.testing.assert_close(small.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    lacking = trained.state_dict()
    name = next(name for name in lacking if name.endswith("conv1.weight") and name.startswith("layer1"))
    del lacking[name]
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        small.load_state_dict(lacking)


@pytest.mark.parametrize("scheme", CONVOLUTIONAL)
def test_its_own_checkpoint_loads_into_a_fresh_one(network: nn.Module, scheme: str) -> None:
    small, stream = low_bits(network, scheme), io.BytesIO()
    torch.save(small.state_dict(), stream)
    stream.seek(0)
    fresh = low_bits(residual_net(), scheme)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    with torch.no_grad():
        # Where a kernel was timed otherwise, sums are scaled in another order.
        torch.testing.assert_close(fresh(IMAGES), small(IMAGES), rtol=1e-3, atol=1e-3)


def test_chains_stay_quantized_and_norms_are_folded(network: nn.Module) -> None:
    small = low_bits(network, "w8a8_static")
    found = {name: m.stays_quantized for name, m in small.named_modules() if isinstance(m, Int8StaticConv2d)}
    # The first convolution of a block feeds only the second; the second's map is added to the shortcut.
    assert found["layer1.0.conv1"]
    assert not found["layer1.0.conv2"]
    assert not any(isinstance(m, nn.BatchNorm2d) for name, m in small.named_modules() if name.startswith("layer1.0"))


def test_a_norm_that_serves_two_convolutions_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.one, self.two = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
            self.last = nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(self.norm(self.one(x)).relu() + self.norm(self.two(x)).relu())

    model = Shared().eval()
    small = low_bits(model, "w8a8_static")
    assert type(small.norm) is nn.BatchNorm2d
    with torch.no_grad():
        wanted, found = model(IMAGES), small(IMAGES)
        assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


def test_zero_reduction_computes_the_same_with_norms_folded(network: nn.Module) -> None:
    step = Quantize(scheme="w8a8_static").identity()
    assert step == Quantize(scheme="w8a8_static", exact=True)
    same = rc.compress(network, step, example_input=IMAGES)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in same.modules()) < sum(
        isinstance(m, nn.BatchNorm2d) for m in network.modules()
    )
    with torch.no_grad():
        torch.testing.assert_close(same(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)


def test_the_log_lists_what_stayed_in_floating_point_and_why(network: nn.Module) -> None:
    log = "\n".join(record_of(low_bits(network, "w8a8_static", exclude="layer3.*")).log)
    assert "reads the image" in log
    assert "the head (head=True quantizes it): fc" in log
    assert "excluded: layer3.0.conv1" in log
    noisy = rc.compress(network, Quantize(scheme="w8a8_static"), example_input=IMAGES, calibration="random")
    assert any("from noise" in line for line in record_of(noisy).log)


def test_only_faster_leaves_what_is_slower(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from rescompress.methods import _low_bits

    slow = {"w8a8": choose_kernel}

    def pretend(layer: nn.Module, x: Tensor, exact: nn.Module) -> Any:
        timing = slow["w8a8"](layer, x, exact)
        faster = layer.weight_shape[:2] == [64, 64]
        return timing.__class__(timing.kernel, 1.0, 2.0 if faster else 0.5, timing.times_ms, timing.refused)

    monkeypatch.setattr(_low_bits, "choose_kernel", pretend)
    small = low_bits(network, "w8a8", only_faster=True)
    kept = {name for name, module in small.named_modules() if isinstance(module, Int8DynamicConv2d)}
    assert kept == {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and tuple(module.weight.shape[:2]) == (64, 64) and name.startswith("layer")
    }
    assert any("slower in low bits" in line for line in record_of(small).log)


def test_attention_that_reads_weights_directly_is_left_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 64, 8, stride=8)
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.mlp = nn.Linear(64, 64)
            self.head = nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.mlp(x).mean(1))

    small = low_bits(Model().eval(), "w8")
    assert type(small.attention.out_proj) is not Int8WeightLinear
    assert type(small.mlp) is Int8WeightLinear
    assert any("attention.out_proj" in line for line in record_of(small).log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w3"}, "must be one of w8, w8a8, w8a8_static, w4; got 'w3'"),
        ({"scheme": "w4", "group_size": 7}, "even int of at least 2, got 7"),
        ({"scheme": "w8", "include": [1]}, r"pattern of layer names or a list of them, got \[1\]"),
        ({"scheme": "w8", "head": "yes"}, "must be true or false, got 'yes'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(rc.SpecError, match=message):
        rc.Spec.from_dict({"steps": [{"kind": "quantize", **options}]})


def test_wrong_use_is_refused_with_the_remedy(network: nn.Module) -> None:
    static = Quantize(scheme="w8a8_static")
    with pytest.raises(rc.SpecError, match="calibration=batches"):
        rc.compress(network, static, example_input=IMAGES)
    with pytest.raises(rc.SpecError, match="put a single batch into a list"):
        rc.compress(network, static, example_input=IMAGES, calibration=IMAGES)
    with pytest.raises(rc.SpecError, match="calibration is empty"):
        rc.compress(network, static, example_input=IMAGES, calibration=[])
    with pytest.raises(rc.InputError, match=r"got list; .* of a DataLoader's \[images, labels\] give the images"):
        rc.compress(network, static, example_input=IMAGES, calibration=[[IMAGES, torch.zeros(4)]])
    with pytest.raises(rc.SpecError, match="calibration batch 1 holds no values"):
        rc.compress(network, static, example_input=IMAGES, calibration=[IMAGES, IMAGES[:0]])
    with pytest.raises(rc.SpecError, match="w4 is for linear layers"):
        low_bits(network, "w4")
    with pytest.raises(rc.SpecError, match=r"no linear layer or convolution of this ResNet matches 'layer9\.\*'"):
        low_bits(network, "w8", include="layer9.*")
    with pytest.raises(rc.SpecError, match="must come before 'quantize'"):
        rc.Spec.of(Quantize(scheme="w8"), rc.StemResize(scale=0.5))


def test_a_layer_without_a_shape_is_refused_until_it_has_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.LazyConv2d(16, 3), nn.Conv2d(16, 8, 3)).eval()
    step = Quantize(scheme="w8")
    with pytest.raises(rc.UnsupportedModelError, match=r"'1\.weight' has no shape yet; run the model once"):
        rc.compress(model, step, example_input=IMAGES)
    model(IMAGES)
    assert type(rc.compress(model, step, example_input=IMAGES)[1]) is Int8WeightConv2d


def test_a_second_step_names_its_layers(transformer: nn.Module) -> None:
    mixed = rc.compress(
        transformer,
        rc.Spec.of(Quantize(scheme="w4", include="*.mlp.*"), Quantize(scheme="w8a8", include=["*.attn.*", "head"])),
        example_input=IMAGES,
    )
    kinds = {name: type(module) for name, module in mixed.named_modules() if isinstance(module, LowBits)}
    assert {kind for name, kind in kinds.items() if ".mlp." in name} == {Int4WeightLinear}
    assert {kind for name, kind in kinds.items() if ".attn." in name or name == "head"} == {Int8DynamicLinear}
    with torch.no_grad():
        wanted, found = transformer(IMAGES), mixed(IMAGES)
    assert 0 < (found - wanted).norm() < 0.35 * wanted.norm()
    with pytest.raises(rc.SpecError, match=r"quantized already: \d+ layers such as .* quantize.include"):
        low_bits(mixed, "w8")


@pytest.mark.parametrize("scheme", CONVOLUTIONAL)
def test_fold_and_measure_work_on_a_quantized_model(network: nn.Module, scheme: str) -> None:
    resized = rc.compress(network, rc.StemResize(scale=0.5), example_input=IMAGES)
    spec = rc.Spec.of(rc.StemResize(scale=0.5), Quantize(scheme=scheme, first_conv=True))
    small = rc.compress(network, spec, example_input=IMAGES, calibration=[IMAGES])
    folded = rc.fold(small, IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(folded(IMAGES), small(IMAGES), rtol=1e-2, atol=1e-2)
    assert any("its output is resized" in line and "conv1" in line for line in record_of(small).log)
    counts = [count_macs(model, IMAGES) for model in (resized, small)]
    assert counts[0].macs == counts[1].macs  # low bits change no product
    assert counts[1].uncounted == ()


def test_an_error_leaves_a_model_in_place_as_it_was(network: nn.Module) -> None:
    model = copy.deepcopy(network)
    modules, state = surgery.fingerprint(model), copy.deepcopy(model.state_dict())
    with pytest.raises(rc.SpecError, match="calibration=batches"):
        rc.compress_(model, Quantize(scheme="w8a8_static"), example_input=IMAGES)
    with pytest.raises(rc.SpecError, match="w4 is for linear layers"):
        rc.compress_(model, Quantize(scheme="w4"), example_input=IMAGES)
    with pytest.raises(rc.RescompressError, match="does not run on calibration batch 1: Given groups=1"):
        spec = rc.Spec.of(rc.StemResize(scale=0.5), Quantize(scheme="w8a8_static"))
        rc.compress_(model, spec, example_input=IMAGES, calibration=[IMAGES, IMAGES[:, :1]])
    assert surgery.fingerprint(model) == modules
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_half_and_double_precision_work_or_are_refused(network: nn.Module) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model, images = copy.deepcopy(network).to(dtype), IMAGES.to(dtype)
        for scheme in ("w8", "w8a8"):
            small = rc.compress(model, Quantize(scheme=scheme), example_input=images)
            with torch.no_grad():
                wanted, found = model(images).float(), small(images).float()
            assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
        with pytest.raises(rc.SpecError, match="w8a8_static convolves float32 maps, not torch"):
            rc.compress(model, Quantize(scheme="w8a8_static"), example_input=images, calibration=[images])


class TwoStems(nn.Module):
    """No block of it makes one map of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 5, padding=2)
        self.conv, self.norm, self.head = nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.fine(x).relu(), self.coarse(x).relu()], dim=1)
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static"])
def test_a_model_that_no_family_describes_is_quantized_all_the_same(scheme, tmp_path):
    model, x = TwoStems().eval(), torch.randn(2, 3, 32, 32)
    with pytest.raises(rc.UnsupportedModelError, match="reads the image in 2 convolutions"):
        rc.compress(model, scale=0.5, example_input=x)

    small = rc.compress(
        model, rc.Quantize(scheme=scheme), example_input=x, calibration=[x] if scheme == "w8a8_static" else None
    )

    with torch.no_grad():
        wanted, found = model(x), small(x)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    program = rc.load(rc.export(small, tmp_path / "small.pt", x, fold=False))
    torch.testing.assert_close(program(x), found, rtol=1e-5, atol=1e-6)


class Chain(nn.Module):
    """Four convolutions in a row, which hand 8-bit maps on; the hooks for trouble are arguments."""

    def __init__(self, *, returns=False, shared=False, casts=False, later=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.dropout, self.head = nn.Dropout2d(), nn.Linear(16, 64)
        self.returns, self.shared, self.casts, self.later = returns, shared, casts, later

    def forward(self, x):
        x = self.conv1(x).relu()
        if self.casts:
            x = x.to(self.conv2.weight.dtype)
        second = self.conv2(x).relu()
        third = (self.conv2 if self.shared else self.conv3)(self.dropout(second)).relu()
        if not self.later or x.shape[-1] > 16:
            third = self.conv4(third).relu()
        scores = self.head(third.mean((2, 3)))
        return {"scores": scores, "maps": [second, third]} if self.returns else scores


def chain(**options):
    torch.manual_seed(0)
    return Chain(**options).eval(), torch.randn(2, 3, 16, 16)


def test_a_map_that_is_returned_is_in_floating_point():
    model, x = chain(returns=True)

    small = rc.compress(model, Quantize(scheme="w8a8_static"), example_input=x, calibration=[x])

    with torch.no_grad():
        for wanted, found in zip(model(x)["maps"], small(x)["maps"], strict=True):
            assert found.dtype == torch.float32
            assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_a_static_model_runs_in_training_mode():
    model, x = chain()
    small = rc.compress(model, Quantize(scheme="w8a8_static"), example_input=x, calibration=[x])
    small.train().dropout.eval()

    with torch.no_grad():
        assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
        assert small.dropout.train() and small(x).isfinite().all()


def test_a_layer_that_is_first_called_in_a_later_batch_is_quantized():
    model, x = chain(later=True)
    larger = torch.randn(1, 3, 24, 24)

    small = rc.compress(model, Quantize(scheme="w8a8_static"), example_input=x, calibration=[x, larger])

    with torch.no_grad():
        assert (small(larger) - model(larger)).norm() < 0.05 * model(larger).norm()


def test_a_convolution_called_twice_is_written_as_torchscript(tmp_path):
    model, x = chain(shared=True)
    small = rc.compress(model, Quantize(scheme="w8a8_static"), example_input=x, calibration=[x])

    program = rc.load(rc.export(small, tmp_path / "small.pt", x))

    with torch.no_grad():
        torch.testing.assert_close(program(x), small(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["w8", "w8a8", "w8a8_static"])
def test_a_layer_to_the_type_of_whose_weight_the_model_casts_stays_in_floating_point(scheme):
    model, x = chain(casts=True)

    small = rc.compress(
        model, Quantize(scheme=scheme), example_input=x, calibration=[x] if "static" in scheme else None
    )

    assert type(small.conv2) is nn.Conv2d and isinstance(small.conv3, LowBits) and isinstance(small.conv4, LowBits)
    assert any(line.endswith("outside of the layer: conv2") for line in record_of(small).log)
    with torch.no_grad():
        assert 0 < (small(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_a_forward_put_on_the_object_is_kept():
    model, x = chain()
    before = model.conv3.forward
    model.conv3.forward = lambda x: before(x) * 2

    small = rc.compress(model, Quantize(scheme="w8"), example_input=x)

    assert isinstance(small.conv3, nn.Conv2d)
    assert any("conv3" in line and "replaced on the object" in line for line in record_of(small).log)


def test_weights_of_other_modules_are_listed():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.ConvTranspose2d(16, 16, 3)).eval()

    small = rc.compress(model, Quantize(scheme="w8", head=True), example_input=torch.randn(1, 3, 16, 16))

    assert any("ConvTranspose2d is not a linear layer" in line for line in record_of(small).log)


def test_the_version_of_torchao_is_in_the_header(tmp_path):
    model, x = chain()
    small = rc.compress(model, Quantize(scheme="w8"), example_input=x)

    assert "torchao" in read_header(rc.export(small, tmp_path / "small.pt", x))["versions"]
