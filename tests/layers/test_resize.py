"""Resize2d: the side is the floor of the exact product, and a scale of 1 passes through."""

from fractions import Fraction

import pytest
import torch

from rescompress.layers.resize import MODES, Resize2d


@pytest.mark.parametrize("kwargs", [{}, {"scale": (0.5, 0.5), "size": (2, 2)}])
def test_a_resize_takes_a_scale_or_a_size(kwargs: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="either a scale or a size"):
        Resize2d(**kwargs)


def test_a_resize_never_makes_an_empty_map() -> None:
    resize = Resize2d((0.25, 0.25))
    assert resize(torch.rand(1, 1, 3, 8)).shape == (1, 1, 1, 2)
    x = torch.rand(2, 3, 4, 4)
    assert Resize2d((1.0, 1.0))(x) is x


@pytest.mark.parametrize("mode", MODES)
def test_the_side_is_the_floor_of_the_exact_product(mode: str) -> None:
    """floor(90 * 0.7) is 62 in floating point; nine tenths of ninety and the like must not lose a pixel."""
    for q in range(2, 17):
        for p in range(1, q):
            resize = Resize2d((p / q, float(f"{p / q:.15g}")), mode=mode)
            for side in (q, 3 * q, 30 * q, 31 * q + 1):
                expected = int(Fraction(p, q) * side)
                assert resize.target(side, side) == (expected, expected)
            x = torch.empty(1, 1, 5 * q, 7 * q)
            assert resize(x).shape[2:] == (5 * p, 7 * p)
