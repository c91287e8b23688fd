"""Write a model as TorchScript: compiled if possible, traced if not, loaded again and compared before it counts."""

import contextlib
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rescompress.errors import ExportError, RescompressWarning
from rescompress.export.bundle import HEADER_NAME, header_text
from rescompress.export.checking import Case, are_detections, at_other_sizes, check, quietly, reason
from rescompress.export.low_bits import in_form, with_slack
from rescompress.export.paths import replacing
from rescompress.export.prepare import Prepared
from rescompress.export.untrusted import check_archive, check_script, reader_of

FORMAT = "torchscript"


def write(prepared: Prepared, path: Path) -> None:
    """Write the program, load it again, compare it with the model, and put it at `path`.

    Where it computes what the model does at the example's batch or image size alone, the header and a warning say so.

    Raises:
        ExportError: no program can be made of the model, or it computes something else.
    """
    with replacing(path) as new:
        with quietly():
            others = with_slack(prepared.original, at_other_sizes(prepared.original, prepared.inputs))
            one_size = _write_checked(prepared, others, new)
        # Before the file takes its place: where warnings are errors, the older file must stay.
        if prepared.dynamic == "batch" and len(prepared.cases) == 1 and prepared.cases[0].batch is not None:
            warnings.warn(
                f"this {type(prepared.model).__name__} is written for its example's batch size alone "
                f"({prepared.cases[0].batch}): the model itself takes no other",
                RescompressWarning,
                stacklevel=3,
            )
        if prepared.dynamic != "none" and one_size and others:
            warnings.warn(
                f"{path} is for the image size of the example input alone: at others the program does not compute "
                "what the model does; write one file for each size",
                RescompressWarning,
                stacklevel=3,
            )


def _write_checked(prepared: Prepared, others: list[Case], path: Path) -> bool:
    """Compile, save, load and compare; where that fails, trace, save, load and compare.

    Returns:
        Whether the program is right at the example's image size alone.
    """
    inputs = prepared.inputs
    model = in_form(prepared.model, inputs, "script")
    makers: dict[str, Callable[[], Any]] = {
        # First, because decisions on sizes stay decisions; a trace records how they fell for the example.
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(
            model,
            example_inputs=None if inputs[1] else inputs[0],
            example_kwarg_inputs=inputs[1] or None,
            check_trace=False,  # check does, on a loaded file
            strict=False,  # dicts as outputs
            _store_inputs=False,  # or the example, maybe somebody's photograph, would be in the file
        ),
    }
    if inputs[0] and inputs[1]:
        del makers["trace"]  # it takes positional or keyword arguments, not both
    if are_detections(prepared.cases[0].outputs):
        del makers["trace"]  # it would record how many boxes there were
    failures: list[str] = []
    for made_by, make in makers.items():
        try:
            with torch.no_grad():
                program = make()
            # The compiler keeps what depends on the size; where the model takes no other, a trace cannot be judged.
            one_size = not _agrees(program, others) or (made_by == "trace" and not others)
            header = {
                "format": FORMAT,
                "made_by": made_by,
                "made_by_because": failures,
                "dynamic": prepared.dynamic if len(prepared.cases) > 1 else "none",
                "input_sizes": "fixed" if one_size else "as the model takes them",
                **prepared.header,
            }
            torch.jit.save(program, str(path), _extra_files={HEADER_NAME: header_text(header)})
            check(open_program(path), prepared.cases)
            return one_size
        except Exception as error:  # the compiler raises anything, and another way of writing may still work
            failures.append(f"torch.jit.{made_by}: {reason(error)}")
    advice = ""
    if are_detections(prepared.cases[0].outputs):
        advice = (
            "; where sizes differ, give an image that the detector need not resize: torchvision rounds others in "
            "another way in TorchScript"
        )
    raise ExportError(f"no TorchScript file can be made of this {type(model).__name__}: {'; '.join(failures)}{advice}")


def _agrees(program: Any, cases: list[Case]) -> bool:
    try:
        check(program, cases)
    except Exception:  # it differs, or does not run at all
        return False
    return True


def open_program(path: Path, device: str | None = None) -> Any:
    """Return the program as a callable module.

    Raises:
        InputError: the file holds what loading would run.
    """
    check_archive(path, FORMAT)
    check_script(path)
    if _calls_torchvision(path):
        # Its operators (nms, roi_align) are known to torch once it is imported.
        with contextlib.suppress(ImportError):
            importlib.import_module("torchvision")
    with quietly():  # torch.jit says that it is deprecated since torch 2.11
        return torch.jit.load(str(path), map_location=device)


def _calls_torchvision(path: Path) -> bool:
    reader = reader_of(path)
    sources = (reader.get_record(name) for name in reader.get_all_records() if name.startswith("code/"))
    return any(re.search(rb"\bops\s*\.\s*torchvision\b", source) for source in sources)
