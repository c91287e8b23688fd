"""Open a written file of any format as one kind of module, after looking that nothing in it runs by being loaded."""

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rescompress.errors import InputError, RescompressError
from rescompress.export.bundle import read_header
from rescompress.export.checking import reason
from rescompress.export.untrusted import check_onnx
from rescompress.spec import Spec

_MODULES = {"torchscript": "torchscript", "torch.export": "program", "onnx": "onnx", "aotinductor": "package"}
"""The file of this package that opens each format."""

_ONE_AT_A_TIME = threading.Lock()
"""torch.export.load keeps its state in a global and fails in the second of two threads."""


class LoadedProgram(nn.Module):
    """A written file, ready to run: called as the model was, it gives what the model gave.

    Attributes:
        program: what runs: a ScriptModule, a torch.export module, an onnxruntime session, or an AOTInductor runner
        header: what the file says of itself
    """

    def __init__(self, program: Callable[..., Any], header: dict[str, Any]) -> None:
        super().__init__()
        self.program = program
        self.header = header
        self.training = False

    @property
    def spec(self) -> Spec:
        """Return the spec that the model was compressed with."""
        return Spec.from_dict(self.header["spec"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> "LoadedProgram":
        """Return self: a written program computes in evaluation mode, whatever it is told."""
        return self


def open_file(path: str | Path, device: str | None = None) -> LoadedProgram:
    """Open a written file; `rescompress.export.load` says more.

    Raises:
        InputError: there is no such file, it is refused, or it cannot run here.
    """
    path = Path(path)
    header = read_header(path)
    kind = header.get("format")
    if not isinstance(kind, str) or kind not in _MODULES:
        raise InputError(f"{path} is of format {kind!r}, and this version opens {', '.join(_MODULES)}")
    opener = importlib.import_module(f"rescompress.export.{_MODULES[kind]}")
    try:
        with _ONE_AT_A_TIME:
            if kind == "onnx":
                check_onnx(path)
            program = opener.open_program(path, device)
    except RescompressError:
        raise
    except Exception as error:  # torch's loaders raise anything on what is not what they wrote
        raise InputError(f"{path} is damaged or was not written by rescompress: {reason(error)}") from error
    return LoadedProgram(program, header)
