"""A TorchScript file computes what the model computes, where rescompress is not, and gives its spec back."""

import os
import subprocess
import sys
import warnings
import zipfile

import pytest
import timm
import torch
from torch import nn

import rescompress as rc
from rescompress.export import read_header
from rescompress.measure import compare, weight_bytes
from tests.export.making import small_vit

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

# Imports nothing but torch, and fails if something else brought rescompress along.
RUNNER = """
import pathlib, sys, torch
torch.set_num_threads(1)
for path in pathlib.Path(sys.argv[1]).glob("*.pt"):
    program = torch.jit.load(path)
    with torch.no_grad():
        torch.save([program(x) for x in torch.load(path.with_suffix(".inputs"))], path.with_suffix(".outputs"))
sys.exit("rescompress" in sys.modules)
"""


def resnet():
    return timm.create_model("resnet18"), 64


def timm_vit():
    return timm.create_model("test_vit", img_size=64), 64


CASES = {
    "resnet, stem_resize folded": (resnet, rc.StemResize(scale=0.5)),
    "resnet, stem_resize kept": (resnet, rc.StemResize(scale=0.7)),
    "resnet, stem_resize to a size": (resnet, rc.StemResize(size=20, mode="nearest")),
    "resnet, input_resize": (resnet, rc.InputResize(scale=0.5)),
    "timm vit, input_resize": (timm_vit, rc.InputResize(scale=0.5)),
    "timm vit, patch_resize": (timm_vit, rc.PatchResize(scale=0.5)),
    "timm vit, token_pool": (timm_vit, rc.TokenPool(after_block=2)),
    "timm vit, token_merge": (timm_vit, rc.TokenMerge(r=2)),
    "torchvision vit, input_resize": (small_vit, rc.InputResize(scale=0.5)),
    "torchvision vit, patch_resize": (small_vit, rc.PatchResize(scale=0.5)),
    "torchvision vit, token_pool": (small_vit, rc.TokenPool(after_block=0)),
    "torchvision vit, token_merge": (small_vit, rc.TokenMerge(r=2)),
}


