"""Relatives of the plain ViT: rotary and relative positions, windows, conv stems, patches cut by a linear layer."""

import copy
import importlib
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import pos_embed_sincos
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig

import rescompress as rc
from rescompress.families import describe
from rescompress.layers.rotary import SpacedRotary
from rescompress.measure.macs import count_macs
from tests.zoo import randomize

Build = Callable[..., nn.Module]


def _timm(name: str, **options: object) -> Build:
    return lambda size=None: timm.create_model(
        name, num_classes=7, **{"depth": 2, **options, **({"img_size": size} if size else {})}
    )


def _tower(module: str, name: str, **options: object) -> Build:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, **options}
    return lambda size=None: getattr(importlib.import_module(f"timm.models.{module}"), name)(img_size=64, **sizes)


def _torchvision_stem(size: object = None) -> nn.Module:
    stem = [ConvStemConfig(8 * i, 3, 2) for i in (1, 2, 3, 4)]
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=7, conv_stem_configs=stem)


SMALL = {"embed_dim": 32, "num_heads": 2}
GEMMA = {"num_classes": 7, "head_dim": 16, "intermediate_size": 32, "position_embedding_size": 16}
MODELS: dict[str, tuple[Build, tuple[int, int]]] = {
    "eva02": (_timm("eva02_tiny_patch14_224", img_size=56), (56, 56)),
    "dinov3": (_timm("vit_tiny_patch16_dinov3_qkvb"), (64, 96)),
    "pe": (_timm("vit_pe_core_tiny_patch16_384", img_size=(64, 96)), (64, 96)),
    "rope": (_timm("vit_small_patch16_rope_224", img_size=64, **SMALL), (64, 64)),
    "rope any size": (
        _timm("vit_medium_patch16_rope_reg1_gap_256", img_size=64, dynamic_img_size=True, **SMALL),
        (64, 96),
    ),
    "rope mixed": (_timm("vit_small_patch16_rope_mixed_ape_224", img_size=(64, 96), **SMALL), (64, 96)),
    "beit": (_timm("beit_base_patch16_224", img_size=(64, 96), **SMALL), (64, 96)),
    "relpos shared": (_timm("vit_srelpos_small_patch16_224", img_size=64, **SMALL), (64, 64)),
    "relpos swin": (_timm("vit_relpos_small_patch16_224", img_size=64, rel_pos_type="mlp-swin", **SMALL), (64, 64)),
    "relpos class": (_timm("vit_relpos_medium_patch16_cls_224", img_size=64, rel_pos_type="bias", **SMALL), (64, 64)),
    "sam": (
        _timm("samvit_base_patch16", img_size=(96, 128), window_size=4, global_attn_indexes=(1,), **SMALL),
        (96, 128),
    ),
    "naflex": (_timm("naflexvit_base_patch16_parfac_gap", **SMALL), (96, 64)),
    "naflex conv": (_timm("naflexvit_base_patch16_gap", embed_proj_type="conv", **SMALL), (96, 64)),
    "qwen": (_tower("qwen3_vit", "Qwen3VitEncoder", out_features=16, pos_embed_grid_size=4), (64, 128)),
    "deepseek": (_tower("deepseek_vit", "DeepseekVitClassifier", num_classes=7), (56, 56)),
    "gemma": (_tower("gemma4_vit", "Gemma4VitClassifier", **GEMMA), (64, 96)),
    "hybrid": (_timm("vit_tiny_r_s16_p8_224", img_size=64, **SMALL), (64, 64)),
    "torchvision stem": (_torchvision_stem, (64, 64)),
}
STEPS: dict[str, rc.Step] = {"patch_resize": rc.PatchResize(scale=0.5), "input_resize": rc.InputResize(scale=0.5)}
CONV_STEMS = ("hybrid", "torchvision stem")
PAIRS = [(name, kind) for name in MODELS for kind in STEPS if not (name in CONV_STEMS and kind == "patch_resize")]
every_pair = pytest.mark.parametrize(("name", "kind"), PAIRS)
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> nn.Module:
    return randomize(MODELS[name][0]()).eval()


def image(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *MODELS[name][1], generator=torch.Generator().manual_seed(1))


def shrink(model: nn.Module, x: Tensor, step: rc.Step) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "an output has shape|.*: an output has shape", rc.RescompressWarning)
        return rc.compress(model, step, example_input=x)


