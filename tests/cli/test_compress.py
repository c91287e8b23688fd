"""`rescompress compress` shows before and after, and the file that it writes computes what it showed."""

import importlib
import json
import os

import pytest
import timm
import torch
from PIL import Image

import rescompress as rc
from rescompress.cli import console
from rescompress.cli.images import open_image
from rescompress.cli.models import Request, load_model
from rescompress.export import read_header
from rescompress.measure import count_macs

RESNET = ("compress", "resnet18", "--random", "--input-size", "64")


def test_what_is_printed(run, here, photo):
    ran = run(*RESNET, "--scale", "0.5", "--image", photo, "--quick", "--out", "small.pt")

    assert ran.code == 0
    assert "timm:resnet18, 64 x 64 pixels, weights: random" in ran.out
    assert "stem_resize: grid 32 x 32 -> 16 x 16, scale 0.5" in ran.out
    assert "fold conv1: folded" in ran.out
    assert "as it is deployed, its resize folded into the convolution" in ran.out
    assert "MACs" in ran.out and "148.558 M =>" in ran.out
    assert "top 5 classes of photo.png (weights are random and predictions mean nothing)" in ran.out
    assert f"wrote small.pt: {os.path.getsize('small.pt') / 1e6:.1f} MB" in ran.out
    assert "torch.jit.load('small.pt')(x)" in ran.out
    assert "identity check passed" in ran.err
    assert "timm:resnet18: weights are random and predictions mean nothing" in ran.err.splitlines()
    assert ran.errors == ran.warnings == []


def test_json_is_pure_and_true(run, here, photo):
    ran = run(*RESNET, "--scale", "0.5", "--image", photo, "--quick", "--json", "--out", "small.pt")

    data = json.loads(ran.out)
    assert ran.code == 0
    assert data["spec"] == {"schema": 1, "steps": [{"kind": "stem_resize", "scale": 0.5}]}
    assert rc.read_spec("small.pt").to_dict() == data["spec"]
    loaded = load_model(Request(reference="resnet18", random=True, input_size=(64, 64)))
    x = loaded.transform(open_image(photo)).unsqueeze(0)
    assert data["comparison"]["before"]["macs"] == count_macs(loaded.model, x).macs
    assert data["file"] == {
        "path": "small.pt",
        "bytes": os.path.getsize("small.pt"),
        "format": "torchscript",
        "made_by": "script",
        "dynamic": "batch",
    }
    with torch.no_grad():
        for name, outputs in (("original", loaded.model(x)), ("compressed", torch.jit.load("small.pt")(x))):
            best = outputs[0].softmax(0).topk(5)
            shown = data["predictions"][name]
            assert [one["index"] for one in shown] == best.indices.tolist()
            torch.testing.assert_close(
                torch.tensor([one["probability"] for one in shown]), best.values, rtol=1e-3, atol=1e-6
            )
    assert data["predictions"]["mean_something"] is False
    assert data["predictions"]["original"] != data["predictions"]["compressed"]


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (
            ["--scale", "0.5", "--set", "stem_resize.mode=nearest"],
            [{"kind": "stem_resize", "scale": 0.5, "mode": "nearest"}],
        ),
        (["--set", "stem_resize.size=[16, 20]"], [{"kind": "stem_resize", "size": [16, 20]}]),
        (["--spec", "spec.yaml"], [{"kind": "input_resize", "scale": 0.5}]),
        (
            ["--spec", "spec.yaml", "--set", "input_resize.scale=0.75", "--set", "stem_resize.scale=0.5"],
            [{"kind": "input_resize", "scale": 0.75}, {"kind": "stem_resize", "scale": 0.5}],
        ),
    ],
)
def test_spec_of_files_and_settings(arguments, steps, run, here, photo):
    (here / "spec.yaml").write_text("steps:\n  - {kind: input_resize, scale: 0.5}\n")

    ran = run(*RESNET, *arguments, "--image", photo, "--quick", "--json")

    assert json.loads(ran.out)["spec"]["steps"] == steps