@pytest.fixture(scope="module")
def written(one_thread, tmp_path_factory):
    """Write every case and run all files in one other process; case -> (model, compressed model, inputs, path)."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for number, (case, (build, step)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model, side = build()
        inputs = [torch.randn(1, 3, side, side), torch.randn(3, 3, side, side)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rc.RescompressWarning)  # a scale of 0.7 is not reached exactly
            small = rc.compress(model, step, example_input=inputs[0]).eval()
        path = rc.export(small, folder / f"{number}.pt", inputs[0])
        torch.save(inputs, path.with_suffix(".inputs"))
        found[case] = (model.eval(), small, inputs, path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUNNER, str(folder)], check=True, cwd=folder)
    return found


@pytest.mark.parametrize("case", CASES)
def test_file_computes_what_the_model_computes_in_a_process_without_rescompress(case, written):
    model, small, inputs, path = written[case]

    outputs = torch.load(path.with_suffix(".outputs"))

    for got, images in zip(outputs, inputs, strict=True):
        with torch.no_grad():
            wanted, before = small(images), model(images)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3), "the reduction must be in the file"


@pytest.mark.parametrize("case", CASES)
def test_file_gives_its_spec_back(case, written):
    _, small, _, path = written[case]

    assert rc.read_spec(path) == rc.spec_of(small) == rc.Spec.of(CASES[case][1])
    header = read_header(path)
    assert (header["made_by"], header["made_by_because"]) == ("script", [])


def test_nothing_but_the_files_is_left(written):
    folder = next(iter(written.values()))[3].parent

    assert {path.suffix for path in folder.iterdir()} == {".pt", ".inputs", ".outputs"}


def test_size_is_that_of_the_weights_and_a_constant(tmp_path):
    for build, step in (CASES["resnet, input_resize"], CASES["timm vit, token_merge"]):
        model, side = build()
        small = rc.compress(model, step, example_input=torch.randn(1, 3, side, side))
        path = rc.export(small, tmp_path / "small.pt", torch.randn(1, 3, side, side))

        extra = path.stat().st_size - read_header(path)["model"]["weight_bytes"]

        assert 0 < extra < 300_000
        assert read_header(path)["model"]["weight_bytes"] <= weight_bytes(small)


def test_header_says_what_the_file_is(tmp_path):
    model, side = resnet()
    x = torch.randn(2, 3, side, side)
    small = rc.compress(model, scale=0.5, example_input=x)
    table = compare(model, small, x, latency=False, peak_memory=False, training=False)

    path = rc.export(small, tmp_path / "small.pt", x, report=table, labels=["cat", "dog"])

    header = read_header(path)
    assert header["spec"] == {"schema": 1, "steps": [{"kind": "stem_resize", "scale": 0.5}]}
    assert header["log"] == ["stem_resize: grid 32 x 32 -> 16 x 16, scale 0.5"]
    assert header["inputs"] == [{"shape": [2, 3, 64, 64], "dtype": "float32"}]
    assert header["batch_sizes_checked"] == [2, 4, 1]
    assert header["preprocessing"]["mean"] == list(model.pretrained_cfg["mean"])
    assert header["model"]["architecture"] == "resnet18"
    assert header["versions"] == {"rescompress": rc.__version__, "torch": torch.__version__, "timm": timm.__version__}
    assert header["labels"] == ["cat", "dog"]
    assert header["report"] == table.to_dict()
    assert [(entry["name"], entry["folded"]) for entry in header["fold"]] == [("conv1", True)]


def test_fold_can_be_left_out(tmp_path):
    model, side = resnet()
    x = torch.randn(1, 3, side, side)
    small = rc.compress(model, scale=0.5, example_input=x)

    path = rc.export(small, tmp_path / "small.pt", x, fold=False)

    assert read_header(path)["fold"] is None
    weight = torch.jit.load(path).state_dict()["conv1.weight"]
    torch.testing.assert_close(weight, small.conv1.weight)


def test_model_is_left_as_it_was(tmp_path):
    model, side = resnet()
    small = rc.compress(model, scale=0.5, example_input=torch.randn(1, 3, side, side)).train()
    small.layer1.eval()
    modes = {name: module.training for name, module in small.named_modules()}
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    path = rc.export(small, tmp_path / "small.pt", torch.randn(1, 3, side, side))

    assert {name: module.training for name, module in small.named_modules()} == modes
    assert all(parameter.requires_grad for parameter in small.parameters())
    torch.testing.assert_close(dict(small.state_dict()), state, rtol=0, atol=0)
    program = torch.jit.load(path)
    assert not program.training
    assert not any(parameter.requires_grad for parameter in program.parameters())


def test_an_uncompressed_model_is_written_with_an_empty_spec(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval(), torch.randn(1, 3, 8, 8)

    path = rc.export(model, str(tmp_path / "plain.pt"), x)

    assert rc.read_spec(path) == rc.Spec()
    torch.testing.assert_close(torch.jit.load(path)(x), model(x).detach())


class Uncompilable(nn.Module):
    """Runs and traces, but starred arguments are beyond TorchScript's compiler."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *images):
        return {"scores": self.conv(images[0]).mean((2, 3))}


def test_what_cannot_be_compiled_is_traced(tmp_path):
    model, x = Uncompilable(), torch.randn(1, 3, 8, 8)

    path = rc.export(model, tmp_path / "traced.pt", x)

    assert read_header(path)["made_by"] == "trace"
    assert not [name for name in zipfile.ZipFile(path).namelist() if "traced_inputs" in name]
    images = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(torch.jit.load(path)(images)["scores"], model(images)["scores"].detach())


class Decides(Uncompilable):
    """A trace of it is wrong for images of another length along that axis."""

    def __init__(self, axis, length):
        super().__init__()
        self.axis, self.length = axis, length

    def forward(self, *images):
        scores = self.conv(images[0]).mean((2, 3))
        return scores if images[0].shape[self.axis] == self.length else -scores


class Refuses(Decides):
    """It takes no images of another length along that axis."""

    def forward(self, *images):
        if images[0].shape[self.axis] != self.length:
            raise ValueError(f"axis {self.axis} has another length than {self.length}")
        return self.conv(images[0])


class Random(nn.Module):
    def forward(self, x):
        return torch.rand_like(x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Decides(axis=0, length=1), "at batch size 3"),
        (Random(), "outputs differ"),
        (nn.Linear(7, 7), "does not run on the example input"),
    ],
)
def test_what_the_file_does_not_compute_is_not_written(tmp_path, model, said):
    old = tmp_path / "small.pt"
    old.write_bytes(b"old")

    with pytest.raises(rc.ExportError, match=said) as caught:
        rc.export(model, old, torch.randn(1, 3, 8, 8))

    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["small.pt"]
    assert old.read_bytes() == b"old"


