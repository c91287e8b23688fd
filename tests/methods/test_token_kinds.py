"""token_pool and token_merge on every kind of plain ViT: rotary and relative positions, other blocks, transformers.

Each compress proves identity at zero reduction by its own check; these tests are about what is reduced.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rescompress as rc
from rescompress.layers.merge import places_of
from rescompress.layers.pool import TokenPool2d
from rescompress.layers.token_positions import pool_bias, pool_rotary
from rescompress.methods._tokens import coarsen_positions
from tests.zoo import randomize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*an output has shape"),  # a sequence is what transformers' models give
    pytest.mark.filterwarnings("ignore:.*pools all tokens and gives them as last_hidden_state"),
]

SMALL = {"img_size": 64, "num_classes": 7, "depth": 3}
NARROW = {**SMALL, "embed_dim": 96, "num_heads": 3}
EVA = {**NARROW, "img_size": 56, "ref_feat_shape": (4, 4)}
GEMMA = {"head_dim": 32, "num_kv_heads": 1, "intermediate_size": 96, "position_embedding_size": 16}
HF = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


def _hf(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**HF, **options))

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "eva02": _timm("eva02_tiny_patch14_224", **EVA),
    "eva post norm": _timm("eva02_tiny_patch14_224", use_post_norm=True, **EVA),
    "dinov3": _timm("vit_small_patch16_dinov3", **NARROW),
    "mixed rotary": _timm("vit_small_patch16_rope_mixed_224", **NARROW),
    "beit": _timm("beit_base_patch16_224", **NARROW),
    "beit shared": _timm("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True, **NARROW),
    "relpos": _timm("vit_relpos_small_patch16_224", **NARROW),
    "relpos bias cls": _timm("vit_relpos_base_patch16_cls_224", rel_pos_type="bias", **NARROW),
    "srelpos": _timm("vit_srelpos_small_patch16_224", **NARROW),
    "cait": _timm("cait_xxs24_224", **NARROW),
    "convit": _timm("convit_tiny", **{**SMALL, "local_up_to_layer": 1, "num_heads": 2, "embed_dim": 32}),
    "gemma": _timm("gemma4_vit_167m", **NARROW, **GEMMA),
    "hf vit": _hf("ViTForImageClassification", "ViTConfig"),
    "hf beit": _hf("BeitModel", "BeitConfig", use_relative_position_bias=True),
    "hf dinov2": _hf("Dinov2Model", "Dinov2Config"),
    "hf dinov3": _hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2),
    "hf data2vec": _hf("Data2VecVisionModel", "Data2VecVisionConfig", use_relative_position_bias=True),
    "hf data2vec shared": _hf("Data2VecVisionModel", "Data2VecVisionConfig", use_shared_relative_position_bias=True),
    "hf dpt": _hf("DPTModel", "DPTConfig", is_hybrid=False),
    "hf blip": _hf("BlipVisionModel", "BlipVisionConfig"),
    "hf siglip": _hf("SiglipVisionModel", "SiglipVisionConfig"),
}
POSITIONED = (
    "dinov3",
    "mixed rotary",
    "beit",
    "beit shared",
    "relpos bias cls",
    "srelpos",
    "hf beit",
    "hf dinov3",
    "hf data2vec",
    "hf data2vec shared",
)
STEPS = {"pool": rc.TokenPool(after_block=0), "merge": rc.TokenMerge(r=2)}


def build(kind: str) -> nn.Module:
    return randomize(MODELS[kind]()).eval()


def image(kind: str) -> Tensor:
    side = 56 if kind.startswith("eva") else 64
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    made = model(x)
    return next(leaf for leaf in tree_leaves(made if isinstance(made, Tensor) else made.to_tuple()))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(fqn) for fqn in model._rescompress.anatomy.blocks]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_reduced(kind: str, step: str) -> None:
    """Blocks compute on as many tokens as the anatomy says; names, copies, old checkpoints and gradients survive."""
    m, x = build(kind), image(kind)
    small = rc.compress(m, STEPS[step], example_input=x)
    seen: list[int] = []
    mlps = [
        getattr(block, "mlp", getattr(block, "intermediate", None)).register_forward_hook(
            lambda _, __, y: seen.append(y.shape[1])
        )
        for block in blocks_of(small)
    ]
    with torch.no_grad():
        expected = outputs(small, x)
    for hook in mlps:
        hook.remove()
    anatomy = small._rescompress.anatomy
    prefixes = [anatomy.num_prefix_tokens if i >= anatomy.prefix_from_block else 0 for i in range(3)]
    inside = step == "pool" or anatomy.dense_tokens
    counts = anatomy.num_patch_tokens[:3] if inside else anatomy.num_patch_tokens[1:]
    assert [n - prefix for n, prefix in zip(seen, prefixes, strict=True)] == list(counts)
    assert counts == {"pool": (16, 4, 4), "merge": (16, 14, 12) if kind == "convit" else (14, 12, 10)}[step]

    assert list(small.state_dict()) == list(m.state_dict())
    small.load_state_dict(m.state_dict())
    with torch.no_grad():
        for other in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            torch.testing.assert_close(outputs(other, x), expected, rtol=0, atol=0)
    for model in (m, small):
        outputs(model.train(), x).square().sum().backward()
    had = {name for name, p in m.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    has = {name for name, p in small.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
    assert had <= {name.replace(".inner", "") for name in has}


@pytest.mark.parametrize("kind", POSITIONED)
def test_merged_tokens_keep_their_positions(kind: str) -> None:
    """A block that is given its tokens in another order, with their places, gives them back in that order."""
    m, x = build(kind), image(kind)
    small = rc.compress(m, rc.TokenMerge(r=[1, 0, 0]), example_input=x)
    given: dict[str, Any] = {}
    block = blocks_of(small)[1]
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: given.update(a=args, k=kwargs), with_kwargs=True)
    with torch.no_grad():
        outputs(small, x)
        hook.remove()
        width = given["a"][0].shape[-1] - 3
        tokens = torch.randn(2, block.num_prefix_tokens + 16, width, generator=torch.Generator().manual_seed(1))
        places = places_of((4, 4), block.num_prefix_tokens, tokens)
        whole = torch.cat([tokens, torch.ones_like(tokens[..., :1]), places], 2)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(2)) + block.num_prefix_tokens
        order = torch.cat([torch.arange(block.num_prefix_tokens), order])

        def run(block: nn.Module, x: Tensor) -> Tensor:
            return tree_leaves(block(x, *given["a"][1:], **given["k"]))[0]  # some give a tuple of one

        straight, shuffled = run(block, whole), run(block, whole[:, order])
        plain = run(m.get_submodule(small._rescompress.anatomy.blocks[1]), tokens)
    torch.testing.assert_close(shuffled, straight[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(straight[..., :width], plain, rtol=1e-4, atol=1e-5)
    elsewhere = whole.clone()
    elsewhere[..., -2:] = whole[:, order][..., -2:]
    assert not torch.allclose(run(block, elsewhere)[..., :width], plain, rtol=1e-2, atol=1e-2)


def test_talking_heads_count_a_token_as_often_as_its_members() -> None:
    small = rc.compress(build("cait"), rc.TokenMerge(r=[1, 0, 0]), example_input=image("cait"))
    attention = blocks_of(small)[1].attn
    x = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([1, 3, 2, 1])
    with torch.no_grad():
        weighed = attention(x, sizes.reshape(1, 4, 1).float(), None, {})[0]
        repeated = attention(x.repeat_interleave(sizes, 1), None, None, {})[0]
    torch.testing.assert_close(weighed, repeated[:, [0, 1, 4, 6]], rtol=1e-4, atol=1e-5)


def test_pooled_rotary_positions_are_those_of_a_coarser_grid() -> None:
    """DINOv3's coordinates run from -1 to 1 on every grid: the model of half the grid has the same positions."""
    m, x = build("dinov3"), torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    coarse = timm.create_model("vit_small_patch16_dinov3", **{**NARROW, "img_size": 64})
    coarse.load_state_dict(m.state_dict())
    small = rc.compress(m, rc.TokenPool(after_block=0), example_input=x)
    with torch.no_grad():
        tokens, rope = m._pos_embed(m.patch_embed(x))
        tokens = TokenPool2d((8, 8), (2, 2), 5)(m.blocks[0](m.norm_pre(tokens), rope=rope))
        for block in coarse.eval().blocks[1:]:
            tokens = block(tokens, rope=coarse.rope.get_embed(shape=(4, 4)))
        torch.testing.assert_close(small(x), m.forward_head(m.norm(tokens)), rtol=1e-4, atol=1e-5)