@every_model
def test_half_the_scale_works_by_default(name: str) -> None:
    model, x = build(name), image(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*an output has shape", rc.RescompressWarning)
        small = rc.compress(model, scale=0.5, example_input=x)
    before, after = describe(model, (x,)).grid, small._rescompress.anatomy.grid
    assert after == (before[0] // 2, before[1] // 2)


@every_pair
def test_identity(name: str, kind: str) -> None:
    model, x = build(name), image(name)
    same = rc.compress(model, STEPS[kind].identity(), example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=1e-6, atol=1e-6)


@every_pair
def test_names_and_loading(name: str, kind: str) -> None:
    model, x = build(name), image(name)
    small = shrink(model, x, STEPS[kind])
    assert list(small.state_dict()) == list(model.state_dict())
    other = MODELS[name][0]().eval()
    loaded = shrink(other, x, STEPS[kind])
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), small(x), rtol=1e-4, atol=1e-5)


@every_pair
def test_cost_falls_as_predicted(name: str, kind: str) -> None:
    """The MLPs run on a quarter of the tokens, prefix tokens apart."""
    model, x = build(name), image(name)
    small = shrink(model, x, STEPS[kind])
    anatomy, new = describe(model, (x,)), small._rescompress.anatomy
    prefix = anatomy.num_prefix_tokens
    expected = (prefix + new.num_patch_tokens[0]) / (prefix + anatomy.num_patch_tokens[0])

    counts = [count_macs(network, x) for network in (model, small)]
    for block in anatomy.blocks:
        before, after = (next(row.macs for row in count.modules if row.fqn == f"{block}.mlp") for count in counts)
        assert after / before == pytest.approx(expected, rel=1e-6)
    assert counts[1].macs < 0.7 * counts[0].macs


@every_pair
def test_gradients_are_finite(name: str, kind: str) -> None:
    model, x = build(name), image(name)
    small = shrink(model, x, STEPS[kind])
    for network in (model, small):
        network(x).square().sum().backward()
    had = {fqn for fqn, parameter in model.named_parameters() if parameter.grad is not None}
    now = {fqn.replace("inner.", ""): parameter.grad for fqn, parameter in small.named_parameters()}
    assert had and all(now[fqn] is not None and bool(now[fqn].isfinite().all()) for fqn in had)


