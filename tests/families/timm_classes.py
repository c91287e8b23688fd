"""The smallest entry point of every class that timm registers, built small: fewer blocks and smaller images."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from scripts.coverage_models import TIMM
from tests.zoo import randomize


@dataclass(frozen=True)
class Small:
    """How one entry point is built small.

    Attributes:
        side: of the image, in pixels
        options: of its constructor: fewer blocks
        smaller: side of the image of which the original makes the smaller grid itself; None where that is half of it
    """

    side: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    smaller: int | None = None


SMALL = {
    "beitv2_base_patch16_224": Small(64, {"depth": 2}),
    "cait_xxs24_224": Small(64, {"depth": 2}),
    "convit_tiny": Small(64, {"depth": 2, "local_up_to_layer": 1}),
    "convmixer_768_32": Small(70),
    "crossvit_tiny_240": Small(240, {"depth": [[1, 2, 0]]}),
    "csatv2": Small(128),
    "davit_tiny": Small(64, {"depths": (1, 1, 1, 1)}),
    "deepseek_vit_412m": Small(84, {"depth": 2}),
    "deepseek_vit_412m_enc": Small(84, {"depth": 2}),
    "deit_tiny_distilled_patch16_224": Small(64, {"depth": 2}),
    "efficientformer_l1": Small(224),
    "vit_tiny_patch16_dinov3_qkvb": Small(64, {"depth": 2}),
    "gcvit_xxtiny": Small(128),
    "gemma4_vit_167m": Small(96, {"depth": 2}),
    "gemma4_vit_167m_enc": Small(96, {"depth": 2}),
    "hiera_tiny_224": Small(128, {"stages": (1, 1, 1, 1)}),
    "inception_resnet_v2": Small(160, smaller=79),
    "inception_v3": Small(160, smaller=79),
    "inception_v4": Small(160, smaller=79),
    "legacy_xception": Small(96, smaller=47),
    "naflexvit_base_patch16_parfac_gap": Small(64, {"depth": 2}),
    "nasnetalarge": Small(96, smaller=47),
    "nest_tiny_jx": Small(64),
    "pit_ti_224": Small(72, smaller=40),
    "pnasnet5large": Small(96, smaller=47),
    "qwen3_vit_88m": Small(64, {"depth": 2}),
    "qwen3_vit_88m_enc": Small(64, {"depth": 2}),
    "samvit_base_patch16_224": Small(64, {"depth": 2}),
    "sam2_hiera_tiny": Small(256),
    "sequencer2d_s": Small(70),
    "swin_tiny_patch4_window7_224": Small(112, {"depths": (2, 2, 1, 1)}),
    "swinv2_tiny_window16_256": Small(128, {"depths": (2, 2, 1, 1), "window_size": 8}),
    "swinv2_cr_tiny_384": Small(128, {"depths": (2, 2, 1, 1)}),
    "tnt_s_legacy_patch16_224": Small(64, {"depth": 2}),
    "twins_svt_small": Small(128, {"depths": (1, 1, 1, 1)}),
    "test_vit": Small(64),
    "test_vit_relpos": Small(64),
    "vgg11": Small(64),
    "xcit_nano_12_p8_384": Small(64, {"depth": 2}),
}
"""Entry points that are not simply built at 64 pixels."""


def small_of(name: str) -> Small:
    """Return how an entry point is built here."""
    return SMALL.get(name, Small())


def build(name: str, side: int | None = None, device: str = "cpu", **more: Any) -> nn.Module:
    """Build an entry point small, in eval mode, with every weight random; for images of another side if asked."""
    small = small_of(name)
    options = {**small.options, **more}
    side = side or small.side
    with torch.device(device):
        try:
            model = timm.create_model(name, img_size=side, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **options)  # takes images of any size
    return (model if device == "meta" else randomize(model)).eval()


def image(name: str, batch: int = 2) -> Tensor:
    """Return random images."""
    side = small_of(name).side
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


__all__ = ["SMALL", "TIMM", "Small", "build", "image", "small_of"]
