"""Write and open a .pt2 file: a torch.export program, which torch runs and compiles anywhere, with nothing pickled."""

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule

from rescompress.export.bundle import HEADER_NAME, header_text
from rescompress.export.capture import write_captured
from rescompress.export.checking import Case, check
from rescompress.export.paths import replacing
from rescompress.export.prepare import Prepared
from rescompress.export.untrusted import check_archive, check_program

FORMAT = "torch.export"

_DROPPED = ("stack_trace", "source_fn_stack", "torch_fn", "from_node", "custom")
"""What a program remembers of where it was made; stack traces hold the paths of the machine."""


def write(prepared: Prepared, path: Path) -> None:
    """Write the program, load it again, compare it with the model, and put it at `path`.

    Raises:
        ExportError: no program can be made of the model, or it computes something else.
    """
    with replacing(path) as new:

        def save(program: ExportedProgram, made: dict[str, Any], cases: list[Case]) -> None:
            _strip(program)
            text = header_text({"format": FORMAT, **prepared.header, **made})
            torch.export.save(program, str(new), extra_files={HEADER_NAME: text})
            check(open_program(new), cases)

        write_captured(prepared, ".pt2", "plain", save)


def _strip(program: ExportedProgram) -> None:
    # The example would be pickled into the file, and may be somebody's photograph.
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                for key in _DROPPED:
                    node.meta.pop(key, None)


def open_program(path: Path, device: str | None = None) -> Any:
    """Return the program as a callable module.

    Raises:
        InputError: the file holds what loading would run.
    """
    check_archive(path, FORMAT)
    check_program(path)
    program = torch.export.load(str(path))
    if device is not None:
        program = move_to_device_pass(program, device)
    return program.module()
