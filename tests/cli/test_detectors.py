"""Detectors on the command line: a list of images goes in, boxes come out, TorchScript is written."""

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import rescompress as rc

NAME = "torchvision:ssdlite320_mobilenet_v3_large"

# Fails if something else brought rescompress along.
RUNNER = """
import sys, torch, torchvision
losses, found = torch.jit.load(sys.argv[1])(torch.load(sys.argv[2]))
assert losses == {} and len(found) == 1
torch.save(found[0], sys.argv[3])
sys.exit("rescompress" in sys.modules)
"""


def image() -> Tensor:
    return torch.rand(3, 320, 320, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:SSD always returns")
def test_compress_shows_boxes_and_writes_torchscript(run, tmp_path):
    path = tmp_path / "small.pt"

    ran = run("compress", NAME, "--random", "--scale", 0.5, "--quick", "--out", path, "--json")

    assert (ran.code, ran.errors) == (0, [])
    told = json.loads(ran.out)
    best = told["predictions"]["compressed"][0]
    assert len(best["box"]) == 4 and all(0 <= side <= 320 for side in best["box"])
    assert told["file"]["made_by"] == "script"

    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    torch.save([image()], inputs)
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUNNER, path, inputs, outputs], check=True)
    torch.testing.assert_close(torch.load(outputs), rc.load(path)([image()])[1][0])


def test_other_formats_are_refused_with_the_remedy(run, tmp_path):
    ran = run("compress", NAME, "--random", "--scale", 0.5, "--quick", "--out", tmp_path / "small.pt2")

    assert ran.code == 1
    assert len(ran.errors) == 1 and "write TorchScript, to a .pt file" in ran.errors[0]


def test_measure_takes_a_detector(run):
    ran = run("measure", NAME, "--random", "--quick", "--json")

    assert ran.code == 0
    assert json.loads(ran.out)["macs"] > 0


def test_networks_of_more_than_one_image_are_refused(run):
    for name, what in (("r3d_18", "clips of video"), ("raft_small", "pairs of images")):
        ran = run("compress", f"torchvision:{name}", "--random", "--scale", 0.5)

        assert ran.code == 1
        assert ran.errors[0].startswith(f"error: torchvision:{name} takes {what}")