def test_a_pooled_rotary_angle_is_that_of_the_window_s_centre() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    angles = (0.4 * rows + 0.3 * columns).reshape(24, 1)
    sin, cos = pool_rotary(angles.sin(), angles.cos(), (4, 6), (2, 3))
    centres = (0.4 * (rows[::2, ::3] + 0.5) + 0.3 * (columns[::2, ::3] + 1)).reshape(4, 1)
    torch.testing.assert_close(sin, centres.sin())
    torch.testing.assert_close(cos, centres.cos())


@pytest.mark.parametrize(
    ("name", "scale", "fastest"),
    [("vit_small_patch16_rope_224", 0.25, "4.0"), ("eva02_tiny_patch14_224", 0.25, "4.0")],
)
def test_rotary_angles_that_say_nothing_of_the_middle_are_refused(name: str, scale: float, fastest: str) -> None:
    m = timm.create_model(name, **{**NARROW, "img_size": 256 if "16" in name else 224})
    x = torch.zeros(1, 3, *m.patch_embed.img_size)
    rc.compress(m, rc.Spec.of(rc.PatchResize(scale=0.5), rc.TokenPool(after_block=0)), example_input=x)
    with pytest.raises(rc.UnsupportedModelError, match=f"grow by up to {fastest} radians from one row of the 4 x 4"):
        rc.compress(m, rc.Spec.of(rc.PatchResize(scale=scale), rc.TokenPool(after_block=0)), example_input=x)


