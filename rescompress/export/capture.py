"""Capture a model as a torch.export program with the sides that may vary: what .pt2, .onnx and .aoti.pt2 start from."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.utils._pytree import tree_map

from rescompress.errors import ExportError, RescompressWarning
from rescompress.export.checking import Case, are_detections, check, is_image, quietly, reason
from rescompress.export.low_bits import in_form, join_maps
from rescompress.export.prepare import Prepared


def write_captured(
    prepared: Prepared, name: str, form: str, write: Callable[[ExportedProgram, dict[str, Any], list[Case]], None]
) -> None:
    """Capture the model and hand the program on; where a varying batch is beyond the exporter, capture without.

    Args:
        prepared: the model and what it must compute.
        name: of the format, for errors.
        form: of low-bit layers, as `in_form` takes it.
        write: of the format.

    Raises:
        ExportError: no program can be made of the model, or it computes something else; the reasons are named.
    """
    if are_detections(prepared.cases[0].outputs):
        raise ExportError(
            f"no {name} file can be made of this {type(prepared.model).__name__}: how many boxes it keeps depends on "
            "the image, which torch.export cannot capture, in the original detector neither; write TorchScript, to a "
            ".pt file"
        )
    with quietly():
        prepared = dataclasses.replace(prepared, model=in_form(prepared.model, prepared.inputs, form))
    failures = []
    for dynamic in _attempts(prepared):
        cases = prepared.cases if dynamic == prepared.dynamic else prepared.cases[:1]
        try:
            with quietly():
                program, made_by = _capture(prepared, dynamic, cases)
                write(program, {"made_by": made_by, "dynamic": dynamic, **_checked(cases)}, cases)
        except Exception as error:  # torch's exporters raise anything, and a program of fixed sizes may still work
            failures.append(f"with dynamic={dynamic!r}: {reason(error)}")
            continue
        if dynamic != prepared.dynamic:
            why = failures[0] if failures else "the model itself takes no other"
            warnings.warn(
                f"this {type(prepared.model).__name__} is written for its example's batch size alone "
                f"({prepared.cases[0].batch}): {why}",
                RescompressWarning,
                stacklevel=4,
            )
        return
    advice = ""
    if prepared.dynamic == "size":
        advice = "; a larger example_input may help, as sides that come down to 1 are taken for constants"
    raise ExportError(
        f"no {name} file can be made of this {type(prepared.model).__name__}: {'; '.join(failures)}{advice}"
    )


def _attempts(prepared: Prepared) -> list[str]:
    if prepared.dynamic != "batch":
        return [prepared.dynamic]
    return ["batch", "none"] if len(prepared.cases) > 1 else ["none"]


def _checked(cases: list[Case]) -> dict[str, Any]:
    return {
        "batch_sizes_checked": list(dict.fromkeys(case.batch for case in cases)),
        "shapes_checked": [case.shapes for case in cases],
    }


def _capture(prepared: Prepared, dynamic: str, cases: list[Case]) -> tuple[ExportedProgram, str]:
    """Return the first program that computes what the model computes, and how it was made."""
    failures = []
    for case in _examples(dynamic, cases):
        # The strict tracer is the second choice: it stumbles on more, but takes modules that share a child.
        for strict in (False, True):
            try:
                shapes = _dynamic_shapes(prepared, dynamic, case)
                program = export(prepared.model, *case.inputs, dynamic_shapes=shapes, strict=strict)
                join_maps(program)
                check(program.module(), cases)
                return program, f"torch.export, strict={strict}"
            except Exception as error:  # see write_captured
                failures.append(reason(error))
    raise ExportError("; ".join(dict.fromkeys(failures)))


def _examples(dynamic: str, cases: list[Case]) -> list[Case]:
    """Return the cases to capture at: a side of length 1 is taken for a constant, here or deep in the network."""
    if dynamic == "none":
        return cases[:1]
    several = [case for case in cases if case.batch is not None and case.batch > 1]
    return several[:1] if dynamic == "batch" else several


def _dynamic_shapes(prepared: Prepared, dynamic: str, case: Case) -> dict[str, Any] | None:
    if dynamic == "none":
        return None
    # A named batch gets its name in the ONNX file. Height and width stay nameless: a named side must take every
    # length down to 1, a nameless one gets the bounds and divisors that the network imposes.
    batch: Any = Dim("batch") if dynamic == "batch" else Dim.DYNAMIC

    def sides(leaf: Any, example: Any) -> Any:
        # By the example, whose other lengths are less likely to be its batch size than those of a made-up case.
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or example.shape[0] != prepared.cases[0].batch:
            return None
        if dynamic == "size" and is_image(leaf, leaf.shape[0]):
            return {0: batch, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        return {0: batch}

    args, kwargs = case.inputs
    shapes: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(sides, (args, kwargs), prepared.inputs)
    return dict(inspect.signature(prepared.model.forward).bind(*shapes[0], **shapes[1]).arguments)
