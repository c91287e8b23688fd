"""The models and steps that every invariant is tested on; a new family or method adds one line here.

Image sizes are small for speed; the architectures are the full ones. Weights are random, so these models prove
equality and cost, never accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import timm
import torch
import torchvision
from torch import Tensor, nn

import rescompress as rc


@dataclass(frozen=True)
class Case:
    """A model: how to build it at an image side, the side, and its kind."""

    build: Callable[[int], nn.Module]
    side: int
    kind: str  # "conv", also where attention in windows follows, or "vit"


def _timm_conv(name: str) -> Callable[[int], nn.Module]:
    return lambda side: timm.create_model(name)


def _timm_vit(name: str, **options: object) -> Callable[[int], nn.Module]:
    return lambda side: timm.create_model(name, img_size=side, **options)


def _tv_vit_b_16(side: int) -> nn.Module:
    return torchvision.models.vit_b_16(image_size=side)


def _mlp_mixer(side: int) -> nn.Module:
    return timm.models.MlpMixer(img_size=side, num_blocks=4, embed_dim=96)


class Logits(nn.Module):
    """A classifier of transformers that gives its scores alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def _hf_vit(side: int) -> nn.Module:
    import transformers

    size = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 192, "num_hidden_layers": 4}
    config = transformers.ViTConfig(**size, image_size=side, patch_size=16)
    return Logits(transformers.ViTForImageClassification(config))


MODELS: dict[str, Case] = {
    "resnet18": Case(_timm_conv("resnet18"), 64, "conv"),
    "resnet50": Case(_timm_conv("resnet50"), 64, "conv"),
    "resnet50d": Case(_timm_conv("resnet50d"), 64, "conv"),
    "resnetv2_50": Case(_timm_conv("resnetv2_50"), 64, "conv"),
    "regnetx_002": Case(_timm_conv("regnetx_002"), 64, "conv"),
    "convnext_atto": Case(_timm_conv("convnext_atto"), 64, "conv"),
    "mobilenetv3_small_050": Case(_timm_conv("mobilenetv3_small_050"), 64, "conv"),
    "tf_efficientnet_lite0": Case(_timm_conv("tf_efficientnet_lite0"), 64, "conv"),
    "torchvision resnet50": Case(lambda side: torchvision.models.resnet50(), 64, "conv"),
    "vit_tiny_patch16_224": Case(_timm_vit("vit_tiny_patch16_224"), 64, "vit"),
    "deit3_small_patch16_224": Case(_timm_vit("deit3_small_patch16_224"), 64, "vit"),
    "vit_small_patch14_reg4_dinov2": Case(_timm_vit("vit_small_patch14_reg4_dinov2", num_classes=10), 56, "vit"),
    "vit_base_patch16_siglip_224": Case(_timm_vit("vit_base_patch16_siglip_224"), 64, "vit"),
    "test_vit": Case(_timm_vit("test_vit"), 64, "vit"),
    "deit_tiny_distilled_patch16_224": Case(_timm_vit("deit_tiny_distilled_patch16_224"), 64, "vit"),
    "vit_tiny average pooled": Case(
        _timm_vit("vit_tiny_patch16_224", global_pool="avg", class_token=False, qk_norm=True, depth=4), 64, "vit"
    ),
    "torchvision vit_b_16": Case(_tv_vit_b_16, 64, "vit"),
    "eva": Case(_timm_vit("vit_tiny_patch16_dinov3_qkvb", depth=4), 64, "vit"),
    "beit": Case(_timm_vit("beit_base_patch16_224", depth=4, embed_dim=96, num_heads=3), 64, "vit"),
    "relpos": Case(_timm_vit("test_vit_relpos"), 64, "vit"),
    "cait": Case(_timm_vit("cait_xxs24_224", depth=4), 64, "vit"),
    "mlp_mixer": Case(_mlp_mixer, 64, "vit"),
    "xcit": Case(_timm_vit("xcit_nano_12_p8_384", depth=4), 64, "vit"),
    "swin": Case(_timm_vit("swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(3, 6)), 56, "conv"),
    "maxvit": Case(_timm_vit("test_coatnet"), 128, "conv"),
    "hiera": Case(_timm_vit("hiera_tiny_224", stages=(1, 1, 1, 1)), 128, "conv"),
}
if find_spec("transformers"):
    MODELS["Hugging Face vit"] = Case(_hf_vit, 64, "vit")

STEPS: dict[str, Callable[[], rc.Step]] = {
    "stem_resize": partial(rc.StemResize, scale=0.5),
    "input_resize": partial(rc.InputResize, scale=0.5),
    "patch_resize": partial(rc.PatchResize, scale=0.5),
    "token_pool": partial(rc.TokenPool, after_block=2, stride=2),
    "token_merge": partial(rc.TokenMerge, r=1),
}

UNSUPPORTED: dict[tuple[str, str], str] = {
    ("conv", "patch_resize"): "a convolutional network has no patch embedding",
    ("conv", "token_pool"): "a convolutional network has no tokens; its own strides pool the map",
    ("conv", "token_merge"): "a convolutional network has no tokens to merge",
    ("vit", "stem_resize"): "the first convolution of a ViT cuts the patches; what leaves it is tokens, and pooling "
    "those before the position embedding is what patch_resize does better",
    ("mlp_mixer", "token_pool"): "the weights of a mixer are as many as its positions: half-way there cannot be fewer",
    ("mlp_mixer", "token_merge"): "there are no keys of attention by which positions could be told alike",
    ("xcit", "patch_resize"): "several convolutions make the patches: there is no kernel that could be made larger",
    ("xcit", "token_merge"): "attention is between channels: no position has a key by which it could be told alike",
}
"""(kind or name of a model, method): why the two do not go together. Each is refused with a reason."""


def why_not(model: str, step: str) -> str | None:
    """Return why a method does not fit a model of the zoo; None if it does."""
    return UNSUPPORTED.get((MODELS[model].kind, step)) or UNSUPPORTED.get((model, step))


PAIRS = [(model, step) for model in MODELS for step in STEPS if why_not(model, step) is None]
REFUSED = [(model, step) for model in MODELS for step in STEPS if why_not(model, step) is not None]


def build(name: str, side: int | None = None) -> nn.Module:
    """Build a model of the zoo in eval mode, with every weight random: heads that start at zero would hide errors."""
    case = MODELS[name]
    model = case.build(side or case.side)
    return randomize(model).eval()


def randomize(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a random value under which activations stay of order one."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if "pos_embed" not in name and "token" not in name else 4
                normal(parameter, 0.0, fan_in**-0.5)
            elif name.endswith(("weight", "scale")) or "gamma" in name:
                normal(parameter, 0.7, 0.1)  # norms, and LayerScale, which starts at 1e-5 and would hide its block
            else:
                normal(parameter, 0.0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                normal(buffer, 0.0, 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(1.0 + torch.rand(buffer.shape, generator=generator))
    return model


def image(name: str, batch: int = 2) -> Tensor:
    """Return a batch of random images of the model's size."""
    side = MODELS[name].side
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
