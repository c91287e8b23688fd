"""What is asked of a model besides its name."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rescompress.errors import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a model is to be built; None leaves the model's own.

    Attributes:
        num_classes: of the head
        channels: of the images
        input_size: (height, width), for models that are built for one size
        pretrained: whether with the library's own weights; for mmseg those that the config names, for a factory
            whatever it makes of the argument
        options: go to the constructor as they are; for mmseg they are merged into the config's `model`
    """

    num_classes: int | None = None
    channels: int | None = None
    input_size: tuple[int, int] | None = None
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?", or nothing where no name is near: the full list would fill the screen."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; did you mean") else ""
