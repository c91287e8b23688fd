"""fold: the folded convolution computes what the convolution and its resize computed, whatever their geometry."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from rescompress.fold import fold, fold_decisions
from rescompress.layers.folded import FoldedConv2d
from rescompress.layers.phases import phases_of_scale
from rescompress.layers.resize import Resize2d, ResizedConv2d
from tests.folding import EVERY, agree, close, stem


@pytest.fixture(autouse=True)
def one_thread():
    # Maps this small are slower on two threads, and much slower beside other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
