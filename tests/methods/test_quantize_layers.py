"""Low-bit layers: integers and outputs are torchao's with every kernel, in whatever order the weight lies."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rescompress.layers import kernels
from rescompress.layers.int4_linear import Int4WeightLinear
from rescompress.layers.integers import int4_groups, int8_rows, pack_int4, unpack_int4
from rescompress.layers.kernels import choose_kernel
from rescompress.layers.low_bits import KernelError, LowBits
from rescompress.layers.packed_conv import Int8StaticConv2d
from rescompress.layers.quantized_conv import Int8DynamicConv2d, Int8WeightConv2d
from rescompress.layers.quantized_linear import (
    Int8DynamicLinear,
    Int8StaticLinear,
    Int8WeightLinear,
    in_eights,
    int_matmul,
)
from rescompress.measure.memory import weight_bytes
from rescompress.methods.quantize import SCHEMES

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


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
        if kernel in ("cpu_tiles", "cuda_tiles"):  # of groups and devices of their own, tested below
            continue
        layer.use(kernel)
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
        for kernel in ("int8", "uint8", "onednn"):
            layer.use(kernel)
            torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(layer(x[1:2]), layer(x)[1:2], rtol=1e-6, atol=1e-6)  # one scale an image
        weight = layer.plain_weight().float() * layer.weight_scale.reshape(-1, 1, 1, 1)
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


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_an_int8_convolution_without_a_batch_says_so(scripted: bool) -> None:
    conv = nn.Conv2d(8, 12, 3)
    for layer in (Int8DynamicConv2d(conv), Int8StaticConv2d(conv, None, (-1.0, 1.0), (-2.0, 2.0))):
        with pytest.raises(torch.jit.Error if scripted else ValueError, match=r"\(B, C, H, W\), got 3 dimensions"):
            (torch.jit.script(layer) if scripted else layer)(torch.randn(8, 9, 9))


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


def test_a_static_convolution_is_what_the_pt2e_flow_computes() -> None:
    """The same ranges give the same whole numbers as torch's quantize and dequantize operators around a convolution."""
    import importlib

    importlib.import_module("torch.ao.quantization.fx._decomposed")
    ops = torch.ops.quantized_decomposed
    conv, x = nn.Conv2d(16, 12, 3, padding=1, stride=2), torch.rand(2, 16, 9, 11) * 4 - 1
    with torch.no_grad():
        wanted = conv(x)
        layer = Int8StaticConv2d(conv, None, (-1.0, 3.0), (wanted.min().item(), wanted.max().item()))
        own = layer.plain()
        x_range = (layer.input_scale, layer.input_zero_point, 0, 255, torch.uint8)
        y_range = (layer.output_scale, layer.output_zero_point, 0, 255, torch.uint8)
        zeros = torch.zeros(12, dtype=torch.long)
        weight = ops.dequantize_per_channel(own["weight"], own["weight_scale"], zeros, 0, -128, 127, torch.int8)
        y = nn.functional.conv2d(
            ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *x_range), *x_range), weight, conv.bias, 2, 1
        )
        theirs = ops.dequantize_per_tensor(ops.quantize_per_tensor(y, *y_range), *y_range)
        gap = (layer(x) - theirs).abs()
    assert gap.max() <= 1.01 * layer.output_scale
    assert (gap > 0.5 * layer.output_scale).float().mean() < 0.01  # ties only


def ordered_layers() -> dict[str, tuple[LowBits, str, Tensor]]:
    torch.manual_seed(0)
    return {
        "int4": (Int4WeightLinear(nn.Linear(128, 48), 32), "cpu_tiles", torch.randn(5, 128)),
        "conv": (Int8DynamicConv2d(nn.Conv2d(16, 24, 3, padding=1, stride=2)), "onednn", torch.randn(2, 16, 9, 9)),
    }


@pytest.mark.parametrize("kind", ["int4", "conv"])
def test_a_weight_in_an_order_of_this_machine_is_held_once_and_shown_plainly(kind: str) -> None:
    layer, kernel, x = ordered_layers()[kind]
    plain, wanted, held = copy.deepcopy(layer.state_dict()), layer(x), weight_bytes(layer)
    before = layer.weight.clone()

    layer.use(kernel)

    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(layer.weight, before)  # it lies in another order, or elsewhere
    assert held <= weight_bytes(layer) <= held + 4 * len(layer.weight_scale)  # zero points
    torch.testing.assert_close(layer.state_dict(), plain, rtol=0, atol=0)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert other.kernel == kernel
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    file = layer.for_export()
    assert file.kernel == layer.portable and layer.kernel == kernel
    torch.testing.assert_close(file.weight, before, rtol=0, atol=0)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)  # which took nothing away
    layer.use(layer.KERNELS[0])
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
    assert weight_bytes(layer) == held