def test_a_model_for_one_batch_size_is_written_for_it(tmp_path):
    with pytest.warns(rc.RescompressWarning, match=r"for its example's batch size alone \(1\)") as caught:
        path = rc.export(Refuses(axis=0, length=1), tmp_path / "one.pt", torch.randn(1, 3, 8, 8))

    assert caught[0].filename == __file__
    assert (read_header(path)["dynamic"], read_header(path)["batch_sizes_checked"]) == ("none", [1])


def test_a_trace_that_is_wrong_at_other_sizes_says_so(tmp_path):
    with pytest.warns(rc.RescompressWarning, match="for the image size of the example input alone") as caught:
        path = rc.export(Decides(axis=2, length=8), tmp_path / "one.pt", torch.randn(1, 3, 8, 8))

    assert caught[0].filename == __file__
    assert read_header(path)["input_sizes"] == "fixed"


def test_the_sizes_that_a_file_is_for_are_in_its_header(tmp_path):
    x = torch.randn(1, 3, 8, 8)
    models = {"traced": Uncompilable(), "fixed": Refuses(axis=2, length=8), "scripted": nn.Conv2d(3, 4, 3)}

    sizes = {name: read_header(rc.export(model, tmp_path / f"{name}.pt", x)) for name, model in models.items()}

    assert {name: header["input_sizes"] for name, header in sizes.items()} == {
        "traced": "as the model takes them",
        "fixed": "fixed",
        "scripted": "as the model takes them",
    }


def test_what_cannot_be_compared_is_refused(tmp_path):
    broken = nn.Linear(3, 3)
    nn.init.constant_(broken.weight, float("nan"))

    with pytest.raises(rc.ExportError, match=r"empty \(batch size 0\)"):
        rc.export(nn.ReLU(), tmp_path / "a.pt", torch.randn(0, 3))
    with pytest.raises(rc.ExportError, match="no finite number"):
        rc.export(broken, tmp_path / "a.pt", torch.randn(1, 3))
    with pytest.raises(rc.ExportError, match="meta device"):
        rc.export(nn.Linear(3, 3, device="meta"), tmp_path / "a.pt", torch.randn(1, 3))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": 5}, r"labels must be a sequence of class names such as .*, got the int 5"),
        ({"preprocessing": "x"}, r"preprocessing must be a dict such as .*, got the str 'x'"),
        ({"preprocessing": {"mean": {1, 2}}}, "JSON"),
    ],
)
def test_wrong_facts_for_the_header_are_refused(tmp_path, options, said):
    with pytest.raises(rc.ExportError, match=said):
        rc.export(nn.ReLU(), tmp_path / "a.pt", torch.randn(1, 3), **options)


def test_keyword_arguments_and_half_precision(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
            return x * gain

    x, gain = torch.randn(2, 4, dtype=torch.bfloat16), torch.tensor(3.0, dtype=torch.bfloat16)

    path = rc.export(Scaled(), tmp_path / "scaled.pt", {"x": x, "gain": gain})

    torch.testing.assert_close(torch.jit.load(path)(x=x, gain=gain), x * 3)
    assert [given["dtype"] for given in read_header(path)["inputs"]] == ["bfloat16", "bfloat16"]


def test_a_scripted_model_and_a_wrong_suffix_are_refused(tmp_path):
    with pytest.raises(rc.ExportError, match="TorchScript already"):
        rc.export(torch.jit.script(nn.ReLU()), tmp_path / "a.pt", torch.randn(1, 3))
    with pytest.raises(rc.ExportError, match="names no format"):
        rc.export(nn.ReLU(), tmp_path / "a.engine", torch.randn(1, 3))
    with pytest.raises(rc.ExportError, match="labels"):
        rc.export(nn.ReLU(), tmp_path / "a.pt", torch.randn(1, 3), labels="cat")
    with pytest.raises(rc.ExportError, match="report"):
        rc.export(nn.ReLU(), tmp_path / "a.pt", torch.randn(1, 3), report=3)
    assert os.listdir(tmp_path) == []
