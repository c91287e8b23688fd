"""Segmentors of mmseg keep the size of what they predict, their names and their training on a smaller map."""

import copy
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rescompress as rc
from rescompress.errors import InputError, SpecError, UnsupportedModelError
from rescompress.families import describe
from rescompress.measure.macs import count_macs
from rescompress.self_check import apply_steps
from rescompress.surgery import clone_shared

try:
    import mmseg
    import mmseg.models  # fills the registry
    from mmengine.config import Config, ConfigDict
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
except ImportError as missing:  # OpenCV without the system's libGL raises it, too
    pytest.skip(f"mmseg cannot be imported: {missing}", allow_module_level=True)

# mmseg tells at each build that a default is one, and mmengine that it reads files in an old way.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "seeded", "in_scope")]

CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs"

CITYSCAPES = {
    "ann/ann_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "apcnet/apcnet_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024": "input_resize",
    "bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024": "input_resize",
    "cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680": "input_resize",
    "danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024": "input_resize",
    "deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "deeplabv3/deeplabv3_r18b-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "deeplabv3plus/deeplabv3plus_r18b-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "dmnet/dmnet_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "dnlnet/dnl_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024": "stem_resize",
    "fastfcn/fastfcn_r50-d32_jpu_aspp_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "fastfcn/fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024": "stem_resize",
    "fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "fcn/fcn_r18b-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "hrnet/fcn_hr18s_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "icnet/icnet_r18-d8_4xb2-80k_cityscapes-832x832": "input_resize",
    "isanet/isanet_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "mobilenet_v2/mobilenet-v2-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "mobilenet_v2/mobilenet-v2-d8_pspnet_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "mobilenet_v3/mobilenet-v3-d8-scratch-s_lraspp_4xb4-320k_cityscapes-512x1024": "stem_resize",
    "nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024": "stem_resize",
    "pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes": "input_resize",
    "pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "pspnet/pspnet_r18b-d8_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "resnest/resnest_s101-d8_deeplabv3_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "resnest/resnest_s101-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "resnest/resnest_s101-d8_fcn_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "resnest/resnest_s101-d8_pspnet_4xb2-80k_cityscapes512x1024": "stem_resize",
    "segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024": "stem_resize",
    "sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024": "stem_resize",
    "setr/setr_vit-l_mla_8xb1-80k_cityscapes-768x768": "patch_resize",
    "setr/setr_vit-l_naive_8xb1-80k_cityscapes-768x768": "patch_resize",
    "stdc/stdc1_4xb12-80k_cityscapes-512x1024": "stem_resize",
    "unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024": "stem_resize",
    "upernet/upernet_r18_4xb2-40k_cityscapes-512x1024": "stem_resize",
}
"""The smallest config of every (backbone, neck, heads) in the Cityscapes configs, and what a plain scale stands for."""

NOT_BUILT = {
    "ccnet/ccnet_r50-d8_4xb2-40k_cityscapes-512x1024": "CrissCrossAttention",  # a compiled operator of mmcv
    "point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024": "point_sample",
    "psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024": "PSAMask",
    "mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024": "mmdet",  # which needs compiled operators
    "mask2former/mask2former_swin-t_8xb2-90k_cityscapes-512x1024": "mmdet",
}
"""Architectures of the Cityscapes configs that mmseg itself does not build here, and what they lack."""

OTHERS = {
    "beit/beit-base_upernet_8xb2-160k_ade20k-640x640": "patch_resize",
    "dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512": "patch_resize",
    "knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512": "stem_resize",
    "mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512": "patch_resize",
    "segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512": "patch_resize",
    "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512": "stem_resize",
    "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512": "stem_resize",
    "twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512": "stem_resize",
    "twins/twins_svt-s_uperhead_8xb2-160k_ade20k-512x512": "stem_resize",
    "vit/vit_deit-s16_upernet_8xb2-160k_ade20k-512x512": "patch_resize",
}
"""Architectures that mmseg ships configs of for other data sets."""


NOT_EXPORTED: dict[str, str] = {}
"""Architectures that torch.export does not take before anything is done to them, and what it says."""


