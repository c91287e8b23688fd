"""Models of Hugging Face: `hf:DIRECTORY_OR_ID`, a folder of `save_pretrained` or a name on the hub."""

from typing import Any

import transformers
from torch import nn

from rescompress.errors import InputError, one_line
from rescompress.huggingface import uncompressed
from rescompress.references import download
from rescompress.references.wanted import Wanted

_hf: Any = transformers  # half of it has no types


def build(name: str, wanted: Wanted) -> nn.Module:
    """Build a model from its folder or its name on the hub; with its weights, compressed if it was saved so.

    The class is the one that was saved. Where that one takes more than images, it is the classifier of its kind; where
    another number of classes is asked for, that or the segmentation model.

    Raises:
        InputError: there is no such model.
    """
    labels = {} if wanted.num_classes is None else {"num_labels": wanted.num_classes}
    with download.hub_or_cache(name) as obstacle:
        try:
            config = _hf.AutoConfig.from_pretrained(name, **labels, **wanted.options)
        except Exception as error:
            hint = f"; {obstacle}" if obstacle else ""
            raise InputError(f"no Hugging Face model {name!r}: {one_line(error, 200)}{hint}") from error
        if wanted.channels is not None and hasattr(config, "num_channels"):
            config.num_channels = wanted.channels
        size = wanted.input_size
        if size is not None and isinstance(getattr(config, "image_size", None), int) and size[0] == size[1]:
            config.image_size = size[0]
        kind = _class(config, bool(labels))
        if wanted.pretrained:
            return kind.from_pretrained(name, config=config, ignore_mismatched_sizes=bool(labels))  # type: ignore[no-any-return]
        make = kind.from_config if hasattr(kind, "from_config") else kind
        return make(uncompressed(config))  # type: ignore[no-any-return]


def _class(config: Any, other_head: bool) -> Any:
    saved = getattr(_hf, (getattr(config, "architectures", None) or [""])[0], None)
    if saved is not None and saved.main_input_name == "pixel_values" and not other_head:
        return saved
    if saved is not None and "Segmentation" in saved.__name__:
        return _hf.AutoModelForSemanticSegmentation
    classifier = _hf.AutoModelForImageClassification
    return classifier if type(config) in classifier._model_mapping else _hf.AutoModel
