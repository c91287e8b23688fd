"""Small models for the tests of measuring."""

import pytest
import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A convolution, a norm and a linear layer, whose counts can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Branching(nn.Module):
    """Takes another course for other values, so that shapes alone cannot tell what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.second(self.first(x))
        return self.first(x)


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def branching() -> Branching:
    torch.manual_seed(0)
    return Branching()
