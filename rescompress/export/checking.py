"""What a written program must compute: the model's own outputs, kept before writing and compared after loading."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rescompress.errors import ExportError, InputError, RescompressError, one_line
from rescompress.inputs import Args, batch_size_of, tensors_of, with_batch

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a file's outputs may be from the model's, relative to the largest of them."""

DYNAMIC = ("batch", "none", "size")
"""Which sides of its inputs a program takes at any length: the batch; no side; batch, height and width."""

OTHER_SIZES: tuple[Callable[[int, int], tuple[int, int]], ...] = (
    lambda height, width: (2 * height, width + 1),
    lambda height, width: (height + 32, 2 * width),
    lambda height, width: (2 * height, 3 * width),
    lambda height, width: (3 * height, 2 * width),
    lambda height, width: (height + 16, width + 32),
)
"""Other image sides to compare at; a model of patches or many strides takes some of them."""

MOST_OTHER_SIZES = 2


@dataclass(frozen=True)
class Case:
    """One run of the model itself: inputs, and the outputs that every program of it must give.

    Attributes:
        at: what is special about the inputs, to name in an error
        batch: their batch size; None where it cannot be told
        slack: how far outputs may be off beyond `TOLERANCE`, where the model rounds its activations to few values
    """

    at: str
    batch: int | None
    inputs: Args
    outputs: Any
    slack: float = 0.0

    @property
    def shapes(self) -> list[list[int]]:
        """Return the shape of every input."""
        return [list(tensor.shape) for tensor in tensors_of(self.inputs)]


def expected_outputs(model: nn.Module, inputs: Args, dynamic: str) -> list[Case]:
    """Run the model on its example, which comes first, and on other batch and image sizes if it takes them.

    Raises:
        ExportError: it does not run on its example or gives no number there, or takes no other image size where
            `dynamic` asks for that.
    """
    try:
        batch = batch_size_of(inputs)
    except InputError:  # a list of tensors, say: what the file need do is then the example alone
        batch = None
    if batch == 0:
        raise ExportError("the example input is empty (batch size 0), so nothing can be compared; give one image")
    try:
        at = "the example" if batch is None else f"batch size {batch}"
        cases = [Case(at, batch, inputs, run(model, inputs))]
    except Exception as error:  # the model's own code runs here
        raise ExportError(f"{type(model).__name__} does not run on the example input: {reason(error)}") from error
    if not any(leaf.isfinite().any() for leaf in tensors_of(cases[0].outputs)):
        raise ExportError(
            f"{type(model).__name__} gives no finite number on the example input, so nothing can be compared; check "
            "its weights, or give another example"
        )
    if dynamic == "none" or batch is None:
        return cases
    for other in (batch + 2, 1):
        resized = with_batch(inputs, other)
        outputs = None if other == batch else _run_or_none(model, resized)
        if outputs is not None:
            cases.append(Case(f"batch size {other}", other, resized, outputs))
    if dynamic == "size":
        cases += _other_sizes(model, inputs, batch)
    return cases


def _other_sizes(model: nn.Module, inputs: Args, batch: int) -> list[Case]:
    if not any(is_image(tensor, batch) for tensor in tensors_of(inputs)):
        raise ExportError(
            "dynamic='size' asks for any image size, and no input is an image (batch, channels, height, width); "
            "write with dynamic='batch'"
        )
    found = at_other_sizes(model, inputs)
    if not found:
        raise ExportError(
            f"dynamic='size' asks for any image size, and this {type(model).__name__} itself takes none but that of "
            f"its example ({_shapes(inputs)}); write it with dynamic='batch', or build it for other sizes"
        )
    return found


def at_other_sizes(model: nn.Module, inputs: Args) -> list[Case]:
    """Run the model on images of other sizes, as far as it takes them; none where the inputs are no images."""
    try:
        batch = batch_size_of(inputs)
    except InputError:
        return []
    found: list[Case] = []
    if any(is_image(tensor, batch) for tensor in tensors_of(inputs)):
        for sides in OTHER_SIZES:
            resized = with_size(inputs, batch, sides)
            outputs = _run_or_none(model, resized)
            if outputs is not None:
                found.append(Case(f"inputs of {_shapes(resized)}", batch, resized, outputs))
            if len(found) == MOST_OTHER_SIZES:
                break
    return found


