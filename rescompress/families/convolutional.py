"""The fallback for any other convolutional network: run it once on the meta device and watch who reads the image."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy
from rescompress.errors import UnsupportedModelError, one_line
from rescompress.families._base import Family, class_names, image_of


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the convolution that first touches the image.

    Whether the network still works on a smaller map is not asked here: compress proves it by a dry run.

    Raises:
        UnsupportedModelError: the model does not run, has no convolution, or reads the image in several places.
    """
    image = image_of(model, args, kwargs)
    calls = _convolutions_called(model, args, kwargs)
    if not calls:
        raise UnsupportedModelError(
            f"no family describes {class_names(model)[0]}, and the probe saw no nn.Conv2d run on the image; to add a "
            "family, see docs/how-to/add-a-family.md (one file)"
        )
    # The convolutions that read what the first one reads: the image itself, or what was made of it by arithmetic.
    source = next((call.source for call in calls if call.reads_image), calls[0].source)
    readers = list(dict.fromkeys(call.fqn for call in calls if call.source is source))
    if len(readers) > 1:
        raise UnsupportedModelError(
            f"{class_names(model)[0]} reads the image in {len(readers)} convolutions ({', '.join(readers[:4])}); "
            "resizing one of them would not fit the others"
        )
    first_conv = readers[0]
    stem_grid = next(call.grid for call in calls if call.fqn == first_conv)
    return ConvAnatomy(
        family=FAMILY.name,
        input_size=(int(image.shape[-2]), int(image.shape[-1])),
        first_conv=first_conv,
        stem_grid=stem_grid,
    )


@dataclass(frozen=True)
class _Call:
    """One call of a convolution: its FQN, the tensor that it read, whether that is the image, its output's grid."""

    fqn: str
    source: Tensor
    reads_image: bool
    grid: tuple[int, int]


def _convolutions_called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Call]:
    """Run a throw-away clone and return the calls of its convolutions in order."""
    failure = ""
    # A model that computes with values (.item(), numpy) fails on the meta device: then run it for real.
    for device in ("meta", None):
        clone = surgery.clone_shared(model, device).eval()
        calls: list[_Call] = []
        moved_args, moved_kwargs = tree_map(
            lambda leaf, device=device: leaf.to(device) if device and isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        image = image_of(model, moved_args, moved_kwargs)
        for fqn, module in clone.named_modules():
            if isinstance(module, nn.Conv2d):
                # Hooks on the clone only: it is thrown away.
                module.register_forward_hook(
                    lambda _, inputs, output, fqn=fqn, image=image, calls=calls: calls.append(
                        _Call(fqn, inputs[0], inputs[0] is image, (int(output.shape[-2]), int(output.shape[-1])))
                    )
                )
        try:
            with torch.no_grad():
                clone(*moved_args, **moved_kwargs)
            return calls
        except Exception as error:  # any code of the user's may run here; the reason is reported below
            failure = f"{type(error).__name__}: {one_line(error)}"
    raise UnsupportedModelError(
        f"{class_names(model)[0]} does not run on an input of shape {tuple(image_of(model, args, kwargs).shape)} "
        f"({failure}); pass an example_input that it takes"
    )


FAMILY = Family(
    name="convolutional",
    summary="any other convolutional network, probed by one run (RegNet, ConvNeXt, MobileNet, EfficientNet, ...)",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(),
    describe=describe,
)