@pytest.mark.parametrize("kind", ["int4", "conv"])
def test_loading_and_converting_go_by_way_of_the_plain_order(kind: str) -> None:
    layer, kernel, x = ordered_layers()[kind]
    torch.manual_seed(1)
    other = type(layer)(nn.Linear(128, 48), 32) if kind == "int4" else type(layer)(nn.Conv2d(16, 24, 3, 2, 1))
    other.use(kernel)
    other.load_state_dict(layer.state_dict())
    assert other.kernel == kernel
    torch.testing.assert_close(other(x), layer(x), rtol=1e-5, atol=1e-6)
    half = copy.deepcopy(other).to(torch.bfloat16)
    assert half.kernel == kernel
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), rtol=0.1, atol=0.05)
    assert half.to("meta").kernel != kernel  # a device that does not have it


def test_torchscript_writes_the_plain_weight_and_orders_it_when_loaded() -> None:
    layer, kernel, x = ordered_layers()["conv"]
    wanted = layer(x)
    layer.use(kernel)
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(layer.for_export(scripted=True)), stream)
    stream.seek(0)
    loaded = torch.jit.load(stream)
    assert loaded.kernel == kernel
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_is_not_there_changes_nothing() -> None:
    layer, x = Int4WeightLinear(nn.Linear(96, 40), 16), torch.randn(3, 96)
    wanted = layer(x)
    with pytest.raises(KernelError, match=r"Int4WeightLinear cannot use 'cpu_tiles': .* dividable by 16"):
        layer.use("cpu_tiles")
    with pytest.raises(KernelError, match="'cuda_tiles' of Int4WeightLinear is for cuda, its weight on cpu"):
        layer.use("cuda_tiles")
    with pytest.raises(ValueError, match="it has shift, lookup, cpu_tiles, cuda_tiles"):
        layer.use("tiles")
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)


def test_the_fastest_correct_kernel_is_chosen_once() -> None:
    calls: list[str] = []

    class Layer(LowBits):
        KERNELS = ("slow", "wrong", "broken", "fast")

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


def test_of_two_kernels_about_as_fast_the_last_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Even(LowBits):
        KERNELS = ("first", "middle", "last", "slow")

        def forward(self, x: Tensor) -> Tensor:
            return x

    times = {"first": 1.0, "middle": 0.9, "last": 1.0, "slow": 1.2, "": 2.0}
    monkeypatch.setattr(kernels, "_seconds", lambda action, x: times[getattr(action, "kernel", "")])
    timing = choose_kernel(Even(), torch.ones(3, 5), nn.Identity())
    assert (timing.kernel, timing.kernel_ms, timing.slower) == ("last", 1000.0, False)


@pytest.mark.parametrize("shape", [(5, 96, 40), (17, 27, 10), (40, 64, 16), (16, 9, 1)])
def test_an_integer_product_is_padded_to_what_cublas_takes(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    a = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    wanted = a.int() @ weight.int().t()
    torch.testing.assert_close(in_eights(a, weight), wanted, rtol=0, atol=0)
    torch.testing.assert_close(int_matmul(a, weight), wanted, rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.script(in_eights)(a, weight), wanted, rtol=0, atol=0)


@pytest.mark.gpu
def test_kernels_agree_on_cuda() -> None:
    x = torch.randn(5, 96, device="cuda")
    for layer in (Int8WeightLinear(nn.Linear(96, 44)), Int8DynamicLinear(nn.Linear(96, 44))):
        wanted = layer(x.cpu())
        timing = choose_kernel(layer.cuda(), x, nn.Identity())
        assert timing.times_ms
        torch.testing.assert_close(layer(x).cpu(), wanted, rtol=1e-3, atol=1e-3)
    conv, image = Int8DynamicConv2d(nn.Conv2d(3, 12, 3)).cuda(), torch.rand(2, 3, 9, 9, device="cuda")
    wanted = conv(image)
    conv.use("int8")
    torch.testing.assert_close(conv(image), wanted, rtol=1e-4, atol=1e-4)
    linear = Int4WeightLinear(nn.Linear(256, 64), 32).to("cuda", torch.bfloat16)
    plain, rows = linear.weight.clone(), torch.randn(7, 256, device="cuda", dtype=torch.bfloat16)
    wanted = linear(rows)
    linear.use("cuda_tiles")
    torch.testing.assert_close(linear(rows), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(linear.plain_weight(), plain, rtol=0, atol=0)


def test_a_row_of_one_value_has_a_scale_of_its_own() -> None:
    """Depthwise 1 x 1 convolutions (FastViT): torchao would take one range over all channels."""
    weight = torch.tensor([0.5, -2.0, 0.01]).reshape(3, 1, 1, 1)
    integers, scale = int8_rows(weight)
    assert integers.shape == weight.shape
    torch.testing.assert_close(integers.reshape(3) * scale, weight.reshape(3), rtol=1e-2, atol=0)
