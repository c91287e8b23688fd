"""`rescompress inspect` says what a file is, in every format, and nothing that the file made up."""

import zipfile

import pytest
import torch
from torch import nn

import rescompress as rc
from rescompress.export.bundle import header_text

X = torch.randn(2, 3, 16, 16)


class Traced(nn.Module):
    """Starred arguments are beyond TorchScript's compiler."""

    def forward(self, *images):
        return images[0] if images[0].shape[2] == 16 else -images[0]


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def facts(ran):
    """Return what stands behind each title, all lines of the same title joined."""
    found = {}
    for line in ran.out.splitlines():
        if line.startswith("  ") and not line.startswith("   "):
            found.setdefault(line[2:17].strip(), []).append(line[17:])
    return {title: " | ".join(lines) for title, lines in found.items()}


@pytest.mark.parametrize(
    ("suffix", "first"),
    [
        (".pt", "torchscript, made by torch.jit.script"),
        (".pt2", "torch.export, made by torch.export, strict=False"),
        (".onnx", "onnx, made by torch.onnx.export, strict=False"),
        pytest.param(".aoti.pt2", "aotinductor, made by AOTInductor, strict=False", marks=pytest.mark.slow),
    ],
)
def test_what_a_file_of_each_format_is(suffix, first, run, tmp_path):
    small = rc.compress(network(), scale=0.5, example_input=X)
    path = rc.export(
        small, tmp_path / f"a{suffix}", X, labels=["cat", "dog"], preprocessing={"mean": [0.5], "crop": "centre"}
    )

    ran = run("inspect", path)

    shown = facts(ran)
    assert ran.out.splitlines()[0] == f"{path}: {first}"
    assert shown["model"] == "(torch.nn.modules.container.Sequential)"
    assert shown["parameters"] == "196, 784 bytes with buffers"
    assert shown["input"] == "float32 [2, 3, 16, 16], on cpu"
    assert shown["takes"] == "any batch size"
    assert shown["compared at"] == "[2, 3, 16, 16]; [4, 3, 16, 16]; [1, 3, 16, 16]"
    assert shown["fused"] == "1 batch norm into the convolution before"
    assert shown["preprocessing"] == "mean [0.5], crop centre"
    assert shown["labels"] == "2 class names, the first is cat (--json lists them)"
    assert f"rescompress {rc.__version__}, torch {torch.__version__}" in shown["versions"]
    assert ("onnxruntime" in shown["versions"]) == (suffix == ".onnx")
    assert ("image sizes" in shown) == (suffix == ".pt")


@pytest.mark.parametrize(
    ("dynamic", "takes"),
    [
        ("size", "any batch size, height and width, as far as the model does"),
        ("none", "the shapes of the example alone"),
    ],
)
def test_what_may_vary(dynamic, takes, run, tmp_path):
    path = rc.export(network(), tmp_path / "a.pt2", X, dynamic=dynamic, fold=False)

    shown = facts(run("inspect", path))

    assert shown["takes"] == takes
    assert ("[2, 3, 32, 17]" in shown["compared at"]) == (dynamic == "size")
    assert shown["fused"] == "nothing: it was not asked for"


def test_a_trace_says_why_and_for_which_size(run, tmp_path):
    with pytest.warns(rc.RescompressWarning, match="for the image size of the example input alone"):
        path = rc.export(Traced(), tmp_path / "a.pt", X)

    ran = run("inspect", path)

    shown = facts(ran)
    assert "made by torch.jit.trace" in ran.out
    assert shown["because"].startswith("torch.jit.script: ")
    assert shown["image sizes"] == "that of the example alone"
    assert shown["fused"] == "nothing: there is no batch norm"


def test_a_file_cannot_add_lines_of_its_own(run, tmp_path):
    forged = "cat\n  versions       forged"
    header = {
        "spec": {"steps": []}, "format": forged, "made_by": forged, "labels": [forged], "versions": {forged: forged},
        "log": [forged], "report": {"ratios": {forged: forged}}, "fused": {"pairs": 3, "reason": forged},
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/extra/rescompress.json", header_text(header))

    ran = run("inspect", tmp_path / "a.pt")

    assert ran.code == 0
    assert not [line for line in ran.out.splitlines() if line.startswith("  versions       forged")]
