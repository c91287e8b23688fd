"""Quantize: integers and outputs are torchao's, files are as small as their bits, wrong use is refused."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.compress import record_of
from rescompress.layers.integers import int4_groups, int8_rows, pack_int4, unpack_int4
from rescompress.layers.kernels import choose_kernel
from rescompress.layers.packed_conv import Int8StaticConv2d
from rescompress.layers.quantized_conv import Int8DynamicConv2d, Int8WeightConv2d
from rescompress.layers.quantized_linear import (
    Int4WeightLinear,
    Int8DynamicLinear,
    Int8StaticLinear,
    Int8WeightLinear,
)
from rescompress.measure.memory import weight_bytes
from rescompress.methods.quantize import SCHEMES, Quantize

CONVOLUTIONAL = ("w8", "w8a8", "w8a8_static")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def reference(linear: nn.Linear, config: Callable[[Any], Any]) -> nn.Module:
    """What torchao makes of a linear layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.quantization as torchao

        model = nn.Sequential(copy.deepcopy(linear))
        torchao.quantize_(model, config(torchao))
    return model


def static_config(torchao: Any, largest: float) -> Any:
    from torchao.quantization.granularity import PerRow, PerTensor

    return torchao.Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.full((1, 1, 1), largest / 127.5),
        granularity=[PerTensor(), PerRow()],
        set_inductor_config=False,
    )


def four_bits(torchao: Any) -> Any:
    from torchao.quantization.granularity import PerGroup

    return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


LINEARS = {
    "w8": (Int8WeightLinear, lambda ao: ao.Int8WeightOnlyConfig(set_inductor_config=False)),
    "w8a8": (Int8DynamicLinear, lambda ao: ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)),
    "w8a8_static": (lambda linear: Int8StaticLinear(linear, 3.5), lambda ao: static_config(ao, 3.5)),
    "w4": (lambda linear: Int4WeightLinear(linear, 16), four_bits),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_layer_computes_what_torchaos_does_with_every_kernel(scheme: str, bias: bool) -> None:
    linear, x = nn.Linear(96, 40, bias=bias), torch.randn(2, 7, 96)
    make, config = LINEARS[scheme]
    layer, theirs = make(linear), reference(linear, config)
    for kernel in layer.KERNELS:
        layer.kernel = kernel
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0], rtol=1e-5, atol=1e-5)


def test_integers_and_scales_are_torchaos_bit_for_bit() -> None:
    linear = nn.Linear(64, 24)
    with torch.no_grad():
        linear.weight[3] = 0  # a row of zeros divides by something
    for scheme in ("w8", "w8a8", "w8a8_static"):
        theirs = reference(linear, LINEARS[scheme][1])[0].weight
        integers, scale = int8_rows(linear.weight)
        torch.testing.assert_close(integers, theirs.qdata, rtol=0, atol=0)
        torch.testing.assert_close(scale, theirs.scale.flatten(), rtol=0, atol=0)
    theirs = reference(linear, four_bits)[0].weight
    packed, scale = int4_groups(linear.weight, 16)
    torch.testing.assert_close(unpack_int4(packed, torch.int8), theirs.qdata, rtol=0, atol=0)
    torch.testing.assert_close(scale, theirs.scale, rtol=0, atol=0)


def test_int4_is_packed_two_to_a_byte() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 4)
    assert packed[0, 0] == 0x10  # -8 is 0 in the low half, -7 is 1 in the high half
    torch.testing.assert_close(unpack_int4(packed, torch.int8), values, rtol=0, atol=0)


def test_integer_products_equal_the_same_products_in_floating_point() -> None:
    """Sums of whole numbers below 2 ** 24 are exact in float32, so the kernels must agree bit for bit."""
    for conv in (
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Conv2d(8, 12, 1, stride=2, bias=False),
        nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(0, 2), dilation=2),
    ):
        layer, x = (
            Int8DynamicConv2d(conv),
            torch.rand(3, 8, 13, 17) * torch.tensor([1.0, 5.0, 0.1]).reshape(-1, 1, 1, 1),
        )
        wanted = layer(x)
        for kernel in ("int8", "uint8"):
            layer.kernel = kernel
            torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(layer(x[1:2]), layer(x)[1:2], rtol=1e-6, atol=1e-6)  # one scale an image
        weight = layer.weight.float() * layer.weight_scale.reshape(-1, 1, 1, 1)
        step = x.flatten(1).amax(1).reshape(-1, 1, 1, 1) / 127.5
        exact = nn.functional.conv2d(
            (x / step).round().clamp(max=127) * step, weight, conv.bias, conv.stride, conv.padding, conv.dilation
        )
        torch.testing.assert_close(wanted, exact, rtol=1e-4, atol=1e-4)


def test_an_int8_weight_convolution_is_the_convolution_with_rounded_weights() -> None:
    conv, x = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), torch.randn(2, 8, 9, 11)
    integers, scale = int8_rows(conv.weight)
    rounded = copy.deepcopy(conv)
    rounded.weight.data = integers.float() * scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(Int8WeightConv2d(conv)(x), rounded(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 16])
def test_a_static_convolution_computes_on_whole_numbers_as_emulated(groups: int) -> None:
    conv, norm = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(16).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.rand(2, 16, 9, 11) * 4 - 1
    with torch.no_grad():
        wanted = norm(conv(x))
        layer = Int8StaticConv2d(conv, norm, (-1.0, 3.0), (wanted.min().item(), wanted.max().item()))
        step = layer.output_scale
        gap = (layer(x) - layer.emulated(x)).abs()
        assert gap.max() <= 1.01 * step
        assert (gap > 0.5 * step).float().mean() < 0.01  # ties only
        assert (layer(x) - wanted).norm() < 0.03 * wanted.norm()


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
        faster = tuple(layer.weight.shape[:2]) == (64, 64)
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


def test_the_fastest_correct_kernel_is_chosen_once() -> None:
    calls: list[str] = []

    class Layer(nn.Module):
        KERNELS = ("slow", "wrong", "broken", "fast")

        def __init__(self) -> None:
            super().__init__()
            self.kernel = "slow"

        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.kernel)
            if self.kernel == "broken":
                raise RuntimeError("no such kernel here")
            if self.kernel == "slow":
                for _ in range(300):
                    x.sum()
            return x * (3 if self.kernel == "wrong" else 2)

    x = torch.ones(16, 16)
    layer = Layer()
    timing = choose_kernel(layer, x, lambda x: x * 2)
    assert layer.kernel == timing.kernel == "fast"
    assert dict(timing.refused).keys() == {"wrong", "broken"}
    assert {name for name, _ in timing.times_ms} == {"slow", "fast"}
    calls.clear()
    assert choose_kernel(Layer(), x, lambda x: x * 2) is timing
    assert calls == []


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
    with pytest.raises(rc.SpecError, match="w4 is for linear layers"):
        low_bits(network, "w4")
    with pytest.raises(rc.SpecError, match=r"no linear layer or convolution of this ResNet matches 'layer9\.\*'"):
        low_bits(network, "w8", include="layer9.*")
    with pytest.raises(rc.SpecError, match="must come before 'quantize'"):
        rc.Spec.of(Quantize(scheme="w8"), rc.StemResize(scale=0.5))
