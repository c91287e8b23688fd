"""What every format starts from: the model frozen, folded and fused, its own outputs, and the header of the file."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from rescompress import surgery
from rescompress.errors import ExportError, did_you_mean
from rescompress.export import describe
from rescompress.export.bundle import header_text
from rescompress.export.checking import DYNAMIC, Case, expected_outputs, quietly, reason
from rescompress.export.fuse import fuse
from rescompress.export.low_bits import in_form, with_slack
from rescompress.fold import fold, fold_decisions
from rescompress.inputs import Args, as_args, default_args


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be written.

    Attributes:
        model: in evaluation mode, folded and fused; its weights are shared with the user's model where nothing changed
        original: the user's model in evaluation mode, neither folded nor fused
        cases: the user's model run on its example, which comes first, and on other sizes
        dynamic: which sides the program must take at any length, one of `DYNAMIC`
        header: what is known before the format adds its part
    """

    model: nn.Module
    original: nn.Module
    cases: list[Case]
    dynamic: str
    header: dict[str, Any]

    @property
    def inputs(self) -> Args:
        """Return the example input."""
        return self.cases[0].inputs


def prepare(
    model: nn.Module,
    example_input: Any,
    *,
    fold_first: bool,
    dynamic: str,
    report: Any,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
) -> Prepared:
    """Freeze, run, fold and fuse a copy of the model, which shares its weights, and describe it.

    Raises:
        ExportError: it cannot be copied, run or written, or an option is wrong.
        InputError: the example input is of no known form.
    """
    if dynamic not in DYNAMIC:
        raise ExportError(f"dynamic must be one of {', '.join(map(repr, DYNAMIC))}, got {dynamic!r}{_hint(dynamic)}")
    _refuse_what_cannot_be_saved(model)
    inputs = as_args(default_args(model) if example_input is None else example_input)
    # A program is compiled for the order of memory of its example, and inputs are brought into this one.
    inputs = tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, inputs)
    given = {
        "preprocessing": describe.describe_preprocessing(model, preprocessing),
        "labels": describe.describe_labels(labels),
        "report": describe.describe_report(report),
    }
    header_text(given)  # refused before the long work
    with quietly():
        subject = _frozen_view(model)
        cases = with_slack(subject, expected_outputs(subject, inputs, dynamic))
        deployed, folding, fusion = subject, None, None
        if fold_first:
            deployed, folding = _folded(subject, inputs)
            deployed, fusion = fuse(deployed, cases, in_form(deployed, inputs, "held"))
        held = in_form(deployed, inputs, "held")
    header = {
        **describe.describe_model(held),
        "inputs": describe.describe_inputs(inputs),
        "batch_sizes_checked": list(dict.fromkeys(case.batch for case in cases)),
        "shapes_checked": [case.shapes for case in cases],
        "fold": folding,
        "fused": None if fusion is None else dataclasses.asdict(fusion),
        "versions": describe.describe_versions(model),
        **given,
    }
    return Prepared(deployed, subject, cases, dynamic, header)


def _hint(dynamic: Any) -> str:
    hint = did_you_mean(str(dynamic), DYNAMIC)
    return hint if hint.startswith("; did you mean") else ""


def _refuse_what_cannot_be_saved(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError("the model is TorchScript already; torch.jit.save writes it")
    tensors: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ExportError(f"{name} is on the meta device, where tensors have no values; load the weights first")
        if is_traceable_wrapper_subclass(tensor):
            # torch.jit.save can end the whole process on one of these, and torch.export.save pickles them.
            raise ExportError(
                f"{name} is a {type(tensor).__name__}, which no file can hold without pickling it; quantize with "
                "rescompress, whose weights are plain buffers, or write the model before quantizing"
            )


def _frozen_view(model: nn.Module) -> nn.Module:
    """Copy the tree of modules in evaluation mode; the weights are the model's own, without requires_grad."""
    memo: dict[int, Any] = {id(old): nn.Parameter(old.detach(), requires_grad=False) for old in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    try:
        return surgery.deep_copy(model, memo).eval()
    except Exception as error:  # foreign classes decide how they are copied
        raise ExportError(f"{type(model).__name__} cannot be copied: {reason(error)}") from error


def _folded(model: nn.Module, inputs: Args) -> tuple[nn.Module, list[dict[str, Any]]]:
    decisions = fold_decisions(model, inputs)
    if any(decision.folded for decision in decisions):
        model = fold(model, inputs).requires_grad_(False)
    return model, [dataclasses.asdict(decision) for decision in decisions]
