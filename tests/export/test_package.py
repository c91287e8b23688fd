"""A compiled package is given what it was compiled for: other orders of memory are put right, other shapes refused."""

import pytest
import torch
from torch import nn

import rescompress as rc

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    path = tmp_path_factory.mktemp("package") / "small.aoti.pt2"
    # The example is in another order than most inputs will be.
    return model, rc.load(rc.export(model, path, X.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    "x",
    [
        X,
        X.contiguous(memory_format=torch.channels_last),
        X.transpose(2, 3),
        X[:, :, ::1].flip(3),
        X[:1],
        X.repeat(3, 1, 1, 1),
    ],
    ids=["contiguous", "channels last", "transposed", "flipped", "one", "six"],
)
def test_any_order_of_memory_and_any_batch(written, x):
    model, program = written

    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [X[:, :1], X[0], X[..., :8], torch.randn(2, 3, 32, 32), X.double(), X.half(), X[:0]],
    ids=["one channel", "no batch", "narrow", "large", "double", "half", "empty"],
)
def test_other_shapes_and_types_are_refused(written, x):
    with pytest.raises(rc.InputError, match=r"compiled for float32 \[2, 3, 16, 16\] and dynamic='batch', got "):
        written[1](x)


def test_another_number_of_inputs_is_refused(written):
    with pytest.raises(rc.InputError, match="takes 1 tensors, got 2"):
        written[1](X, X)
