"""token_merge: a slow reference written from the paper, and what must be conserved."""

import re

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given, settings
from torch import Tensor

import rescompress as rc
from rescompress.layers.merge import (
    match_tokens,
    merge_matched,
    proportional_bias,
    repeat_merged,
    source_of_matched,
)
from tests.zoo import randomize


def reference(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge one sequence token by token, as the paper's section 3 describes it."""
    n = x.shape[0]
    a = [i for i in range(prefix, n) if i % 2 == 0]
    b = [i for i in range(prefix, n) if i % 2 == 1]
    cosine = torch.nn.functional.cosine_similarity
    best = {i: max(b, key=lambda j: cosine(metric[i], metric[j], dim=0).item()) for i in a} if b else {}
    strength = {i: cosine(metric[i], metric[j], dim=0).item() for i, j in best.items()}
    merged = sorted(best, key=lambda i: -strength[i])[: min(r, (n - prefix) // 2)]
    sums = {i: x[i] * size[i] for i in range(n)}
    sizes = {i: size[i].clone() for i in range(n)}
    for i in merged:
        sums[best[i]] = sums[best[i]] + sums.pop(i)
        sizes[best[i]] = sizes[best[i]] + sizes.pop(i)
    order = [*range(prefix), *(i for i in a if i in sums), *b]
    return torch.stack([sums[i] / sizes[i] for i in order]), torch.stack([sizes[i] for i in order])


sequences = st.tuples(st.integers(0, 3), st.integers(2, 15), st.integers(1, 9), st.integers(0, 10_000))


@given(sequences)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_equals_the_slow_reference(case: tuple[int, int, int, int]) -> None:
    prefix, patches, r, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, prefix + patches, 5, generator=generator, dtype=torch.float64)
    metric = torch.randn(2, prefix + patches, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, (2, prefix + patches, 1), generator=generator).double()
    y, new_size = merge_matched(x, size, match_tokens(metric, min(r, patches // 2), prefix), prefix)
    for i in range(2):
        expected, expected_size = reference(x[i], size[i], metric[i], r, prefix)
        torch.testing.assert_close(y[i], expected)
        torch.testing.assert_close(new_size[i], expected_size)


@given(sequences)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_keeps_the_weighted_sum_and_every_prefix_token(case: tuple[int, int, int, int]) -> None:
    prefix, patches, r, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, prefix + patches, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, (2, prefix + patches, 1), generator=generator).double()
    y, new_size = merge_matched(x, size, match_tokens(x, min(r, patches // 2), prefix), prefix)
    torch.testing.assert_close((y * new_size).sum(1), (x * size).sum(1))
    torch.testing.assert_close(new_size.sum(1), size.sum(1))
    torch.testing.assert_close(y[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    torch.testing.assert_close(new_size[:, :prefix], size[:, :prefix], rtol=0, atol=0)
    assert y.shape[1] == prefix + patches - min(r, patches // 2)


@given(sequences)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_a_repeated_token_stands_as_often_as_its_members(case: tuple[int, int, int, int]) -> None:
    prefix, patches, _, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, prefix + patches, 5, generator=generator)
    size = torch.randint(1, 5, (1, prefix + patches, 1), generator=generator).expand(2, -1, -1).clone()
    size[1, prefix:] = size[1, prefix:].flip(0)
    size[:, :prefix] = 1
    repeated = repeat_merged(x, size.float(), int(size[0, prefix:].sum()), prefix)
    for i in range(2):
        torch.testing.assert_close(repeated[i], x[i].repeat_interleave(size[i, :, 0], 0), rtol=0, atol=0)


def test_proportional_attention_counts_a_token_as_often_as_its_members() -> None:
    """Attention with the bias log(size) equals attention on a sequence in which tokens are repeated."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=generator, dtype=torch.float64)
    size = torch.tensor([1.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    attend = torch.nn.functional.scaled_dot_product_attention
    weighed = attend(q, k, v, attn_mask=proportional_bias(size.reshape(1, 4, 1)))
    repeats = size.long()
    repeated = attend(q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))
    torch.testing.assert_close(weighed, repeated)


def vit(**options: object) -> torch.nn.Module:
    return randomize(timm.create_model("vit_tiny_patch16_224", **{"img_size": 64, "depth": 4, **options})).eval()


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tokens_seen(model: torch.nn.Module, x: Tensor = X) -> list[int]:
    """Return the sequence length that each block's MLP computes on."""
    seen: list[int] = []
    hooks = [block.mlp.register_forward_hook(lambda m, a, y: seen.append(y.shape[1])) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("step", "patches"),
    [
        (rc.TokenMerge(r=2), [14, 12, 10, 8]),
        (rc.TokenMerge(r=[0, 5, 0, 1]), [16, 11, 11, 10]),
        pytest.param(
            rc.TokenMerge(r=99), [8, 4, 2, 1], marks=pytest.mark.filterwarnings("ignore:.*r=99 cannot be reached")
        ),
        (rc.TokenMerge(keep=0.5), [14, 12, 10, 8]),
        (rc.TokenMerge(keep=0.7), [15, 14, 12, 11]),
        (rc.TokenMerge(r=0), [16, 16, 16, 16]),
        (rc.TokenMerge(keep=1.0), [16, 16, 16, 16]),
    ],
)
def test_schedules(step: rc.TokenMerge, patches: list[int]) -> None:
    small = rc.compress(vit(), step, example_input=X)
    assert tokens_seen(small) == [1 + n for n in patches]
    assert small._rescompress.anatomy.num_patch_tokens == (16, *patches)


def test_attention_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = rc.compress(vit(), rc.TokenMerge(r=2), example_input=X)
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: Tensor) -> Tensor:
        masks.append(kwargs["attn_mask"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        small(X)
    assert masks[0] is None and [mask.shape for mask in masks[1:]] == [(2, 1, 1, n) for n in (15, 13, 11)]


def test_an_average_pooling_head_takes_the_mean_over_all_patches() -> None:
    """With merging in the last block only, the MLP of that block aside, the mean is that of the unmerged tokens."""
    for fc_norm in (False, True):
        m = vit(global_pool="avg", class_token=False, fc_norm=fc_norm, depth=1)
        torch.nn.init.zeros_(m.blocks[0].mlp.fc2.weight)  # the MLP is not linear, so it may not take part
        torch.nn.init.zeros_(m.blocks[0].mlp.fc2.bias)
        small = rc.compress(m, rc.TokenMerge(r=6), example_input=X)
        with torch.no_grad():
            tokens = small.forward_features(X)
            if fc_norm:  # no norm stands between the blocks and the mean: then it is exact
                torch.testing.assert_close(small(X), m(X), rtol=1e-5, atol=1e-5)
            x, keys = unmerged_block(m)
            merged, size = merge_matched(x, torch.ones_like(x[..., :1]), match_tokens(keys, 6, 0), 0)
            mean = (m.norm(merged) * size).sum(1) / size.sum(1)
            torch.testing.assert_close(tokens.mean(1), mean, rtol=1e-5, atol=1e-5)


def unmerged_block(m: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Return the tokens after the first block's attention, and its mean keys."""
    block = m.blocks[0]
    x = m._pos_embed(m.patch_embed(X))
    keys = block.attn.qkv(block.norm1(x)).reshape(2, 16, 3, 3, 64)[:, :, 1].mean(2)
    return x + block.attn(block.norm1(x)), keys


def test_blocks_that_cannot_be_adopted_are_refused() -> None:
    class Other(timm.models.vision_transformer.Block):
        pass

    for block, message in (
        (Other, r"does not know blocks of class .*Other; it knows timm\.models\.vision_transformer\.Block, "),
        (timm.models.vision_transformer.ParallelScalingBlock, "attention and MLP run side by side"),
    ):
        m = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, block_fn=block)
        with pytest.raises(rc.UnsupportedModelError, match=message):
            rc.compress(m, rc.TokenMerge(r=2), example_input=X)
    m = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, attn_layer="diff")
    with pytest.raises(rc.UnsupportedModelError, match=r"does not know timm\.layers.*DiffAttention"):
        rc.compress(m, rc.TokenMerge(r=2), example_input=X)


@given(sequences)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_every_token_finds_what_it_was_merged_into(case: tuple[int, int, int, int]) -> None:
    prefix, patches, r, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, prefix + patches, 4, generator=generator, dtype=torch.float64)
    match = match_tokens(x, min(r, patches // 2), prefix)
    merged, size = merge_matched(x, torch.ones_like(x[..., :1]), match, prefix)
    source = source_of_matched(x.shape[1], match, prefix)
    groups = [(source[0] == i).nonzero().flatten() for i in range(merged.shape[1])]
    torch.testing.assert_close(torch.stack([x[0, group].mean(0) for group in groups]), merged[0])
    assert [len(group) for group in groups] == size.flatten().tolist()


def test_features_as_maps_hold_what_was_merged_at_every_place() -> None:
    """Each block merges at its entry what the blocks before it have merged, and r more; all places get tokens back."""
    features = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, img_size=64, depth=3, out_indices=[0, 1, 2]
    )
    small = rc.compress(randomize(features).eval(), rc.TokenMerge(r=2), example_input=X)
    assert small._rescompress.anatomy.num_patch_tokens == (14, 12, 10, 16)
    with torch.no_grad():
        maps = small(X)
    assert [tuple(one.shape) for one in maps] == [(2, 192, 4, 4)] * 3
    distinct = [[len(one[i].flatten(1).T.unique(dim=0)) for i in range(2)] for one in maps]
    assert distinct == [[14, 14], [12, 12], [10, 10]]


def test_torchscript_of_each_scripted_block() -> None:
    for block in (timm.models.vision_transformer.Block, timm.models.vision_transformer.ResPostBlock):
        small = rc.compress(vit(depth=2, block_fn=block), rc.TokenMerge(r=2), example_input=X)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(small)(X), small(X))
    features = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=3)
    dense = rc.compress(randomize(features).eval(), rc.TokenMerge(r=2), example_input=X)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(dense.model)(X), dense.model(X))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (rc.Spec.of(rc.TokenMerge(r=[1, 2])), "lists 2 numbers, but the model has 4 blocks"),
        (rc.Spec.of(rc.TokenMerge(keep=0.01)), "cannot be reached"),
        (rc.Spec.of(rc.TokenMerge(r=1), rc.TokenMerge(r=1)), "in the model already"),
        (rc.Spec.of(rc.TokenMerge(r=1), rc.TokenPool(after_block=2)), "no grid left after token_merge"),
        (rc.Spec.of(rc.TokenPool(after_block=1), rc.TokenMerge(keep=0.5)), "does not go with token_pool"),
        (rc.Spec.of(rc.TokenPool(after_block=1), rc.TokenMerge(r=[1, 0, 0, 0])), "its first 2 numbers must be 0"),
    ],
)
def test_what_does_not_fit_is_refused(spec: rc.Spec, message: str) -> None:
    with pytest.raises(rc.SpecError, match=message):
        rc.compress(vit(), spec, example_input=X)


@pytest.mark.parametrize(
    ("options", "step", "message"),
    [
        (
            {},
            rc.TokenMerge(r=5),
            r"token_merge.r=5 cannot be reached in 2 of 4 blocks, first in block 2: at most half of the tokens merge "
            "at a time, so 2 of 16 patch tokens leave the last block",
        ),
        ({}, rc.TokenMerge(r=[0, 9, 0, 0]), r"token_merge.r=\(0, 9, 0, 0\) cannot be reached in 1 of 4 .* so 8 of 16"),
        (
            {"features_only": True},
            rc.TokenMerge(keep=0.25),
            "token_merge.keep=0.25 cannot be reached in 2 of 4 .* the last block computes on 8 of 16 patch tokens",
        ),
    ],
)
def test_what_is_reached_is_said_once(options: dict[str, bool], step: rc.TokenMerge, message: str) -> None:
    with pytest.warns(rc.RescompressWarning) as caught:
        rc.compress(vit(**options), step, example_input=X)
    assert len(caught) == 1 and re.match(message, str(caught[0].message))


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(rc.SpecError, match="merges nothing"):
        rc.compress(vit(img_size=16), rc.TokenMerge(r=3), example_input=X[..., :16, :16])


def test_after_pooling_merging_begins_behind_it() -> None:
    spec = rc.Spec.of(rc.TokenPool(after_block=1), rc.TokenMerge(r=1))
    small = rc.compress(vit(), spec, example_input=X)
    assert small._rescompress.anatomy.num_patch_tokens == (16, 16, 4, 3, 2)
    with torch.no_grad():
        assert small(X).isfinite().all()


def test_gradient_checkpointing_and_training_with_drop_path() -> None:
    small = rc.compress(vit(drop_path_rate=0.3, attn_drop_rate=0.1), rc.TokenMerge(r=2), example_input=X)
    with torch.no_grad():
        expected = small(X)
    small.set_grad_checkpointing()
    torch.testing.assert_close(small(X), expected, rtol=1e-6, atol=1e-6)
    small.train()
    a, b = small(X), small(X)
    assert (a - b).abs().max() > 1e-4  # drop-path and attention dropout still draw
    a.sum().backward()


def test_masks_are_refused() -> None:
    small = rc.compress(vit(), rc.TokenMerge(r=2), example_input=X)
    with pytest.raises(RuntimeError, match="no meaning under an attention mask"):
        small(X, attn_mask=torch.zeros(17, 17))


def test_half_precision() -> None:
    small = rc.compress(vit(), rc.TokenMerge(r=2), example_input=X)
    with torch.no_grad():
        expected = small(X)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = small(X)
        half = rc.compress(vit().to(torch.bfloat16), rc.TokenMerge(r=2))(X.to(torch.bfloat16))
    # other pairs may be merged once keys are rounded, so only the size of the error can be asked for
    assert (autocast.float() - expected).norm() < 0.2 * expected.norm()
    assert half.dtype == torch.bfloat16 and (half.float() - expected).norm() < 0.3 * expected.norm()


def test_features_are_not_reshaped_into_a_map_of_nonsense() -> None:
    small = rc.compress(vit(), rc.TokenMerge(r=2), example_input=X)
    with pytest.raises(RuntimeError, match="after token_merge the features of the blocks form no single grid"):
        small.forward_intermediates(X)