def test_a_new_step_is_put_where_its_stage_is(run, here, photo):
    (here / "spec.yaml").write_text("steps:\n  - {kind: token_merge, r: 2}\n")

    ran = run(
        "compress", "test_vit", "--random", "--input-size", "64", "--spec", "spec.yaml",
        "--set", "input_resize.scale=0.5", "--image", photo, "--quick", "--json",
    )  # fmt: skip

    assert [step["kind"] for step in json.loads(ran.out)["spec"]["steps"]] == ["input_resize", "token_merge"]


def test_two_steps_of_a_kind_cannot_be_set_by_kind(run, here, photo):
    (here / "spec.yaml").write_text(
        "steps:\n  - {kind: token_pool, after_block: 0}\n  - {kind: token_pool, after_block: 1}\n"
    )

    ran = run(
        "compress", "test_vit", "--random", "--spec", "spec.yaml", "--set", "token_pool.stride=4", "--image", photo
    )

    assert ran.code == 1
    assert "is ambiguous" in ran.errors[0]


def test_a_scale_that_is_not_reached_is_a_warning(run, photo):
    ran = run(*RESNET, "--scale", "0.7", "--image", photo, "--quick")

    assert ran.code == 0
    assert len(ran.warnings) == 1
    assert "0.7 cannot be reached exactly: 32 x 32 becomes 22 x 22" in ran.warnings[0]


