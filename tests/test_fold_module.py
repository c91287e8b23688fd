"""A folded model as a module: dtypes, layouts, every way to ship it, and the decisions that led to it."""

import copy
import io
import pickle
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.compress import Record
from rescompress.errors import RescompressWarning, SpecError, UnsupportedModelError
from rescompress.fold import fold, fold_decisions
from rescompress.layers.composite import build
from rescompress.layers.folded import BorderedFoldedConv2d, FoldedConv2d
from rescompress.layers.phases import NotPeriodicError, phases_of_scale, phases_of_size
from rescompress.layers.resize import Resize2d, ResizedConv2d
from tests.folding import agree, close, stem


@pytest.fixture(autouse=True)
def one_thread():
    # Maps this small are slower on two threads, and much slower beside other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Precision, layout, life as a module


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(mode, dtype):
    model = stem(scale=(0.5, 0.5), mode=mode).to(dtype)
    folded = fold(model, torch.zeros(1, 3, 32, 48, dtype=dtype), force=True)
    assert folded.weight.dtype == dtype
    agree(model, folded, (32, 48), (35, 41), dtype=dtype)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_channels_last_stays(mode):
    model = stem(scale=(0.5, 0.5), mode=mode).to(memory_format=torch.channels_last)
    folded = fold(model, torch.zeros(1, 3, 32, 48), force=True)
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    close(folded(x), model(x))
    assert folded(x).is_contiguous(memory_format=torch.channels_last)


WAYS = {
    "plain": {"scale": (0.5, 0.5)},
    "nearest": {"scale": (0.5, 0.5), "mode": "nearest"},
    "bank": {"scale": (2 / 3, 2 / 3)},
    "oblong bank": {"scale": (2 / 3, 0.5)},
    "border": {"scale": (0.5, 2 / 3), "mode": "bicubic", "antialias": True},
    "area": {"scale": (0.5, 0.5), "mode": "area"},
    "size": {"size": (8, 12)},
}


def small_net(**resize) -> nn.Module:
    return nn.Sequential(stem(**resize), nn.BatchNorm2d(4), nn.ReLU()).eval()


def small_classifier() -> nn.Module:
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def other_image(way: str) -> Tensor:
    return torch.randn(2, 3, *((32, 48) if way == "size" else (44, 60)))


@pytest.mark.parametrize("way", WAYS)
def test_script_and_trace_follow_every_size(way):
    model, x = small_net(**WAYS[way]), torch.randn(2, 3, 32, 48)
    folded = fold(model, x, force=True)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(folded), buffer)
    buffer.seek(0)
    for program in (torch.jit.load(buffer), torch.jit.trace(folded, x), torch.jit.freeze(torch.jit.script(folded))):
        with torch.no_grad():
            for image in (x, other_image(way)):
                close(program(image), model(image))
        if way in ("size", "area"):
            with pytest.raises(Exception, match="convolution output"):
                program(torch.randn(2, 3, 34, 48))


@pytest.mark.parametrize("way", WAYS)
def test_torch_export(way):
    model, x = small_net(**WAYS[way]), torch.randn(2, 3, 32, 48)
    program = torch.export.export(fold(model, x, force=True), (x,)).module()
    with torch.no_grad():
        close(program(x), model(x))


def test_torch_export_with_dynamic_sides():
    model, x = small_net(scale=(0.5, 0.5)), torch.randn(2, 3, 32, 48)
    sides = {2: torch.export.Dim("height", min=16, max=512), 3: torch.export.Dim("width", min=16, max=512)}
    program = torch.export.export(fold(model, x), (x,), dynamic_shapes=(sides,)).module()
    image = torch.randn(2, 3, 45, 71)
    with torch.no_grad():
        close(program(image), model(image))


@pytest.mark.parametrize("way", ["plain", "nearest", "bank", "border"])
def test_torch_compile_in_one_graph(way):
    torch._dynamo.reset()
    model, x = small_net(**WAYS[way]), torch.randn(2, 3, 32, 48)
    compiled = torch.compile(fold(model, x, force=True), backend="eager", fullgraph=True)
    with torch.no_grad():
        for image in (x, other_image(way)):
            close(compiled(image), model(image))


