"""A file is as large as its weights and a constant: none is in it twice, none that nothing reads."""

import zipfile

import pytest
import timm
import torch

import rescompress as rc
from rescompress.export import read_header

OVERHEAD = {".pt": 200_000, ".pt2": 500_000, ".onnx": 200_000, ".aoti.pt2": 3_000_000}
"""Bytes beside the weights, as docs/how-to/deploy.md says: source, graph, or for a package a library and its source."""

WEIGHTS = {".pt": "/data/", ".pt2": "/data/weights/weight_"}

MODELS = {
    "resnet18": (lambda: timm.create_model("resnet18", num_classes=10), rc.StemResize(scale=0.5)),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10), rc.PatchResize(scale=0.5)),
}

NAMES = ["resnet18", pytest.param("vit", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a file of the asked model and suffix, written once."""
    folder = tmp_path_factory.mktemp("files")
    x = torch.randn(1, 3, 64, 64)
    models = {}

    def write(name, suffix):
        if name not in models:
            torch.manual_seed(0)
            build, step = MODELS[name]
            models[name] = rc.compress(build(), step, example_input=x).eval()
            for parameter in models[name].parameters():  # or equal ones, such as zero biases, could be kept once
                torch.nn.init.normal_(parameter, std=0.02)
        path = folder / f"{name}{suffix}"
        return path if path.exists() else rc.export(models[name], path, x)

    return write


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx", pytest.param(".aoti.pt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_size_is_that_of_the_weights_and_a_stated_constant(name, suffix, written):
    path = written(name, suffix)
    weights = read_header(path)["model"]["weight_bytes"]

    overhead = path.stat().st_size - weights

    print(f"{path.name}: {weights} bytes of weights and {overhead}")
    # ONNX keeps no running statistics of norms that are folded away, and may compute with constants beforehand.
    assert -0.001 * weights < overhead < OVERHEAD[suffix]
    assert OVERHEAD[suffix] < 0.15 * weights, "the constant would hide a weight"


@pytest.mark.parametrize("suffix", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_stored_tensors_are_the_weights_and_nothing_else(name, suffix, written):
    path = written(name, suffix)
    with zipfile.ZipFile(path) as archive:
        stored = [info.file_size for info in archive.infolist() if WEIGHTS[suffix] in info.filename]

    assert sum(stored) == read_header(path)["model"]["weight_bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_read(name, written):
    program = torch.export.load(written(name, ".pt2"))
    owned = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}

    unread = [owned[node.name] for node in program.graph.nodes if node.name in owned and not node.users]

    assert owned
    assert unread == []
