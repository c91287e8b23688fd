"""Build a compressed segmentor from an mmseg config, so that mmengine's runner trains and tests it as any other.

With `custom_imports = dict(imports=["rescompress.openmmlab"])`, a config that inherits from another one says

    model = dict(type="Compressed", scale=0.5)
"""

from typing import Any

import torch
from mmseg.registry import MODELS
from torch import nn

from rescompress.compress import compress_
from rescompress.errors import InputError, SpecError
from rescompress.spec import Spec


@MODELS.register_module(name="Compressed")  # type: ignore[untyped-decorator]
def compressed(
    scale: float | None = None,
    spec: Any = None,
    segmentor: Any = "EncoderDecoder",
    example_size: tuple[int, int] | None = None,
    **config: Any,
) -> nn.Module:
    """Build a segmentor and compress it; what comes back is the segmentor itself, with its names and methods.

    Its checkpoints hold the uncompressed segmentor's names, and the other way round: either loads into either.

    Args:
        scale: as for `rescompress.compress`
        spec: instead of a scale, a spec as a dict or the path of a .yaml or .json file
        segmentor: the class, whose options are given beside these; or the whole config of a segmentor
        example_size: (height, width) of the image to compress with; by default the crop that the config names, in its
            data preprocessor or for its sliding window
        **config: the segmentor's own options, which stand where they stood in the config that this one inherits from

    Raises:
        InputError: the config names no size of its images.
        SpecError, UnsupportedModelError: as for `rescompress.compress`.
    """
    if (scale is None) == (spec is None):
        raise SpecError(f"Compressed takes either a scale or a spec, got scale={scale!r} and spec={spec!r}")
    whole = {"type": segmentor, **config} if isinstance(segmentor, str) else {**segmentor, **config}
    size = example_size or crop_size(whole)
    if size is None:
        raise InputError(
            "this config names no crop, neither as model.data_preprocessor.size nor as model.test_cfg.crop_size; give "
            "model.example_size=(height, width)"
        )
    wanted = spec if spec is None or isinstance(spec, str | Spec) else _plain(spec)
    # mmseg's own configs nest ConfigDicts, which its builder takes as well as dicts.
    model: nn.Module = MODELS.build(whole)
    image = torch.rand(1, _channels(whole), *size, generator=torch.Generator().manual_seed(0))
    training = model.training
    compress_(model.eval(), wanted, scale=scale, example_input=image)
    return model.train(training)


def crop_size(config: Any) -> tuple[int, int] | None:
    """Return the (height, width) of the crops that the config of a segmentor names; None if it names none."""
    for part, name in (("data_preprocessor", "size"), ("test_cfg", "crop_size")):
        size = (config.get(part) or {}).get(name)
        if size is not None:
            return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return None


def _channels(config: Any) -> int:
    return int((config.get("backbone") or {}).get("in_channels", 3))


def _plain(value: Any) -> Any:
    """Return the config's dicts and tuples as the plain data that a spec is."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
