"""Models by reference, as training asks for them; tests/cli has what the command line makes of them."""

import pytest
import torch
from torch import nn

from rescompress.errors import InputError, NoWeightsError
from rescompress.references import download
from rescompress.references.models import build_model
from rescompress.references.wanted import Wanted

SHARED = nn.Conv2d(3, 4, 3)


def test_a_module_by_its_name_is_copied():
    built = build_model(f"{__name__}:SHARED", Wanted(num_classes=4))

    assert built is not SHARED
    torch.testing.assert_close(dict(built.state_dict()), dict(SHARED.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_pretrained_weights_that_cannot_be_had_are_an_error_at_once(name, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "reachable", lambda _url: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    with pytest.raises(NoWeightsError, match=rf"no pretrained weights for {name} \(.* cannot be reached\)"):
        build_model(name, Wanted(pretrained=True))


def test_options_are_the_callers_own():
    options = {"drop_rate": 0.5}

    model = build_model("timm:test_resnet", Wanted(num_classes=3, channels=1, options=options))

    assert options == {"drop_rate": 0.5}
    assert (model.drop_rate, model.fc.out_features, model.conv1[0].in_channels) == (0.5, 3, 1)


@pytest.fixture
def saved(tmp_path):
    """A ViT for 5 classes and images of 32 x 32, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.num_labels = 5
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    return f"hf:{tmp_path}", model


def test_hugging_face_gets_a_new_head_and_keeps_the_rest(saved):
    reference, source = saved

    model = build_model(reference, Wanted(num_classes=7, channels=3, input_size=(32, 32), pretrained=True))

    assert model.classifier.out_features == 7
    assert model.training  # as every other model that is built
    torch.testing.assert_close(dict(model.vit.state_dict()), dict(source.vit.state_dict()), rtol=0, atol=0)


def test_hugging_face_is_built_for_other_images_without_weights_only(saved):
    reference, _ = saved

    model = build_model(reference, Wanted(num_classes=7, channels=1, input_size=(64, 64)))

    assert model(torch.rand(1, 1, 64, 64)).logits.shape == (1, 7)
    with pytest.raises(InputError, match=r"position_embeddings is \(1, 17, 16\) instead of \(1, 65, 16\)"):
        build_model(reference, Wanted(num_classes=7, input_size=(64, 64), pretrained=True))
