"""`rescompress compress --quantize`: low bits behind whatever else is done, ranges from a folder of photographs."""

import json

import pytest
import torch
from PIL import Image

import rescompress as rc
from rescompress.cli.images import calibration_batches, calibration_files, plain_transform
from rescompress.cli.specs import shortened

RESNET = ("compress", "resnet18", "--random", "--input-size", "64", "--quick")


@pytest.fixture
def photographs(tmp_path):
    """Ten pictures, five in each of two folders, and a file that is none."""
    generator = torch.Generator().manual_seed(0)
    for place in range(10):
        folder = tmp_path / "photographs" / f"class{place // 5}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((80, 90), Image.Resampling.BICUBIC).save(folder / f"{place}.png")
    (tmp_path / "photographs" / "notes.txt").write_text("no image")
    return tmp_path / "photographs"


def test_low_bits_behind_a_scale(run, here, photo):
    ran = run(*RESNET, "--scale", "0.5", "--quantize", "w8a8", "--image", photo, "--out", "small.pt")

    assert ran.code == 0 and ran.errors == []
    assert "stem_resize: grid 32 x 32 -> 16 x 16" in ran.out
    assert "quantize: w8a8: 19 layers with 11.16 M weights" in ran.out  # the convolutions, not the head alone
    assert "left in floating point, reads the image (first_conv=True quantizes it): conv1" in ran.out
    assert "fold conv1: folded" in ran.out
    spec = rc.Spec.of(rc.StemResize(scale=0.5), rc.Quantize(scheme="w8a8"))
    assert rc.read_spec("small.pt") == spec
    low_bits, images = torch.jit.load("small.pt"), torch.randn(2, 3, 64, 64)
    assert low_bits(images).shape == (2, 1000)
    assert (here / "small.pt").stat().st_size < 14.5e6  # of 46.8 MB


def test_ranges_come_from_the_folder(run, photographs, photo):
    ran = run(
        *RESNET, "--quantize", "w8a8_static", "--calibration", photographs, "--image", photo, "--json",
        "--set", "quantize.exclude=layer4.*",
    )  # fmt: skip

    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["spec"]["steps"] == [{"kind": "quantize", "scheme": "w8a8_static", "exclude": ["layer4.*"]}]
    assert any("excluded: layer4.0.conv1" in line for line in found["log"])
    assert not any("noise" in line for line in found["log"])
    noisy = run(*RESNET, "--quantize", "w8a8_static", "--calibration", "random", "--image", photo)
    assert "ranges of activations are from noise" in noisy.out


def test_files_are_taken_at_equal_distances_and_as_the_model_takes_them(photographs):
    files = calibration_files(photographs)
    assert [file.name for file in files] == [f"{place}.png" for place in range(10)]
    assert [file.name for file in calibration_files(photographs, limit=4)] == ["0.png", "2.png", "5.png", "7.png"]
    transform = plain_transform((32, 32))
    batches = calibration_batches(files, transform, batch_size=4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    with Image.open(files[9]) as last:
        torch.testing.assert_close(batches[2][1], transform(last.convert("RGB")), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "w8a8_static"], "give --calibration DIR"),
        (["--scale", "0.5", "--quantize", "w8a8_static"], "give --calibration DIR"),
        (["--scale", "0.5", "--set", "quantize.scheme=w8a8_static"], "give --calibration DIR"),
        (["--quantize", "w8", "--calibration", "random"], "--calibration random is for --quantize w8a8_static"),
        (["--scale", "0.5", "--calibration", "random"], "--calibration random is for --quantize w8a8_static"),
        (["--quantize", "w8a8_static", "--calibration", "nowhere"], "the calibration folder nowhere does not exist"),
        (["--quantize", "w8a8_static", "--calibration", "empty"], "empty holds no image that Pillow can read"),
        (["--quantize", "w8a8_static", "--calibration", "file.txt"], "the calibration folder file.txt is a file"),
        (["--quantize", "w7"], "quantize.scheme must be one of w8, w8a8, w8a8_static, w4; got 'w7'"),
        (["--spec", "low.yaml", "--quantize", "w8"], "has a quantize step already; --set quantize.scheme=w8"),
        (["--quantize", "w4"], "leaves every layer of this ResNet in floating point"),
        ([], "nothing to do"),
    ],
)  # fmt: skip
def test_wrong_use_is_answered_in_one_line(run, here, photo, arguments, message):
    (here / "empty").mkdir()
    (here / "file.txt").write_text("")
    (here / "low.yaml").write_text("steps: [{kind: quantize, scheme: w4}]")
    ran = run(*RESNET, "--image", photo, *arguments, "--out", "small.pt")
    assert ran.code == 1
    assert len(ran.errors) == 1 and message in ran.errors[0]
    assert not (here / "small.pt").exists()


def test_a_damaged_photograph_is_named(run, here, photographs, photo):
    (photographs / "class0" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    ran = run(*RESNET, "--quantize", "w8a8_static", "--calibration", photographs, "--image", photo)
    assert ran.code == 1
    assert "3.png" in ran.errors[0]


def test_long_lists_of_names_are_cut_for_people_only():
    line = "quantize: left in floating point, fewer than 1024 weights: a, b, c, d, e, f"
    assert shortened(line).endswith("weights: a, b, c, d and 2 more")
    assert shortened("quantize: w8: 3 layers") == "quantize: w8: 3 layers"
    assert shortened(line.replace(", e, f", "")) == line.replace(", e, f", "")


def test_quantize_works_alone(run, here, photo):
    ran = run("compress", "test_vit", "--random", "--quick", "--quantize", "w4", "--image", photo)
    assert ran.code == 0
    assert "quantize: w4: 24 layers" in ran.out