def _shapes(inputs: Args) -> str:
    return ", ".join(" x ".join(map(str, tensor.shape)) for tensor in tensors_of(inputs))


def with_size(inputs: Args, batch: int, sides: Callable[[int, int], tuple[int, int]]) -> Args:
    """Return `inputs` with other sides of every image, whose pixels are repeated.

    Shape:
        - Input: tensors (B, ...), of which those of four dimensions are images
        - Output: images (B, C, H', W') with (H', W') = sides(H, W), all other tensors as they are
    """

    def resized(leaf: Any) -> Any:
        if not is_image(leaf, batch):
            return leaf
        height, width = sides(leaf.shape[2], leaf.shape[3])
        rows = torch.arange(height, device=leaf.device) % leaf.shape[2]
        columns = torch.arange(width, device=leaf.device) % leaf.shape[3]
        return leaf.index_select(2, rows).index_select(3, columns)

    resized_inputs: Args = tree_map(resized, inputs)
    return resized_inputs


def is_image(leaf: Any, batch: int) -> bool:
    """Whether a value is a batch of images: a floating-point tensor of four dimensions."""
    return isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.shape[0] == batch and leaf.is_floating_point()


def are_detections(outputs: Any) -> bool:
    """Whether outputs are a detector's: for each image a dict of the things found in it, however many they are."""
    return isinstance(outputs, list) and bool(outputs) and all(isinstance(one, dict) for one in outputs)


def run(program: Any, inputs: Args) -> Any:
    """Call a model or program without gradients."""
    with torch.no_grad():
        return program(*inputs[0], **inputs[1])


def _run_or_none(model: nn.Module, inputs: Args) -> Any:
    try:
        return run(model, inputs)
    except Exception:  # a model for one size only: its file need not do more than it does
        return None


def check(program: Any, cases: list[Case]) -> None:
    """Compare a program with the model at every case.

    Raises:
        ExportError: its outputs are others in number, shape, type or value.
    """
    for case in cases:
        _check_outputs(case, run(program, case.inputs))


def _check_outputs(case: Case, found: Any) -> None:
    wanted_leaves = [leaf for leaf in tree_leaves(case.outputs) if isinstance(leaf, Tensor)]
    found_leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
    if len(wanted_leaves) != len(found_leaves):
        raise ExportError(f"the written program gives {len(found_leaves)} outputs instead of {len(wanted_leaves)}")
    for wanted, got in zip(wanted_leaves, found_leaves, strict=True):
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            raise ExportError(
                f"at {case.at} the written program gives {tuple(got.shape)} {got.dtype} instead of "
                f"{tuple(wanted.shape)} {wanted.dtype}"
            )
        _check_values(wanted, got.to(wanted.device), case)


def _check_values(wanted: Tensor, got: Tensor, case: Case) -> None:
    if wanted.numel() == 0:
        return
    tolerance = TOLERANCE.get(wanted.dtype)
    if tolerance is None:  # whole numbers and the like
        different = int((wanted != got).sum())
        if different:
            raise ExportError(
                f"at {case.at} the program's outputs differ from the model's in {different} of {wanted.numel()} values"
            )
        return
    wanted, got = wanted.to("cpu", torch.float64), got.to("cpu", torch.float64)
    size = wanted.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    # A NaN where the model gives a number is infinitely far from it.
    distance = (got - wanted).abs().nan_to_num(math.inf, math.inf).masked_fill(same, 0.0).max().item()
    distance /= size or 1.0
    if distance > max(tolerance, case.slack):
        raise ExportError(f"at {case.at} the program's outputs differ from the model's by {distance:.3g} of their size")


_LOGGERS = ("torch._guards", "torch.export", "torch.utils.cpp_extension")
"""Who logs an error for each attempt that fails, and a warning where there is no CUDA."""


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what torch's exporters warn of their own insides; what matters is checked by loading and comparing."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def reason(error: BaseException) -> str:
    """Return class and beginning of an error: in those of torch's compilers, the telling lines stand before source."""
    return str(error) if isinstance(error, RescompressError) else f"{type(error).__name__}: {one_line(error)}"
