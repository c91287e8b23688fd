"""patch_resize: timm's own resizing is the reference; upsizing loses nothing; checkpoints of the old size load."""

import copy

import pytest
import timm
import torch
from torch import nn

import rescompress as rc
from rescompress.layers.resample import resample_patch_kernel
from tests.zoo import randomize


def vit(**options: object) -> nn.Module:
    options = {"img_size": 96, "depth": 2, **options}
    return randomize(timm.create_model("vit_tiny_patch16_224", **options)).eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch_size", [32, 24, 12, 8, 48, (32, 24)])
@pytest.mark.parametrize(
    "options", [{}, {"no_embed_class": True, "reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}]
)
def test_equals_timms_set_input_size(patch_size: int | tuple[int, int], options: dict[str, object]) -> None:
    model, x = vit(**options), images(96, 96)
    reference = copy.deepcopy(model)
    reference.set_input_size(patch_size=patch_size)
    small = rc.compress(model, rc.PatchResize(patch_size=patch_size), example_input=x)
    torch.testing.assert_close(small.patch_embed.proj.weight, reference.patch_embed.proj.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.pos_embed, reference.pos_embed, rtol=1e-5, atol=1e-5)
    assert small.patch_embed.grid_size == reference.patch_embed.grid_size
    assert small.patch_embed.num_patches == reference.patch_embed.num_patches
    assert tuple(small.patch_embed.patch_size) == tuple(reference.patch_embed.patch_size)
    with torch.no_grad():
        torch.testing.assert_close(small(x), reference(x), rtol=1e-5, atol=1e-5)
        a, b = small.forward_intermediates(x)[1], reference.forward_intermediates(x)[1]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_patch_that_does_not_fill_the_image_is_said() -> None:
    model, x = vit(img_size=112), images(112, 112)
    reference = copy.deepcopy(model)
    reference.set_input_size(patch_size=20)
    with pytest.warns(rc.RescompressWarning, match="12 rows and 12 columns at its end are not read"):
        small = rc.compress(model, rc.PatchResize(patch_size=20), example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("larger", [(32, 32), (20, 20), (24, 17), (16, 48)])
def test_up_then_down_gives_the_kernel_back(larger: tuple[int, int]) -> None:
    kernel = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    back = resample_patch_kernel(resample_patch_kernel(kernel, larger), (16, 16))
    torch.testing.assert_close(back, kernel, rtol=1e-4, atol=1e-4)
    exact = resample_patch_kernel(resample_patch_kernel(kernel.double(), larger), (16, 16))
    torch.testing.assert_close(exact, kernel.double(), rtol=1e-10, atol=1e-10)


def test_up_then_down_on_a_model() -> None:
    model, x = vit(), images(96, 96)
    up = rc.compress(model, rc.PatchResize(patch_size=32), example_input=x)
    down = rc.compress(up, rc.PatchResize(patch_size=16), example_input=x)
    torch.testing.assert_close(down.patch_embed.proj.weight, model.patch_embed.proj.weight, rtol=1e-4, atol=1e-4)
    assert [step.patch_size for step in rc.spec_of(down)] == [(32, 32), (16, 16)]


def test_larger_patch_of_enlarged_image_gives_the_old_tokens() -> None:
    """The paper's claim: on an upsampled image the larger kernel computes what the old one did on the image."""
    kernel = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patch = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    enlarged = nn.functional.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    old = nn.functional.conv2d(patch, kernel)
    new = nn.functional.conv2d(enlarged, resample_patch_kernel(kernel, (16, 16)))
    torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


def test_dynamic_image_sizes() -> None:
    model = vit(dynamic_img_size=True, img_size=96)
    small = rc.compress(model, rc.PatchResize(scale=0.5), example_input=images(160, 128))
    reference = copy.deepcopy(model)
    reference.set_input_size(patch_size=32)
    with torch.no_grad():
        for size in ((96, 96), (160, 128), (32, 224)):
            x = images(*size)
            torch.testing.assert_close(small(x), reference(x), rtol=1e-5, atol=1e-5)


def test_dynamic_padding() -> None:
    model = vit(dynamic_img_size=True, dynamic_img_pad=True)
    small = rc.compress(model, rc.PatchResize(scale=0.5), example_input=images(90, 90))
    reference = copy.deepcopy(model)
    reference.set_input_size(patch_size=32)
    with torch.no_grad():
        for size in ((90, 75), (33, 64)):
            x = images(*size)
            torch.testing.assert_close(small(x), reference(x), rtol=1e-5, atol=1e-5)


def test_scale_snaps_to_the_nearest_patch_and_says_so() -> None:
    with pytest.warns(rc.RescompressWarning, match="6 x 6 becomes 4 x 4, a scale of 0.6667"):
        small = rc.compress(vit(), rc.PatchResize(scale=0.7), example_input=images(96, 96))
    assert small.patch_embed.grid_size == (4, 4)
    assert small.patch_embed.proj.kernel_size == (24, 24)


def test_half_precision_and_frozen_parameters() -> None:
    model = vit().to(torch.bfloat16)
    model.patch_embed.proj.weight.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    small = rc.compress(model, scale=0.5)
    assert small.patch_embed.proj.weight.dtype == torch.bfloat16 and small.pos_embed.dtype == torch.bfloat16
    assert not small.patch_embed.proj.weight.requires_grad and not small.pos_embed.requires_grad
    assert small.patch_embed.proj.bias.requires_grad


def test_after_input_resize() -> None:
    model, x = vit(), images(96, 96)
    both = rc.Spec.of(rc.InputResize(size=64), rc.PatchResize(scale=0.5))
    small = rc.compress(model, both, example_input=x)
    assert small.patch_embed.grid_size == (2, 2)
    with torch.no_grad():
        assert small(x).shape == (2, 1000)
    copy.deepcopy(small).load_state_dict(model.state_dict())


@pytest.mark.parametrize("patch_size", [97, (16, 200)])
def test_patch_larger_than_the_image(patch_size: int) -> None:
    with pytest.raises(rc.SpecError, match="larger than the 96 x 96 image"):
        rc.compress(vit(), rc.PatchResize(patch_size=patch_size), example_input=images(96, 96))


def test_scale_that_changes_nothing() -> None:
    with pytest.raises(rc.SpecError, match="changes nothing"):
        rc.compress(vit(img_size=32), rc.PatchResize(scale=0.99), example_input=images(32, 32))