def test_gemma_turns_tokens_by_where_they_are() -> None:
    """Both halves of the channels: merged tokens by their places, pooled ones by the centres of their windows."""
    m, x = build("gemma"), image("gemma")
    merged = blocks_of(rc.compress(m, STEPS["merge"], example_input=x))[0].attn
    pooled = blocks_of(rc.compress(m, rc.TokenPool(after_block=0, stride=(1, 2)), example_input=x))[1]
    rows, columns = (sides.flatten() for sides in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    places = torch.stack([columns, rows], dim=-1).float()[None]
    tokens = torch.randn(1, 16, 96, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cos, sin = m.encoder.rotary_emb(tokens, places)
        given, plain = {"rope_cos": cos, "rope_sin": sin}, m.encoder.blocks[0].attn(tokens, cos, sin)
        torch.testing.assert_close(merged(tokens, None, None, given)[0], plain, rtol=1e-4, atol=1e-5)
        shuffled = merged(tokens[:, order], None, order[None], given)[0]
        torch.testing.assert_close(shuffled, plain[:, order], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(merged(tokens, None, order[None], given)[0], plain, rtol=1e-2, atol=1e-2)
        (own_cos, own_sin), _ = pooled.on_own_grid((cos, sin), {"attn_mask": None})
        centres = places[:, ::2] + torch.tensor([0.5, 0.0])
        torch.testing.assert_close((own_cos, own_sin), m.encoder.rotary_emb(tokens, centres))


@pytest.mark.parametrize("step", STEPS)
def test_a_shared_bias_that_the_host_fits_to_fewer_tokens_is_refused(step: str) -> None:
    x = image("hf data2vec shared")
    small = rc.compress(build("hf data2vec shared"), STEPS[step], example_input=x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="call it without interpolate_pos_encoding"):
        small(x, interpolate_pos_encoding=True)


def test_merging_layers_that_would_give_attention_weights_say_that_they_have_none() -> None:
    x = image("hf data2vec")
    small = rc.compress(build("hf data2vec"), STEPS["merge"], example_input=x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="call the model without output_attentions"):
        small(x, output_attentions=True)


def test_blocks_of_several_sequences_are_refused() -> None:
    m = timm.create_model("crossvit_tiny_240", depth=[[1, 1, 0]], num_classes=7)
    for step in STEPS.values():
        with pytest.raises(rc.UnsupportedModelError, match=r"MultiScaleBlock.*: each takes two sequences"):
            rc.compress(m, step, example_input=torch.zeros(1, 3, 240, 240))


@pytest.mark.parametrize(
    "kind",
    ["beit", "relpos bias cls", "relpos", "beit shared", "hf beit", "hf data2vec", "hf data2vec shared"],
)
def test_pooled_relative_positions_have_the_distances_of_their_windows(kind: str) -> None:
    m, x = build(kind), image(kind)
    small = rc.compress(m, rc.TokenPool(after_block=0, stride=(2, 1)), example_input=x)
    prefix = small._rescompress.anatomy.num_prefix_tokens

    def bias(model: nn.Module, i: int) -> Tensor:
        if kind == "beit shared":
            given = model.rel_pos_bias()
            return given if model is m else blocks_of(small)[i].on_own_grid((given,), {})[0][0]
        if kind == "hf data2vec shared":
            given = model.encoder.relative_position_bias((4, 4))
            arguments = {"relative_position_bias": given}
            return (arguments if model is m else blocks_of(small)[i].on_own_grid((), arguments)[1])[
                "relative_position_bias"
            ][0]
        if kind == "hf data2vec":
            return model.encoder.layer[i].attention.attention.relative_position_bias((4, 4), False, dim_size=17)[0]
        if kind == "hf beit":
            return model.layers[i].relative_position_bias((4, 4), False, dim_size=17)[0]
        attn = model.blocks[i].attn
        return attn._get_rel_pos_bias()[0] if kind == "beit" else attn.rel_pos.get_bias()[0]

    with torch.no_grad():
        full, pooled = bias(m, 1), bias(small, 1)
        torch.testing.assert_close(full if "shared" in kind else bias(small, 0), bias(m, 0))
    assert pooled.shape[-1] == prefix + 8
    for a in range(8):
        for b in range(8):
            # row and column of the window's first patch, on the 4 x 4 grid
            i, j = (prefix + 2 * (n // 4) * 4 + n % 4 for n in (a, b))
            torch.testing.assert_close(pooled[:, prefix + a, prefix + b], full[:, i, j])
    torch.testing.assert_close(pooled[:, :prefix, :prefix], full[:, :prefix, :prefix])
    torch.testing.assert_close(pool_bias(full, (4, 4), (2, 1)), pooled)


def test_offsets_of_pooled_tokens_are_counted_in_patches() -> None:
    m = build("convit")
    with torch.no_grad():
        m(image("convit"))  # its attention makes its table of offsets on the first call
    attention = m.blocks[0].attn
    full = attention.rel_indices.clone()
    coarsen_positions(m, "blocks.0", (4, 4), (2, 2), 0)
    kept = torch.tensor([0, 2, 8, 10])
    torch.testing.assert_close(attention.rel_indices, full[:, kept][:, :, kept])


def test_a_pooled_grid_reaches_blocks_that_take_its_sides() -> None:
    m = randomize(timm.create_model("xcit_nano_12_p16_224", num_classes=7, depth=2, embed_dim=32, num_heads=2)).eval()
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    small = rc.compress(m, rc.TokenPool(after_block=0), example_input=x)
    with torch.no_grad():
        tokens, (height, width) = m.patch_embed(x)
        tokens = tokens + m.pos_embed(2, height, width).reshape(2, -1, tokens.shape[1]).permute(0, 2, 1)
        tokens = TokenPool2d((4, 6), (2, 2), 0)(m.blocks[0](tokens, height, width))
        tokens = m.norm(m.forward_cls(m.blocks[1](tokens, 2, 3)))
        torch.testing.assert_close(small(x), m.forward_head(tokens))
        with pytest.raises(RuntimeError, match="made for images of 64 x 96 pixels, and got 96 x 64"):
            small(x.transpose(2, 3))
    with pytest.raises(rc.UnsupportedModelError, match="a convolution over the grid of tokens"):
        rc.compress(m, rc.TokenMerge(r=1), example_input=x)


def test_transformers_records_what_leaves_the_layers() -> None:
    x = image("hf vit")
    for step, lengths in ((STEPS["pool"], [17, 5, 5, 5]), (STEPS["merge"], [17, 15, 13, 11])):
        small = rc.compress(build("hf vit"), step, example_input=x)
        with torch.no_grad():
            made = small(x, output_hidden_states=True)
        assert [state.shape[1] for state in made.hidden_states] == lengths


def test_a_host_of_any_image_size_takes_one_size_afterwards() -> None:
    small = rc.compress(build("hf dinov2"), STEPS["pool"], example_input=image("hf dinov2"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="made for images of 4 x 4 patches, and got 2 x 8"):
        small(torch.zeros(1, 3, 32, 128))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("beit", "hf vit") else pytest.mark.slow) for kind in MODELS]
)
def test_exports(kind: str, step: str) -> None:
    x = image(kind)
    small = rc.compress(build(kind), STEPS[step], example_input=x)
    with torch.no_grad():
        program = torch.export.export(small, (x,), strict=False).module()
        torch.testing.assert_close(outputs(program, x), outputs(small, x), rtol=1e-4, atol=1e-5)


def test_pooling_then_merging() -> None:
    """Places are counted on the pooled grid."""
    m, x = build("beit"), image("beit")
    small = rc.compress(m, rc.Spec.of(rc.TokenPool(after_block=0, stride=(1, 2)), rc.TokenMerge(r=2)), example_input=x)
    assert small._rescompress.anatomy.num_patch_tokens == (16, 8, 6, 4)
    last = blocks_of(small)[2]
    assert last.grid == (4, 2) and last.comes_in == 3
    same = rc.compress(m, rc.Spec.of(rc.TokenPool(after_block=0, stride=(1, 2)), rc.TokenMerge(r=0)), example_input=x)
    pooled = rc.compress(m, rc.TokenPool(after_block=0, stride=(1, 2)), example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(same(x), pooled(x), rtol=1e-5, atol=1e-5)
        assert small(x).isfinite().all()


def test_masks_are_refused_behind_either() -> None:
    x = image("dinov3")
    for step in STEPS.values():
        small = rc.compress(build("dinov3"), step, example_input=x)
        with pytest.raises(RuntimeError, match="attention mask"):
            small(x, attn_mask=torch.zeros(21, 21))
