"""A file takes the sides that were asked for at any length, or an error or a warning says why not."""

import os
import warnings

import pytest
import timm
import torch
from torch import nn

import rescompress as rc
from rescompress.export import load, read_header

EXPORTED = [".pt2", ".onnx"]


class Small(nn.Module):
    """Takes any image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


class OneImageOnly(Small):
    def forward(self, x):
        if x.shape[0] != 1:
            raise ValueError("one image only")
        return super().forward(x)


class DecidesByBatch(Small):
    def forward(self, x):
        return super().forward(x) * (1 if x.shape[0] == 1 else -1)


class OneSizeOnly(Small):
    def forward(self, x):
        if x.shape[2:] != (8, 8):
            raise ValueError("8 x 8 only")
        return super().forward(x)


class DecidesBySize(Small):
    """Runs at every size, but no one program computes all that it does."""

    def forward(self, x):
        return super().forward(x) * (1 if x.shape[2] > 20 else -1)


@pytest.mark.parametrize("suffix", [".pt", *EXPORTED])
def test_size_may_vary_where_the_model_allows(suffix, tmp_path):
    model = Small().eval()

    path = rc.export(model, tmp_path / f"a{suffix}", torch.randn(1, 3, 16, 16), dynamic="size")

    assert read_header(path)["dynamic"] == "size"
    assert [1, 3, 32, 17] in [shapes[0] for shapes in read_header(path)["shapes_checked"]]
    for shape in [(1, 3, 16, 16), (4, 3, 9, 31), (2, 3, 40, 7)]:
        x = torch.randn(shape)
        torch.testing.assert_close(load(path)(x), model(x).detach(), rtol=1e-5, atol=1e-6)


RESNETS = [
    (step, suffix)
    for step in (rc.StemResize(scale=0.5), rc.StemResize(scale=0.75), rc.InputResize(scale=0.5))
    for suffix in EXPORTED
]
BEYOND_UPSTREAM = {
    (rc.InputResize(scale=0.5), ".onnx"): "of an odd side, ONNX's Resize stretches the whole to the rounded size where "
    "torch keeps the scale and cuts",
}
"""(step, suffix): why the two do not go together with dynamic='size'. Each is refused by comparing."""


def compressed_resnet(step, x):
    torch.manual_seed(0)
    return rc.compress(timm.create_model("resnet18"), step, example_input=x).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("step", "suffix"), [pair for pair in RESNETS if pair not in BEYOND_UPSTREAM])
def test_size_may_vary_in_compressed_networks(step, suffix, tmp_path):
    x = torch.randn(1, 3, 160, 160)
    model = compressed_resnet(step, x)

    path = rc.export(model, tmp_path / f"a{suffix}", x, dynamic="size")

    for shape in [(2, 3, 160, 224), (3, 3, 200, 168)]:
        images = torch.randn(shape)
        with torch.no_grad():
            wanted = model(images)
        torch.testing.assert_close(load(path)(images), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(("step", "suffix"), BEYOND_UPSTREAM)
def test_what_upstream_cannot_vary_is_refused(step, suffix, tmp_path):
    x = torch.randn(1, 3, 160, 160)

    with pytest.raises(rc.ExportError, match="outputs differ"):
        rc.export(compressed_resnet(step, x), tmp_path / f"a{suffix}", x, dynamic="size")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pt", *EXPORTED])
def test_a_size_that_the_model_cannot_vary_is_an_error_and_nothing_is_written(suffix, tmp_path):
    with pytest.raises(rc.ExportError, match=r"takes none but that of its example \(1 x 3 x 8 x 8\); write it with"):
        rc.export(OneSizeOnly(), tmp_path / f"a{suffix}", torch.randn(1, 3, 8, 8), dynamic="size")
    with pytest.raises(rc.ExportError, match="no input is an image"):
        rc.export(nn.Linear(4, 4), tmp_path / f"a{suffix}", torch.randn(1, 4), dynamic="size")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", EXPORTED)
def test_a_size_that_the_exporter_cannot_vary_is_an_error_and_the_old_file_stays(suffix, tmp_path):
    old = tmp_path / f"a{suffix}"
    old.write_bytes(b"old")

    with pytest.raises(rc.ExportError, match=r"with dynamic='size'.*a larger example_input may help") as caught:
        rc.export(DecidesBySize(), old, torch.randn(1, 3, 16, 16), dynamic="size")

    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [old.name]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("suffix", "model"),
    [
        (".pt", OneImageOnly()),
        *((suffix, model) for suffix in EXPORTED for model in (OneImageOnly(), DecidesByBatch())),
    ],
)
def test_a_batch_that_cannot_vary_is_fixed_with_a_warning_that_names_it(suffix, model, tmp_path):
    x = torch.randn(1, 3, 8, 8)

    with pytest.warns(rc.RescompressWarning, match=r"for its example's batch size alone \(1\)") as caught:
        path = rc.export(model, tmp_path / f"a{suffix}", x)

    assert caught[0].filename == __file__
    assert (read_header(path)["dynamic"], read_header(path)["batch_sizes_checked"]) == ("none", [1])
    torch.testing.assert_close(load(path)(x), model(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", [".pt", *EXPORTED, pytest.param(".aoti.pt2", marks=pytest.mark.slow)])
def test_where_a_warning_is_an_error_the_old_file_stays(suffix, tmp_path):
    old = tmp_path / f"a{suffix}"
    old.write_bytes(b"old")

    with warnings.catch_warnings():
        warnings.simplefilter("error", rc.RescompressWarning)
        with pytest.raises(rc.RescompressWarning, match="for its example's batch size alone"):
            rc.export(OneImageOnly(), old, torch.randn(1, 3, 8, 8))

    assert os.listdir(tmp_path) == [old.name]
    assert old.read_bytes() == b"old"


def test_a_fixed_program_takes_its_example_size_alone(tmp_path):
    path = rc.export(Small(), tmp_path / "a.pt2", torch.randn(2, 3, 8, 8), dynamic="none")

    assert read_header(path)["shapes_checked"] == [[[2, 3, 8, 8]]]
    with pytest.raises((AssertionError, RuntimeError), match="2"):
        load(path)(torch.randn(3, 3, 8, 8))


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(rc.ExportError, match="got 'bacth'; did you mean 'batch'"):
        rc.export(Small(), tmp_path / "a.pt2", torch.randn(1, 3, 8, 8), dynamic="bacth")


class Arguments(nn.Module):
    """Takes and gives more than one tensor."""

    def forward(self, x, gain, *, shift):
        return {"sum": x * gain + shift, "mean": x.mean(1)}


@pytest.mark.parametrize("suffix", EXPORTED)
def test_several_arguments_and_outputs(suffix, tmp_path):
    path = rc.export(
        Arguments(), tmp_path / f"a{suffix}", ((torch.randn(1, 3), torch.randn(3)), {"shift": torch.ones(())})
    )

    x, gain, shift = torch.randn(4, 3), torch.randn(3), torch.tensor(2.0)
    found = load(path)(x, gain, shift=shift)
    wanted = Arguments()(x, gain, shift=shift)
    found = found if isinstance(found, dict) else dict(zip(wanted, found, strict=True))
    torch.testing.assert_close(found, wanted)


def test_onnx_names_its_sides_inputs_and_outputs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = rc.export(Small(), tmp_path / "a.onnx", torch.randn(1, 3, 8, 8))

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    assert [(given.name, given.shape) for given in session.get_inputs()] == [("x", ["batch", 3, 8, 8])]
    assert [given.name for given in session.get_outputs()] == ["output"]


def test_what_onnx_cannot_hold_is_refused_before_the_work(tmp_path):
    with pytest.raises(rc.ExportError, match="bfloat16"):
        rc.export(Small().bfloat16(), tmp_path / "a.onnx", torch.randn(1, 3, 8, 8).bfloat16())
    assert os.listdir(tmp_path) == []