@pytest.mark.parametrize("name", ["eva02", "rope mixed", "beit", "relpos shared", "sam", "naflex", "gemma"])
def test_torch_export(name: str) -> None:
    x = image(name)
    small = shrink(build(name), x, STEPS["input_resize" if name in ("naflex", "gemma") else "patch_resize"])
    exported = torch.export.export(small, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), small(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov3", "rope any size", "rope mixed", "beit", "sam", "naflex", "naflex conv"])
@pytest.mark.parametrize("kind", STEPS)
def test_intermediates_come_at_the_new_grid(name: str, kind: str) -> None:
    x = image(name)
    small = shrink(build(name), x, STEPS[kind])
    with torch.no_grad():
        last, maps = small.forward_intermediates(x, indices=2)
        final = small.forward_features(x)
    assert [tuple(one.shape[-2:]) for one in maps] == [small._rescompress.anatomy.grid] * 2
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("name", ["eva02", "dinov3", "relpos swin"])
def test_equals_timms_own_smaller_model(name: str) -> None:
    """Where positions are laid out by the grid itself, timm's set_input_size is the reference."""
    if name == "dinov3":
        build_ = _timm("vit_tiny_patch16_dinov3_qkvb", img_size=(64, 96), dynamic_img_size=False)
        model, x = randomize(build_()).eval(), image(name)
    else:
        model, x = build(name), image(name)
    half = (x.shape[-2] // 2, x.shape[-1] // 2)
    reference = copy.deepcopy(model)
    reference.set_input_size(img_size=half)
    small = rc.compress(model, rc.InputResize(scale=0.5), example_input=x)
    smaller = nn.functional.interpolate(x, half, mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(small(x), reference(smaller), rtol=1e-5, atol=1e-5)
    assert count_macs(small, x).macs == count_macs(reference, smaller).macs


# timm's own resampling of BEiT's tables indexes with lists, and searches in strided tensors
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
@pytest.mark.parametrize("name", ["eva02", "rope", "rope mixed", "beit", "relpos shared"])
@pytest.mark.parametrize("kind", STEPS)
def test_timms_set_input_size_goes_on_working(name: str, kind: str) -> None:
    x = image(name)
    small = rc.compress(build(name), STEPS[kind], example_input=x)
    rows, columns = small._rescompress.anatomy.grid
    small.set_input_size(img_size=(2 * x.shape[-2], 2 * x.shape[-1]))
    large = nn.functional.interpolate(x, scale_factor=2)
    with torch.no_grad():
        maps = small.forward_intermediates(large, intermediates_only=True)
    assert tuple(maps[-1].shape[-2:]) == (2 * rows, 2 * columns)
    assert bool(small(large).isfinite().all())


ROTARY = {
    "axial": (
        partial(pos_embed_sincos.RotaryEmbeddingCat, 16, in_pixels=False, feat_shape=(4, 6), grid_indexing="xy"),
        SpacedRotary.from_axial,
    ),
    "axial halves": (
        partial(pos_embed_sincos.RotaryEmbeddingCat, 16, in_pixels=False, feat_shape=(4, 6), rotate_half=True),
        SpacedRotary.from_axial,
    ),
    "mixed": (
        partial(pos_embed_sincos.RotaryEmbeddingMixed, 32, 3, 2, feat_shape=(4, 6), grid_indexing="xy"),
        SpacedRotary.from_mixed,
    ),
    "multimodal": (partial(pos_embed_sincos.RotaryEmbeddingMRope, 16, (2, 3, 3)), SpacedRotary.from_multimodal),
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_tables_span_what_they_spanned(kind: str) -> None:
    make, from_rope = ROTARY[kind]
    rope = make()
    expected = rope.get_embed(shape=(4, 6)) if kind == "multimodal" else rope.get_embed()
    torch.testing.assert_close(from_rope(rope, (1.0, 1.0), (4, 6)).get_embed(), expected, rtol=1e-6, atol=1e-6)
    # 3 steps apart and centred, the token of a 3 x 3 patch is the one in its middle
    full = rope.get_embed(shape=(9, 6)) if kind == "multimodal" else from_rope(rope, (1.0, 1.0), (9, 6)).get_embed()
    middles = full.unflatten(-2, (9, 6))[..., 1::3, 1::3, :].flatten(-3, -2)
    spaced = from_rope(rope, (3.0, 3.0), (3, 2))
    torch.testing.assert_close(spaced.get_embed(), middles, rtol=1e-5, atol=1e-5)
    bands = spaced.bands
    if bands is not None:
        torch.testing.assert_close(copy.deepcopy(spaced).bfloat16().bands, bands, rtol=0, atol=0)


def test_rotary_tables_with_a_reference_grid_stay_timms() -> None:
    small = rc.compress(build("pe"), STEPS["patch_resize"], example_input=image("pe"))
    built = timm.create_model("vit_pe_core_tiny_patch16_384", img_size=(32, 48), depth=2)
    torch.testing.assert_close(small.rope.get_embed(), built.rope.get_embed())


def test_distances_count_in_old_steps() -> None:
    """Between neighbours of the smaller grid lie two steps of the old one."""
    small = rc.compress(build("relpos shared"), STEPS["patch_resize"], example_input=image("relpos shared"))
    small = copy.deepcopy(small)
    assert small.shared_rel_pos.rel_coords_log[1, 2].tolist() == pytest.approx([0.0, torch.tensor(3.0).log().item()])
    small.set_input_size(img_size=(128, 128))
    assert small.shared_rel_pos.rel_coords_log[0, 3].tolist() == pytest.approx([-torch.tensor(7.0).log().item(), 0.0])


def test_windows_cover_the_same_part_of_the_image() -> None:
    model, x = build("sam"), image("sam")
    small = rc.compress(model, STEPS["patch_resize"], example_input=x)
    assert [block.window_size for block in small.blocks] == [2, 0]
    assert [len(block.attn.rel_pos_h) for block in small.blocks] == [3, 5]
    assert [len(block.attn.rel_pos_w) for block in small.blocks] == [3, 7]
    middle = small.blocks[0].attn.rel_pos_h[1]  # distance 0 stays in the middle of a table
    others = [model.blocks[0].attn.rel_pos_h[row] for row in (0, 3, 6)]
    nearest = min(range(3), key=lambda i: (others[i] - middle).norm().item())
    assert nearest == 1


@pytest.mark.parametrize("name", CONV_STEMS)
def test_stems_of_convolutions_have_no_kernel_to_enlarge(name: str) -> None:
    with pytest.raises(rc.UnsupportedModelError, match="made by a stem of several convolutions"):
        rc.compress(build(name), STEPS["patch_resize"], example_input=image(name))


def test_linear_patches_equal_the_same_convolution() -> None:
    """NaFlex lays out a patch as (height, width, channel): as a convolution it resamples to the same."""
    linear, conv = build("naflex"), _timm("naflexvit_base_patch16_parfac_gap", embed_proj_type="conv", **SMALL)().eval()
    weights = linear.state_dict()
    kernel = weights["embeds.proj.weight"].unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2)
    conv.load_state_dict({**weights, "embeds.proj.weight": kernel})
    x = image("naflex")
    small, reference = (rc.compress(model, STEPS["patch_resize"], example_input=x) for model in (linear, conv))
    with torch.no_grad():
        torch.testing.assert_close(small(x), reference(x), rtol=1e-4, atol=1e-5)


def test_patches_that_the_loader_cuts() -> None:
    """After patch_resize the loader cuts the larger patches; a resized image cannot come in patches."""
    model, x = build("naflex"), image("naflex")
    small = rc.compress(model, STEPS["patch_resize"], example_input=x)
    assert small.get_patch_size() == (32, 32)
    patches = x.unflatten(2, (3, 32)).unflatten(4, (2, 32)).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, -1)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij")
    batch = {
        "patches": patches,
        "patch_coord": torch.stack([rows.flatten(), columns.flatten()], dim=-1).expand(2, -1, -1),
        "patch_valid": torch.ones(2, 6, dtype=torch.bool),
    }
    with torch.no_grad():
        torch.testing.assert_close(small(batch), small(x), rtol=1e-4, atol=1e-5)
    resized = rc.compress(model, STEPS["input_resize"], example_input=x)
    with pytest.raises(ValueError, match="patches that have been cut already"):
        resized(batch)


def test_a_host_of_any_size_that_checks_for_whole_patches() -> None:
    """Half of 7 patches is reached neither by a kernel nor by a scale exactly; the host must still take its images."""
    model = randomize(
        timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=98, dynamic_img_size=True, depth=2)
    )
    x = torch.randn(1, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    with pytest.warns(rc.RescompressWarning, match="98 x 98 becomes 42 x 42"):
        small = rc.compress(model.eval(), rc.InputResize(scale=0.5), example_input=x)
    with torch.no_grad():
        assert small.forward_intermediates(x)[1][-1].shape[-2:] == (3, 3)
        assert small.forward_intermediates(torch.cat([x, x], dim=-1))[1][-1].shape[-2:] == (3, 6)
    with pytest.warns(rc.RescompressWarning, match="7 x 7 becomes 2 x 2"):
        larger = rc.compress(model, rc.PatchResize(scale=0.5), example_input=x)
    assert larger.patch_embed.proj.kernel_size == (49, 49)


def test_two_reductions_after_each_other() -> None:
    model, x = build("rope mixed"), image("rope mixed")
    twice = rc.compress(
        model, rc.Spec.of(rc.PatchResize(patch_size=(32, 16)), rc.PatchResize(patch_size=32)), example_input=x
    )
    once = rc.compress(model, rc.PatchResize(patch_size=32), example_input=x)
    assert twice.rope.spacing == once.rope.spacing == (2.0, 2.0)
    torch.testing.assert_close(twice.rope.get_embed(), once.rope.get_embed())


def test_jittered_indices_are_refused() -> None:
    model = _timm("vit_small_patch16_rope_224", img_size=64, rope_shift_coords=0.1, **SMALL)()
    with pytest.raises(rc.UnsupportedModelError, match="shifts, jitters or rescales"):
        rc.compress(model, STEPS["patch_resize"], example_input=torch.randn(1, 3, 64, 64))


# TorchScript is deprecated since torch 2.11
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", ["rope", "rope mixed"])
def test_spaced_rotary_tables_can_be_scripted(name: str) -> None:
    x = image(name)
    small = rc.compress(build(name), STEPS["patch_resize"], example_input=x)
    scripted = torch.jit.script(small)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), small(x))