@pytest.fixture
def in_scope() -> None:
    """Types in configs are mmseg's."""
    init_default_scope("mmseg")


def config_of(name: str, size: tuple[int, int]) -> Any:
    """Return the segmentor's config of a shipped config, without downloads, for one process, ViTs of four blocks."""
    config = Config.fromfile(CONFIGS / f"{name}.py").model
    _plain(config)
    backbone = config.backbone
    if backbone.type in ("VisionTransformer", "BEiT", "MAE"):
        several = len(backbone.get("out_indices", ())) > 1
        backbone.update(num_layers=4, img_size=size, out_indices=(0, 1, 2, 3) if several else (3,))
    return config


def _plain(config: Any) -> None:
    if isinstance(config, dict):
        for key in [key for key in config if key in ("init_cfg", "pretrained", "checkpoint")]:
            config.pop(key)
        if config.get("type") == "SyncBN":
            config["type"] = "BN"
    for one in config.values() if isinstance(config, dict) else config:
        if isinstance(one, dict | list | tuple):
            _plain(one)


def built(name: str, size: tuple[int, int]) -> nn.Module:
    model = MODELS.build(config_of(name, size))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # zeros would hide whatever the blocks do
        if parameter.detach().abs().max() < 1e-3:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def tiny_fcn(**options: Any) -> Any:
    """A config of an FCN on a ResNet-18 that is small enough to train in a test."""
    norm = {"type": "BN"}
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "size": (64, 128), "pad_val": 0, "seg_pad_val": 255},
        "backbone": {
            "type": "ResNetV1c",
            "depth": 18,
            "base_channels": 8,
            "stem_channels": 8,
            "strides": (1, 2, 1, 1),
            "dilations": (1, 1, 2, 4),
            "norm_cfg": norm,
        },
        "decode_head": {
            "type": "FCNHead",
            "in_channels": 64,
            "channels": 8,
            "num_convs": 1,
            "num_classes": 19,
            "norm_cfg": norm,
            "loss_decode": {"type": "CrossEntropyLoss", "avg_non_ignore": True},
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        **options,
    }
    return ConfigDict(config)


def tiny_vit(kind: str, **options: Any) -> nn.Module:
    """A segmentor on a ViT or BEiT of 64 x 64 pixels, 4 x 4 patches."""
    backbone = {"type": kind, "img_size": (64, 64), "embed_dims": 16, "num_layers": 3, "num_heads": 2, **options}
    head = {"type": "FCNHead", "in_channels": 16, "channels": 8, "in_index": 0, "num_classes": 5, "num_convs": 1}
    config = tiny_fcn(backbone={**backbone, "mlp_ratio": 2, "out_indices": (1, 2)}, decode_head=head)
    model = MODELS.build(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def samples(size: tuple[int, int], original: tuple[int, int] | None = None) -> list[SegDataSample]:
    made = []
    for index in range(2):
        generator = torch.Generator().manual_seed(index)
        sample = SegDataSample(
            metainfo={
                "ori_shape": original or size,
                "img_shape": size,
                "pad_shape": size,
                "padding_size": [0, 0, 0, 0],
            }
        )
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, *size), generator=generator))
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, *size), generator=generator))
        made.append(sample)
    return made


def leaves(outputs: Any) -> list[torch.Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(outputs) if isinstance(one, torch.Tensor)]


def check_identity(model: nn.Module, small: nn.Module, images: torch.Tensor) -> None:
    """The steps that were taken, at zero reduction, change nothing."""
    same = clone_shared(model)
    anatomy = replace(describe(model, (images,)), multiple=small._rescompress.anatomy.multiple)
    apply_steps(same, rc.spec_of(small).identity(), anatomy)
    same_outputs(same, model, images, 1e-6)


def check_export(name: str, model: nn.Module, small: nn.Module, images: torch.Tensor) -> None:
    """A program of torch.export computes the same; where there is none, the original has none either."""
    if name in NOT_EXPORTED:
        with pytest.raises(Exception):  # noqa: B017  whatever torch.export raises on a foreign model
            torch.export.export(model, (images,))
        return
    same_outputs(torch.export.export(small, (images,)).module(), small, images, 1e-5)


