"""Augmentation of a batch on its device does to each image what its own random numbers say, and nothing else."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning")

from rescompress.errors import InputError
from rescompress.lightning.data._augment import (
    crop_and_flip,
    mixed_images,
    resized,
    train_transform,
)
from rescompress.lightning.data._augment import (
    test_transform as evaluation_transform,
)
from rescompress.lightning.data._order import drawn, mixed, uniform


@pytest.mark.parametrize("flip", ["none", "horizontal", "both"])
def test_each_image_is_shifted_and_mirrored_by_its_own_numbers(flip: str) -> None:
    images = torch.randint(1, 256, (12, 3, 7, 9), dtype=torch.uint8)
    draws = mixed(torch.arange(12))

    found = crop_and_flip(images, draws, 2, flip)

    seen = set()
    for image, one, (down, right, across, upright) in zip(found, images, uniform(draws, 4).tolist(), strict=True):
        top, left = int(down * 5), int(right * 5)
        expected = F.pad(one, (2, 2, 2, 2))[:, top : top + 7, left : left + 9]
        sides = [2] * (flip != "none" and across < 0.5) + [1] * (flip == "both" and upright < 0.5)
        torch.testing.assert_close(image, expected.flip(sides), rtol=0, atol=0)
        seen.add((top, left, *sides))
    assert len(seen) > 6


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = torch.rand(6, 1, 8, 8)
    draws = mixed(torch.arange(6))

    whole = crop_and_flip(images, draws, 3, "both")

    torch.testing.assert_close(crop_and_flip(images[4:], draws[4:], 3, "both"), whole[4:], rtol=0, atol=0)


def test_resizing_averages_what_falls_together() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4)

    torch.testing.assert_close(resized(images, (1, 1)).flatten(), torch.tensor([7.5]))
    assert resized(images, (4, 4)) is images


def test_the_transform_of_evaluation_takes_the_middle() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 15:25] = 200

    found = evaluation_transform((10, 10), crop_ratio=0.5)(image)

    torch.testing.assert_close(found, image[:, 5:15, 15:25])


def test_erasing_fills_with_the_mean_colour() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    with drawn(0):
        found = train_transform((32, 32), erase=1.0, mean=(0.5, 0.4, 0.3))(image)

    colours = {tuple(pixel) for pixel in found.flatten(1).T.tolist()}
    assert colours == {(0, 0, 0), (128, 102, 76)}


def test_mixed_labels_are_the_shares_of_the_pixels() -> None:
    images = torch.stack([torch.full((1, 8, 8), float(value)) for value in range(4)])
    labels = torch.arange(4)

    for ways in ((0.4, 0.0), (0.0, 1.0)):
        found, weights = mixed_images(images, labels, 3, *ways, 4)
        torch.testing.assert_close(found.mean((1, 2, 3)), weights @ torch.arange(4.0))
        assert (weights > 0).sum() > 4


def test_mixing_needs_one_label_for_each_image() -> None:
    with pytest.raises(InputError, match="need one class per image"):
        mixed_images(torch.zeros(2, 1, 4, 4), torch.zeros(2, 5), 0, 0.2, 0.0, 5)
