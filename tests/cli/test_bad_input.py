"""Whatever is wrong is said in one line with a non-zero exit code, and no file is written."""

import os
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

RESNET = ("resnet18", "--random", "--input-size", "64")
VIT = ("test_vit", "--random", "--input-size", "80")  # a 5 x 5 grid
HALF = ("--scale", "0.5")


@pytest.fixture
def broken(here, photo):
    """One of each broken file, in the current folder."""
    (here / "text.png").write_text("no image")
    (here / "folder").mkdir()
    (here / "cut.png").write_bytes(photo.read_bytes()[:1000])
    (here / "text.pth").write_text("no weights")
    state = {"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}
    torch.save(state, here / "other.pth")
    save_file(state, here / "other.safetensors")
    for name in ("other.pth", "other.safetensors"):
        (here / f"cut-{name}").write_bytes((here / name).read_bytes()[:-30])
    torch.save({"model": timm.create_model("resnet18", num_classes=7).state_dict()}, here / "seven.pth")
    torch.save([1, 2], here / "list.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(here / "program.pt")
    torch.save({"run": os.system, "weight": torch.zeros(1)}, here / "code.pth")
    (here / "bad.yaml").write_text("steps: [")
    (here / "unknown.yaml").write_text("steps: [{kind: token_pol, after_block: 1}]")
    (here / "option.yaml").write_text("steps: [{kind: token_pool, after: 1}]")
    (here / "net.py").write_text("def build():\n    raise ValueError('two\\nlines')\ndef number():\n    return 3\n")
    return here


CASES = {
    "unknown model": (["resnet81", *HALF], "unknown model 'resnet81'.*did you mean"),
    "unknown model far from all": (["qqqqqqqq", *HALF], "unknown model 'qqqqqqqq': timm has none of this name$"),
    "model of torchvision without its prefix": (["vit_b_16", *HALF], "did you mean 'torchvision:vit_b_16'"),
    "unknown weights tag": (["resnet18.a1_in2k", *HALF], "timm has no weights.*did you mean 'resnet18.a1_in1k'"),
    "unknown model of torchvision": (["torchvision:resnet81", *HALF], "unknown model 'resnet81'.*did you mean"),
    "unknown source": (["tim:resnet18", *HALF], "unknown model source 'tim'; did you mean 'timm'"),
    "no name": (["timm:", *HALF], "has no name"),
    "factory that fails": (["net:build", *HALF], "net:build failed: ValueError: two lines"),
    "factory of something else": (["net:number", *HALF], "gives a int, not an nn.Module"),
    "unknown factory": (["net:biuld", *HALF], "net has no 'biuld'; did you mean 'build'"),
    "unknown method": ([*RESNET, "--set", "stem_resise.scale=0.5"], "unknown method.*did you mean 'stem_resize'"),
    "unknown option": ([*RESNET, "--set", "stem_resize.scal=0.5"], "no option 'scal'; did you mean 'scale'"),
    "unknown mode": ([*RESNET, *HALF, "--set", "stem_resize.mode=linear"], "stem_resize.mode must be one of"),
    "setting without a value": ([*RESNET, "--set", "stem_resize"], "KIND.OPTION=VALUE"),
    "setting that is not YAML": ([*RESNET, "--set", "stem_resize.size=[1"], "not YAML"),
    "unknown method in a file": ([*VIT, "--spec", "unknown.yaml"], "unknown.yaml: unknown method 'token_pol'"),
    "unknown option in a file": ([*VIT, "--spec", "option.yaml"], "no option 'after'; did you mean 'after_block'"),
    "spec that is not YAML": ([*VIT, "--spec", "bad.yaml"], "bad.yaml: the spec is not YAML"),
    "missing spec": ([*VIT, "--spec", "none.yaml"], "cannot read the spec none.yaml"),
    "nothing to do": ([*RESNET], "nothing to do: give --scale"),
    "scale 0": ([*RESNET, "--scale", "0"], r"scale must be in \(0, 1\], got 0"),
    "scale 1.5": ([*RESNET, "--scale", "1.5"], r"scale must be in \(0, 1\], got 1.5"),
    "scale nan": ([*RESNET, "--scale", "nan"], r"scale must be in \(0, 1\], got nan"),
    "scale -1": ([*RESNET, "--scale=-1"], r"scale must be in \(0, 1\], got -1"),
    "stride that does not divide the grid": ([*VIT, "--set", "token_pool.after_block=1"], "does not divide the 5 x 5"),
    "method of another family": ([*VIT, "--set", "stem_resize.scale=0.5"], "needs a convolutional network"),
    "image that is none": ([*RESNET, *HALF, "--image", "text.png"], "text.png is not an image"),
    "missing image": ([*RESNET, *HALF, "--image", "none.png"], "there is no image none.png"),
    "image that is a folder": ([*RESNET, *HALF, "--image", "folder"], "is a folder"),
    "truncated image": ([*RESNET, *HALF, "--image", "cut.png"], "cut.png is damaged"),
    "missing weights": (["resnet18", *HALF, "--weights", "none.pth"], "there is no weights file none.pth"),
    "weights that are a folder": (["resnet18", *HALF, "--weights", "folder"], "are a folder"),
    "weights that are none": (
        ["resnet18", *HALF, "--weights", "text.pth"],
        r"text.pth is damaged or not a file of torch.save; write one with torch.save\(model.state_dict\(\), file\)$",
    ),
    "truncated weights": (["resnet18", *HALF, "--weights", "cut-other.pth"], "cut-other.pth is damaged or not a file"),
    "truncated safetensors": (
        ["resnet18", *HALF, "--weights", "cut-other.safetensors"],
        "is damaged or not a safetens",
    ),
    "weights of another model": (
        ["resnet18", *HALF, "--weights", "other.pth"],
        r"weights of another model than this ResNet: fc.weight is \(10, 4\) instead of \(1000, 512\).*more",
    ),
    "safetensors of another model": (["resnet18", *HALF, "--weights", "other.safetensors"], "weights of another model"),
    "weights for other classes": (["resnet18", *HALF, "--weights", "seven.pth"], "give --num-classes 7$"),
    "no state dict": (["resnet18", *HALF, "--weights", "list.pth"], "holds no state dict"),
    "weights that are a program": (
        ["resnet18", *HALF, "--weights", "program.pt"],
        "is a TorchScript program, not a st",
    ),
    "weights with code": (["resnet18", *HALF, "--weights", "code.pth"], "since that could run code"),
    "image too small": (["resnet18", "--random", "--input-size", "1", "--scale", "0.5"], "changes nothing"),
    "folder that is not there": ([*RESNET, *HALF, "--out", "none/small.pt"], "there is no folder none"),
    "out is a folder": ([*RESNET, *HALF, "--out", "folder"], "names no format"),
    "unknown format": ([*RESNET, *HALF, "--out", "small.tflite"], "names no format"),
    "folder that cannot be written": ([*RESNET, *HALF, "--out", "/proc/self/small.pt"], "is not writable"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_no_file(case, run, broken, photo):
    arguments, said = CASES[case]
    before = sorted(os.listdir(broken))
    out = [] if "--out" in arguments else ["--out", "small.pt"]
    image = [] if "--image" in arguments else ["--image", photo]

    ran = run("compress", *arguments, *out, *image, "--quick")

    assert ran.code == 1
    assert ran.out == ""
    assert len(ran.errors) == 1
    assert_matches(said, ran.errors[0])
    assert ran.err.splitlines()[-1] == ran.errors[0]
    assert "Traceback" not in ran.err
    assert [name for name in sorted(os.listdir(broken)) if name != "__pycache__"] == before


def assert_matches(pattern, text):
    assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"


USAGE = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["compres"], "unknown command 'compres'; did you mean 'compress'"),
    "no model": (["compress"], "required: MODEL"),
    "unknown option": (["compress", "resnet18", "--scal", "0.5"], "'--scal'; did you mean '--scale'"),
    "scale that is no number": (["compress", "resnet18", "--scale", "half"], "--scale: invalid float value: 'half'"),
    "scale and spec": (["compress", "resnet18", "--scale", "0.5", "--spec", "a.yaml"], "not allowed with"),
    "random and weights": (["measure", "resnet18", "--random", "--weights", "a.pth"], "not allowed with"),
    "size that is none": (["measure", "resnet18", "--input-size", "64x"], "expected pixels"),
    "size 0": (["measure", "resnet18", "--input-size", "0"], "expected pixels"),
    "no classes": (["measure", "resnet18", "--num-classes", "0"], "at least 1"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(case, run):
    arguments, said = USAGE[case]

    ran = run(*arguments)

    assert ran.code == 2
    assert ran.err.splitlines() == ran.errors
    assert len(ran.errors) == 1
    assert_matches(said, ran.errors[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "none.pt"], "there is no file none.pt"),
        (["inspect", "text.png"], "text.png is damaged or not a file that rescompress wrote"),
        (["inspect", "other.pth"], "has no header: rescompress did not write it"),
        (["methods", "token_marge"], "did you mean 'token_merge'"),
        (["measure", "resnet81"], "unknown model 'resnet81'"),
    ],
)
def test_the_other_commands_answer_in_one_line_too(arguments, said, run, broken):
    ran = run(*arguments)

    assert ran.code == 1
    assert ran.out == ""
    assert len(ran.errors) == 1
    assert_matches(said, ran.errors[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scale", "1.5"], "scale must be in"),
        (["--scale", "0.5", "--set", "stem_resize.mode=linear"], "stem_resize.mode must be one of"),
        (["--scale", "0.5", "--set", "token_pool.stride=2"], "token_pool"),
        (["--set", "stem_resise.scale=0.5"], "unknown method"),
        (["--spec", "option.yaml"], "no option 'after'"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_built(arguments, said, run, broken, photo):
    (broken / "slow.py").write_text("def build():\n    raise ValueError('the model was built')\n")

    ran = run("compress", "slow:build", *arguments, "--image", photo)

    assert ran.code == 1
    assert_matches(said, ran.errors[0])
    assert "built" not in ran.err and "building" not in ran.err
