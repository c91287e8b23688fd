"""Write a model as TorchScript: compiled if possible, traced if not, loaded again and compared before it counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rescompress.errors import ExportError
from rescompress.export.bundle import HEADER_NAME, header_text
from rescompress.export.checking import check, one_line, quietly
from rescompress.export.paths import replacing
from rescompress.export.prepare import Prepared
from rescompress.export.untrusted import check_archive, check_script

FORMAT = "torchscript"


def write(prepared: Prepared, path: Path) -> None:
    """Compile, save, load and compare; where that fails, trace, save, load and compare; then put it at `path`.

    Raises:
        ExportError: no program can be made of the model, or it computes something else.
    """
    model, inputs = prepared.model, prepared.inputs
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
    dynamic = prepared.dynamic if len(prepared.cases) > 1 else "none"
    failures = []
    with replacing(path) as new, quietly():
        for made_by, make in makers.items():
            text = header_text({"format": FORMAT, "made_by": made_by, "dynamic": dynamic, **prepared.header})
            try:
                with torch.no_grad():
                    program = make()
                torch.jit.save(program, str(new), _extra_files={HEADER_NAME: text})
                check(open_program(new), prepared.cases)
                return
            except Exception as error:  # the compiler raises anything, and another way of writing may still work
                failures.append(f"torch.jit.{made_by}: {one_line(error)}")
        raise ExportError(f"no TorchScript file can be made of this {type(model).__name__}: {'; '.join(failures)}")


def open_program(path: Path, device: str | None = None) -> Any:
    """Return the program as a callable module.

    Raises:
        InputError: the file holds what loading would run.
    """
    check_archive(path, FORMAT)
    check_script(path)
    with quietly():  # torch.jit says that it is deprecated since torch 2.11
        return torch.jit.load(str(path), map_location=device)
