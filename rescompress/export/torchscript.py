"""Write a model as TorchScript: compiled if possible, traced if not, loaded again and compared before it counts."""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from rescompress.errors import ExportError, RescompressWarning, one_line
from rescompress.export import describe
from rescompress.export.bundle import HEADER_NAME, header_text
from rescompress.export.paths import replacing
from rescompress.fold import fold, fold_decisions
from rescompress.inputs import Args, as_args, batch_size_of, default_input, tensors_of, with_batch

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a file's outputs may be from the model's, relative to the largest of them."""


def write(
    model: nn.Module,
    path: Path,
    example_input: Any,
    *,
    fold_first: bool,
    report: Any,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
) -> None:
    """Write the program, load it again, compare it with the model, and put it at `path`.

    Where it computes what the model does at the example's image size alone, the header and a warning say so.

    Raises:
        ExportError: no program can be made of the model, or it computes something else.
    """
    _refuse_what_cannot_be_saved(model)
    inputs = as_args(default_input(model) if example_input is None else example_input)
    given = {
        "preprocessing": describe.describe_preprocessing(model, preprocessing),
        "labels": describe.describe_labels(labels),
        "report": describe.describe_report(report),
    }
    header_text(given)  # refused before the long work
    with _quietly():
        subject = _frozen_view(model)
        expected = _expected(subject, inputs)
        deployed, folding = _folded(subject, inputs) if fold_first else (subject, None)
        header = {
            "format": "torchscript",
            **describe.describe_model(deployed),
            "inputs": describe.describe_inputs(inputs),
            "batch_sizes_checked": [batch for batch, _, _ in expected],
            "fold": folding,
            "versions": describe.describe_versions(model),
            **given,
        }
        others = _other_sizes(subject, inputs)
        with replacing(path) as new:
            one_size = _write_checked(deployed, inputs, expected, others, header, new)
            if one_size and others:
                # Before the file takes its place: where warnings are errors, the older file must stay.
                warnings.warn(
                    f"{path} is for the image size of the example input alone: at others the program does not compute "
                    "what the model does; write one file for each size",
                    RescompressWarning,
                    stacklevel=3,
                )


def _refuse_what_cannot_be_saved(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError("the model is TorchScript already; torch.jit.save writes it")
    tensors: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ExportError(f"{name} is on the meta device, where tensors have no values; load the weights first")
        if is_traceable_wrapper_subclass(tensor):
            # torch.jit.save can end the whole process on one of these.
            raise ExportError(
                f"{name} is a {type(tensor).__name__}, which TorchScript cannot hold; write the model before quantizing"
            )


def _frozen_view(model: nn.Module) -> nn.Module:
    """Copy the tree of modules in evaluation mode; the weights are the model's own, without requires_grad."""
    memo: dict[int, Any] = {id(old): nn.Parameter(old.detach(), requires_grad=False) for old in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:  # foreign classes decide how they are copied
        raise ExportError(f"{type(model).__name__} cannot be copied: {_reason(error)}") from error


Expected = list[tuple[int, Args, Any]]
"""Batch size, inputs and the model's own outputs."""


def _expected(model: nn.Module, inputs: Args) -> Expected:
    """Run the model on its example, and on another batch size if it takes one."""
    batch = batch_size_of(inputs)
    if batch == 0:
        raise ExportError("the example input is empty (batch size 0), so nothing can be compared; give one image")
    try:
        with torch.no_grad():
            expected = [(batch, inputs, model(*inputs[0], **inputs[1]))]
    except Exception as error:  # the model's own code runs here
        raise ExportError(f"{type(model).__name__} does not run on the example input: {_reason(error)}") from error
    if not any(leaf.isfinite().any() for leaf in tensors_of(expected[0][2])):
        raise ExportError(
            f"{type(model).__name__} gives no finite number on the example input, so nothing can be compared; check "
            "its weights, or give another example"
        )
    try:
        args, kwargs = with_batch(inputs, batch + 2)
        with torch.no_grad():
            expected.append((batch + 2, (args, kwargs), model(*args, **kwargs)))
    except Exception:  # a model for one batch size only: its file need not do more than it does
        pass
    return expected


def _other_sizes(model: nn.Module, inputs: Args) -> Expected:
    """Run the model on larger and on smaller images, as far as it takes them; none where the input is no image."""
    height, width = next((tensor.shape[-2:] for tensor in tensors_of(inputs) if tensor.ndim == 4), (0, 0))
    found: Expected = []
    for new_height, new_width in ((height + 32, width + 32), (height // 2, width // 2)):

        def resized(leaf: Any, rows: int = new_height, columns: int = new_width) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim != 4 or leaf.shape[-2:] != (height, width):
                return leaf
            at = torch.arange(max(rows, columns), device=leaf.device)
            return leaf.index_select(2, at[:rows] % height).index_select(3, at[:columns] % width)

        if min(height, width, new_height, new_width) > 0:
            args, kwargs = tree_map(resized, inputs)
            # The model itself may be for one size only.
            with contextlib.suppress(Exception), torch.no_grad():
                found.append((batch_size_of(inputs), (args, kwargs), model(*args, **kwargs)))
    return found


def _folded(model: nn.Module, inputs: Args) -> tuple[nn.Module, list[dict[str, Any]]]:
    decisions = fold_decisions(model, inputs)
    if any(decision.folded for decision in decisions):
        model = fold(model, inputs).requires_grad_(False)
    return model, [dataclasses.asdict(decision) for decision in decisions]


def _write_checked(
    model: nn.Module, inputs: Args, expected: Expected, others: Expected, header: dict[str, Any], path: Path
) -> bool:
    """Compile, save, load and compare; where that fails, trace, save, load and compare.

    Returns:
        Whether the program is right at the example's image size alone.
    """
    makers: dict[str, Callable[[], Any]] = {
        # First, because decisions on sizes stay decisions; a trace records how they fell for the example.
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(
            model,
            example_inputs=None if inputs[1] else inputs[0],
            example_kwarg_inputs=inputs[1] or None,
            check_trace=False,  # _check does, on a loaded file
            strict=False,  # dicts as outputs
        ),
    }
    if inputs[0] and inputs[1]:
        del makers["trace"]  # it takes positional or keyword arguments, not both
    failures = []
    for made_by, make in makers.items():
        try:
            with torch.no_grad():
                program = make()
            # The compiler keeps what depends on the size; where the model takes no other, a trace cannot be judged.
            one_size = not _agrees(program, others) or (made_by == "trace" and not others)
            sizes = "fixed" if one_size else "as the model takes them"
            text = header_text({"made_by": made_by, "input_sizes": sizes, **header})
            torch.jit.save(program, str(path), _extra_files={HEADER_NAME: text})
            _check(torch.jit.load(str(path)), expected)
            return one_size
        except Exception as error:  # the compiler raises anything, and another way of writing may still work
            failures.append(f"torch.jit.{made_by}: {_reason(error)}")
    raise ExportError(f"no TorchScript file can be made of this {type(model).__name__}: {'; '.join(failures)}")


def _agrees(program: Any, expected: Expected) -> bool:
    try:
        _check(program, expected)
    except Exception:  # it differs, or does not run at all
        return False
    return True


def _check(program: Any, expected: Expected) -> None:
    for batch, (args, kwargs), outputs in expected:
        with torch.no_grad():
            found = program(*args, **kwargs)
        wanted_leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        found_leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if len(wanted_leaves) != len(found_leaves):
            raise ExportError(f"the written program gives {len(found_leaves)} outputs instead of {len(wanted_leaves)}")
        for wanted, got in zip(wanted_leaves, found_leaves, strict=True):
            if wanted.shape != got.shape or wanted.dtype != got.dtype:
                raise ExportError(
                    f"at batch size {batch} the written program gives {tuple(got.shape)} {got.dtype} instead of "
                    f"{tuple(wanted.shape)} {wanted.dtype}"
                )
            _check_values(wanted, got, batch)


def _check_values(wanted: Tensor, got: Tensor, batch: int) -> None:
    if wanted.numel() == 0:
        return
    tolerance = TOLERANCE.get(wanted.dtype)
    if tolerance is None:  # whole numbers and the like
        same = torch.equal(wanted, got)
        distance = 0.0
    else:
        size = wanted.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        same = torch.allclose(got, wanted, rtol=0.0, atol=tolerance * size, equal_nan=True)
        distance = (got - wanted).nan_to_num(0.0).abs().max().item() / (size or 1.0)
    if not same:
        raise ExportError(
            f"at batch size {batch} the program's outputs differ from the model's by {distance:.3g} of their size"
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence what torch.jit says of itself (deprecated since torch 2.11) and of tracing; what matters is checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit")
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.jit")
        yield


def _reason(error: BaseException) -> str:
    """Return class and beginning of an error: in torch.jit's, the telling line stands before pages of source."""
    return f"{type(error).__name__}: {one_line(error)}"