def same_outputs(one: nn.Module, other: nn.Module, images: torch.Tensor, share: float) -> None:
    """Compare what two models give; they may be apart by a share of the largest value."""
    found = []
    for model in (one, other):
        torch.manual_seed(0)  # SegNeXt's head starts from random numbers in each call
        with torch.no_grad():
            found.append(leaves(model(images)))
    for new, old in zip(*found, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=share * float(old.abs().max()))


def check(name: str, kind: str, size: tuple[int, int]) -> None:
    """Everything that is promised of one architecture."""
    model = built(name, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = rc.compress(model, scale=0.5, example_input=images[:1])

    assert [step.kind for step in rc.spec_of(small)] == [kind]
    # Segmenter's head attends to 150 class tokens, which stay, beside the 64 patches of so small an image.
    largest = 0.6 if "segmenter" in name else 0.35
    assert 0.2 < count_macs(small, images).macs / count_macs(model, images).macs < largest
    with torch.no_grad():
        old = leaves(model(images))
        torch.manual_seed(0)  # SegNeXt's head starts from random numbers in each call
        new = leaves(small(images))
    assert [one.shape for one in new] == [one.shape for one in old]
    check_identity(model, small, images)
    check_export(name, model, small, images)

    assert list(small.state_dict()) == list(before)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    loaded = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    loaded.load_state_dict(before)
    with torch.no_grad():
        torch.manual_seed(0)
        torch.testing.assert_close(leaves(loaded(images))[0], new[0], rtol=1e-5, atol=1e-5)
        predicted = small(images, samples(size, (size[0] + 3, size[1] - 5)), mode="predict")
    assert predicted[1].pred_sem_seg.data.shape == (1, size[0] + 3, size[1] - 5)

    losses = [one.train()(images, samples(size), mode="loss") for one in (model, small)]
    assert list(losses[1]) == list(losses[0])
    for one in losses:
        sum(leaf.sum() for key, value in one.items() if "loss" in key for leaf in leaves(value)).backward()
    trained = [parameter.grad is not None for parameter in model.parameters()]
    assert [parameter.grad is not None for parameter in small.parameters()] == trained
    assert all(parameter.grad.isfinite().all() for parameter in small.parameters() if parameter.grad is not None)


def side(name: str) -> tuple[int, int]:
    if "mobilenet_v3" in name:  # its head pools windows of 49 positions of 8 pixels
        return (400, 416)
    return (128, 128) if CITYSCAPES.get(name, OTHERS.get(name)) == "patch_resize" else (128, 192)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024", (128, 128)),
        ("erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024", (64, 128)),
        ("fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024", (64, 64)),
        ("pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes", (128, 128)),
        ("segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024", (64, 128)),
    ],
)
def test_segmentors_keep_what_they_promise(name: str, size: tuple[int, int]) -> None:
    check(name, CITYSCAPES[name], size)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*CITYSCAPES, *OTHERS])
def test_every_architecture(name: str) -> None:
    check(name, (CITYSCAPES | OTHERS)[name], side(name))


@pytest.mark.slow
def test_no_architecture_of_the_cityscapes_configs_is_left_out() -> None:
    def parts(name: Path) -> str:
        config = Config.fromfile(name).model
        backbone = config.backbone
        kinds = [
            sorted({one["type"] for one in (part if isinstance(part, list) else [part])})
            for part in (config.get("neck"), config.decode_head, config.get("auxiliary_head"))
            if part
        ]
        return json.dumps([config.type, backbone.type, backbone.get("backbone_cfg", {}).get("type"), kinds])

    shipped = {parts(path) for path in CONFIGS.glob("*/*cityscapes*.py")}
    assert {parts(CONFIGS / f"{name}.py") for name in [*CITYSCAPES, *NOT_BUILT]} == shipped


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_mmseg_itself_does_not_build(name: str) -> None:
    with pytest.raises((RuntimeError, ImportError), match=NOT_BUILT[name]):
        MODELS.build(config_of(name, (64, 64)))


