"""Bytes: weights from storage, live activations against known peaks, real memory in a process of its own."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rescompress.errors import MeasureError
from rescompress.layers.resize import Resize2d, ResizedConv2d
from rescompress.measure import live_activation_bytes, peak_memory, weight_bytes

MB = 1e6


def _resnet50() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        return models.resnet50()


def test_live_activations_of_resnet50_are_the_known_ones() -> None:
    x = torch.empty(1, 3, 224, 224)
    model = _resnet50()
    assert round(live_activation_bytes(model, x) / MB, 2) == 11.04
    conv = model.conv1
    model.conv1 = ResizedConv2d.from_conv(conv, after=Resize2d(scale=(0.5, 0.5)))
    assert round(live_activation_bytes(model, x) / MB, 2) == 4.62
    model.conv1 = nn.Conv2d(3, 64, 9, stride=4, padding=3, bias=False, device="meta")
    assert round(live_activation_bytes(model, x) / MB, 2) == 3.21


def test_live_activations_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(inplace=True), nn.Linear(100, 2), nn.ReLU())
    x = torch.zeros(1, 4)
    # The input and the hidden layer, with the third layer's output at the end of its call.
    assert live_activation_bytes(model, x) == 4 * (4 + 100 + 2)


def test_a_training_step_keeps_what_the_backward_needs() -> None:
    depth, width = 6, 50
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for _ in range(depth)))
    x = torch.zeros(8, width)
    map_bytes = 4 * 8 * width
    training = live_activation_bytes(model, x, training=True)
    # The input and the output of every sigmoid; the first backward steps add a few maps and one weight gradient.
    assert training >= (depth + 1) * map_bytes
    assert training <= (depth + 4) * map_bytes + 4 * (width * width + width)
    # Inference: the caller's input, what the outer Sequential holds, and the input and output of the sigmoid.
    assert live_activation_bytes(model, x) == 4 * map_bytes


def test_a_model_that_looks_at_values_is_run(branching: nn.Module) -> None:
    assert live_activation_bytes(branching, torch.ones(1, 4)) >= 3 * 16
    assert live_activation_bytes(branching, torch.ones(1, 4)) > live_activation_bytes(branching, -torch.ones(1, 4))


def test_live_activations_leave_the_model_alone(small: nn.Module, branching: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    state = torch.get_rng_state()
    live_activation_bytes(small, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), training=True)
    live_activation_bytes(branching, torch.ones(1, 4), training=True)
    for name, tensor in small.state_dict().items():
        assert_close(tensor, before[name])
    assert all(parameter.grad is None for model in (small, branching) for parameter in model.parameters())
    assert small.training
    assert_close(torch.get_rng_state(), state)


def test_no_training_step_without_a_gradient(small: nn.Module) -> None:
    with pytest.raises(MeasureError, match="requires a gradient"):
        live_activation_bytes(small.requires_grad_(False), torch.zeros(1, 3, 8, 8), training=True)


def test_weights_count_each_storage_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    assert weight_bytes(model) == 800
    model[1].weight = nn.Parameter(model[0].weight.detach().t())  # another parameter, the same storage
    assert weight_bytes(model) == 400
    model.register_buffer("mask", torch.zeros(7, dtype=torch.int8))
    assert weight_bytes(model.half()) == 200 + 200 + 7  # half() made two storages out of one


def test_int8_weights_count_one_byte_each() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert 128 * 256 <= weight_bytes(model) <= 128 * 256 + 128 * 16


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.quantize_per_tensor(torch.randn(8, 4, 3, 3), 0.1, 0, torch.qint8)
        self.packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], 1)


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_count() -> None:
    assert weight_bytes(Packed()) == 8 * 4 * 3 * 3


def test_the_process_takes_what_the_model_needs() -> None:
    found = peak_memory(torch.nn.Sequential(nn.Linear(4000, 2000), nn.Linear(2000, 16)), torch.ones(2000, 4000))
    assert found.method in ("VmHWM", "ru_maxrss")
    if found.method == "VmHWM":
        assert 32 * MB <= found.load_bytes <= 45 * MB
        assert 16 * MB <= found.run_bytes <= 70 * MB  # 2000 x 2000 floats, and workspace


def test_a_quantized_model_is_measured() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    representation = repr(model)
    assert peak_memory(model, torch.ones(1, 64)).run_bytes >= 0
    assert repr(model) == representation


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_cannot_be_pickled_is_refused_with_the_reason() -> None:
    with pytest.raises(MeasureError, match=r"Locked cannot be pickled: .*lock"):
        peak_memory(Locked(), torch.zeros(1))


def test_a_model_of_the_running_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Locked, "__module__", "__main__")
    with pytest.raises(MeasureError, match="Locked lives in the script that runs"):
        peak_memory(Locked(), torch.zeros(1))


def test_a_model_that_fails_in_its_process_tells_why() -> None:
    with pytest.raises(MeasureError, match=r"ended with code 1: .*mat1 and mat2"):
        peak_memory(nn.Linear(4, 4), torch.zeros(1, 5))
