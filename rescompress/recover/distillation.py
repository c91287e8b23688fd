"""The loss by which a compressed model learns from the original: its logits, and the maps inside it if asked for.

Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531
Romero et al., "FitNets: Hints for Thin Deep Nets", https://arxiv.org/abs/1412.6550
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from rescompress import surgery
from rescompress.errors import InputError, SpecError, UnsupportedModelError
from rescompress.recover.batches import IGNORED, ModelCall


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What is learned from the teacher.

    Attributes:
        temperature: both logits are divided by it, and the loss multiplied by its square
        features: FQNs of modules, the same in both models, whose outputs are compared: maps (B, C, H, W), the teacher's
            averaged onto the grid of the student's, or tokens (B, N, C), their means over the tokens
        feature_weight: of their loss, the mean squared difference over the teacher's mean square, against that of the
            logits
        label_weight: of the cross entropy with the labels, in [0, 1]; the rest is the teacher's

    Raises:
        SpecError: a value out of range.
    """

    temperature: float = 1.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SpecError(f"Distillation.temperature must be above 0, got {self.temperature}")
        if not self.feature_weight >= 0:
            raise SpecError(f"Distillation.feature_weight must be at least 0, got {self.feature_weight}")
        if not 0 <= self.label_weight <= 1:
            raise SpecError(f"Distillation.label_weight must be in [0, 1], got {self.label_weight}")
        object.__setattr__(self, "features", tuple(self.features))

    def losses(
        self,
        student: nn.Module,
        teacher: nn.Module,
        call: ModelCall,
        label_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run both models on a batch and return the losses by name; "loss" is what to minimise.

        Args:
            student: learns.
            teacher: is learned from.
            call: for both.
            label_loss: called with logits and labels where `label_weight` asks for it; `cross_entropy` by default.

        Raises:
            InputError: labels are to be learned from and the call has none, or they do not fit the logits.
            UnsupportedModelError: the models give no logits of the same shape, or a feature cannot be compared.
        """
        with torch.no_grad(), _outputs_of(teacher, self.features) as taught:
            reference = logits_of(teacher(*call.args, **call.kwargs))
        with _outputs_of(student, self.features) as learned:
            outputs = student(*call.args, **call.kwargs)
        given = _alike(outputs, reference)
        found = {"distillation": torch.stack([self._divergence(one, reference) for one in given]).mean()}
        loss = (1 - self.label_weight) * found["distillation"]
        if self.features:
            found["features"] = torch.stack(
                [feature_loss(learned[name], taught[name], name) for name in self.features]
            ).mean()
            loss = loss + self.feature_weight * found["features"]
        if self.label_weight:
            if call.labels is None:
                raise InputError("label_weight needs labels, and the loader gives none; give pairs (images, labels)")
            found["labels"] = torch.stack([(label_loss or cross_entropy)(one, call.labels) for one in given]).mean()
            loss = loss + self.label_weight * found["labels"]
        return {"loss": loss, **found}

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of two batches of logits over dimension 1, a mean over the rest."""
        old = F.log_softmax(teacher.float() / self.temperature, dim=1)
        new = F.log_softmax(student.float() / self.temperature, dim=1)
        divergence: Tensor = F.kl_div(new, old, reduction="none", log_target=True).sum(1).mean()
        return divergence * self.temperature**2


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of logits (B, classes) or, for dense prediction, (B, classes, h, w).

    Dense logits are brought up to the size of the labels (B, H, W), in which 255 stands for pixels without a label as
    long as there is no class of that number.
    """
    if logits.ndim == 4 and labels.ndim == 3:
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        if logits.shape[1] <= IGNORED:
            labels = labels.masked_fill(labels == IGNORED, -100)
    return mean_cross_entropy(logits.float(), labels)


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Return the mean cross entropy over all labels but the ignored ones: where all are ignored 0, and not NaN.

    Shape:
        - logits: (B, classes, ...)
        - labels: (B, ...) class indices, or weights of the shape of the logits
    """
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels)
    total = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp(min=1)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits among a model's outputs: (B, classes), or (B, classes, H, W) for dense prediction.

    Raises:
        UnsupportedModelError: there are none.
    """
    named = getattr(outputs, "logits", None)
    leaves = [named] if isinstance(named, Tensor) else tree_leaves(outputs)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim in (2, 4):
            return leaf
    raise UnsupportedModelError(
        "distillation needs logits (B, classes) or (B, classes, H, W) in the teacher's outputs and found none; give "
        "models that end in a classifier or a segmentation head"
    )


def _alike(outputs: Any, reference: Tensor) -> list[Tensor]:
    """Return every logit tensor of the student: in training mode some models give those of auxiliary heads as well."""
    found = [
        leaf
        for leaf in tree_leaves(getattr(outputs, "logits", outputs))
        if isinstance(leaf, Tensor) and leaf.shape == reference.shape
    ]
    if not found:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        raise UnsupportedModelError(
            f"the teacher's logits are of shape {tuple(reference.shape)}, and the model's outputs of {shapes}: the "
            "teacher must be the model from before the compression, or one of the same outputs"
        )
    return found


def feature_loss(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """Return the mean squared difference of two features over the teacher's mean square.

    Raises:
        UnsupportedModelError: they are no maps or tokens of the same number of channels.
    """
    if student.ndim == teacher.ndim == 4 and student.shape[1] == teacher.shape[1]:
        teacher = F.adaptive_avg_pool2d(teacher, student.shape[-2:])  # type: ignore[arg-type]
    elif student.ndim == teacher.ndim == 3 and student.shape[2] == teacher.shape[2]:
        student, teacher = student.mean(1), teacher.mean(1)
    else:
        raise UnsupportedModelError(
            f"feature {name!r} is of shape {tuple(student.shape)} in the model and {tuple(teacher.shape)} in the "
            "teacher; only maps (B, C, H, W) and tokens (B, N, C) of the same channels can be compared"
        )
    difference = F.mse_loss(student.float(), teacher.float())
    return difference / teacher.float().pow(2).mean().clamp_min(1e-12)


@contextmanager
def _outputs_of(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Catch what modules give while the model runs."""
    found: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if not tensors:
                raise UnsupportedModelError(f"module {name!r} gives no tensor that could be compared")
            found[name] = tensors[0]

        return hook

    # For the time of one call only: nothing stays on the model.
    handles = [surgery.get(model, name).register_forward_hook(catch(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
