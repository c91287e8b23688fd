"""Models of Hugging Face: `hf:DIRECTORY_OR_ID`, a folder of `save_pretrained` or a name on the hub."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from rescompress.cli import download
from rescompress.cli.images import IMAGENET_MEAN, IMAGENET_STD, Transform, plain_preprocessing, plain_transform
from rescompress.cli.models import Loaded, Request, build, say_random
from rescompress.errors import InputError, one_line
from rescompress.huggingface import uncompressed
from rescompress.inputs import default_input

_hf: Any = transformers  # half of it has no types


def load(name: str, request: Request) -> Loaded:
    """Build a model from its folder or its name on the hub, compressed if it was saved so.

    The class is the one that was saved, or the classifier of its kind where that one takes more than images or another
    number of classes is asked for.

    Raises:
        InputError: there is no such model, or it is not one for images.
    """
    reference = f"hf:{name}"
    local = Path(name).is_dir()
    access: AbstractContextManager[None] = nullcontext()
    hint = ""
    if not local and not download.reachable(download.hub_url()):
        access, hint = download.hub_cache_only(), f"; {download.host_of(download.hub_url())} cannot be reached"
    labels = {} if request.num_classes is None else {"num_labels": request.num_classes}
    _hf.utils.logging.set_verbosity_error()  # importing transformers undoes what the command line set
    _hf.utils.logging.disable_progress_bar()
    with access:
        try:
            config = _hf.AutoConfig.from_pretrained(name, **labels)
        except Exception as error:
            raise InputError(f"no Hugging Face model {name!r}: {one_line(error, 200)}{hint}") from error
        kind, classifies = _class(config, request.num_classes is not None)
        if request.wants_pretrained:
            model = build(reference, lambda: kind.from_pretrained(name, ignore_mismatched_sizes=bool(labels), **labels))
        else:
            auto = kind.from_config if hasattr(kind, "from_config") else kind
            model = build(reference, lambda: auto(uncompressed(config)))
        settings = _processor(name)
    if request.random:
        say_random(reference, None)
    size = request.input_size or _size(settings) or tuple(int(side) for side in default_input(model).shape[-2:])
    names = getattr(config, "id2label", None) or {}
    transform, preprocessing = _preprocessing(settings, (size[0], size[1]))
    return Loaded(
        reference=reference,
        model=model,
        input_size=(size[0], size[1]),
        transform=transform,
        preprocessing=preprocessing,
        labels=tuple(str(names[index]) for index in sorted(names)) if classifies else None,
        weights=request.weights or ("random" if request.random else "pretrained"),
    )


def _class(config: Any, other_head: bool) -> tuple[Any, bool]:
    """Return the class to build, and whether it gives one score for each class."""
    classifier = _hf.AutoModelForImageClassification
    saved = getattr(_hf, (getattr(config, "architectures", None) or [""])[0], None)
    if saved is not None and saved.main_input_name == "pixel_values" and not other_head:
        return saved, "ForImageClassification" in saved.__name__
    if type(config) in classifier._model_mapping:
        return classifier, True
    return _hf.AutoModel, False


def _processor(name: str) -> dict[str, Any]:
    """Return what preprocessor_config.json says; nothing where there is none."""
    try:
        settings, _ = _hf.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) of the images that the processor makes, None where it does not fix one."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size")
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, Mapping) and "height" in size and "width" in size:
        return (int(size["height"]), int(size["width"]))
    if isinstance(size, Mapping) and "shortest_edge" in size and settings.get("crop_pct"):  # ConvNeXt's crop
        return (int(size["shortest_edge"]), int(size["shortest_edge"]))
    return None


def _preprocessing(settings: Mapping[str, Any], size: tuple[int, int]) -> tuple[Transform, dict[str, Any]]:
    """Return the processor's steps as a transform, and what they are for the header of a file."""
    if not settings:
        return plain_transform(size), plain_preprocessing()
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean = tuple(settings.get("image_mean") or IMAGENET_MEAN)
        std = tuple(settings.get("image_std") or IMAGENET_STD)
    crops = bool(settings.get("do_center_crop")) or "crop_pct" in settings
    described = {"mean": list(mean), "std": list(std)}
    if crops:
        return plain_transform(size, mean, std), plain_preprocessing() | described
    resample = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))

    def squash(image: Image.Image) -> Tensor:
        image = image.resize((size[1], size[0]), resample)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1)
        return (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    return squash, described | {"interpolation": resample.name.lower(), "crop_pct": 1.0, "crop_mode": "squash"}
