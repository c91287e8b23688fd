"""Every format computes what the model computes, in a process without rescompress, and gives its spec back."""

import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torchvision

import rescompress as rc
from rescompress.export import load, read_header
from tests.export.making import small_vit

pytestmark = pytest.mark.usefixtures("one_thread")

# Runs every file of a folder on its inputs, and fails if something brought rescompress along.
RUNNER = """
import logging, pathlib, sys, torch
logging.disable(logging.WARNING)
torch.set_num_threads(1)
for path in pathlib.Path(sys.argv[1]).iterdir():
    if path.suffix not in (".pt", ".pt2", ".onnx"):
        continue
    if path.suffix == ".onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        program = lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    elif path.name.endswith(".aoti.pt2"):
        program = torch._inductor.aoti_load_package(str(path))
    elif path.suffix == ".pt2":
        program = torch.export.load(path).module()
    else:
        program = torch.jit.load(path)
    with torch.no_grad():
        inputs = torch.load(path.parent / (path.name.partition(".")[0] + ".inputs"))
        torch.save([program(x) for x in inputs], str(path) + ".outputs")
sys.exit(any(name.split(".")[0] in ("rescompress", "timm", "torchvision", "torchao") for name in sys.modules))
"""


def resnet():
    return timm.create_model("resnet18", num_classes=10), 64


def torchvision_resnet():
    return torchvision.models.resnet18(num_classes=10), 64  # shares its ReLU


def timm_vit():
    return timm.create_model("test_vit", img_size=64), 64


MODELS = {"resnet": resnet, "torchvision-resnet": torchvision_resnet, "timm-vit": timm_vit, "small-vit": small_vit}
STEPS = {
    "none": None,
    "stem_resize": rc.StemResize(scale=0.5),
    "stem_resize-kept": rc.StemResize(scale=0.7),
    "patch_resize": rc.PatchResize(scale=0.5),
    "token_pool": rc.TokenPool(after_block=0),
    "token_merge": rc.TokenMerge(r=2),
}
CONV = ("none", "stem_resize", "stem_resize-kept")
VIT = ("none", "patch_resize", "token_pool", "token_merge")

QUICK = [
    ("resnet", "stem_resize", ".pt2"),
    ("torchvision-resnet", "none", ".pt2"),
    ("small-vit", "patch_resize", ".pt2"),
    ("small-vit", "token_pool", ".pt2"),
    ("small-vit", "token_merge", ".pt2"),
    ("resnet", "stem_resize-kept", ".onnx"),
    ("small-vit", "none", ".onnx"),
    ("small-vit", "token_merge", ".onnx"),
    ("small-vit", "patch_resize", ".aoti.pt2"),
]
WHOLE = [
    (model, step, suffix)
    for model in MODELS
    for step in (VIT if "vit" in model else CONV)
    for suffix in (".pt", ".pt2", ".onnx", ".aoti.pt2")
    if (model, step, suffix) not in QUICK
]


def name_of(cell):
    return f"{cell[0]}-{cell[1]}{cell[2]}"


def write(cells, folder):
    """Write every cell and run all files in one other process; cell -> (compressed model, inputs, path, outputs)."""
    found = {}
    for number, cell in enumerate(cells):
        torch.manual_seed(number)
        model, side = MODELS[cell[0]]()
        inputs = [torch.randn(batch, 3, side, side) for batch in (1, 2, 5)]
        step = STEPS[cell[1]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rc.RescompressWarning)  # a scale of 0.7 is not reached exactly
            small = model if step is None else rc.compress(model, step, example_input=inputs[0])
        path = rc.export(small.eval(), folder / f"{number}{cell[2]}", inputs[0])
        torch.save(inputs, folder / f"{number}.inputs")
        found[cell] = (small, inputs, path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUNNER, str(folder)], check=True, cwd=folder, timeout=250)
    return {cell: (*value, torch.load(f"{value[2]}.outputs")) for cell, value in found.items()}


@pytest.fixture(scope="module")
def quick(one_thread, tmp_path_factory):
    return write(QUICK, tmp_path_factory.mktemp("files"))


def assert_equal_to_eager(written, cell):
    small, inputs, path, outputs = written
    for images, got, again in zip(inputs, outputs, map(load(path), inputs), strict=True):
        with torch.no_grad():
            wanted = small(images)
        tolerance = {"rtol": 0, "atol": 1e-4 * wanted.abs().max().item()}
        torch.testing.assert_close(got, wanted, **tolerance)
        torch.testing.assert_close(again, wanted, **tolerance)
    assert (
        rc.read_spec(path) == load(path).spec == (rc.Spec() if STEPS[cell[1]] is None else rc.Spec.of(STEPS[cell[1]]))
    )


@pytest.mark.parametrize("cell", QUICK, ids=name_of)
def test_file_computes_what_the_model_computes_at_every_batch_size(cell, quick):
    assert_equal_to_eager(quick[cell], cell)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", WHOLE, ids=name_of)
def test_the_whole_table(cell, one_thread, tmp_path):
    assert_equal_to_eager(write([cell], tmp_path)[cell], cell)


@pytest.mark.parametrize("cell", QUICK, ids=name_of)
def test_header_says_what_the_file_is(cell, quick):
    path = quick[cell][2]

    header = read_header(path)

    formats = {".pt2": "torch.export", ".onnx": "onnx", ".aoti.pt2": "aotinductor"}
    assert (header["format"], header["dynamic"]) == (formats[cell[2]], "batch")
    assert header["batch_sizes_checked"] == [1, 3]
    assert header["versions"]["torch"] == torch.__version__
    assert ("onnxruntime" in header["versions"]) == (cell[2] == ".onnx")


@pytest.mark.parametrize("cell", QUICK, ids=name_of)
def test_file_holds_no_second_weights_nor_paths_of_this_machine(cell, quick):
    path = quick[cell][2]
    weights = read_header(path)["model"]["weight_bytes"]

    extra = path.stat().st_size - weights

    # what the program itself takes: JSON or protobuf; for a package source, and a library that holds no less
    assert -0.05 * weights < extra < (3_000_000 if cell[2] == ".aoti.pt2" else 300_000)
    if cell[2] != ".aoti.pt2":
        assert os.path.dirname(os.path.dirname(torch.__file__)).encode() not in path.read_bytes()
