"""Models of Hugging Face: `hf:DIRECTORY_OR_ID`, a folder of `save_pretrained` or a name on the hub."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers

from rescompress.cli import download
from rescompress.cli.images import plain_preprocessing, plain_transform
from rescompress.cli.models import Loaded, Request, build, say_random
from rescompress.errors import InputError, one_line
from rescompress.inputs import default_input

_hf: Any = transformers  # half of it has no types


def load(name: str, request: Request) -> Loaded:
    """Build a model from its folder or its name on the hub; its classifier if it has one.

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
        classifier = _hf.AutoModelForImageClassification
        classifies = type(config) in classifier._model_mapping
        auto = classifier if classifies else _hf.AutoModel
        if request.wants_pretrained:
            model = build(reference, lambda: auto.from_pretrained(name, ignore_mismatched_sizes=bool(labels), **labels))
        else:
            model = build(reference, lambda: auto.from_config(config))
    if request.random:
        say_random(reference, None)
    size = request.input_size or tuple(int(side) for side in default_input(model).shape[-2:])
    names = getattr(config, "id2label", None) or {}
    return Loaded(
        reference=reference,
        model=model,
        input_size=(size[0], size[1]),
        transform=plain_transform((size[0], size[1])),
        preprocessing=plain_preprocessing(),
        labels=tuple(str(names[index]) for index in sorted(names)) if classifies else None,
        weights=request.weights or ("random" if request.random else "pretrained"),
    )
