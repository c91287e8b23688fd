"""Every class of model that timm registers: what compress promises, for each of them at a small size.

By default those in QUICK, one of each kind; `pytest -m slow tests/families/test_timm.py` tests the others.
"""

import contextlib
import copy
import importlib
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rescompress as rc
from rescompress.anatomy import Anatomy, ViTAnatomy
from rescompress.families import describe
from rescompress.measure import count_macs
from rescompress.self_check import apply_steps
from rescompress.surgery import clone_shared, fingerprint
from tests.families.timm_classes import TIMM, build, image, small_of

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_EXPORTED: dict[str, str] = {}
"""Entry points that torch.export does not take before anything is done to them, and what it says."""

QUICK = (
    "test_byobnet",
    "test_convnext",
    "test_coatnet",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "cait_xxs24_224",
    "crossvit_tiny_240",
    "beitv2_base_patch16_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "hiera_tiny_224",
    "levit_128s",
    "swin_tiny_patch4_window7_224",
    "gmlp_ti16_224",
)
"""Entry points that are tested by default."""

BY_ARITHMETIC: dict[str, tuple[float, str]] = {
    "efficientformer_l1": (0.05, "its original is made for one resolution"),
    "samvit_base_patch16_224": (0.06, "the original fills up windows of 14 x 14 on any map; ours shrink with the grid"),
}
"""Entry point: how far its cost may lie from that of the smaller grid's share, and why no original could be counted."""


@dataclass
class Pair:
    """An original and what `scale=0.5` makes of it."""

    name: str
    original: nn.Module
    small: nn.Module
    x: Tensor
    expected: list[Tensor]
    found: list[Tensor]
    before: dict[str, int]
    state: dict[str, Tensor]


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all tensors that a model gives."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TIMM],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    name = request.param
    model, x = build(name), image(name)
    expected = run(model, x)
    before = fingerprint(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", rc.RescompressWarning
        )  # of outputs that are smaller maps, and scales not reached
        small = rc.compress(model, scale=0.5, example_input=x)
    return Pair(name, model, small, x, expected, run(small, x), before, state)


