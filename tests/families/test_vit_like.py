"""Relatives of the plain ViT in timm that lay something of their own out over the grid."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GatedMlp, GluMlp
from timm.models import mlp_mixer
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.testing import assert_close

import rescompress as rc
from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid, ViTAnatomy
from rescompress.compress import record_of
from rescompress.families.convit import distances
from rescompress.layers.grid_matrices import resample_matrix
from rescompress.layers.map_tokens import MapTokens
from rescompress.layers.positions import TableLoader
from rescompress.layers.resize import Resize2d
from rescompress.measure import count_macs
from tests.zoo import randomize

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::rescompress.errors.RescompressWarning"),
]

MIXER = partial(mlp_mixer.MlpMixer, embed_dim=64, num_blocks=2)

MODELS: dict[str, tuple[str | Callable[..., nn.Module], int, dict[str, Any]]] = {
    "cait": ("cait_xxs24_224", 64, {"depth": 1, "depth_token_only": 1}),
    "convit": ("convit_tiny", 64, {"depth": 2, "local_up_to_layer": 1}),
    "crossvit": ("crossvit_tiny_240", 240, {"depth": [[1, 1, 0]]}),
    "crossvit dagger": ("crossvit_9_dagger_240", 240, {"depth": [[1, 1, 0]]}),
    "coat": ("coat_tiny", 64, {"serial_depths": [1, 1, 1, 1], "parallel_depth": 1}),
    "coat lite": ("coat_lite_tiny", 64, {"serial_depths": [1, 1, 1, 1]}),
    "xcit": ("xcit_nano_12_p8_224", 32, {"depth": 1}),
    "volo": (VOLO, 64, {"layers": (1, 1, 1), "embed_dims": (48, 96, 96), "num_heads": (2, 4, 4)}),
    "pit": ("pit_ti_distilled_224", 64, {"depth": [1, 1, 1]}),
    "tnt": ("tnt_s_patch16_224", 64, {"depth": 1}),
    "tnt legacy": ("tnt_s_legacy_patch16_224", 64, {"depth": 1}),
    "visformer": ("visformer_tiny", 64, {"depth": (1, 1, 1)}),
    "mixer": (MIXER, 64, {"block_layer": mlp_mixer.MixerBlock}),
    "gmixer": (MIXER, 64, {"block_layer": mlp_mixer.MixerBlock, "mlp_layer": GluMlp, "act_layer": nn.SiLU}),
    "resmlp": (MIXER, 64, {"block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine, "mlp_ratio": 4}),
    "gmlp": (MIXER, 64, {"block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": GatedMlp, "mlp_ratio": 4}),
    "levit": ("levit_128s", 64, {"depth": (1, 1, 1)}),
    "levit conv": ("levit_conv_128s", 64, {"depth": (1, 1, 1)}),
    "efficientformer": ("efficientformer_l1", 224, {"depths": (1, 1, 1, 2)}),
    "efficientformerv2": ("efficientformerv2_s0", 64, {"depths": (1, 1, 2, 2)}),
    "twins svt": ("twins_svt_small", 64, {"depths": (2, 1, 1, 1)}),
    "twins pcpvt": ("twins_pcpvt_small", 64, {"depths": (1, 1, 1, 1)}),
}
"""Name: entry point or class, image side, options that make it shallow."""

NOT_BUILT_SMALLER = {
    "convit": "its host counts distances in patches of its own grid, the compressed one in those of the trained grid",
    "crossvit": "the second branch is scaled twice, by the host to its own size and then to the smaller one",
    "crossvit dagger": "the second branch is scaled twice, by the host to its own size and then to the smaller one",
    "efficientformer": "its host has biases for images of 224 pixels only",
}
"""Why timm's own model for the smaller image computes something else."""


def build(name: str, side: int | None = None) -> nn.Module:
    entry, default, shallow = MODELS[name]
    make = partial(timm.create_model, entry) if isinstance(entry, str) else entry
    return make(img_size=side or default, num_classes=8, **shallow)


@cache
def original(name: str) -> nn.Module:
    return randomize(build(name)).eval()


def image(name: str, batch: int = 2) -> Tensor:
    side = MODELS[name][1]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@cache
def compressed(name: str) -> nn.Module:
    return rc.compress(original(name), scale=0.5, example_input=image(name))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(x)
    return made


