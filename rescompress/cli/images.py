"""Open a photograph of any kind, and turn it into what a model takes."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rescompress.errors import InputError, one_line

Transform = Callable[[Image.Image], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP = 0.875
CALIBRATION_LIMIT, CALIBRATION_BATCH = 64, 8
_WHITE = (1.0, 255.0, 65535.0)


@dataclass(frozen=True, kw_only=True)
class View:
    """How a model sees photographs.

    Attributes:
        input_size: (height, width) of the image that it is given
        transform: makes the model's input, without its batch dimension, from a photograph
        preprocessing: what transform does, for the header of a file
        labels: class names; None where not known
    """

    input_size: tuple[int, int]
    transform: Transform
    preprocessing: dict[str, Any]
    labels: tuple[str, ...] | None = None


def default_photograph() -> Path:
    """Return the photograph that scikit-image ships: a cat.

    Raises:
        InputError: scikit-image is not installed.
    """
    # Found, not imported: the import alone takes longer than reading the file.
    found = importlib.util.find_spec("skimage")
    path = Path(found.origin).parent / "data" / "chelsea.png" if found and found.origin else None
    if path is None or not path.is_file():
        raise InputError(
            "there is no photograph to run on: give one with --image FILE, or install scikit-image, which ships one "
            "(pip install 'rescompress[report]')"
        )
    return path


def open_image(path: str | Path) -> Image.Image:
    """Return a photograph as upright RGB; transparent parts become white, deep grey values are scaled to 8 bits.

    Raises:
        InputError: there is no such file, or it is damaged or no image.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no image {path}")
    if path.is_dir():
        raise InputError(f"the image {path} is a folder; name a file in it")
    try:
        with Image.open(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"the image {path} is too large: {error}") from error
    except Exception as error:  # damaged files fail in as many ways as there are formats
        raise InputError(f"the image {path} is damaged: {one_line(error, 160)}") from error


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits of grey, which convert("RGB") would cut off at 255
        deep = image.convert("F")
        brightest = float(deep.getextrema()[1])  # type: ignore[arg-type]
        white = next((limit for limit in _WHITE if brightest <= limit), brightest)
        return deep.point(lambda grey: grey * (255.0 / white) + 0.0).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def calibration_files(folder: str | Path, limit: int = CALIBRATION_LIMIT) -> list[Path]:
    """Return images of a folder and its subfolders: at most `limit`, at equal distances in the order of their names.

    The same folder gives the same images each time, and a folder for each class gives some of every class.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"the calibration folder {folder} {what}; give a folder of photographs")
    Image.init()  # else only the suffixes of a few formats are known
    suffixes = set(Image.registered_extensions())
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise InputError(f"the calibration folder {folder} holds no image that Pillow can read")
    count = min(limit, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def calibration_batches(files: list[Path], transform: Transform, batch_size: int = CALIBRATION_BATCH) -> list[Tensor]:
    """Return the images as a model takes them, in batches.

    Raises:
        InputError: one of them is damaged.
    """
    images = [transform(open_image(file)) for file in files]
    return [torch.stack(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]


def plain_transform(
    size: tuple[int, int], mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Transform:
    """Return the usual evaluation transform: shorter side resized, centre cropped, normalised.

    Shape:
        - Output: (3, *size)
    """

    def transform(image: Image.Image) -> Tensor:
        factor = max(int(size[0] / CROP) / image.height, int(size[1] / CROP) / image.width)
        width, height = max(size[1], int(image.width * factor)), max(size[0], int(image.height * factor))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
        image = image.crop((left, top, left + size[1], top + size[0]))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1)
        return (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    return transform


def plain_preprocessing() -> dict[str, Any]:
    """Return what `plain_transform` does, for the header of a file."""
    return {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "interpolation": "bicubic",
        "crop_pct": CROP,
        "crop_mode": "center",
    }
