"""The fallback for any other convolutional network: run it once on the meta device and watch who reads the image."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy
from rescompress.errors import UnsupportedModelError
from rescompress.families._base import Family, class_names, image_of, probe


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
    stem = readers[0] if len(readers) == 1 else _block_around(model, readers)
    if stem is None:
        raise UnsupportedModelError(
            f"{class_names(model)[0]} reads the image in {len(readers)} convolutions ({', '.join(readers[:4])}); "
            "resizing one of them would not fit the others"
        )
    grid = next(call.grid for call in calls if call.fqn == readers[0])
    if len(readers) > 1:
        grid = surgery.output_grid(surgery.get(model, stem), (int(source.shape[-2]), int(source.shape[-1])))
    return ConvAnatomy(
        family=FAMILY.name,
        input_size=(int(image.shape[-2]), int(image.shape[-1])),
        first_conv=stem,
        stem_grid=grid,
    )


def _block_around(model: nn.Module, readers: list[str]) -> str | None:
    """Return the innermost block that holds all convolutions that read the image; None if that is the model itself.

    Re-parameterised stems add up parallel convolutions; what leaves the block is one map again.
    """
    paths = [fqn.split(".")[:-1] for fqn in readers]
    common = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    while common and isinstance(surgery.get(model, ".".join(common)), nn.ModuleList | nn.ModuleDict):
        common.pop()  # a list is never called
    return ".".join(common) or None


@dataclass(frozen=True)
class _Call:
    """One call of a convolution: its FQN, the tensor that it read, whether that is the image, its output's grid."""

    fqn: str
    source: Tensor
    reads_image: bool
    grid: tuple[int, int]


def _convolutions_called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Call]:
    """Run a throw-away clone and return the calls of its convolutions in order."""
    calls: list[_Call] = []

    def watch(clone: nn.Module, image: Tensor) -> None:
        calls.clear()
        for fqn, module in clone.named_modules():
            if isinstance(module, nn.Conv2d):
                # Hooks on the clone only: it is thrown away.
                module.register_forward_hook(
                    lambda _, inputs, output, fqn=fqn: calls.append(
                        _Call(fqn, inputs[0], inputs[0] is image, (int(output.shape[-2]), int(output.shape[-1])))
                    )
                )

    probe(model, args, kwargs, watch)
    return calls


FAMILY = Family(
    name="convolutional",
    summary="any other convolutional network, probed by one run (RegNet, ConvNeXt, MobileNet, EfficientNet, ...)",
    methods=("stem_resize", "input_resize", "quantize"),
    hosts=(),
    describe=describe,
)