def other(name: str) -> nn.Module:
    """Return the model with other weights."""
    model = copy.deepcopy(original(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def steps(name: str) -> list[rc.Step]:
    """Return the steps that change the grid of this kind of model."""
    anatomy = record_of(compressed(name)).anatomy
    if isinstance(anatomy, ConvAnatomy):
        return [rc.StemResize(scale=0.5), rc.InputResize(scale=0.5)]
    assert isinstance(anatomy, ViTAnatomy)
    return [rc.InputResize(scale=0.5)] + ([] if anatomy.conv_stem else [rc.PatchResize(scale=0.5)])


@pytest.mark.parametrize("name", MODELS)
def test_zero_reduction_gives_the_original_outputs(name: str) -> None:
    x = image(name)
    for step in steps(name):
        same = rc.compress(original(name), step.identity(), example_input=x)
        assert_close(outputs(same, x), outputs(original(name), x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_from_before_give_the_outputs_of_a_model_compressed_with_them(name: str) -> None:
    x, later = image(name), other(name)
    for step in steps(name):
        small = rc.compress(original(name), step, example_input=x)
        assert list(small.state_dict()) == list(original(name).state_dict())
        outputs(small, x)  # what a host keeps of its tables must not outlive them
        small.load_state_dict(later.state_dict())
        assert_close(outputs(small, x), outputs(rc.compress(later, step, example_input=x), x))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_BUILT_SMALLER])
def test_input_resize_is_the_model_that_timm_builds_for_the_smaller_image(name: str) -> None:
    x = image(name)
    small = rc.compress(original(name), rc.InputResize(scale=0.5), example_input=x)
    resize = next(module for module in small.modules() if isinstance(module, Resize2d))
    resized = resize(x)
    built = build(name, resized.shape[-1]).eval()
    built.load_state_dict(small.state_dict())
    assert_close(outputs(small, x), outputs(built, resized))
    assert count_macs(small, x).macs == count_macs(built, resized).macs


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    model = copy.deepcopy(compressed(name)).train()
    model(image(name)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", MODELS)
def test_features_are_maps_of_the_smaller_grid(name: str) -> None:
    x = image(name)
    with torch.no_grad():
        features, maps = compressed(name).forward_intermediates(x)
        _, before = original(name).forward_intermediates(x)
    scale = float(record_of(compressed(name)).log[0].split()[-1])
    for small, large in zip(maps, before, strict=True):
        assert all(abs(a - scale * b) <= 1 for a, b in zip(small.shape[-2:], large.shape[-2:], strict=True))
    with torch.no_grad():
        assert_close(compressed(name).forward_head(features), outputs(compressed(name), x))


def test_mixing_layers_compute_on_the_smaller_grid_what_they_did_on_the_larger_one() -> None:
    """Whatever is smooth enough for the smaller grid is mixed exactly: lifted, mixed, projected."""
    weight = torch.randn(64, 64, dtype=torch.float64)
    identity = torch.eye(64, dtype=torch.float64)
    lift = resample_matrix(identity, "columns", (8, 8), (4, 4))
    small = torch.randn(16, 3, dtype=torch.float64)
    mixed = resample_matrix(weight, "square", (8, 8), (4, 4)) @ small
    assert_close(mixed, resample_matrix(weight @ (lift @ small), "rows", (8, 8), (4, 4)))
    assert_close(resample_matrix(identity, "square", (8, 8), (4, 4)), torch.eye(16, dtype=torch.float64))
    ones = torch.ones(64, dtype=torch.float64)
    assert_close(resample_matrix(ones, "rows", (8, 8), (4, 4)), ones[:16])


def test_mixing_weights_come_back_from_a_larger_grid_without_loss() -> None:
    weight = torch.randn(16, 16, dtype=torch.float64)
    larger = resample_matrix(weight, "square", (4, 4), (6, 6))
    assert_close(resample_matrix(larger, "square", (6, 6), (4, 4)), weight)


def test_tables_over_distances_keep_their_distances() -> None:
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(8.0), indexing="ij")
    smooth = torch.cos(rows / 6) + columns**2 / 20
    sampled = resample_matrix(smooth.flatten()[None], "offsets", (12, 8), (6, 4)).reshape(6, 4)
    assert_close(sampled[:5, :3], smooth[::2, ::2][:5, :3], rtol=0.02, atol=0.12)
    assert_close(resample_matrix(smooth.flatten()[None], "offsets", (12, 8), (12, 8))[0], smooth.flatten())


def test_convit_counts_distances_in_patches_of_the_trained_grid() -> None:
    model = compressed("convit")
    indices = model.get_buffer("blocks.0.attn.rel_indices")
    whole = original("convit").blocks[0].attn.get_rel_indices(16).reshape(4, 4, 4, 4, 3)
    assert_close(indices.reshape(2, 2, 2, 2, 3), whole[::2, ::2, ::2, ::2])
    assert_close(distances((4, 4), (4, 4)).float(), whole.reshape(1, 16, 16, 3))
    again = rc.compress(model, rc.InputResize(scale=0.5))
    assert_close(again.get_buffer("blocks.0.attn.rel_indices"), torch.zeros(1, 1, 1, 3))


def test_twins_takes_its_grid_from_the_map() -> None:
    embed = original("twins svt").patch_embeds[0]
    x = image("twins svt")
    tokens, size = MapTokens(embed.proj, embed.norm)(x)
    expected, expected_size = embed(x)
    assert_close(tokens, expected)
    assert size == expected_size
    small = compressed("twins svt")
    with torch.no_grad():
        assert small(torch.randn(1, 3, 96, 96)).shape == (1, 8)


def test_attention_biases_by_distance_are_resampled_and_indexed_anew() -> None:
    before, after = original("levit").stages[0].blocks[0].attn, compressed("levit").stages[0].blocks[0].attn
    assert after.resolution == (2, 2)
    assert_close(after.attention_biases, resample_matrix(before.attention_biases, "offsets", (4, 4), (2, 2)))
    assert after.attention_bias_idxs.tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]


@pytest.mark.parametrize("name", ["levit", "efficientformerv2"])
def test_models_that_have_run_with_gradients_can_be_compressed(name: str) -> None:
    """They keep biases that hang on the graph of their last forward, with which they cannot be copied."""
    model = randomize(build(name)).eval()
    model(image(name))
    kept = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    small = rc.compress(nn.Sequential(model), scale=0.5, example_input=image(name))
    assert_close(outputs(small, image(name)), outputs(compressed(name), image(name)))
    assert all(kept)


def test_a_compressed_model_that_has_run_with_gradients_is_compressed_further() -> None:
    small = copy.deepcopy(compressed("levit"))
    small(image("levit"))
    assert_close(outputs(rc.fold(small, image("levit")), image("levit")), outputs(small, image("levit")))
    further = [rc.compress(model, rc.InputResize(scale=0.5)) for model in (small, compressed("levit"))]
    assert_close(outputs(further[0], image("levit")), outputs(further[1], image("levit")))


def test_a_copy_holds_what_hung_on_a_graph_and_the_original_keeps_its_own() -> None:
    class Last(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = {"output": [super().forward(x)]}
            return self.last["output"][0]

    model = Last(2, 2)
    made = model(torch.ones(1, 2))
    copied = surgery.deep_copy(model)
    assert_close(copied.last["output"][0], made)
    assert not copied.last["output"][0].requires_grad
    assert model.last["output"][0] is made


def test_checkpoints_of_each_reduction_load_into_the_second_where_grids_are_wide() -> None:
    """64 rows of a table are 4 x 16 positions of the once compressed model, not 8 x 8."""
    model = randomize(timm.create_model("vit_tiny_patch16_224", img_size=(128, 512), depth=1, num_classes=5)).eval()
    x = torch.randn(1, 3, 128, 512, generator=torch.Generator().manual_seed(1))
    once = rc.compress(model, rc.PatchResize(scale=0.5), example_input=x)
    twice = rc.compress(once, rc.PatchResize(scale=0.5))
    expected = outputs(twice, x)
    for source in (once, model):
        loaded = copy.deepcopy(twice)
        loaded.load_state_dict(source.state_dict())
        assert_close(outputs(loaded, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "grid"), [(64, (4, 16)), (256, (8, 32)), (16, (2, 8)), (1024, (16, 64)), (17, None), (0, None)]
)
def test_a_loaded_table_has_the_aspect_of_the_grid_from_before(rows: int, grid: Grid | None) -> None:
    loader = TableLoader("table", "tokens", (8, 32), (4, 16), 1)
    assert loader._grid_of(torch.zeros(1, rows + 1, 3)) == grid


@pytest.mark.parametrize("name", ["coat", "efficientformer", "efficientformerv2"])
def test_maps_that_meet_again_get_sides_that_fit(name: str) -> None:
    with pytest.warns(rc.RescompressWarning, match="cannot be reached exactly"):
        small = rc.compress(original(name), rc.StemResize(scale=0.6), example_input=image(name))
    grid = record_of(small).anatomy.grid
    assert grid is not None
    assert grid[0] % (8 if name == "coat" else 16) == 0


def test_crossvit_shrinks_both_branches() -> None:
    for name in ("crossvit", "crossvit dagger"):
        model = compressed(name)
        assert [model.pos_embed_0.shape[1], model.pos_embed_1.shape[1]] == [101, 50]


@pytest.mark.parametrize("entry", ["levit_conv_128s", "efficientformerv2_s0", "pit_ti_224"])
def test_extractors_of_features_are_compressed_too(entry: str) -> None:
    model = randomize(timm.create_model(entry, img_size=64, features_only=True)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = [tuple(maps.shape[-2:]) for maps in model(x)]
        small = rc.compress(model, scale=0.5, example_input=x)
        after = [tuple(maps.shape[-2:]) for maps in small(x)]
    assert all(new <= (old + 1) // 2 for a, b in zip(before, after, strict=True) for old, new in zip(a, b, strict=True))


def test_levit_keeps_its_resize_when_timm_fuses_its_norms() -> None:
    model = copy.deepcopy(compressed("levit"))
    fused = timm.utils.reparameterize_model(model)
    assert_close(outputs(fused, image("levit")), outputs(compressed("levit"), image("levit")), rtol=1e-4, atol=1e-4)
