"""token_pool: every pooled token is the mean (or maximum) of its window, prefix tokens are left alone."""

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given, settings

import rescompress as rc
from rescompress.layers.pool import TokenPool2d, TokenRepeat2d
from tests.zoo import randomize


@given(
    out=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    prefix=st.integers(0, 3),
    mode=st.sampled_from(["avg", "max"]),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_pooled_token_is_the_mean_of_its_window(
    out: tuple[int, int], stride: tuple[int, int], prefix: int, mode: str
) -> None:
    grid = (out[0] * stride[0], out[1] * stride[1])
    x = torch.randn(2, prefix + grid[0] * grid[1], 3, dtype=torch.float64)
    y = TokenPool2d(grid, stride, prefix, mode)(x)
    assert y.shape == (2, prefix + out[0] * out[1], 3)
    torch.testing.assert_close(y[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    for row in range(out[0]):
        for column in range(out[1]):
            window = [
                x[:, prefix + (row * stride[0] + i) * grid[1] + column * stride[1] + j]
                for i in range(stride[0])
                for j in range(stride[1])
            ]
            expected = torch.stack(window).mean(0) if mode == "avg" else torch.stack(window).amax(0)
            torch.testing.assert_close(y[:, prefix + row * out[1] + column], expected)


def model() -> torch.nn.Module:
    return randomize(timm.create_model("vit_tiny_patch16_224", img_size=(64, 128), depth=4)).eval()


X = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))


def test_blocks_compute_on_the_pooled_grid() -> None:
    m = model()
    small = rc.compress(m, rc.TokenPool(after_block=[0, 2], stride=2), example_input=X)
    with torch.no_grad():
        x = m.norm_pre(m._pos_embed(m.patch_embed(X)))
        x = m.blocks[0](x)
        x = TokenPool2d((4, 8), (2, 2), 1)(x)
        x = m.blocks[2](m.blocks[1](x))
        x = TokenPool2d((2, 4), (2, 2), 1)(x)
        x = m.forward_head(m.norm(m.blocks[3](x)))
        torch.testing.assert_close(small(X), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            rc.TokenPool(after_block=3, stride=3),
            "token_pool.stride=3 does not divide the 4 x 8 token grid after block 3",
        ),
        (rc.TokenPool(after_block=[0, 1], stride=4), "does not divide the 1 x 2 token grid after block 1"),
        (rc.TokenPool(after_block=4), "after_block=4 is no block of this model; it has blocks 0 to 3"),
        (rc.TokenPool(after_block=-5), "no block of this model"),
        (rc.TokenPool(after_block=[3, -1]), "pooled there already|does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(step: rc.TokenPool, message: str) -> None:
    with pytest.raises(rc.SpecError, match=message):
        rc.compress(model(), step, example_input=X)


def test_a_second_pooling_sees_the_grid_that_the_first_one_left() -> None:
    spec = rc.Spec.of(rc.TokenPool(after_block=0, stride=2), rc.TokenPool(after_block=1, stride=(1, 2), mode="max"))
    small = rc.compress(model(), spec, example_input=X)
    assert small._rescompress.anatomy.grids == ((4, 8), (2, 4), (2, 2), (2, 2), (2, 2))
    step_by_step = rc.compress(
        rc.compress(model(), rc.TokenPool(after_block=0), example_input=X),
        rc.TokenPool(after_block=1, stride=(1, 2), mode="max"),
        example_input=X,
    )
    with torch.no_grad():
        torch.testing.assert_close(step_by_step(X), small(X), rtol=0, atol=0)
    assert rc.spec_of(step_by_step) == rc.spec_of(small)


def test_gradient_checkpointing() -> None:
    small = rc.compress(model(), rc.TokenPool(after_block=1), example_input=X)
    expected = small(X)
    small.set_grad_checkpointing()
    torch.testing.assert_close(small(X), expected, rtol=1e-6, atol=1e-6)


def test_another_number_of_tokens_raises() -> None:
    with pytest.raises(RuntimeError, match=r"made for a .* grid, and got 7 patch tokens"):
        TokenPool2d((4, 4), (2, 2), 0)(torch.zeros(1, 7, 2))


def test_a_model_with_dynamic_image_sizes_takes_one_size_afterwards() -> None:
    """A 32 x 128 image has as many tokens as a 64 x 64 one: nothing behind the patches could tell them apart."""
    m = randomize(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True)).eval()
    small = rc.compress(m, rc.TokenPool(after_block=0), example_input=torch.rand(1, 3, 32, 96))
    with torch.no_grad():
        x = torch.rand(1, 3, 32, 96)
        y = m.blocks[0](m._pos_embed(m.patch_embed(x)))
        y = m.forward_head(m.norm(m.blocks[1](TokenPool2d((2, 6), (2, 2), 1)(y))))
        torch.testing.assert_close(small(x), y, rtol=0, atol=0)
        with pytest.raises(AssertionError, match=r"Input height \(96\) doesn't match model \(32\)"):
            small(torch.rand(1, 3, 96, 32))
        same = rc.compress(m, rc.TokenPool(after_block=0, stride=1), example_input=x)
        same(torch.rand(1, 3, 96, 32))  # nothing pooled, nothing fixed


def test_features_are_not_reshaped_into_a_map_of_nonsense() -> None:
    m = model()
    small = rc.compress(m, rc.TokenPool(after_block=1), example_input=X)
    with pytest.raises(RuntimeError, match="after token_pool the features of the blocks form no single grid"):
        small.forward_intermediates(X)
    tokens = small.forward_intermediates(X, output_fmt="NLC", intermediates_only=True)
    assert [t.shape[1] for t in tokens] == [32, 8, 8, 8]
    same = rc.compress(m, rc.TokenPool(after_block=1, stride=1), example_input=X)
    assert same.forward_intermediates(X, intermediates_only=True)[0].shape == (1, 192, 4, 8)


def test_blocks_keep_their_places_and_their_parts() -> None:
    m = model()
    small = rc.compress(m, rc.TokenPool(after_block=1), example_input=X)
    assert list(small.blocks._modules) == ["0", "1", "2", "3"]
    assert small.blocks[1].attn.num_heads == 3
    with torch.no_grad():
        last = small.forward_intermediates(X, indices=[3], output_fmt="NLC", intermediates_only=True)[0]
        x = m.blocks[1](m.blocks[0](m._pos_embed(m.patch_embed(X))))
        x = m.blocks[3](m.blocks[2](TokenPool2d((4, 8), (2, 2), 1)(x)))
    torch.testing.assert_close(last, x[:, 1:], rtol=0, atol=0)


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    prefix=st.integers(0, 2),
)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_repetition_is_undone_by_pooling(grid: tuple[int, int], stride: tuple[int, int], prefix: int) -> None:
    x = torch.randn(2, prefix + grid[0] * grid[1], 3, dtype=torch.float64)
    full = TokenRepeat2d(grid, stride, prefix)(x)
    assert full.shape[1] == prefix + grid[0] * stride[0] * grid[1] * stride[1]
    for mode in ("avg", "max"):
        pooled = TokenPool2d((grid[0] * stride[0], grid[1] * stride[1]), stride, prefix, mode)(full)
        torch.testing.assert_close(pooled, x)


