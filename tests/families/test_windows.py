"""Windowed and hierarchical networks: windows, tables of relative positions and schedules on a smaller grid."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.davit import DaVit
from timm.models.efficientvit_msra import EfficientVitMsra
from timm.models.gcvit import GlobalContextVit
from timm.models.hiera import Hiera
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

import rescompress as rc
from rescompress.errors import RescompressWarning, SmallerGridError
from rescompress.families._windows import clipped, dividing, relative_index
from rescompress.families.byobnet import _block_size
from rescompress.layers.positions import resample_table
from tests.zoo import randomize

SWIN = {"num_classes": 5, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}


def _maxxvit(side: int, kind: tuple[str, ...], rel_pos_type: str, **options: Any) -> nn.Module:
    config = MaxxVitCfg(
        embed_dim=(32, 64),
        depths=(1, 1),
        block_type=kind,
        stem_width=16,
        transformer_cfg=MaxxVitTransformerCfg(rel_pos_type=rel_pos_type, rel_pos_dim=16, partition_ratio=8, **options),
    )
    return MaxxVit(config, img_size=side, num_classes=5)


def _torchvision_swin(v2: bool) -> nn.Module:
    options: Any = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if v2 else {}
    return TorchvisionSwin([4, 4], 16, [2, 2], [1, 2], [7, 7], num_classes=5, **options)


def _torchvision_maxvit(side: int) -> nn.Module:
    return MaxVit((side, side), 16, 7, [32, 32], [1, 1], 32, stochastic_depth_prob=0.0, num_classes=5)


def _mvit(side: int, **options: Any) -> nn.Module:
    return MultiScaleVit(
        MultiScaleVitCfg(depths=(1, 2), embed_dim=16, **_MVIT, **options), img_size=side, num_classes=5
    )


_MVIT: dict[str, Any] = {"num_heads": 1, "stride_q": ((1, 1), (2, 2)), "stride_kv": None, "stride_kv_adaptive": (2, 2)}


def _hiera(side: int, **options: Any) -> nn.Module:
    return Hiera(img_size=(side, side), num_classes=5, embed_dim=16, stages=(1, 1, 1, 1), **options)


def _gcvit(side: int) -> nn.Module:
    return GlobalContextVit(
        img_size=side, num_classes=5, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_ratio=(16, 16)
    )


def _tiny_vit(side: int) -> nn.Module:
    return TinyVit(
        num_classes=5,
        depths=(1, 1, 1, 1),
        embed_dims=(16, 16, 32, 32),
        num_heads=(1, 1, 2, 2),
        window_sizes=(7, 7, 7, 7),
    )


def _byobnet(side: int, layer: str, **options: Any) -> nn.Module:
    block = {"type": "self_attn", "d": 1, "s": 2, "gs": 0, "br": 0.5}
    blocks = (ByoBlockCfg(c=32, **block), ByoBlockCfg(c=64, **block))
    config = ByoModelCfg(
        blocks=blocks,
        stem_chs=16,
        stem_type="3x3",
        fixed_input_size=True,
        self_attn_layer=layer,
        self_attn_kwargs=options,
    )
    return ByobNet(config, num_classes=5, img_size=side)


def _bat(side: int) -> nn.Module:
    block = {"type": "bottle", "d": 1, "s": 2, "gs": 16, "br": 0.5}
    config = ByoModelCfg(
        blocks=(ByoBlockCfg(c=32, **block), ByoBlockCfg(c=64, **block)),
        stem_chs=16,
        stem_type="3x3",
        stem_pool="",
        attn_layer="bat",
        attn_kwargs={"block_size": 8},
    )
    return ByobNet(config, num_classes=5)


Build = Callable[[int], nn.Module]

MODELS: dict[str, tuple[Build, int]] = {
    "swin": (lambda side: SwinTransformer(img_size=side, window_size=7, **SWIN), 56),
    "swin dynamic": (lambda side: SwinTransformer(img_size=side, window_size=7, strict_img_size=False, **SWIN), 56),
    "swin v2": (lambda side: SwinTransformerV2(img_size=side, window_size=8, **SWIN), 64),
    "swin v2-cr": (lambda side: SwinTransformerV2Cr(img_size=side, window_size=8, **SWIN), 64),
    "torchvision swin": (lambda side: _torchvision_swin(v2=False), 56),
    "torchvision swin v2": (lambda side: _torchvision_swin(v2=True), 56),
    "coatnet bias": (lambda side: _maxxvit(side, ("C", "T"), "bias"), 64),
    "coatnet mlp": (lambda side: _maxxvit(side, ("T", "T"), "mlp"), 64),
    "maxvit bias_tf": (lambda side: _maxxvit(side, ("M", "M"), "bias_tf"), 64),
    "maxvit nchw": (lambda side: _maxxvit(side, ("M", "M"), "bias", use_nchw_attn=True), 64),
    "maxvit parallel": (lambda side: _maxxvit(side, ("PM", "PM"), "mlp"), 64),
    "torchvision maxvit": (_torchvision_maxvit, 56),
    "hiera": (_hiera, 64),
    "hiera window embedding": (lambda side: _hiera(side, abs_win_pos_embed=True), 64),
    "nest": (lambda side: Nest(side, 3, 4, 2, (16, 16), (1, 1), (1, 2), num_classes=5, drop_path_rate=0.0), 64),
    "gcvit": (_gcvit, 64),
    "mvit": (lambda side: _mvit(side), 64),
    "mvit class token": (lambda side: _mvit(side, use_cls_token=True, use_abs_pos=True), 64),
    "davit": (lambda side: DaVit(num_classes=5, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2)), 56),
    "tiny vit": (_tiny_vit, 112),
    "efficientvit msra": (lambda side: EfficientVitMsra(side, num_classes=5, depth=(1, 1, 1)), 224),
    "botnet": (lambda side: _byobnet(side, "bottleneck", dim_head=8), 64),
    "halonet": (lambda side: _byobnet(side, "halo", block_size=8, halo_size=2, num_heads=2, dim_head=8), 64),
    "lambda": (lambda side: _byobnet(side, "lambda", r=None), 64),
    "bat": (_bat, 64),
}


def build(name: str) -> nn.Module:
    make, side = MODELS[name]
    return randomize(make(side)).eval()


class Compressed:
    """A model of this file at scale 0.5, and what was known of it before."""

    def __init__(self, name: str, kind: str) -> None:
        side = MODELS[name][1]
        self.original = build(name)
        self.x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        self.state = {key: value.clone() for key, value in self.original.state_dict().items()}
        self.buffers = {key: value.clone() for key, value in self.original.named_buffers()}
        with torch.no_grad():
            self.expected = self.original(self.x)
        self.small = rc.compress(self.original, _step(kind, 0.5), example_input=self.x)
        with torch.no_grad():
            self.output = self.small(self.x)


def _step(kind: str, scale: float) -> dict[str, Any]:
    return {"steps": [{"kind": kind, "scale": scale}]}


@functools.cache
def compressed(name: str, kind: str = "stem_resize") -> Compressed:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RescompressWarning)  # every grid here halves exactly
        return Compressed(name, kind)


@pytest.mark.parametrize("name", MODELS)
def test_names_survive_and_old_checkpoints_load(name: str) -> None:
    case = compressed(name)
    loaded = copy.deepcopy(case.small)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
        loaded.load_state_dict(case.state)
        assert list(loaded.state_dict()) == list(case.state)
        torch.testing.assert_close(loaded(case.x), case.output, rtol=1e-5, atol=1e-5)
        loaded.load_state_dict(case.small.state_dict())
        torch.testing.assert_close(loaded(case.x), case.output, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["tiny vit", "efficientvit msra"])
def test_new_weights_count_after_a_forward_that_has_kept_biases(name: str) -> None:
    case = compressed(name)
    loaded = copy.deepcopy(case.small)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(2)
        loaded(case.x)  # the host gathers its biases from these tables
        loaded.load_state_dict(case.state)
        torch.testing.assert_close(loaded(case.x), case.output, rtol=1e-5, atol=1e-5)


class Features(nn.Module):
    """A head around a network whose own forward is not called."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body.forward_features(x)  # type: ignore[operator]
        return made


