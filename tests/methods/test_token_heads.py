"""token_merge: a merged token counts as often as its patches in whatever pools the tokens.

An image of two distinct patches, without positions, has only tokens that are equal to others: merging those must give
the original's outputs, whatever the head does.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import rescompress as rc
from rescompress.families._base import families, family_of
from tests.zoo import randomize

TIMM = {"img_size": 64, "depth": 3, "num_classes": 5}
NARROW = {**TIMM, "embed_dim": 64, "num_heads": 2}
HF = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 16}
VIT, EVA, RELPOS = "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_relpos_small_patch16_224"
PLAIN_EVA = {**NARROW, "patch_size": 16, "use_rot_pos_emb": False}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**TIMM, **options})


def _hf(model: str, config: str, towers: bool = False, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        given: dict[str, Any] = {**HF, "image_size": 64, **options}
        if towers:
            given = {"vision_config": given, "text_config": {**HF, "vocab_size": 9, "bos_token_id": 1} | _NO_IDS}
        return getattr(transformers, model)(getattr(transformers, config)(**given))

    return build


_NO_IDS = {"eos_token_id": 2, "pad_token_id": 0}


def _torchvision() -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(64, 16, 3, 2, 32, 64, num_classes=5)


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "timm class token": ("vit", _timm(VIT)),
    "timm mean": ("vit", _timm(VIT, global_pool="avg")),
    "timm mean and maximum": ("vit", _timm(VIT, global_pool="avgmax")),
    "timm mean with prefix": ("vit", _timm(VIT, global_pool="avg", pool_include_prefix=True)),
    "timm attention pooling": ("vit", _timm("vit_base_patch16_siglip_224", embed_dim=64, num_heads=2)),
    "torchvision": ("vit", _torchvision),
    "eva mean": ("eva", _timm(EVA, **PLAIN_EVA)),
    "eva attention pooling": ("eva", _timm(EVA, **PLAIN_EVA, global_pool="map")),
    "relpos mean": ("relpos_vit", _timm(RELPOS)),
    "timm beit": ("relpos_vit", _timm("beit_base_patch16_224", **NARROW)),
    "naflex mean": ("flex_vit", _timm("naflexvit_base_patch16_gap", **NARROW)),
    "naflex attention pooling": ("flex_vit", _timm("naflexvit_base_patch16_map", **NARROW)),
    "cait": ("cait", _timm("cait_xxs24_224")),
    "convit mean": ("convit", _timm("convit_tiny", local_up_to_layer=1, global_pool="avg")),
    "vit": ("hf_vit", _hf("ViTForImageClassification", "ViTConfig")),
    "beit mean": ("hf_vit", _hf("BeitForImageClassification", "BeitConfig", use_mean_pooling=True)),
    "beit class token": ("hf_vit", _hf("BeitForImageClassification", "BeitConfig", use_mean_pooling=False)),
    "data2vec mean": ("hf_vit", _hf("Data2VecVisionForImageClassification", "Data2VecVisionConfig")),
    "dinov2": ("hf_vit", _hf("Dinov2ForImageClassification", "Dinov2Config")),
    "dinov2 registers": ("hf_vit", _hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig")),
    "dinov2 maps": ("hf_vit", _hf("Dinov2Backbone", "Dinov2Config")),
    "beit maps": ("hf_dense", _hf("BeitBackbone", "BeitConfig", reshape_hidden_states=True)),
    "ijepa": ("hf_vit", _hf("IJepaForImageClassification", "IJepaConfig")),
    "clip": ("hf_vit", _hf("CLIPForImageClassification", "CLIPConfig", towers=True)),
    "clip projection": ("hf_vit", _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig")),
    "metaclip 2": ("hf_vit", _hf("MetaClip2ForImageClassification", "MetaClip2Config", towers=True)),
    "siglip classifier": ("hf_vit", _hf("SiglipForImageClassification", "SiglipConfig", towers=True)),
    "siglip": ("hf_vit", _hf("SiglipVisionModel", "SiglipVisionConfig")),
}


def without_positions(model: nn.Module) -> nn.Module:
    names = ("pos_embed", "position_embedding", "relative_position_bias", "rel_pos", "pos_proj")
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.data.zero_()
    return model


def two_patches() -> Tensor:
    """Return an image of 4 x 4 patches: three of one kind, the others of another."""
    one, other = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    places = ((0, 0), (2, 3), (1, 1))
    rows = [torch.cat([one if (i, j) in places else other for j in range(4)], dim=2) for i in range(4)]
    return torch.cat(rows, dim=1)[None]


def read(made: Any) -> Tensor:
    if isinstance(made, Tensor):
        return made
    if "feature_maps" in made:
        return torch.cat(made.feature_maps)
    names = ("logits", "image_embeds", "pooler_output")
    return next(made[name] for name in names if name in made)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*pools all tokens and gives them as last_hidden_state")
@pytest.mark.filterwarnings("ignore:.*an output has shape")
@pytest.mark.filterwarnings("ignore:.*the last block computes on 8 of 16 patch tokens")
@pytest.mark.parametrize("name", MODELS)
def test_merging_equal_tokens_changes_nothing(name: str) -> None:
    m, x = without_positions(randomize(MODELS[name][1]())).eval(), two_patches()
    small = rc.compress(m, rc.TokenMerge(r=3), example_input=x)
    assert MODELS[name][0] in (small._rescompress.anatomy.family, getattr(family_of(m), "name", None))
    with torch.no_grad():
        expected = read(m(x))
        error = (read(small(x)) - expected).abs().max() / expected.abs().max()
    assert error < 3e-5


def test_every_family_that_merges_is_here() -> None:
    merging = {family.name for family in families() if "token_merge" in family.methods}
    assert merging - {family for family, _ in MODELS.values()} == {"mmseg_vit"}  # dense: tests/families/test_mmseg.py


class Mean(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        made = self.tower(x)
        return (made if isinstance(made, Tensor) else made.last_hidden_state).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "tower", [_hf("ViTModel", "ViTConfig"), _timm(VIT, num_classes=0, global_pool="")], ids=["transformers", "timm"]
)
def test_a_reader_that_is_not_known_is_named(tower: Callable[[], nn.Module]) -> None:
    model = Mean(randomize(tower())).eval()
    with pytest.warns(rc.RescompressWarning, match=r"Mean reads the tokens of .*a merged token counts once there"):
        rc.compress(model, rc.TokenMerge(r=1), example_input=two_patches())


def test_a_reader_of_what_the_host_pooled_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", rc.RescompressWarning)
        model = nn.Sequential(randomize(_timm(VIT)()), nn.Softmax(-1)).eval()
        rc.compress(model, rc.TokenMerge(r=1), example_input=two_patches())


def test_repeated_tokens_that_are_given_are_named() -> None:
    with pytest.warns(rc.RescompressWarning, match="as often as the patches it stands for, and not in their places"):
        rc.compress(MODELS["siglip"][1]().eval(), rc.TokenMerge(r=1), example_input=two_patches())
