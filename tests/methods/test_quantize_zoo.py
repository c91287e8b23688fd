"""Quantize on every model of the zoo: what it computes stays near, the original is untouched, checkpoints load."""

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.compress import record_of
from rescompress.layers import kernels
from rescompress.layers.low_bits import LowBits
from rescompress.measure.memory import weight_bytes
from rescompress.methods.quantize import LEFT
from rescompress.surgery import fingerprint
from tests.zoo import MODELS, build, image

SCHEMES = {"conv": ("w8a8_static", "w8a8", "w8"), "vit": ("w8a8", "w8a8_static", "w4", "w8")}
"""By kind of model; the first is tested always, the others where slow tests are."""

MOST = {"w8": 0.04, "w8a8": 0.08, "w8a8_static": 0.12, "w4": 0.35}
"""Largest relative error of the outputs of a network of random weights."""

QUICK = [(name, SCHEMES[case.kind][0]) for name, case in MODELS.items()]
SLOW = [(name, scheme) for name, case in MODELS.items() for scheme in SCHEMES[case.kind][1:]]


@pytest.fixture(autouse=True)
def quickly(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROUNDS", 1)


def low_bits(model: nn.Module, scheme: str, x: Tensor) -> nn.Module:
    calibration = [x] if scheme == "w8a8_static" else None
    return rc.compress(model, rc.Quantize(scheme=scheme), example_input=x, calibration=calibration)


def check(name: str, scheme: str) -> None:
    model, x = build(name), image(name)
    before, state = fingerprint(model), {key: value.clone() for key, value in model.state_dict().items()}
    small = low_bits(model.train(), scheme, x)  # a user's model may be in any mode
    assert model.training and small.training
    model.eval(), small.eval()
    with torch.no_grad():
        wanted, found = model(x), small(x)
        assert 0 < (found - wanted).norm() < MOST[scheme] * wanted.norm()
        small.load_state_dict(state)
        torch.testing.assert_close(small(x), found, rtol=0, atol=0)
    assert fingerprint(model) == before
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert weight_bytes(small) < weight_bytes(model)
    layers = {
        layer
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)  # which holds a weight of its own
    }
    done = {layer for layer, module in small.named_modules() if isinstance(module, LowBits)}
    log = record_of(small).log
    left = {layer for line in log if LEFT in line for layer in listed(line)}
    assert done and done | left == layers and not done & left  # every layer is in low bits or has a reason


def listed(line: str) -> list[str]:
    return line.rpartition(": ")[2].split(", ")


@pytest.mark.parametrize(("name", "scheme"), QUICK, ids=[f"{name}-{scheme}" for name, scheme in QUICK])
def test_every_model(name: str, scheme: str) -> None:
    check(name, scheme)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), SLOW, ids=[f"{name}-{scheme}" for name, scheme in SLOW])
def test_every_model_with_the_other_schemes(name: str, scheme: str) -> None:
    check(name, scheme)


@pytest.mark.parametrize("before", [rc.PatchResize(scale=0.5), rc.TokenMerge(r=1), rc.TokenPool(after_block=2)])
def test_low_bits_behind_fewer_tokens(before: rc.Step) -> None:
    model, x = build("test_vit"), image("test_vit")
    shorter = rc.compress(model, before, example_input=x)
    both = rc.compress(model, rc.Spec.of(before, rc.Quantize(scheme="w8a8")), example_input=x)
    with torch.no_grad():
        wanted, found = shorter(x), both(x)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


class Sharing(nn.Module):
    """A convolution and a linear layer that are called twice, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(32, 32, 3, padding=1)
        self.alias = self.twice
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.alias(self.twice(x).relu()).relu().mean((2, 3))
        return self.head(self.two(self.one(self.one(x)).relu()))


@pytest.mark.parametrize("scheme", ["w8", "w8a8", "w8a8_static", "w4"])
def test_shared_modules_and_weights(scheme: str) -> None:
    torch.manual_seed(0)
    model, x = Sharing().eval(), torch.randn(2, 3, 32, 32)
    small = low_bits(model, scheme, x)
    assert small.alias is small.twice
    with torch.no_grad():
        wanted, found = model(x), small(x)
        assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert other.alias is other.twice
            torch.testing.assert_close(other(x), found, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "scheme"), [("resnet18", "w8a8"), ("test_vit", "w8a8"), ("test_vit", "w4")])
def test_a_quantized_model_compiles_without_graph_breaks(name: str, scheme: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 64) if name == "resnet18" else torch.randn(2, *model.default_cfg["input_size"])
    small = low_bits(model, scheme, x)
    torch.compiler.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), small(x), rtol=1e-4, atol=1e-4)
