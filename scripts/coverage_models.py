"""The models that scripts/coverage.py and the acceptance tests go through: how to build each, and its example input."""

import fnmatch
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rescompress.inputs import Args, default_args

TIMM = """
    beitv2_base_patch16_224 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
    deepseek_vit_412m_enc deit_tiny_distilled_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvim_m1_dist efficientvit_b0
    efficientvit_l1 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf
    gcvit_xxtiny gemma4_vit_167m gemma4_vit_167m_enc ghostnet_050 hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
    hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
    levit_256d levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224
    mobilenetv3_small_050 mobilenetv5_base mobilenetv5_300m_enc mvitv2_tiny naflexvit_base_patch16_parfac_gap
    nasnetalarge nest_tiny_jx nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m
    qwen3_vit_88m_enc rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 test_resnet resnetv2_18 rexnet_100
    selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window16_256 swinv2_cr_tiny_384 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
    vgg11 visformer_tiny test_vit test_vit_relpos samvit_base_patch16_224 volo_d1_224 ese_vovnet19b_slim_dw
    legacy_xception xception41p xcit_nano_12_p8_384
""".split()  # noqa: SIM905  words read better than ninety quoted lines
"""The smallest entry point of every class that timm registers, in timm 1.0.31."""

TIMM_MORE = """
    aimv2_large_patch14_224 beit_base_patch16_224 botnet26t_256 coatnet_nano_rw_224 convnext_tiny
    deit3_small_patch16_224 efficientnet_b0 eva02_tiny_patch14_224 fastvit_mci0 flexivit_small halonet26t
    hiera_small_abswin_256 lambda_resnet26t lamhalobotnet50ts_256 levit_128 maxvit_pico_rw_256 mixer_s32_224
    mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 naflexvit_base_patch16_gap pit_s_distilled_224
    regnety_002 repvgg_a0 resmlp_12_224 resnet18 resnet50 swin_s3_tiny_224 test_maxvit test_vit2 twins_pcpvt_small
    vit_base_patch16_siglip_224 vit_pe_core_tiny_patch16_384 vit_small_patch14_reg4_dinov2 vit_small_patch16_224
    vit_small_patch16_dinov3 vit_small_patch16_rope_224 vit_srelpos_small_patch16_224 vit_tiny_r_s16_p8_224
    vitamin_small_224
    hiera_tiny_224/features hrnet_w18_small/features swin_tiny_patch4_window7_224/features test_resnet/features
    test_vit/features
""".split()  # noqa: SIM905
"""More of timm: other kinds of the same classes, and extractors of features (features_only=True)."""

_VIT = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_STAGES = {"depths": [2, 2, 6, 2]}
_SEGFORMER = {"hidden_sizes": [32, 64, 160, 256], "decoder_hidden_size": 256}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": _VIT,
    "DeiTForImageClassification": _VIT,
    "BeitForImageClassification": {**_VIT, "use_relative_position_bias": True},
    "BeitForSemanticSegmentation": {
        **_VIT,
        "image_size": 224,
        "use_relative_position_bias": True,
        "out_indices": [3, 5, 7, 11],
    },
    "Data2VecVisionForImageClassification": {**_VIT, "use_shared_relative_position_bias": True},
    "Dinov2ForImageClassification": _VIT,
    "Dinov2WithRegistersForImageClassification": _VIT,
    "DINOv3ViTModel": {**_VIT, "num_register_tokens": 4},
    "DINOv3ConvNextModel": {},
    "SiglipForImageClassification": {"vision_config": _VIT},
    "SiglipVisionModel": _VIT,
    "Siglip2VisionModel": {**_VIT, "num_patches": 196},
    "Siglip2ForImageClassification": {"vision_config": {**_VIT, "num_patches": 196}},
    "CLIPForImageClassification": {"vision_config": _VIT},
    "CLIPVisionModel": _VIT,
    "SwinForImageClassification": {},
    "Swinv2ForImageClassification": {},
    "ConvNextForImageClassification": {},
    "ConvNextV2ForImageClassification": {},
    "ResNetForImageClassification": {},
    "SegformerForImageClassification": _SEGFORMER,
    "SegformerForSemanticSegmentation": _SEGFORMER,
    "DPTForDepthEstimation": {**_VIT, "image_size": 224, "is_hybrid": False, "neck_hidden_sizes": [24, 48, 96, 192]},
    "DPTForSemanticSegmentation": {
        **_VIT,
        "image_size": 224,
        "is_hybrid": False,
        "neck_hidden_sizes": [24, 48, 96, 192],
    },
    "UperNetForSemanticSegmentation": {},
}
"""Class of transformers: what its default config is changed by."""

