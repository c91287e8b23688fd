"""What the tests of fold share: a small stem with a resize behind it, and comparisons that cannot be of equals."""

import torch
from torch import Tensor, nn

from rescompress.layers.resize import Resize2d, ResizedConv2d

EVERY = [
    ("nearest", False),
    ("bilinear", False),
    ("area", False),
    ("bicubic", False),
    ("bilinear", True),
    ("bicubic", True),
]
"""Each mode, with antialias where it has one."""


def stem(conv: nn.Conv2d | None = None, *, before: nn.Module | None = None, same: bool = False, **resize) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 7, 2, 3) if conv is None else conv
    return ResizedConv2d.from_conv(conv, before=before, after=Resize2d(**resize), same_padding=same).eval()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare relatively to the largest output."""
    scale = float(expected.detach().abs().max()) or 1.0
    torch.testing.assert_close(actual / scale, expected / scale, atol=tolerance, rtol=0.0)


def agree(model: nn.Module, folded: nn.Module, *sides: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
    assert not isinstance(folded, ResizedConv2d), "nothing was folded, and the comparison would be of equals"
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    with torch.no_grad():
        for height, width in sides:
            x = torch.randn(2, 3, height, width).to(dtype)
            close(folded(x), model(x), tolerance)
