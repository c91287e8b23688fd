"""Segmentors of mmseg begin with the weights that mmengine's runner would begin with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rescompress.errors import NoWeightsError
from rescompress.references.models import build_model
from rescompress.references.wanted import Wanted

try:
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS
except ImportError as missing:  # OpenCV without the system's libGL raises it, too
    pytest.skip(f"mmseg cannot be imported: {missing}", allow_module_level=True)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def segformer(**more: Any) -> dict[str, Any]:
    norm = {"type": "BN", "requires_grad": True}
    backbone = {"type": "MixVisionTransformer", "embed_dims": 8, "num_layers": [1, 1, 1, 1], "num_heads": [1, 1, 2, 4]}
    head = {
        "type": "SegformerHead",
        "in_channels": [8, 8, 16, 32],
        "in_index": [0, 1, 2, 3],
        "channels": 16,
        "num_classes": 5,
        "norm_cfg": norm,
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss"},
    }
    return {
        "type": "EncoderDecoder",
        "backbone": {**backbone, **more.pop("backbone", {})},
        "decode_head": head,
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        **more,
    }


def reference_of(model: dict[str, Any], folder: Path) -> str:
    Config({"model": model, "default_scope": "mmseg"}).dump(folder / "net.py")
    return f"mmseg:{folder / 'net.py'}"


def as_the_runner_begins(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    init_default_scope("mmseg")
    built = MODELS.build(Config({"model": model}).model)
    built.init_weights()
    return dict(built.state_dict())


def loading(way: str, file: Path) -> dict[str, Any]:
    """Return a config that names a file of weights of its backbone, in one of mmseg's ways."""
    if way == "pretrained":
        return segformer(pretrained=str(file))
    return segformer(backbone={"init_cfg": {"type": "Pretrained", "checkpoint": str(file)}})


@pytest.mark.parametrize("way", ["pretrained", "init_cfg"])
def test_without_pretrained_weights_it_is_initialised_as_by_the_runner(way, tmp_path, capsys):
    reference = reference_of(loading(way, tmp_path / "is_not_there.pth"), tmp_path)
    torch.manual_seed(3)
    expected = as_the_runner_begins(segformer())
    capsys.readouterr()

    torch.manual_seed(3)
    model = build_model(reference, Wanted(num_classes=5))

    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    assert float(model.decode_head.conv_seg.weight.detach().std()) < 0.015  # mmseg's 0.01; torch's own is about 0.14
    assert capsys.readouterr().out == ""  # where tables and JSON go


@pytest.mark.parametrize("way", ["pretrained", "init_cfg"])
def test_the_weights_that_the_config_names_are_loaded(way, tmp_path):
    source = MODELS.build(Config(segformer()["backbone"]))
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    reference = reference_of(loading(way, tmp_path / "backbone.pth"), tmp_path)

    model = build_model(reference, Wanted(num_classes=7, pretrained=True))

    torch.testing.assert_close(dict(model.backbone.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    assert model.decode_head.conv_seg.out_channels == 7


def test_pretrained_weights_that_cannot_be_had_are_an_error(tmp_path):
    missing = reference_of(loading("init_cfg", tmp_path / "is_not_there.pth"), tmp_path)
    with pytest.raises(NoWeightsError, match=r"no pretrained weights for mmseg:.*is_not_there\.pth"):
        build_model(missing, Wanted(pretrained=True))

    none = reference_of(segformer(), tmp_path)
    with pytest.raises(NoWeightsError, match="its config names none"):
        build_model(none, Wanted(pretrained=True))
