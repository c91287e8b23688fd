"""fold: the folded convolution computes what the convolution and its resize computed, or says why it does not fold."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rescompress.errors import RescompressWarning, UnsupportedModelError
from rescompress.fold import fold, fold_decisions
from rescompress.layers.folded import BorderedFoldedConv2d, FoldedConv2d
from rescompress.layers.phases import NotPeriodicError, phases_of_scale, phases_of_size
from rescompress.layers.resize import Resize2d, ResizedConv2d

PLAIN = [("nearest", False), ("bilinear", False), ("area", False), ("bicubic", False)]
EVERY = [*PLAIN, ("bilinear", True), ("bicubic", True)]


@pytest.fixture(autouse=True)
def one_thread():
    # Maps this small are slower on two threads, and much slower beside other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# The rewrite as arithmetic


def test_resnet_stem_bilinear_half_is_one_plain_9x9_convolution_of_stride_4():
    model = stem(nn.Conv2d(3, 8, 7, 2, 3, bias=False), scale=(0.5, 0.5))
    folded = fold(model)
    assert type(folded) is nn.Conv2d
    assert (folded.kernel_size, folded.stride, folded.padding) == ((9, 9), (4, 4), (3, 3))
    assert list(folded.state_dict()) == ["weight"]
    # By hand: the mean of four kernels, each moved by one position of the stride-2 grid.
    by_hand = torch.zeros(8, 3, 9, 9)
    for row in (0, 2):
        for column in (0, 2):
            by_hand[:, :, row : row + 7, column : column + 7] += model.weight.detach() / 4
    torch.testing.assert_close(folded.weight.detach(), by_hand)
    agree(model, folded, (224, 224), (97, 131), (8, 8))


def test_nearest_half_is_the_same_kernel_at_twice_the_stride():
    model = stem(scale=(0.5, 0.5), mode="nearest")
    folded = fold(model)
    assert isinstance(folded, FoldedConv2d)
    assert folded.stride == (4, 4)
    assert set(dict(folded.named_parameters())) == {"weight", "bias"}
    torch.testing.assert_close(folded.weight, model.weight, rtol=0, atol=0)
    agree(model, folded, (64, 64), (65, 67), (66, 63))


def test_phase_bank_has_p_times_p_kernels_at_stride_2q():
    model = stem(nn.Conv2d(3, 4, 7, 2, 3), scale=(2 / 3, 2 / 3))
    folded = fold(model, torch.zeros(1, 3, 48, 48), force=True)
    assert folded.weight.shape == (4 * 4, 3, 11, 11)
    assert folded.stride == (6, 6)
    agree(model, folded, *((side, side + 7) for side in range(40, 53)))


@st.composite
def cases(draw):
    """Draw a convolution, a resize and an image that both accept."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
    padding = draw(st.one_of(st.tuples(*[st.integers(0, 3)] * 2), st.sampled_from(["same", "valid"])))
    stride = (1, 1) if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2))
    padding_mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    per_group = draw(st.integers(1, 2))
    # torch copies the input to pad an even kernel unevenly, and warns.
    assume(padding != "same" or all(side % 2 for side in kernel))
    torch.manual_seed(draw(st.integers(0, 9)))
    conv = nn.Conv2d(
        groups * per_group,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        padding_mode,
        dtype=torch.float64,
    )
    mode, antialias = draw(st.sampled_from(EVERY))
    q = draw(st.tuples(*[st.integers(2, 7)] * 2))
    p = (draw(st.integers(1, q[0])), draw(st.integers(1, q[1])))
    sides = draw(st.tuples(*[st.integers(9, 40)] * 2))
    by_size = draw(st.booleans())
    try:
        x = torch.randn(2, conv.in_channels, *sides, dtype=torch.float64)
        height, width = conv(x).shape[2:]
    except RuntimeError:  # an image smaller than the kernel, or than its reflection
        assume(False)
    size = (height * p[0] // q[0], width * p[1] // q[1])
    assume(min(size) >= 1)
    if by_size:
        resize = Resize2d(size=size, mode=mode, antialias=antialias)
    else:
        resize = Resize2d(scale=(p[0] / q[0], p[1] / q[1]), mode=mode, antialias=antialias)
    return ResizedConv2d.from_conv(conv, after=resize), x


@settings(max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_folded_equals_interpolated(case):
    model, x = case
    (decision,) = fold_decisions(model, x, force=True) or (None,)
    # What may stay: rounding that breaks the pattern, area on a side that q does not divide, large ratios of a size.
    allowed = ("a folded area", "does not repeat", "nothing at this size", "no ratio", "width 1", "elements")
    if decision is None or not decision.folded:
        assert decision is None or any(reason in decision.reason for reason in allowed), decision
        return
    assert decision.max_error < 1e-10
    folded = fold(model, x, force=True)
    with torch.no_grad():
        exact = model(x)
        close(folded(x), exact, 1e-10)
        close(folded.float()(x.float()).double(), exact, 1e-5)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(EVERY), st.integers(12, 40), st.integers(12, 40))
def test_one_folded_module_serves_varying_sizes(p, q, mode, height, width):
    assume(math.gcd(p, q) == 1 and p < q)
    model = stem(nn.Conv2d(3, 2, 3, 1, 1), scale=(p / q, p / q), mode=mode[0], antialias=mode[1]).double()
    folded = fold(model, torch.zeros(1, 3, 9 * q, 9 * q, dtype=torch.float64), force=True)
    if isinstance(folded, ResizedConv2d):
        return
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    try:
        with torch.no_grad():
            actual = folded(x)
    except ValueError as error:
        assert (mode[0] == "area" and (height % q or width % q)) or (mode[1] and width * p // q == 1), error
        return
    close(actual, model(x).detach(), 1e-10)


@pytest.mark.parametrize(("mode", "antialias"), EVERY)
def test_pattern_is_that_of_interpolate_on_every_length(mode, antialias):
    # The matrix of the resize of any length must be the pattern, but for `head` and `tail` rows at the borders.
    for p, q in ((1, 2), (1, 3), (2, 3), (3, 4), (5, 8)):
        pattern = phases_of_scale(p / q, mode, antialias)
        resize = Resize2d(scale=(1.0, p / q), mode=mode, antialias=antialias)
        for length in range(5 * q, 7 * q):
            if length % pattern.multiple:
                continue
            eye = torch.eye(length, dtype=torch.float64)[:, None, None].expand(-1, 1, 2, -1)
            real = resize(eye)[:, 0, 0].T
            for row in range(pattern.head, real.shape[0] - pattern.tail):
                expected = torch.zeros(length, dtype=torch.float64)
                for tap, weight in enumerate(pattern.weights[row % p]):
                    if weight != 0:
                        expected[row // p * q + pattern.first + tap] = weight
                torch.testing.assert_close(real[row], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "area"])
def test_only_cubic_and_antialiased_resizes_have_borders(mode):
    assert (phases_of_scale(0.75, mode, False).head, phases_of_scale(0.75, mode, False).tail) == (0, 0)
    assert phases_of_scale(0.75, "bicubic", False).head > 0
    assert phases_of_scale(0.75, "bilinear", True).head > 0


# Each kind of convolution


@pytest.mark.parametrize(
    ("conv", "before", "same"),
    [
        (nn.Conv2d(3, 4, 7, 2, 3), None, False),
        (nn.Conv2d(3, 4, 7, 2, 3, bias=False), None, False),
        (nn.Conv2d(3, 6, 3, 2, 1, groups=3), None, False),
        (nn.Conv2d(3, 3, 5, 1, 2, groups=3), None, False),
        (nn.Conv2d(3, 4, 3, 2, (1, 4), dilation=(2, 3)), None, False),
        (nn.Conv2d(3, 4, (3, 5), (2, 1), 0), None, False),
        (nn.Conv2d(3, 4, 5, 1, "same"), None, False),
        (nn.Conv2d(3, 4, 5, 2, "valid"), None, False),
        (nn.Conv2d(3, 4, 7, 2, 3, padding_mode="reflect"), None, False),
        (nn.Conv2d(3, 4, 7, 2, 3, padding_mode="replicate"), None, False),
        (nn.Conv2d(3, 4, 7, 2, 3, padding_mode="circular"), None, False),
        (nn.Conv2d(3, 4, 3, 2, 0), None, True),
        (nn.Conv2d(3, 4, 3, 2, 1), Resize2d(scale=(0.75, 0.75)), False),
        (nn.Conv2d(3, 4, 1, 1, 0), None, False),
        (nn.Conv2d(3, 4, 4, 4, 0), None, False),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_every_kind_of_convolution(conv, before, same, mode):
    conv = copy.deepcopy(conv).double()
    model = stem(conv, before=before, same=same, scale=(0.5, 2 / 3), mode=mode)
    folded = fold(model, torch.zeros(1, 3, 48, 56, dtype=torch.float64), force=True)
    agree(model, folded, (48, 56), (47, 53), (61, 34), dtype=torch.float64)


@pytest.mark.parametrize(("mode", "antialias"), EVERY)
@pytest.mark.parametrize("scale", [(0.5, 0.5), (1.0, 0.5), (0.5, 1.0), (0.25, 0.75), (1 / 3, 0.125)])
def test_every_mode_and_scale_on_images_that_are_not_square(mode, antialias, scale):
    model = stem(nn.Conv2d(3, 2, 3, 2, 1), scale=scale, mode=mode, antialias=antialias).double()
    folded = fold(model, torch.zeros(1, 3, 48, 96, dtype=torch.float64), force=True)
    agree(model, folded, (48, 96), (96, 48), dtype=torch.float64)
    if mode != "area":
        agree(model, folded, (39, 95), (50, 61), dtype=torch.float64)


@pytest.mark.parametrize(("mode", "antialias"), EVERY)
def test_smallest_maps_are_right_or_refused(mode, antialias):
    model = stem(nn.Conv2d(3, 2, 3, 1, 1), scale=(0.5, 0.5), mode=mode, antialias=antialias).double()
    folded = fold(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64), force=True)
    right = 0
    for height in range(1, 9):
        for width in range(1, 9):
            x = torch.randn(1, 3, height, width, dtype=torch.float64)
            try:
                actual = folded(x)
            except (ValueError, RuntimeError) as error:
                text = str(error)
                assert "too small" in text or "greater than actual" in text or "divides" in text or "width 1" in text
                continue
            right += 1
            close(actual, model(x), 1e-10)
    assert right >= 9


def test_a_scale_by_size_holds_for_its_size_alone():
    model = stem(size=(8, 12))
    folded = fold(model, torch.zeros(1, 3, 32, 48))
    agree(model, folded, (32, 48))
    with pytest.raises(ValueError, match=r"folded for a convolution output of side 16, got 17; fold again"):
        folded(torch.zeros(1, 3, 34, 48))


def test_folded_area_refuses_a_side_that_does_not_divide():
    model = stem(scale=(0.5, 0.5), mode="area")
    folded = fold(model, torch.zeros(1, 3, 32, 32))
    agree(model, folded, (32, 32), (64, 40))
    with pytest.raises(ValueError, match=r"2 divides, got 17; use the model from before fold"):
        folded(torch.zeros(1, 3, 34, 32))
    (decision,) = fold_decisions(model, torch.zeros(1, 3, 34, 34), force=True)
    assert not decision.folded
    assert "2 divides, got 17" in decision.reason


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
        ({"scale": (0.7, 0.7)}, "side 90 times scale 0.7 is rounded below 63"),
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
