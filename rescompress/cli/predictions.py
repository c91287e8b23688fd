"""What a model says of one image: its best classes by name, or how far two models' outputs are apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

TOP = 5


@dataclass(frozen=True)
class Prediction:
    """One class.

    Attributes:
        index: of the class
        label: its name; "class 7" where names are not known
        probability: softmax of the scores
    """

    index: int
    label: str
    probability: float


def run(model: nn.Module, images: Tensor) -> Tensor | None:
    """Return the first output of the model, in evaluation mode; None if it gives no tensor of numbers.

    Shape:
        - images: (B, C, H, W)
    """
    with torch.inference_mode():
        output = model.eval()(images)
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


def side_by_side(before: Sequence[Prediction], after: Sequence[Prediction]) -> Any:
    """Return both lists as one rich table."""
    from rich.table import Table

    table = Table()
    table.add_column("", justify="right")
    for name in ("original", "compressed"):
        table.add_column(name)
        table.add_column("", justify="right")
    for place, (a, b) in enumerate(zip(before, after, strict=True), 1):
        # The first of several synonyms will do here.
        names = [one.label.partition(",")[0] for one in (a, b)]
        table.add_row(str(place), names[0], f"{a.probability:.1%}", names[1], f"{b.probability:.1%}")
    return table


def relative_difference(before: Tensor, after: Tensor) -> float | None:
    """Return the root mean square of the difference over that of `before`; None for different shapes."""
    if before.shape != after.shape:
        return None
    return float((after - before).norm() / before.norm().clamp_min(1e-12))