def test_maps_of_features_have_the_full_grid_and_the_pooled_values() -> None:
    """Each block pools at its entry and repeats at its exit, which is the same as staying pooled."""
    options = {"img_size": (64, 128), "depth": 4}
    features = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=[1, 3], **options)
    m = model()
    features.model.load_state_dict(m.state_dict(), strict=False)
    spec = rc.Spec.of(rc.TokenPool(after_block=0), rc.TokenPool(after_block=1, stride=(1, 2), mode="max"))
    dense = rc.compress(features.eval(), spec, example_input=X)
    assert dense._rescompress.anatomy.num_patch_tokens == (32, 8, 4, 4, 32)
    small = rc.compress(m, spec, example_input=X)
    with torch.no_grad():
        maps = dense(X)
        tokens = small.forward_intermediates(X, [0, 3], output_fmt="NLC", intermediates_only=True)[1]
    assert [tuple(one.shape) for one in maps] == [(1, 192, 4, 8), (1, 192, 4, 8)]
    expected = tokens.transpose(1, 2).reshape(1, 192, 2, 2).repeat_interleave(2, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(maps[1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(rc.SpecError, match="behind the last block nothing is computed on fewer tokens"):
        rc.compress(features, rc.TokenPool(after_block=3), example_input=X)


def test_torchscript_of_a_pooling_around_each_block() -> None:
    features = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=(64, 128), depth=3)
    dense = rc.compress(randomize(features).eval(), rc.TokenPool(after_block=0), example_input=X)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(dense.model)(X), dense.model(X))
