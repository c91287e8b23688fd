"""The fallback for any other convolutional network: run it once on the meta device and watch who reads the image."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names


def describe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvAnatomy:
    """Find the convolution that first touches the image.

    Whether the network still works on a smaller map is not asked here: compress proves it by a dry run.

    Raises:
        UnsupportedModelError: the model does not run, has no convolution, or reads the image in several places.
    """
    image = args[0]
    if not isinstance(image, Tensor) or image.ndim != 4:
        raise UnsupportedModelError(
            f"no family describes {class_names(model)[0]}, and it cannot be probed: its first argument is no image "
            "(B, C, H, W); to add a family, see docs/how-to/add-a-family.md (one file)"
        )
    calls = _convolutions_called(model, args, kwargs)
    if not calls:
        raise UnsupportedModelError(
            f"no family describes {class_names(model)[0]}, and the probe saw no nn.Conv2d run on the image; to add a "
            "family, see docs/how-to/add-a-family.md (one file)"
        )
    readers = list(dict.fromkeys(fqn for fqn, reads_image, _ in calls if reads_image))
    if len(readers) > 1:
        raise UnsupportedModelError(
            f"{class_names(model)[0]} reads the image in {len(readers)} convolutions ({', '.join(readers[:4])}); "
            "resizing one of them would not fit the others"
        )
    first_conv = readers[0] if readers else calls[0][0]
    stem_grid = next(grid for fqn, _, grid in calls if fqn == first_conv)
    return ConvAnatomy(
        family=FAMILY.name,
        input_size=(int(image.shape[-2]), int(image.shape[-1])),
        first_conv=first_conv,
        stem_grid=stem_grid,
    )


def _convolutions_called(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, bool, tuple[int, int]]]:
    """Run a throw-away clone and return (FQN, whether it reads the image itself, output grid) in order of the calls."""
    failure = ""
    # A model that computes with values (.item(), numpy) fails on the meta device: then run it for real.
    for device in ("meta", None):
        clone = surgery.clone_shared(model, device).eval()
        calls: list[tuple[str, bool, tuple[int, int]]] = []
        moved_args, moved_kwargs = tree_map(
            lambda leaf, device=device: leaf.to(device) if device and isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        for fqn, module in clone.named_modules():
            if isinstance(module, nn.Conv2d):
                # Hooks on the clone only: it is thrown away.
                module.register_forward_hook(
                    lambda _, inputs, output, fqn=fqn, image=moved_args[0], calls=calls: calls.append(
                        (fqn, inputs[0] is image, (int(output.shape[-2]), int(output.shape[-1])))
                    )
                )
        try:
            with torch.no_grad():
                clone(*moved_args, **moved_kwargs)
            return calls
        except Exception as error:  # any code of the user's may run here; the reason is reported below
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    raise UnsupportedModelError(
        f"{class_names(model)[0]} does not run on an input of shape {tuple(args[0].shape)} ({failure}); "
        "pass an example_input that it takes"
    )


FAMILY = Family(
    name="convolutional",
    summary="any other convolutional network, probed by one run (RegNet, ConvNeXt, MobileNet, EfficientNet, ...)",
    methods=("stem_resize", "input_resize"),
    hosts=(),
    describe=describe,
)