def test_a_map_of_an_odd_size_comes_back_at_it() -> None:
    model, images = MODELS.build(tiny_fcn()).eval(), torch.randn(1, 3, 97, 129)
    with pytest.warns(rc.RescompressWarning, match="cannot be reached exactly"):
        small = rc.compress(model, scale=0.5, example_input=images)
    assert small(images).shape == model(images).shape == (1, 19, 13, 17)


def test_sliding_windows() -> None:
    model = MODELS.build(tiny_fcn(test_cfg={"mode": "slide", "crop_size": (64, 64), "stride": (32, 32)})).eval()
    small = rc.compress(model, scale=0.5, example_input=torch.randn(1, 3, 64, 64))
    images = torch.randn(1, 3, 96, 128)

    predicted = small(images, mode="predict")[0].seg_logits.data

    # The mean over all windows, each at its old size.
    windows, counts = torch.zeros(19, 96, 128), torch.zeros(96, 128)
    for top in (0, 32):
        for left in (0, 32, 64):
            crop = images[:, :, top : top + 64, left : left + 64]
            made = nn.functional.interpolate(small.decode_head.inner(small.backbone(crop)), (64, 64), mode="bilinear")
            windows[:, top : top + 64, left : left + 64] += made[0].detach()
            counts[top : top + 64, left : left + 64] += 1
    torch.testing.assert_close(predicted, windows / counts)


def test_a_predicting_call_is_an_example_too() -> None:
    model, images = MODELS.build(tiny_fcn()).eval(), torch.randn(1, 3, 64, 128)
    small = rc.compress(model, scale=0.5, example_input=((images,), {"mode": "predict"}))
    again = rc.compress(model, scale=0.5, example_input=images)
    torch.testing.assert_close(small(images), again(images))


def test_branches_that_each_read_the_image_take_no_stem_resize() -> None:
    model = built("bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024", (128, 128))
    with pytest.raises(UnsupportedModelError, match=r"each read the image or its size.*use input_resize"):
        rc.compress(model, rc.StemResize(scale=0.5), example_input=torch.randn(1, 3, 128, 128))


def test_the_pooling_window_of_lraspp_covers_the_same_part() -> None:
    name = "mobilenet_v3/mobilenet-v3-d8-scratch-s_lraspp_4xb4-320k_cityscapes-512x1024"
    model = MODELS.build(config_of(name, (512, 1024))).eval().to("meta")
    with pytest.warns(rc.RescompressWarning, match="only shapes"):
        small = rc.compress(model, scale=0.5, example_input=torch.empty(1, 3, 512, 1024, device="meta"))
    pool = small.decode_head.image_pool[0]
    assert (pool.kernel_size, pool.stride) == ((24, 24), (8, 10))
    assert model.decode_head.image_pool[0].kernel_size == 49


@pytest.mark.parametrize("spec", [rc.PatchResize(scale=0.5), rc.InputResize(scale=0.5)])
def test_positions_of_a_vit_follow(spec: rc.Step) -> None:
    model, images = tiny_vit("VisionTransformer"), torch.randn(1, 3, 64, 64)
    small = rc.compress(model, spec, example_input=images)

    # The host resamples nothing at the size that it was compressed with ...
    assert small.backbone.pos_embed.shape == (1, 1 + 2 * 2, 16)
    assert small(images).shape == model(images).shape
    # ... and goes on taking other sizes, with the position embedding stretched from its own grid.
    assert small(torch.randn(1, 3, 128, 64)).shape == (1, 5, 8, 4)