def assert_same(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    """Compare outputs; they may be apart by a share of the largest value."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=share * max(1.0, b.abs().max().item()))


def test_every_module_of_timm_is_covered() -> None:
    covered = {type(build(name, device="meta")).__module__ for name in TIMM}
    missing = set(timm.list_modules()) - {module.rpartition(".")[2] for module in covered}
    assert {module for module in missing if registers_a_class(module)} == set()


def registers_a_class(module: str) -> bool:
    """Whether entry points of this module build classes that are defined there, not another module's."""
    namespace = importlib.import_module(f"timm.models.{module}")
    return any(
        isinstance(thing, type) and issubclass(thing, nn.Module) and hasattr(thing, "forward_features")
        for thing in vars(namespace).values()
        if getattr(thing, "__module__", None) == namespace.__name__
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_class_of_timm_is_covered() -> None:
    covered = {type(build(name, device="meta")) for name in TIMM}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert type(model) in covered, f"{name} is a {type(model).__name__}, which no entry of TIMM is"


def test_identity_of_the_default(pair: Pair) -> None:
    same = clone_shared(pair.original)
    anatomy = replace(describe(pair.original, (pair.x,)), multiple=anatomy_of(pair).multiple)
    apply_steps(same, rc.spec_of(pair.small).identity(), anatomy)
    assert_same(run(same, pair.x), pair.expected, 1e-6)


def test_the_reduction_is_none(pair: Pair) -> None:
    """What the other tests compare is not the original again, and the outputs are of the same kind."""
    assert len(pair.found) == len(pair.expected)
    if all(a.shape == b.shape for a, b in zip(pair.found, pair.expected, strict=True)):
        apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(pair.found, pair.expected, strict=True)]
        assert max(apart) > 1e-3
    assert all(bool(tensor.isfinite().all()) for tensor in pair.found)


def test_names_survive_and_checkpoints_load(pair: Pair) -> None:
    assert list(pair.small.state_dict()) == list(pair.state)
    loaded = copy.deepcopy(pair.small)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(pair.state)
    assert_same(run(loaded, pair.x), pair.found, 1e-5)
    loaded.load_state_dict(pair.small.state_dict())
    assert_same(run(loaded, pair.x), pair.found, 0)


def test_the_original_is_untouched(pair: Pair) -> None:
    assert fingerprint(pair.original) == pair.before
    torch.testing.assert_close(dict(pair.original.state_dict()), pair.state, rtol=0, atol=0)
    assert_same(run(pair.original, pair.x), pair.expected, 0)


def test_cost_falls_as_predicted(pair: Pair) -> None:
    measured, before = count_macs(pair.small, pair.x).macs, count_macs(pair.original, pair.x).macs
    assert measured < before
    if pair.name in BY_ARITHMETIC:
        allowed, _ = BY_ARITHMETIC[pair.name]
        assert measured == pytest.approx(share_of_grid(pair) * before, rel=allowed)
    else:
        assert measured == pytest.approx(predicted_macs(pair), rel=TOLERANCE.get(pair.name, 1e-6))


def anatomy_of(pair: Pair) -> Anatomy:
    """Return what the compressed model was left with."""
    anatomy: Anatomy = pair.small._rescompress.anatomy
    return anatomy


def reader_of(anatomy: Anatomy) -> str:
    """Return the name of what reads the image, and goes on reading all of it."""
    name: str = anatomy.patch_conv if isinstance(anatomy, ViTAnatomy) else anatomy.first_conv
    return name


def share_of_grid(pair: Pair) -> float:
    """Return the area of the new grid over that of the old one."""
    old, new = describe(pair.original, (pair.x,)).grid, anatomy_of(pair).grid
    return (new[0] * new[1]) / (old[0] * old[1])


def predicted_macs(pair: Pair) -> float:
    """Return the count of the original for the image that makes the smaller grid, with a stem that reads it whole."""
    step = rc.spec_of(pair.small).steps[0]
    side = small_of(pair.name).smaller or pair.x.shape[-1] // 2
    x = pair.x.new_empty(2, 3, side, side, device="meta")
    at_small = count_macs(build(pair.name, side, device="meta"), x)
    if isinstance(step, rc.InputResize):
        return at_small.macs
    whole = count_macs(pair.original, pair.x)
    readers = READERS.get(pair.name) or (reader_of(describe(pair.original, (pair.x,))),)
    return at_small.macs + sum(macs_of(whole, reader) - macs_of(at_small, reader) for reader in readers)


def macs_of(count: Any, fqn: str) -> int:
    """Return the MACs of a module."""
    return next((row.macs for row in count.modules if row.fqn == fqn), 0)


READERS = {"crossvit_tiny_240": ("patch_embed.0.proj", "patch_embed.1.proj")}
"""Entry points of which several convolutions go on reading the whole image."""

TOLERANCE: dict[str, float] = {
    "davit_tiny": 0.03,  # the original fills up windows that are larger than its map; the compressed one's fit
    "tiny_vit_5m_224": 0.03,  # so does this one
    "swinv2_cr_tiny_384": 0.03,  # the original's windows are a part of its image, so smaller ones at the smaller size
    "gcvit_xxtiny": 0.01,  # windows are cut otherwise at the smaller size
}
"""Entry point: how far its cost may lie from the count of the original at the smaller size."""


def test_gradients_reach_every_parameter(pair: Pair) -> None:
    had, has = gradients(pair.original, pair.x), gradients(pair.small, pair.x)
    assert has.keys() == had.keys()
    assert [name for name, grad in has.items() if not bool(grad.isfinite().all())] == []


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all parameters that get one, by their names in the state dict."""
    model = copy.deepcopy(model).train()  # some give the head of the teacher in training only
    outputs = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(2)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs).backward()
    kept = {id(p): p.grad for p in model.parameters() if p.grad is not None}
    return {name: kept[id(p)] for name, p in model.state_dict(keep_vars=True).items() if id(p) in kept}


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # torch of its own LSTM (sequencer2d)
def test_exports(pair: Pair) -> None:
    """A program of torch.export computes the same; where there is none, the original has none either."""
    if pair.name in NOT_EXPORTED:
        with pytest.raises(Exception):  # noqa: B017  whatever torch.export raises on a foreign model
            torch.export.export(pair.original, (pair.x,))
        return
    program = torch.export.export(pair.small, (pair.x,))
    assert_same(run(program.module(), pair.x), pair.found, 1e-5)


def test_batches_of_one_and_of_none(pair: Pair) -> None:
    assert_same(run(pair.small, pair.x[:1]), [tensor[:1] for tensor in pair.found], 1e-4)
    with contextlib.suppress(RuntimeError, ValueError, ZeroDivisionError):  # not every original takes it
        expected = run(pair.original, pair.x[:0])
        assert [tensor.shape[0] for tensor in run(pair.small, pair.x[:0])] == [tensor.shape[0] for tensor in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pair: Pair, dtype: torch.dtype) -> None:
    """The reduced model loses as much by it as the original does."""
    lost = []
    for model, whole in ((pair.original, pair.expected), (pair.small, pair.found)):
        low = run(copy.deepcopy(model).to(dtype), pair.x.to(dtype))
        assert all(tensor.dtype == dtype for tensor in low)
        apart = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(low, whole, strict=True)]
        lost.append(float(max(apart)))
    if not math.isfinite(lost[0]):
        pytest.skip("the original overflows")
    assert lost[1] < max(4 * lost[0], 16 * torch.finfo(dtype).eps)


def test_images_of_another_shape(pair: Pair) -> None:
    """Twice as wide: what the original takes, the reduced model takes."""
    side = pair.x.shape[-1]
    other = pair.x.new_empty(1, 3, side, 2 * side).normal_(generator=torch.Generator().manual_seed(3))
    try:
        expected = run(pair.original, other)
    except (RuntimeError, ValueError, AssertionError, IndexError):
        pytest.skip("the original takes images of one shape")
    found = run(pair.small, other)
    assert [tensor.ndim for tensor in found] == [tensor.ndim for tensor in expected]
    assert all(bool(tensor.isfinite().all()) for tensor in found)
