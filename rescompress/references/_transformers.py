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
            return _pretrained(kind, name, config, bool(labels))
        make = kind.from_config if hasattr(kind, "from_config") else kind
        return make(uncompressed(config))  # type: ignore[no-any-return]


def _pretrained(kind: Any, name: str, config: Any, new_head: bool) -> nn.Module:
    load: Any = kind.from_pretrained
    model, told = load(name, config=config, ignore_mismatched_sizes=new_head, output_loading_info=True)
    for key, saved, built in sorted(told["mismatched_keys"]):
        if saved[1:] != built[1:]:  # no head for other classes, and random from now on
            raise InputError(
                f"hf:{name} was saved for other images: its {key} is {tuple(saved)} instead of {tuple(built)}; give "
                "the size and channels that it was saved with, or begin without its weights"
            )
    return model.train()  # type: ignore[no-any-return]  # as the constructors of all libraries leave it


def _class(config: Any, other_head: bool) -> Any:
    saved = getattr(_hf, (getattr(config, "architectures", None) or [""])[0], None)
    classifier = _hf.AutoModelForImageClassification
    if other_head:
        segments = saved is not None and "Segmentation" in saved.__name__
        return _hf.AutoModelForSemanticSegmentation if segments else classifier
    if saved is not None and saved.main_input_name == "pixel_values":
        return saved
    return classifier if type(config) in classifier._model_mapping else _hf.AutoModel
