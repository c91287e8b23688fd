"""What timm documents of its models goes on working on compressed ones: features, heads, checkpointing, layouts."""

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from tests.families.timm_classes import build, image, small_of
from tests.zoo import randomize

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::rescompress.errors.RescompressWarning"),
]

KINDS = (
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_byobnet",
    "test_vit",
    "vit_tiny_patch16_dinov3_qkvb",
    "beitv2_base_patch16_224",
    "test_vit_relpos",
    "cait_xxs24_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "test_coatnet",
    "hiera_tiny_224",
    "levit_128s",
    "gmlp_ti16_224",
    "xcit_nano_12_p8_384",
)
"""A representative of each kind."""


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """An original, what scale=0.5 makes of it, and images."""
    name = request.param
    model, x = build(name), image(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RescompressWarning)
        return model, rc.compress(model, scale=0.5, example_input=x), x


def close(found: Any, expected: Any, share: float = 1e-5) -> None:
    """Compare nested outputs up to a share of their size."""
    torch.testing.assert_close(found, expected, rtol=share, atol=share)


@torch.no_grad()
def test_forward_is_head_of_features(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, small, x = pair
    close(small.forward_head(small.forward_features(x)), small(x))


@torch.no_grad()
def test_the_head_without_its_classifier(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, small, x = pair
    features = small.forward_head(small.forward_features(x), pre_logits=True)
    headless = copy.deepcopy(small)
    headless.reset_classifier(0)
    original = copy.deepcopy(model)
    original.reset_classifier(0)
    assert headless(x).shape == original(x).shape
    assert features.shape == model.forward_head(model.forward_features(x), pre_logits=True).shape
    if torch.equal(original(x), model.forward_head(model.forward_features(x), pre_logits=True)):  # not so for all
        close(headless(x), features)


def test_a_new_classifier(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, small, x = pair
    changed, as_original = copy.deepcopy(small), copy.deepcopy(model)
    changed.reset_classifier(10)
    as_original.reset_classifier(10)
    assert list(changed.state_dict()) == list(as_original.state_dict())
    scores = changed(x)
    assert scores.shape == (2, 10)
    scores.sum().backward()
    classifier = changed.get_classifier()
    for layer in classifier if isinstance(classifier, list | tuple | nn.ModuleList) else [classifier]:
        assert all(parameter.grad is not None for parameter in layer.parameters())
    with torch.no_grad():
        close(changed.forward_features(x), small.forward_features(x), 0)
    assert rc.spec_of(changed) == rc.spec_of(small)


def test_the_classifier_is_found(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, small, _ = pair
    assert str(small.get_classifier()) == str(model.get_classifier())
    assert small.num_classes == model.num_classes
    assert small.num_features == model.num_features


@torch.no_grad()
def test_intermediates_are_those_of_the_compressed_model(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, small, x = pair
    final, features = small.forward_intermediates(x)
    close(final, small.forward_features(x))
    _, original = model.forward_intermediates(x)
    assert [f.shape[:2] for f in features] == [f.shape[:2] for f in original]
    assert all(bool(f.isfinite().all()) for f in features)
    for before, after in zip(original, features, strict=True):
        assert after.shape[-1] < before.shape[-1] or before.shape[-1] <= 2
    chosen = small.forward_intermediates(x, indices=[0, len(features) - 1], intermediates_only=True)
    close(chosen, [features[0], features[-1]], 0)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_dinov3_qkvb", "beitv2_base_patch16_224"])
@torch.no_grad()
def test_intermediates_name_the_right_blocks_after_pooling(name: str) -> None:
    options = {} if name == "test_vit" else {"depth": 4}
    model, x = build(name, **options), image(name)
    small = rc.compress(model, rc.TokenPool(after_block=1), example_input=x)
    left: dict[int, Tensor] = {}
    for index, block in enumerate(small.blocks):
        block.register_forward_hook(lambda _, args, out, index=index: left.update({index: out}))
    prefix = small.num_prefix_tokens
    for index in (0, 1, len(model.blocks) - 1):
        [feature] = small.forward_intermediates(x, indices=[index], output_fmt="NLC", intermediates_only=True)
        close(feature, left[index_of(small, model, index)][:, prefix:], 0)


def index_of(small: nn.Module, model: nn.Module, index: int) -> int:
    """Return at which place of the compressed sequence the block of this index stands."""
    names = [name for name, _ in small.blocks.named_children()]
    return names.index(str(index)) if len(names) > len(model.blocks) else index


def test_checkpointing_changes_no_gradient(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, small, x = pair
    saving = copy.deepcopy(small)
    saving.set_grad_checkpointing(True)
    plain, saved = gradients(copy.deepcopy(small), x), gradients(saving, x)
    assert plain.keys() == saved.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(saved[name], grad, rtol=1e-4, atol=1e-4 * max(1.0, grad.abs().max().item()))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all parameters in training mode, with normalisation as in evaluation."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)
    outputs = model(x)
    sum(y.square().sum() for y in (outputs if isinstance(outputs, list | tuple) else [outputs])).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_channels_last(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, small, x = pair
    moved = copy.deepcopy(small).to(memory_format=torch.channels_last)
    close(moved(x.contiguous(memory_format=torch.channels_last)), small(x), 1e-4)


@torch.no_grad()
def test_autocast_in_bfloat16_costs_little_more_than_it_does_the_original(
    pair: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    model, small, x = pair
    errors = []
    for one in (model, small):
        expected = one(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = one(x)
        errors.append(float((found.float() - expected).norm() / expected.norm()))
    assert errors[1] < max(4 * errors[0], 0.05)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224", "hiera_tiny_224"])
@torch.no_grad()
def test_without_classes_a_model_gives_its_features(name: str) -> None:
    model, x = build(name, num_classes=0), image(name)
    small = rc.compress(model, scale=0.5, example_input=x)
    features = small(x)
    assert features.shape == (2, model.num_features)
    close(features, small.forward_head(small.forward_features(x), pre_logits=True))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_vit", "hiera_tiny_224", "swin_tiny_patch4_window7_224"]
)
@torch.no_grad()
def test_extractors_of_features(name: str) -> None:
    x, side = image(name), small_of(name).side
    options = dict(small_of(name).options)
    if name not in ("test_resnet", "test_convnext"):
        options["img_size"] = side
    extractor = randomize(timm.create_model(name, features_only=True, **options)).eval()
    small = rc.compress(extractor, scale=0.5, example_input=x)
    before, after = (as_maps(one, one(x)) for one in (extractor, small))
    assert small.feature_info.channels() == [f.shape[1] for f in after]
    assert small.feature_info.reduction() == [2 * reduction for reduction in extractor.feature_info.reduction()]
    for old, new in zip(before, after, strict=True):
        assert new.shape[:2] == old.shape[:2]
        if new.shape == old.shape:  # brought back to the whole grid
            assert (new - old).abs().max() > 1e-3 * old.abs().max()
        else:
            assert new.shape[2:] == torch.Size([-(-old.shape[2] // 2), -(-old.shape[3] // 2)])
        assert bool(new.isfinite().all())


def as_maps(extractor: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """Return features as (B, C, H, W): some hosts give (B, H, W, C)."""
    last = [f.shape[-1] for f in features] == extractor.feature_info.channels()
    return [f.permute(0, 3, 1, 2) if last else f for f in features]