@pytest.mark.parametrize("way", WAYS)
def test_pickle_deepcopy_and_gradients(way):
    model, x = small_net(**WAYS[way]), torch.randn(2, 3, 32, 48)
    folded = fold(model, x, force=True)
    again = pickle.loads(pickle.dumps(copy.deepcopy(folded)))
    close(again(x), model(x))
    again(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in again.parameters())


def test_gradient_of_the_input_is_the_unfolded_models():
    for way in ("bank", "border"):
        model, x = small_net(**WAYS[way]).double(), torch.randn(1, 3, 32, 48, dtype=torch.float64, requires_grad=True)
        folded = fold(model, x.detach(), force=True)
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        (actual,) = torch.autograd.grad(folded(x).square().sum(), x)
        close(actual, expected, 1e-10)


# Decisions


def test_arithmetic_folds_where_it_is_cheaper_and_force_folds_elsewhere():
    x = torch.zeros(1, 3, 128, 128)
    conv = nn.Conv2d(3, 16, 7, 2, 3)
    (half,) = fold_decisions(stem(conv, scale=(0.5, 0.5)), x)
    (bank,) = fold_decisions(stem(conv, scale=(0.75, 0.75)), x)
    assert half.folded
    assert (half.macs_before, half.macs_after) == (16 * 3 * 49 * 64 * 64, 16 * 3 * 81 * 32 * 32)
    assert not bank.folded
    assert bank.macs_after > bank.macs_before
    (forced,) = fold_decisions(stem(conv, scale=(0.75, 0.75)), x, force=True)
    assert forced.folded
    assert forced.reason.startswith("forced")
    assert forced.max_error < 1e-5


def test_decision_prints_as_one_readable_line():
    (decision,) = fold_decisions(nn.Sequential(stem(scale=(0.5, 0.5))), torch.zeros(1, 3, 64, 64))
    text = str(decision)
    assert text.startswith("0: folded, 0.6 MMACs => 0.2 MMACs, largest relative difference ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("resize", "reason"),
    [
        ({"scale": (0.333, 0.5)}, "no ratio of whole numbers up to 64; the nearest is 1/3"),
        ({"scale": (19 / 28, 19 / 28)}, "elements, more than"),
        ({"size": (16, 16)}, "changes nothing at this size"),
        ({"size": (32, 32)}, "16 to 32 enlarges"),
    ],
)
def test_what_cannot_be_folded_stays_with_its_reason(resize, reason):
    model = nn.Sequential(stem(nn.Conv2d(3, 16, 7, 2, 3), **resize))
    x = torch.randn(1, 3, 32, 32)
    (decision,) = fold_decisions(model, x, force=True)
    assert not decision.folded
    assert reason in decision.reason
    with pytest.warns(RescompressWarning, match="nothing was folded"):
        kept = fold(model, x, force=True)
    torch.testing.assert_close(kept(x), model(x), rtol=0, atol=0)


def test_force_does_not_fold_what_would_differ(monkeypatch):
    def wrong(conv, axes):
        folded = build(conv, axes)
        with torch.no_grad():
            folded.weight.mul_(1.5)
        return folded

    monkeypatch.setattr(sys.modules[fold.__module__], "build", wrong)
    model, x = nn.Sequential(stem(scale=(0.5, 0.5))), torch.zeros(1, 3, 64, 64)
    (decision,) = fold_decisions(model, x, force=True)
    assert not decision.folded
    assert "on a random image, over 1e-04" in decision.reason
    with pytest.warns(RescompressWarning, match="nothing was folded"):
        assert isinstance(fold(model, x, force=True)[0], ResizedConv2d)