@pytest.mark.parametrize("spec", [rc.PatchResize(scale=0.5), rc.InputResize(scale=0.5)])
def test_relative_positions_of_beit_are_those_of_one_built_smaller(spec: rc.Step) -> None:
    model, images = tiny_vit("BEiT"), torch.randn(1, 3, 64, 64)
    small = rc.compress(model, spec, example_input=images).backbone
    native = tiny_vit("BEiT", img_size=(32, 32)).backbone
    for mine, theirs in zip(small.layers, native.layers, strict=True):
        assert torch.equal(mine.attn.relative_position_index, theirs.attn.relative_position_index)
        assert mine.attn.relative_position_bias_table.shape == theirs.attn.relative_position_bias_table.shape
        assert mine.attn.num_relative_distance == theirs.attn.num_relative_distance
    assert (small.patch_shape, small.window_size) == (native.patch_shape, native.window_size)


def test_beit_is_described_at_its_own_size_only() -> None:
    with pytest.raises(UnsupportedModelError, match="give an example_input of its img_size"):
        rc.compress(tiny_vit("BEiT"), scale=0.5, example_input=torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize("kind", ["VisionTransformer", "BEiT", "MAE"])
@pytest.mark.parametrize("step", [rc.TokenPool(after_block=0), rc.TokenMerge(r=3)])
def test_heads_on_vits_get_maps_of_the_whole_grid(kind: str, step: rc.Step) -> None:
    """compress itself proves that nothing changes at zero reduction, positions between merged tokens included."""
    model, images = tiny_vit(kind), torch.randn(2, 3, 64, 64)
    small = rc.compress(model, step, example_input=images)
    before, after = model(images), small(images)
    assert after.shape == before.shape == (2, 5, 4, 4)
    assert not torch.equal(after, before)
    assert list(small.state_dict()) == list(model.state_dict())
    assert count_macs(small, images).macs < count_macs(model, images).macs
    after.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())


def test_mmseg_describes_what_it_is() -> None:
    anatomy = describe(tiny_vit("BEiT"), (torch.randn(1, 3, 64, 64),))
    assert (anatomy.family, anatomy.host, anatomy.restored) == ("mmseg_vit", "backbone", ("decode_head",))
    anatomy = describe(MODELS.build(tiny_fcn()).eval(), (torch.randn(1, 3, 64, 128),))
    assert (anatomy.family, anatomy.first_conv, anatomy.restored_sizes) == ("mmseg", "backbone.stem.0", ((8, 16),))


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Four images in the folders of Cityscapes."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        images, labels = (tmp_path / folder / part / "ulm" for folder in ("leftImg8bit", "gtFine"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(2):
            stem = f"ulm_{index:06d}_000019"
            Image.fromarray(random.integers(0, 255, (96, 160, 3), dtype=np.uint8)).save(
                images / f"{stem}_leftImg8bit.png"
            )
            Image.fromarray(random.integers(0, 19, (96, 160), dtype=np.uint8)).save(
                labels / f"{stem}_gtFine_labelTrainIds.png"
            )
    return tmp_path


def runner_config(data: Path, work: Path, model: dict[str, Any], **options: Any) -> Config:
    def loader(part: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "batch_size": 2 if part == "train" else 1,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": {
                "type": "CityscapesDataset",
                "data_root": str(data),
                "data_prefix": {"img_path": f"leftImg8bit/{part}", "seg_map_path": f"gtFine/{part}"},
                "pipeline": [{"type": "LoadImageFromFile"}, *steps, {"type": "PackSegInputs"}],
            },
        }

    crop = [{"type": "LoadAnnotations"}, {"type": "RandomCrop", "crop_size": (64, 128)}]
    return Config(
        {
            "default_scope": "mmseg",
            "custom_imports": {"imports": ["rescompress.openmmlab"]},
            "model": model,
            "work_dir": str(work),
            "train_dataloader": loader("train", crop),
            "val_dataloader": loader("val", [{"type": "LoadAnnotations"}]),
            "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
            "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}},
            "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 2, "val_interval": 2},
            "val_cfg": {"type": "ValLoop"},
            "default_hooks": {
                "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2},
                "logger": {"type": "LoggerHook", "interval": 1},
            },
            "log_processor": {"by_epoch": False},
            "log_level": "ERROR",
            "experiment_name": work.name,
            **options,
        }
    )