MMSEG = """
    ann/ann_r50-d8_4xb2-40k_cityscapes-512x1024 apcnet/apcnet_r50-d8_4xb2-40k_cityscapes-512x1024
    bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb4-160k_cityscapes-1024x1024
    bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024
    cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680 danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024
    ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024
    deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024
    deeplabv3/deeplabv3_r18b-d8_4xb2-80k_cityscapes-512x1024
    deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024
    deeplabv3plus/deeplabv3plus_r18b-d8_4xb2-80k_cityscapes-512x1024
    dmnet/dmnet_r50-d8_4xb2-40k_cityscapes-512x1024 dnlnet/dnl_r50-d8_4xb2-40k_cityscapes-512x1024
    emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024 encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024
    erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024
    fastfcn/fastfcn_r50-d32_jpu_aspp_4xb2-80k_cityscapes-512x1024
    fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024
    fastfcn/fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024
    fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024 fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024
    fcn/fcn_r18b-d8_4xb2-80k_cityscapes-512x1024 gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-512x1024
    hrnet/fcn_hr18_4xb2-160k_cityscapes-512x1024 icnet/icnet_r18-d8-in1k-pre_4xb2-160k_cityscapes-832x832
    isanet/isanet_r50-d8_4xb2-40k_cityscapes-512x1024
    mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024
    mobilenet_v2/mobilenet-v2-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024
    mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024
    mobilenet_v2/mobilenet-v2-d8_pspnet_4xb2-80k_cityscapes-512x1024
    mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024
    nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024 ocrnet/ocrnet_hr18_4xb2-160k_cityscapes-512x1024
    ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024 pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes
    pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024 pspnet/pspnet_r18b-d8_4xb2-80k_cityscapes-512x1024
    resnest/resnest_s101-d8_deeplabv3_4xb2-80k_cityscapes-512x1024
    resnest/resnest_s101-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024
    resnest/resnest_s101-d8_fcn_4xb2-80k_cityscapes-512x1024
    resnest/resnest_s101-d8_pspnet_4xb2-80k_cityscapes512x1024
    segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024 sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024
    setr/setr_vit-l_mla_8xb1-80k_cityscapes-768x768 setr/setr_vit-l_naive_8xb1-80k_cityscapes-768x768
    stdc/stdc1_4xb12-80k_cityscapes-512x1024 unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024
    upernet/upernet_r18_4xb2-40k_cityscapes-512x1024 beit/beit-base_upernet_8xb2-160k_ade20k-640x640
    dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512 knet/knet-s3_r50-d8_deeplabv3_8xb2-adamw-80k_ade20k-512x512
    knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512
    mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512-ms maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512
    maskformer/maskformer_swin-s_upernet_8xb2-160k_ade20k-512x512
    segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512
    segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512
    segnext/segnext_mscan-s_1xb16-adamw-160k_ade20k-512x512
    swin/swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512
    twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512
    twins/twins_pcpvt-s_uperhead_8xb4-160k_ade20k-512x512 twins/twins_svt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512
    twins/twins_svt-s_uperhead_8xb2-160k_ade20k-512x512 unet/unet-s5-d16_deeplabv3_4xb4-40k_drive-64x64
    unet/unet-s5-d16_pspnet_4xb4-40k_chase-db1-128x128 vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512
    vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512
""".split()  # noqa: SIM905
"""Configs that mmseg ships, one of each combination of backbone, neck and heads on Cityscapes, and others' on ADE20K.

PointRend, PSANet and CCNet need compiled operators, Mask2Former mmdetection; VPD and SAN are wrapped around networks of
other libraries.
"""


SMALL = (128, 256)
"""Height and width of the images of mmseg's models: small, for the work is done in values."""


@dataclass(frozen=True)
class Subject:
    """One model of a library.

    Attributes:
        library: "timm", "torchvision", "transformers" or "mmseg"
        name: what the library calls it: an entry point (with /features for its extractor), a class, a config file
    """

    library: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    def build(self, **options: Any) -> nn.Module:
        """Build the model with random weights, in eval mode."""
        return _BUILD[self.library](self.name, **options).eval()

    def example(self, model: nn.Module) -> Args:
        """Return the arguments of one call, on the device of the model."""
        device = next(model.parameters()).device
        if self.library == "mmseg":
            size = (512, 1024) if "lraspp" in self.name else SMALL  # its pooling window is made for one size
            return (torch.rand(1, 3, *size, device=device),), {}
        return default_args(model)