@pytest.mark.parametrize(("resize", "side"), [({"scale": (3 / 7, 3 / 7)}, 112), ({"size": (48, 48)}, 224)])
def test_nearest_that_only_float32_rounds_apart_stays(resize, side):
    # In a large float64 map every sample is where it should be; what was folded on that ground was wrong in float32.
    index, ideal = torch.arange(7000)[None, None, None], torch.arange(3000) * 7 // 3
    for dtype, right in ((torch.float64, True), (torch.float32, False)):
        real = Resize2d(scale=(1.0, 3 / 7), mode="nearest")(index.to(dtype)).flatten().long()
        assert torch.equal(real, ideal) is right
    (decision,) = fold_decisions(stem(**resize, mode="nearest"), torch.zeros(1, 3, side, side), force=True)
    assert not decision.folded
    assert "by float32 rounding, output 27 takes input 62 instead of 63" in decision.reason


@pytest.mark.parametrize("scale", [2 / 3, 0.4, 5 / 8, 0.5])
def test_nearest_folded_on_a_small_image_is_right_on_a_large_one(scale):
    model = stem(nn.Conv2d(3, 2, 7, 2, 3), scale=(scale, scale), mode="nearest")
    agree(model, fold(model, torch.zeros(1, 3, 112, 112), force=True), (112, 112), (224, 1024))


def test_every_scale_of_usual_steps_keeps_its_pattern():
    # 0.7 < 7/10 in float64, and 90 * 0.7 < 63: Resize2d rounds the scale up.
    model = stem(nn.Conv2d(3, 2, 3, 1, 1), scale=(0.7, 0.7))
    folded = fold(model, torch.zeros(1, 3, 90, 90), force=True)
    assert folded(torch.zeros(1, 3, 90, 90)).shape[2:] == (63, 63)
    agree(model, folded, (90, 90), (91, 99))
    with pytest.raises(NotPeriodicError, match=r"side 49 times scale .* is rounded below 1"):
        phases_of_scale(1 / 49, "bilinear", False)


def test_a_scale_next_to_nothing_stays():
    (decision,) = fold_decisions(stem(scale=(1e-300, 0.5)), torch.zeros(1, 3, 32, 32), force=True)
    assert not decision.folded
    assert "too near to 0" in decision.reason
    with pytest.raises(NotPeriodicError, match="scale 1e-300 is too near to 0"):
        phases_of_scale(1e-300, "bilinear", False)


def test_rounding_of_nearest_is_found_out():
    # 13 / 11 in float32 is a little low: some output 11 * t is floored to input 13 * t - 1, and the pattern is broken.
    found = {}
    for p, q in ((5, 12), (11, 13), (3, 7), (2, 3)):
        try:
            phases_of_scale(p / q, "nearest", False)
            found[p, q] = None
        except NotPeriodicError as error:
            found[p, q] = str(error)
        index = torch.arange(2000, dtype=torch.float64)[None, None, None]
        real = nn.functional.interpolate(index, scale_factor=(1.0, p / q), mode="nearest").flatten()
        ideal = (torch.arange(real.numel()) * q // p).double()
        assert found[p, q] is not None or torch.equal(real, ideal)
    assert found[2, 3] is None
    assert "float32 rounding" in found[11, 13]


def test_hooks_subclasses_and_unreached_convolutions_stay():
    class Own(ResizedConv2d):
        pass

    x = torch.zeros(1, 3, 32, 32)
    hooked = stem(scale=(0.5, 0.5))
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in fold_decisions(hooked, x)[0].reason
    own = Own.from_conv(nn.Conv2d(3, 4, 3), after=Resize2d(scale=(0.5, 0.5)))
    assert "Own" in fold_decisions(own, x)[0].reason
    unused = nn.Identity()
    unused.spare = stem(scale=(0.5, 0.5))
    assert "does not reach" in fold_decisions(unused, x)[0].reason


# fold as a whole


def test_original_is_untouched_and_nothing_is_shared():
    model = nn.Sequential(stem(before=Resize2d(scale=(0.5, 0.5)), scale=(0.5, 0.5)), nn.BatchNorm2d(4)).train()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modules = {id(module) for module in model.modules()}
    folded = fold(model, torch.zeros(2, 3, 64, 64))
    assert isinstance(folded[0], FoldedConv2d)
    assert isinstance(model[0], ResizedConv2d)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not modules & {id(module) for module in folded.modules()}
    assert all(module.training for module in [*model.modules(), *folded.modules()])
    assert folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [rc.StemResize(scale=0.5), rc.StemResize(scale=0.5, mode="nearest")])