def test_weights_of_a_file_are_used(run, here, photo):
    state = timm.create_model("resnet18", num_classes=3).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, here / "mine.pth")

    ran = run(
        "compress", "resnet18", "--weights", "mine.pth", "--num-classes", "3", "--input-size", "64", "--scale", "0.5",
        "--image", photo, "--quick", "--out", "small.pt",
    )  # fmt: skip

    assert ran.code == 0
    assert "weights: mine.pth" in ran.out
    assert "class 2" in ran.out
    assert "mean nothing" not in ran.out + ran.err
    # Its convolutions hold the batch norms behind them, so that what shows the weights is the outputs.
    torch.testing.assert_close(torch.jit.load("small.pt").state_dict()["fc.weight"], state["fc.weight"])
    model = timm.create_model("resnet18", num_classes=3)
    model.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    small = rc.compress(model, scale=0.5, example_input=x).eval()
    with torch.no_grad():
        wanted = small(x)
        torch.testing.assert_close(torch.jit.load("small.pt")(x), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


NET = """
import torch
def build():
    torch.manual_seed(0)
    stem, norm = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
    return torch.nn.Sequential(stem, norm, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
"""

FORMATS = [
    (".pt", "TorchScript", "torch.jit.load('small.pt')(x)"),
    (".pt2", "torch.export", "torch.export.load('small.pt2').module()(x)"),
    (".onnx", "ONNX", "session = onnxruntime.InferenceSession('small.onnx'); session.run(None, "),
    pytest.param(
        ".aoti.pt2",
        "compiled by AOTInductor",
        "torch._inductor.aoti_load_package('small.aoti.pt2')(x)",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("suffix", "called", "use"), FORMATS)
def test_how_to_use_the_file_is_said_and_true(suffix, called, use, run, here, photo):
    (here / "mynet.py").write_text(NET)

    ran = run(
        "compress", "mynet:build", "--input-size", "32", "--scale", "0.5", "--image", photo, "--quick",
        "--out", f"small{suffix}",
    )  # fmt: skip

    assert (ran.code, ran.warnings) == (0, [])
    assert f"wrote small{suffix}: {console.size(os.path.getsize(f'small{suffix}'))}, {called}" in ran.out
    said = next(line for line in ran.out.splitlines() if line.startswith("use it, without rescompress: "))
    assert use in said
    assert "x is (batch, 3, 32, 32)" in ran.out
    x = torch.randn(3, 3, 32, 32)
    first, _, last = said.partition(": ")[2].rpartition("; ")
    names = {"torch": torch, "x": x, **({"onnxruntime": importlib.import_module("onnxruntime")} if first else {})}
    exec(first, names)
    found = eval(last, names)
    found = torch.from_numpy(found[0]) if isinstance(found, list) else found
    assert found.shape == (3, 3)
    torch.testing.assert_close(found, rc.load(f"small{suffix}")(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dynamic", "said"), [("size", "x is (batch, 3, height, width)"), ("none", "x is (1, 3, 32, 32)")]
)
def test_dynamic_says_what_may_vary(dynamic, said, run, here, photo):
    (here / "mynet.py").write_text(NET)

    ran = run(
        "compress", "mynet:build", "--input-size", "32", "--scale", "0.5", "--image", photo, "--quick",
        "--out", "small.pt2", "--dynamic", dynamic,
    )  # fmt: skip

    assert ran.code == 0
    assert said in ran.out
    assert read_header("small.pt2")["dynamic"] == dynamic
    x = torch.randn(4, 3, 48, 64)
    if dynamic == "size":
        assert rc.load("small.pt2")(x).shape == (4, 3)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            rc.load("small.pt2")(x)


def test_an_unknown_choice_of_dynamic_is_wrong_usage(run):
    ran = run("compress", "resnet18", "--scale", "0.5", "--dynamic", "bacth")

    assert (ran.code, ran.errors) == (2, ["error: unknown dynamic 'bacth'; did you mean 'batch'?"])


def test_out_names_every_format(run):
    shown = " ".join(run("compress", "--help").out.split())
    ran = run(*RESNET, "--scale", "0.5", "--out", "small.engine")

    assert (ran.code, len(ran.errors)) == (1, 1)
    for suffix in (".pt (", ".pt2 (", ".onnx (", ".aoti.pt2 ("):
        assert suffix in shown
        assert suffix in ran.errors[0]


def test_a_model_of_the_users_own(run, here, photo):
    (here / "mynet.py").write_text(
        "import torch\n"
        "def segmenter():\n"
        "    stem = torch.nn.Conv2d(3, 4, 3, stride=2)\n"
        "    return torch.nn.Sequential(stem, torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))\n"
    )

    ran = run("compress", "mynet:segmenter", "--input-size", "32x48", "--scale", "0.5", "--image", photo, "--quick")

    assert ran.code == 0
    assert "mynet:segmenter, 32 x 48 pixels, weights: as built" in ran.out
    assert "no class scores" in ran.out


def test_the_default_photograph_is_found_and_the_lack_of_it_explained(run, monkeypatch):
    pytest.importorskip("skimage")
    found = run(*RESNET, "--scale", "0.5", "--quick")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lacking = run(*RESNET, "--scale", "0.5", "--quick")

    assert "chelsea.png" in found.out
    assert (lacking.code, len(lacking.errors)) == (1, 1)
    assert "--image FILE" in lacking.errors[0] and "rescompress[report]" in lacking.errors[0]


def test_a_failure_at_the_end_keeps_the_old_file(run, here, photo, monkeypatch):
    (here / "small.pt").write_bytes(b"old")
    monkeypatch.setattr("torch.jit.save", lambda *_args, **_more: (_ for _ in ()).throw(RuntimeError("disk full")))

    ran = run(*RESNET, "--scale", "0.5", "--image", photo, "--quick", "--out", "small.pt")

    assert ran.code == 1
    assert "disk full" in ran.errors[0]
    assert (here / "small.pt").read_bytes() == b"old"
    assert sorted(os.listdir(here)) == ["photo.png", "small.pt"]


@pytest.mark.slow
def test_everything_is_measured(run, here, photo):
    ran = run("compress", "test_vit", "--random", "--scale", "0.5", "--image", photo, "--json")

    after = json.loads(ran.out)["comparison"]["after"]
    assert [latency["batch_size"] for latency in after["latencies"]] == [1, 8]
    assert all(0 < latency["q1_ms"] <= latency["median_ms"] <= latency["q3_ms"] for latency in after["latencies"])
    assert after["peak"]["run_bytes"] > 0


def test_grey_and_transparent_photographs_are_run(run, here, photo):
    Image.open(photo).convert("LA").save(here / "grey.png")

    ran = run(*RESNET, "--scale", "0.5", "--image", "grey.png", "--quick")

    assert ran.code == 0
    assert "top 5 classes of grey.png" in ran.out
