"""Segmentors of mmseg: `mmseg:CONFIG.py`, a path or the name of a config that mmseg ships."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import mmseg
import mmseg.models  # fills the registry
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from rescompress.errors import InputError, NoWeightsError, one_line
from rescompress.references.wanted import Wanted, nearest

_SHIPPED = Path(mmseg.__file__).parent / ".mim" / "configs"


def build(name: str, wanted: Wanted) -> nn.Module:
    """Build a segmentor from its config, with plain batch norms, its weights initialised as mmengine's runner does.

    Raises:
        NoWeightsError: the weights that the config names cannot be had, or it names none.
        InputError: there is no such config, or it is broken.
    """
    config = read_config(name)
    init_default_scope(config.get("default_scope", "mmseg"))
    if wanted.num_classes is not None:
        for head in ("decode_head", "auxiliary_head"):
            heads = config.model.get(head) or []
            for one in heads if isinstance(heads, list | tuple) else [heads]:
                one["num_classes"] = wanted.num_classes
    if wanted.channels not in (None, 3):
        wanted.options.setdefault("backbone", {}).setdefault("in_channels", wanted.channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmseg tells its defaults, and that mmcv has no compiled operators
        config.merge_from_dict({"model": wanted.options})
        named = list(_named_weights(config.model))
        if wanted.pretrained and not named:
            raise NoWeightsError(f"no pretrained weights for mmseg:{name} (its config names none)")
        if not wanted.pretrained:
            for part, key in named:
                del part[key]  # else they would be downloaded
        model: Any = MODELS.build(config.model)
        # That it begins without pretrained weights is no news where that was asked for.
        with _told_from(logging.WARNING if wanted.pretrained else logging.ERROR):
            try:
                model.init_weights()
            except Exception as error:  # a download fails in many ways
                if not wanted.pretrained:
                    raise
                raise NoWeightsError(f"no pretrained weights for mmseg:{name} ({one_line(error, 120)})") from error
    # Synchronised batch norms would ask for several GPUs; Lightning's sync_batchnorm brings them back in training.
    return revert_sync_batchnorm(model)  # type: ignore[no-any-return]


def _named_weights(part: Any) -> Iterator[tuple[Any, str]]:
    """Give each place of a config that names weights: `pretrained`, or an `init_cfg` that loads some."""
    if isinstance(part, dict):
        for key, value in part.items():
            if (key == "pretrained" and value) or (key == "init_cfg" and _loads(value)):
                yield part, key
            else:
                yield from _named_weights(value)
    elif isinstance(part, list | tuple):
        for one in part:
            yield from _named_weights(one)


def _loads(init_cfg: Any) -> bool:
    cfgs = init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]
    return any(isinstance(one, dict) and "Pretrained" in str(one.get("type")) for one in cfgs)


@contextmanager
def _told_from(level: int) -> Iterator[None]:
    """Let mmengine tell only what matters, for it has some lines for each parameter, and not on standard output."""
    logger = MMLogger.get_current_instance()
    before = logger.level
    logger.setLevel(level)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


def read_config(name: str) -> Any:
    """Return the whole config of a segmentor.

    Raises:
        InputError: there is none, or it is broken.
    """
    path = _path(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = Config.fromfile(path)
    except Exception as error:  # a config is code of the user's
        raise InputError(f"cannot read the config {path}: {type(error).__name__}: {one_line(error)}") from error
    if config.get("model") is None:
        raise InputError(f"{path} describes no model")
    return config


def _path(name: str) -> Path:
    """Return the config's file: a path as it is, or one in the folder of configs that mmseg ships."""
    file = name if name.endswith(".py") else f"{name}.py"
    for path in (Path(file), _SHIPPED / file):
        if path.is_file():
            return path
    shipped = sorted(str(path.relative_to(_SHIPPED)) for path in _SHIPPED.glob("*/*.py"))
    by_name = [path for path in shipped if path.partition("/")[2] == file]
    if len(by_name) == 1:
        return _SHIPPED / by_name[0]
    raise InputError(f"there is no config {name!r}, neither as a file nor in mmseg{nearest(file, shipped)}")