def test_what_is_folded_cannot_be_compressed_again(spec):
    x = torch.rand(1, 3, 64, 64)
    small = rc.compress(small_classifier(), spec, example_input=x)
    folded = fold(small, x)
    close(folded(x), small(x))
    again = rc.InputResize(scale=0.5)
    with pytest.raises(SpecError, match="folded for deployment"):
        rc.compress(folded, again, example_input=x)
    assert rc.spec_of(folded) == rc.spec_of(small)
    rc.compress(small, again, example_input=x)  # the original is still what it was
    with pytest.warns(RescompressWarning, match="nothing was folded"):
        kept = fold(rc.compress(small_classifier(), again, example_input=x), x)
    rc.compress(kept, rc.StemResize(scale=0.5), example_input=x)


def test_a_model_that_is_one_convolution_keeps_its_record():
    small = stem(scale=(0.5, 0.5))
    small._rescompress = Record(rc.Spec.of(rc.StemResize(scale=0.5)), None, ())
    folded = fold(small, torch.zeros(1, 3, 32, 32))
    assert type(folded) is nn.Conv2d
    assert folded._rescompress.folded
    assert not small._rescompress.folded


def test_nothing_to_fold_warns_and_gives_a_copy():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.warns(RescompressWarning, match="no convolution of it is followed by a resize"):
        copied = fold(model)
    assert fold_decisions(model) == ()
    x = torch.randn(1, 3, 8, 8)
    assert copied[0] is not model[0]
    torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)
    assert fold_decisions(stem(scale=(1.0, 1.0))) == ()


def test_a_shared_convolution_is_folded_everywhere():
    shared = stem(nn.Conv2d(3, 3, 3, 1, 1), scale=(0.5, 0.5))
    model = nn.Sequential(shared, nn.ReLU(), shared)
    folded = fold(model, torch.zeros(1, 3, 32, 32))
    assert folded[0] is folded[2]
    agree(model, folded, (32, 32), (45, 37))


def test_default_size_is_the_models_own():
    model = nn.Sequential(stem(size=(56, 56)))
    folded = fold(model)
    assert isinstance(folded[0], FoldedConv2d)
    agree(model, folded, (224, 224))


def test_a_model_that_needs_values_is_run_for_real():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = stem(scale=(0.5, 0.5))

        def forward(self, x):
            return self.stem(x) if x.sum().item() >= 0 else x

    (decision,) = fold_decisions(Choosy(), torch.zeros(1, 3, 64, 64))
    assert decision.folded
    with pytest.raises(UnsupportedModelError, match="does not run on the example input"):
        fold(Choosy(), torch.zeros(1, 5, 64, 64))


def test_border_of_a_bicubic_fold_is_not_the_kernels():
    # The strips matter: without them the first row would be the folded kernel's, which reads zeros beyond the map.
    model = stem(scale=(0.5, 0.5), mode="bicubic")
    folded = fold(model, torch.zeros(1, 3, 64, 64), force=True)
    assert isinstance(folded, BorderedFoldedConv2d)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        inner = folded.folded(folded.pad(x))
        assert float((inner - model(x))[:, :, 0].abs().max()) > 1e-2
        close(folded(x), model(x))


def test_sizes_are_checked_on_their_own_length():
    assert phases_of_size(112, 56, "bilinear", False).only == 112
    with pytest.raises(NotPeriodicError, match="52/105 is no ratio"):
        phases_of_size(105, 52, "bilinear", False)
    assert phases_of_size(20, 10, "nearest", False).weights.tolist() == [[1.0]]


def test_warnings_of_compile_time_do_not_leak_into_folding():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold(nn.Sequential(stem(scale=(0.5, 0.5))), torch.zeros(1, 3, 64, 64))