@pytest.mark.filterwarnings("ignore")
def test_the_runner_trains_a_compressed_segmentor(cityscapes: Path, tmp_path: Path) -> None:
    """Two iterations from an uncompressed checkpoint, validation, and a checkpoint that loads into either."""
    plain = MODELS.build(tiny_fcn())
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    config = runner_config(
        cityscapes,
        tmp_path / "work",
        {**tiny_fcn(), "type": "Compressed", "scale": 0.5},
        load_from=str(tmp_path / "plain.pth"),
    )
    # From a file, as mmengine's tools read it: that is what imports what it names.
    config.dump(tmp_path / "config.py")
    config = Config.fromfile(tmp_path / "config.py")
    Runner.from_cfg(config).train()

    written = torch.load(tmp_path / "work" / "iter_2.pth", weights_only=False)["state_dict"]
    assert list(written) == list(plain.state_dict())
    assert any(not torch.equal(written[name], value) for name, value in plain.state_dict().items())
    assert all(value.isfinite().all() for value in written.values())
    (log,) = (tmp_path / "work").glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert any("mIoU" in line for line in lines)
    # The same weights in a plain segmentor and in one that is compressed afterwards.
    plain.load_state_dict(written)
    images = torch.randn(1, 3, 64, 128)
    small = rc.compress(plain.eval(), scale=0.5, example_input=images)
    again = MODELS.build(config.model).eval()
    again.load_state_dict(written)
    torch.testing.assert_close(again(images), small(images))


def test_a_compressed_config_names_its_mistakes() -> None:
    import rescompress.openmmlab  # noqa: F401  registers the type

    with pytest.raises(SpecError, match="either a scale or a spec"):
        MODELS.build({**tiny_fcn(), "type": "Compressed"})
    with pytest.raises(InputError, match="names no crop"):
        MODELS.build({**tiny_fcn(data_preprocessor=None), "type": "Compressed", "scale": 0.5})


def test_a_compressed_config_takes_a_spec_and_a_whole_segmentor() -> None:
    import rescompress.openmmlab  # noqa: F401

    spec = {"steps": [{"kind": "input_resize", "size": (32, 64)}]}
    model = MODELS.build({"type": "Compressed", "spec": spec, "segmentor": tiny_fcn(), "example_size": (64, 128)})
    assert type(model).__name__ == "EncoderDecoder"
    assert rc.spec_of(model) == rc.Spec.of(rc.InputResize(size=(32, 64)))


def test_weights_are_initialised_past_what_was_put_in() -> None:
    """mmengine's runner calls init_weights of all children, and the head's asks for its conv_seg."""
    model = rc.compress(MODELS.build(tiny_fcn()).eval(), scale=0.5, example_input=torch.randn(1, 3, 64, 128))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    model.init_weights()
    assert model.decode_head.conv_seg.weight.abs().max() < 1
    assert model.backbone.stem[0].weight.abs().max() < 7


@pytest.mark.parametrize("written", ["name", "name.py", "folder/name.py"])
def test_the_command_line_finds_shipped_configs(written: str) -> None:
    from rescompress.cli.models import Request, load_model

    name = "erfnet_fcn_4xb4-160k_cityscapes-512x1024"
    reference = written.replace("folder", "erfnet").replace("name", name)
    loaded = load_model(Request(reference=f"mmseg:{reference}", random=True, num_classes=7))
    assert loaded.input_size == (512, 1024)
    assert loaded.model.decode_head.conv_seg.out_channels == 7
    assert not any("Sync" in type(module).__name__ for module in loaded.model.modules())
    assert loaded.preprocessing["mean"] == pytest.approx([0.485, 0.456, 0.406], abs=1e-3)


def test_the_command_line_says_what_is_wrong_with_a_config(tmp_path: Path) -> None:
    from rescompress.cli.models import Request, load_model

    def load(name: str) -> None:
        load_model(Request(reference=f"mmseg:{name}", random=True))

    with pytest.raises(InputError, match=r"did you mean 'erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024.py'"):
        load("erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1023")
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(InputError, match="cannot read the config"):
        load(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("a = 1")
    with pytest.raises(InputError, match="describes no model"):
        load(str(tmp_path / "empty.py"))