def subjects(
    libraries: list[str] | None = None, only: str | None = None, all_entry_points: bool = False
) -> list[Subject]:
    """Return the models of the libraries that are installed, or of those named, whose name matches `only`."""
    found = []
    for library, names in _NAMES.items():
        if libraries and library not in libraries:
            continue
        try:
            listed = list(names(all_entry_points))
        except ImportError:
            if libraries:
                raise
            continue
        found += [Subject(library, name) for name in listed]
    if only is not None:
        found = [one for one in found if fnmatch.fnmatch(str(one), f"*{only}*")]
    return found


def _names_of(module: str) -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=importlib.import_module(module)))


def _timm_names(all_entry_points: bool) -> Iterator[str]:
    timm = importlib.import_module("timm")
    yield from timm.list_models() if all_entry_points else (*TIMM, *TIMM_MORE)


def _torchvision_names(all_entry_points: bool) -> Iterator[str]:
    for module in ("torchvision.models", "torchvision.models.segmentation", "torchvision.models.detection"):
        yield from _names_of(module)


def _transformers_names(all_entry_points: bool) -> Iterator[str]:
    importlib.import_module("transformers")
    yield from TRANSFORMERS


def _mmseg_names(all_entry_points: bool) -> Iterator[str]:
    importlib.import_module("mmseg")
    yield from MMSEG


def _build_timm(name: str, **options: Any) -> nn.Module:
    name, _, kind = name.partition("/")
    if kind:
        options["features_only"] = True
    model: nn.Module = importlib.import_module("timm").create_model(name, **options)
    return model


def _build_torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    dense = name in _names_of("torchvision.models.detection") + _names_of("torchvision.models.segmentation")
    given = {"weights": None, **({"weights_backbone": None} if dense else {}), **options}
    if name in _names_of("torchvision.models.detection") and not name.startswith("ssd"):
        given |= {"min_size": 256, "max_size": 341}
    if "rcnn" in name:
        # Their heads run on every region found, and random weights find any number: the same number, then, whatever
        # the maps, or the counts could not be compared.
        given |= {"rpn_post_nms_top_n_test": 50, "rpn_nms_thresh": 1.0}
        given |= {"box_score_thresh": 0.0, "box_nms_thresh": 1.0, "box_detections_per_img": 20}
    if name in ("googlenet", "inception_v3"):
        given.setdefault("init_weights", False)  # its own initialisation takes a minute
    model: nn.Module = torchvision.models.get_model(name, **given)
    return model


def _build_transformers(name: str, **options: Any) -> nn.Module:
    kind: Any = getattr(importlib.import_module("transformers"), name)
    config = kind.config_class(**{**TRANSFORMERS[name], **options})
    model: nn.Module = kind(config)
    return model


def _build_mmseg(name: str, **options: Any) -> nn.Module:
    import mmseg
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    registry = importlib.import_module("mmseg.registry")
    importlib.import_module("mmseg.models")
    init_default_scope("mmseg")
    config = Config.fromfile(str(Path(mmseg.__file__).parent / ".mim" / "configs" / f"{name}.py"))
    if config.model.backbone.type in ("BEiT", "MAE"):  # their tables of relative positions are made for one size
        config.model.backbone.img_size = SMALL
    model: nn.Module = registry.MODELS.build(_without_weights(config.model.to_dict() | options))
    return model


def _without_weights(config: Any) -> Any:
    """Return a config that downloads nothing and needs no other processes to normalise with."""
    if isinstance(config, list | tuple):
        return type(config)(_without_weights(item) for item in config)  # some hosts ask for tuples
    if not isinstance(config, dict):
        return config
    kept = {key: _without_weights(value) for key, value in config.items() if key != "init_cfg"}
    for key in ("pretrained", "checkpoint"):
        if key in kept:
            kept[key] = None
    return {**kept, "type": "BN"} if kept.get("type") == "SyncBN" else kept


_NAMES = {
    "timm": _timm_names,
    "torchvision": _torchvision_names,
    "transformers": _transformers_names,
    "mmseg": _mmseg_names,
}
_BUILD = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "transformers": _build_transformers,
    "mmseg": _build_mmseg,
}