@pytest.mark.filterwarnings("ignore:.*an output has shape:rescompress.errors.RescompressWarning")
@pytest.mark.parametrize("name", ["swin", "mvit class token", "davit", "tiny vit", "coatnet bias"])
def test_a_host_whose_forward_is_bypassed_is_refitted_as_well(name: str) -> None:
    case = compressed(name)
    small = rc.compress(Features(case.original), scale=0.5, example_input=case.x)
    with torch.no_grad():
        torch.testing.assert_close(small(case.x), case.small.forward_features(case.x))  # type: ignore[operator]


def test_a_warning_names_the_known_networks_that_stay_as_they_are() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (build("davit") for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    with pytest.warns(RescompressWarning, match="only 'first' is compressed.*'second'") as given:
        rc.compress(Both(), scale=0.5, example_input=compressed("davit").x)
    assert len(given) == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_original_is_untouched(name: str) -> None:
    case = compressed(name)
    torch.testing.assert_close(dict(case.original.named_buffers()), case.buffers, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.original(case.x), case.expected, rtol=0, atol=0)
        assert (case.output - case.expected).abs().max() > 1e-3  # and compressing did change something


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_keeps_its_gradient(name: str) -> None:
    case = compressed(name)

    def gradients(model: nn.Module) -> dict[str, Tensor | None]:
        model = copy.deepcopy(model).train()
        for module in model.modules():
            if "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth":
                module.eval()  # what is dropped by chance has no gradient
        model(case.x).square().sum().backward()
        # a wrapped stem shows its extra level here, though not in the state dict
        return {key.replace("inner.", ""): parameter.grad for key, parameter in model.named_parameters()}

    before, after = gradients(case.original), gradients(case.small)
    for key, gradient in before.items():
        if gradient is None or not gradient.any():
            continue
        kept = after[key]
        assert kept is not None and bool(kept.isfinite().all()) and bool(kept.any()), key


AT_HALF_SIZE = (
    "swin",
    "swin v2",
    "swin v2-cr",
    "coatnet bias",
    "coatnet mlp",
    "hiera",
    "hiera window embedding",
    "nest",
    "mvit",
    "mvit class token",
    "efficientvit msra",
    "botnet",
    "lambda",
)


@pytest.mark.parametrize("name", AT_HALF_SIZE)
def test_input_resize_gives_what_the_library_builds_for_half_the_image(name: str) -> None:
    case, (build, side) = compressed(name, "input_resize"), MODELS[name]
    reference = build(side // 2).eval()
    reference.load_state_dict(case.small.state_dict())
    half = F.interpolate(case.x, scale_factor=0.5, mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(case.small(case.x), reference(half), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_windows_of_torchvision_that_fit_are_left_alone(v2: bool) -> None:
    model = randomize(_torchvision_swin(v2)).eval()
    x = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    small = rc.compress(model, rc.InputResize(scale=0.5), example_input=x)
    half = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(half), rtol=1e-4, atol=1e-5)


WINDOWS = {
    "swin": [(7, 7), (7, 7), (4, 4), (4, 4)],
    "swin dynamic": [(7, 7), (7, 7), (4, 4), (4, 4)],
    "swin v2": [(8, 8), (8, 8), (4, 4), (4, 4)],
    "swin v2-cr": [(8, 8), (8, 8), (4, 4), (4, 4)],
    "torchvision swin": [[7, 7], [7, 7], [4, 4], [4, 4]],
    "torchvision swin v2": [[7, 7], [7, 7], [4, 4], [4, 4]],
    "maxvit bias_tf": [(8, 8), (8, 8), (4, 4), (4, 4)],
    "torchvision maxvit": [7, 1, 4, 1],
    "gcvit": [(4, 4), (4, 4), (4, 4), (4, 4)],
    "davit": [(7, 7), (4, 4)],
    "tiny vit": [7, 4, 7],  # the last one was larger than its map before
    "halonet": [8, 4],
}
"""Windows at half the grid, block by block: those of the original wherever they fit, else the whole map."""


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_keep_their_size_where_it_fits(name: str) -> None:
    found = []
    for module in compressed(name).small.modules():
        kind = type(module).__name__
        if (kind.endswith(("Block",)) and hasattr(module, "window_size")) or kind.startswith("ShiftedWindowAttention"):
            found.append(module.window_size)
        elif kind == "PartitionAttentionLayer":
            found.append(module.p)
        elif kind.startswith("PartitionAttention"):
            found.append(module.partition_size)
        elif kind == "HaloAttn":
            found.append(module.block_size)
    assert found == WINDOWS[name]


@pytest.mark.parametrize("name", ["swin", "maxvit bias_tf", "gcvit", "nest", "tiny vit"])
def test_features_only_gives_the_maps_of_the_whole_model(name: str) -> None:
    case = compressed(name)
    features = timm.models._features.FeatureListNet(
        copy.deepcopy(case.original), out_indices=(0, 1), flatten_sequential=True
    ).eval()
    with pytest.warns(RescompressWarning, match="an output has shape"):
        small = rc.compress(features, rc.StemResize(scale=0.5), example_input=case.x)
    with torch.no_grad():
        found, (_, expected) = small(case.x), case.small.forward_intermediates(case.x, indices=[0, 1])
    for one, other in zip(found, expected, strict=True):
        one = one if one.shape == other.shape else one.permute(0, 3, 1, 2)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hiera", "mvit"])
def test_features_through_the_getter(name: str) -> None:
    case = compressed(name)
    getter = timm.models._features.FeatureGetterNet(
        copy.deepcopy(case.original), out_indices=(0, 1), prune=False
    ).eval()
    with pytest.warns(RescompressWarning, match="an output has shape"):
        small = rc.compress(getter, rc.StemResize(scale=0.5), example_input=case.x)
    with torch.no_grad():
        _, expected = case.small.forward_intermediates(case.x, indices=[0, 1])
        torch.testing.assert_close(small(case.x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the library's own resampling
@pytest.mark.parametrize("name", ["swin", "swin v2", "swin v2-cr"])
def test_set_input_size_works_on_a_compressed_swin(name: str) -> None:
    case = compressed(name)
    small, side = copy.deepcopy(case.small), MODELS[name][1]
    small.set_input_size(img_size=(2 * side, 2 * side))
    x = torch.randn(1, 3, 2 * side, 2 * side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert bool(small(x).isfinite().all())
        small.set_input_size(img_size=(side, side))
        assert small(case.x).shape == case.output.shape


@pytest.mark.parametrize("name", ["maxvit bias_tf", "efficientvit msra"])
def test_set_input_size_is_refused_where_it_would_undo_the_grid(name: str) -> None:
    small = compressed(name).small
    with pytest.raises(RuntimeError, match="compressed for images of one size"):
        small.set_input_size(img_size=(64, 64))


def test_a_grid_that_mask_units_do_not_fill_snaps_and_says_so() -> None:
    model, x = randomize(_hiera(96)).eval(), torch.randn(1, 3, 96, 96)
    with pytest.warns(RescompressWarning, match="24 x 24 becomes 8 x 8"):
        small = rc.compress(model, scale=0.5, example_input=x)
    assert small.unroll.size == [8, 8] and small.mask_spatial_shape == [1, 1]


def test_gcvit_leaves_out_one_pooling_and_keeps_every_convolution() -> None:
    case = compressed("gcvit")
    before, after = (
        [sum(isinstance(m, nn.MaxPool2d) for m in stage.global_block.modules()) for stage in model.stages]
        for model in (case.original, case.small)
    )
    assert (before, after) == ([2, 1], [1, 0])


@pytest.mark.parametrize("name", ["mvit", "botnet"])
def test_relative_positions_stay_centred(name: str) -> None:
    """A table that grows with the distance still has its least value at distance 0, and the same on both sides."""
    build, side = MODELS[name]
    model = build(side).eval()
    tables = [key for key, _ in model.named_parameters() if key.rsplit(".", 1)[-1] in _LINES]
    with torch.no_grad():
        for key in tables:
            table = model.get_parameter(key)
            table.copy_((torch.arange(len(table)) - len(table) // 2).abs()[:, None].expand_as(table))
    small = rc.compress(model, rc.StemResize(scale=0.5), example_input=torch.randn(1, 3, side, side))
    assert tables
    for key in tables:
        line = small.get_parameter(key)[:, 0].detach()
        torch.testing.assert_close(line, line.flip(0), rtol=1e-5, atol=1e-5)
        assert len(line) < len(model.get_parameter(key)) and int(line.argmin()) == len(line) // 2


_LINES = ("rel_pos_h", "rel_pos_w", "height_rel", "width_rel")


@pytest.mark.parametrize("name", ["swin", "coatnet bias", "hiera", "mvit", "nest"])
def test_export_equals_eager(name: str) -> None:
    case = compressed(name)
    program = torch.export.export(case.small, (case.x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(case.x), case.output, rtol=1e-5, atol=1e-5)


def test_bilinear_attention_gives_the_same_scores_to_lines_and_positions_that_are_alike() -> None:
    """A score that every pair of parts had on the larger grid is what every pair has on the smaller one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 1, 1, 3, 8, 1, generator=generator).expand(3, 8, 8, 3, 8, 1).reshape(192, 3, 8, 1)
    bias = torch.randn(3, 1, generator=generator).expand(3, 64).reshape(192)
    line = torch.ones(1, 3, 8, 1)
    made = resample_table(weight, "mixing", (8, 8), (6, 6), 3), resample_table(bias, "mixing", (8, 8), (6, 6), 3)
    scores, smaller = F.conv2d(line, weight, bias), F.conv2d(line[:, :, :6], *made)
    torch.testing.assert_close(smaller.view(3, 36), scores.view(3, 64)[:, :36])


def test_bilinear_attention_keeps_which_parts_each_score_is_of() -> None:
    """Scores that grow from row to row, and not from column to column, still do."""
    bias = torch.arange(8.0)[:, None].expand(8, 8).reshape(64)
    made = resample_table(bias, "mixing", (8, 8), (4, 4), 1).view(4, 4)
    torch.testing.assert_close(made, made[:, :1].expand(4, 4))
    torch.testing.assert_close(made[:, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]), rtol=0, atol=0.1)


@pytest.mark.parametrize(("side", "size"), [((48, 48), 8), ((12, 12), 6), ((3, 3), 3), ((16, 24), 8), ((12, 18), 6)])
def test_square_blocks_divide_both_sides(side: tuple[int, int], size: int) -> None:
    assert _block_size(8, side, "attention") == size


def test_square_blocks_without_a_common_divisor_are_refused() -> None:
    with pytest.raises(SmallerGridError, match="none near it divides both sides of its map of 10 x 14"):
        _block_size(8, (10, 14), "attention")


def test_clipped_windows() -> None:
    assert clipped((7, 7), (14, 14), (7, 7)) == (7, 7)
    assert clipped((7, 7), (7, 14), (4, 7)) == (4, 7)
    assert clipped((7, 7), (5, 5), (3, 3)) == (7, 7)  # larger than its map before: the host's own choice


def test_dividing_windows() -> None:
    assert dividing((7, 7), (28, 14), "x") == (7, 7)
    assert dividing((7, 7), (4, 24), "x") == (4, 8)
    with pytest.raises(SmallerGridError, match="windows of 7"):
        dividing((7, 7), (53, 53), "x")


@pytest.mark.parametrize("window", [(4, 4), (3, 5)])
def test_relative_index_is_that_of_the_libraries(window: tuple[int, int]) -> None:
    from timm.models.swin_transformer import get_relative_position_index

    torch.testing.assert_close(relative_index(window), get_relative_position_index(*window))
