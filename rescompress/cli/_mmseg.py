"""Segmentors of mmseg: `mmseg:CONFIG.py`, a path or the name of a config that mmseg ships."""

import warnings
from pathlib import Path
from typing import Any

import mmseg
import mmseg.models
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from rescompress.cli.images import plain_preprocessing, plain_transform
from rescompress.cli.models import Loaded, Request, build, nearest, say_random
from rescompress.errors import InputError, one_line
from rescompress.openmmlab import crop_size

_SHIPPED = Path(mmseg.__file__).parent / ".mim" / "configs"
_SIZE = (512, 1024)


def load(name: str, request: Request) -> Loaded:
    """Build a segmentor from its config, with plain batch norms and without a download.

    Raises:
        InputError: there is no such config, it is broken, or its segmentor cannot be built.
    """
    reference = f"mmseg:{name}"
    path = _path(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = Config.fromfile(path)
    except Exception as error:  # a config is code of the user's
        raise InputError(f"cannot read the config {path}: {type(error).__name__}: {one_line(error)}") from error
    if config.get("model") is None:
        raise InputError(f"{path} describes no model")
    init_default_scope(config.get("default_scope", "mmseg"))
    model_config = config.model
    # Pretrained backbones would be downloaded; --weights gives the whole segmentor's.
    model_config["pretrained"] = None
    if request.num_classes is not None:
        for head in ("decode_head", "auxiliary_head"):
            heads = model_config.get(head) or []
            for one in heads if isinstance(heads, list | tuple) else [heads]:
                one["num_classes"] = request.num_classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmseg tells its defaults, and that mmcv has no compiled operators
        model = build(reference, lambda: MODELS.build(model_config))
    if request.weights is None:
        reason = "mmseg's are not downloaded here; give their file with --weights" if request.wants_pretrained else None
        say_random(reference, reason)
    size = request.input_size or crop_size(model_config) or _SIZE
    mean, std = _normalisation(model_config.get("data_preprocessor") or {})
    return Loaded(
        reference=reference,
        # One process on any device: synchronised batch norms would ask for several GPUs.
        model=revert_sync_batchnorm(model),
        input_size=size,
        transform=plain_transform(size, mean, std),
        preprocessing={**plain_preprocessing(), "mean": list(mean), "std": list(std)},
        labels=None,
        weights=request.weights or "random",
    )


def _path(name: str) -> Path:
    """Return the config's file: a path as it is, or one in the folder of configs that mmseg ships.

    Raises:
        InputError: there is none.
    """
    file = name if name.endswith(".py") else f"{name}.py"
    for path in (Path(file), _SHIPPED / file):
        if path.is_file():
            return path
    shipped = sorted(str(path.relative_to(_SHIPPED)) for path in _SHIPPED.glob("*/*.py"))
    by_name = [path for path in shipped if path.partition("/")[2] == file]
    if len(by_name) == 1:
        return _SHIPPED / by_name[0]
    raise InputError(f"there is no config {name!r}, neither as a file nor in mmseg{nearest(file, shipped)}")


def _normalisation(preprocessor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of pixels in [0, 1]; mmseg counts them from 0 to 255."""
    usual = plain_preprocessing()
    if preprocessor.get("mean") is None or preprocessor.get("std") is None:
        return tuple(usual["mean"]), tuple(usual["std"])
    return tuple(value / 255 for value in preprocessor["mean"]), tuple(value / 255 for value in preprocessor["std"])
