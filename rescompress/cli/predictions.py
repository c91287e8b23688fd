"""What a model says of one image: its best classes by name, or how far two models' outputs are apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rescompress.inputs import as_args

TOP = 5


@dataclass(frozen=True)
class Prediction:
    """One class.

    Attributes:
        index: of the class
        label: its name; "class 7" where names are not known
        probability: softmax of the scores, or a detector's own score
        box: left, top, right and bottom in pixels of the image; None where whole images are classified
    """

    index: int
    label: str
    probability: float
    box: tuple[float, ...] | None = None


def run(model: nn.Module, example_input: Any) -> Any:
    """Return the outputs of the model, in evaluation mode."""
    args, kwargs = as_args(example_input)
    with torch.inference_mode():
        return model.eval()(*args, **kwargs)


def first_output(output: Any) -> Tensor | None:
    """Return the scores among a model's outputs, else the first of them; None if there is no tensor of numbers."""
    logits = getattr(output, "logits", None)
    leaves = [logits] if isinstance(logits, Tensor) else tree_leaves(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return tensors[0].float() if tensors else None


def top_classes(output: Tensor | None, labels: Sequence[str] | None) -> list[Prediction] | None:
    """Return the best classes of the first image, best first; None if the output is no list of class scores.

    Shape:
        - output: (B, K)
    """
    if output is None or output.ndim != 2 or output.shape[1] < 2:
        return None
    best = output[0].softmax(0).topk(min(TOP, output.shape[1]))
    return [
        Prediction(index, labels[index] if labels and len(labels) == output.shape[1] else f"class {index}", probability)
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def found_things(output: Any, labels: Sequence[str] | None) -> list[Prediction]:
    """Return what a detector found in the first image, best first."""
    one = output[0]
    order = one["scores"].argsort(descending=True)
    indices, scores, boxes = (one[key][order].tolist() for key in ("labels", "scores", "boxes"))
    return [
        Prediction(index, labels[index] if labels and index < len(labels) else f"class {index}", score, tuple(box))
        for index, score, box in zip(indices, scores, boxes, strict=True)
    ]


def side_by_side(before: Sequence[Prediction], after: Sequence[Prediction]) -> Any:
    """Return both lists as one rich table."""
    from rich.table import Table

    table = Table()
    table.add_column("", justify="right")
    for name in ("original", "compressed"):
        table.add_column(name)
        table.add_column("", justify="right")
    for place, pair in enumerate(zip_longest(before, after), 1):
        table.add_row(str(place), *(cell for one in pair for cell in _cells(one)))
    return table


def _cells(one: Prediction | None) -> tuple[str, str]:
    if one is None:  # a detector has found fewer things
        return "", ""
    name = one.label.partition(",")[0]  # the first of several synonyms will do here
    where = "" if one.box is None else f" at {', '.join(f'{side:.0f}' for side in one.box)}"
    return f"{name}{where}", f"{one.probability:.1%}"


def relative_difference(before: Tensor, after: Tensor) -> float | None:
    """Return the root mean square of the difference over that of `before`; None for different shapes."""
    if before.shape != after.shape:
        return None
    return float((after - before).norm() / before.norm().clamp_min(1e-12))
