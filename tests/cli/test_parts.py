"""Photographs, preprocessing and models by reference, each on its own."""

import time

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision.models import ResNet18_Weights

from rescompress.cli.images import open_image, plain_transform
from rescompress.cli.models import Request, load_model
from rescompress.references import download


def pixels_of(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


@pytest.fixture
def red_left(tmp_path):
    """An 8 x 4 picture, red on the left and blue on the right."""
    image = Image.new("RGB", (8, 4), "blue")
    image.paste("red", (0, 0, 4, 4))
    return image


@pytest.mark.parametrize(
    ("mode", "left"),
    [("RGBA", (255, 0, 0)), ("P", (255, 0, 0)), ("CMYK", (255, 0, 0)), ("L", (76, 76, 76)), ("1", None)],
)
def test_any_mode_of_image_becomes_rgb(mode, left, red_left, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    red_left.convert(mode).save(path)

    image = open_image(path)

    assert (image.mode, image.size) == ("RGB", (8, 4))
    if left is not None:
        assert tuple(pixels_of(image)[0, 0].tolist()) == left


def test_transparent_parts_are_white(red_left, tmp_path):
    red_left.putalpha(Image.new("L", red_left.size, 0))
    red_left.save(tmp_path / "clear.png")

    assert pixels_of(open_image(tmp_path / "clear.png")).min() == 255


def test_deep_grey_is_scaled(tmp_path):
    Image.frombytes("I;16", (2, 1), b"\xff\xff\x00\x80").save(tmp_path / "deep.png")

    assert pixels_of(open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [255, 127]


def test_a_photograph_is_turned_upright(red_left, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned by 90 degrees clockwise
    red_left.save(tmp_path / "turned.png", exif=exif)

    image = open_image(tmp_path / "turned.png")

    assert image.size == (4, 8)
    assert tuple(pixels_of(image)[0, 0].tolist()) == (255, 0, 0)
    assert tuple(pixels_of(image)[-1, 0].tolist()) == (0, 0, 255)


def test_plain_transform_is_the_usual_one(photo):
    image = open_image(photo)
    usual = create_transform((3, 96, 96), interpolation="bicubic", crop_pct=0.875)

    torch.testing.assert_close(plain_transform((96, 96))(image), usual(image))


def test_each_library_brings_its_own_preprocessing(photo):
    image = open_image(photo)
    from_timm = load_model(Request(reference="test_vit", random=True))
    from_torchvision = load_model(Request(reference="torchvision:resnet18", random=True))
    smaller = load_model(Request(reference="torchvision:resnet18", random=True, input_size=(64, 96)))

    data = resolve_data_config({}, model=timm.create_model("test_vit"))
    torch.testing.assert_close(from_timm.transform(image), create_transform(**data)(image))
    torch.testing.assert_close(from_torchvision.transform(image), ResNet18_Weights.DEFAULT.transforms()(image))
    assert smaller.transform(image).shape == (3, 64, 96)
    assert from_torchvision.labels[281] == "tabby"
    assert from_timm.labels[281].startswith("tabby")


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_random_weights_download_no_backbone(name, monkeypatch):
    def download_nothing(*_args, **_more):
        raise AssertionError("something was downloaded")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download_nothing)

    assert load_model(Request(reference=f"torchvision:{name}", random=True)).weights == "random"


@pytest.mark.parametrize("reference", ["resnet18", "torchvision:resnet18"])
def test_without_a_network_weights_are_random_at_once(reference, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(download, "reachable", lambda _url: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    started = time.perf_counter()

    loaded = load_model(Request(reference=reference))

    assert time.perf_counter() - started < 10
    assert loaded.weights == "random"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "cannot be reached): weights are random and predictions mean nothing" in lines[0]


def test_random_weights_are_the_same_on_every_run_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    one, other = (load_model(Request(reference="test_vit", random=True)) for _ in range(2))

    torch.testing.assert_close(dict(one.model.state_dict()), dict(other.model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(torch.rand(3), expected)


def test_hugging_face_folder(tmp_path, photo):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    source = transformers.ResNetForImageClassification(config)
    source.save_pretrained(tmp_path / "net")

    loaded = load_model(Request(reference=f"hf:{tmp_path / 'net'}", input_size=(64, 64)))

    torch.testing.assert_close(dict(loaded.model.state_dict()), dict(source.state_dict()))
    assert loaded.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert loaded.transform(open_image(photo)).shape == (3, 64, 64)
