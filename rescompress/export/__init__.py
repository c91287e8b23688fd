"""Write a model to one file that runs without rescompress and says what it is, and open such a file."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rescompress.export.bundle import read_header, read_spec
from rescompress.export.paths import check_writable, suffix_of

if TYPE_CHECKING:
    from torch import nn

    from rescompress.export.loading import LoadedProgram

__all__ = ["check_writable", "export", "load", "read_header", "read_spec"]

_WRITERS = {".pt": "torchscript", ".pt2": "program", ".onnx": "onnx", ".aoti.pt2": "package"}
"""The file of this package that writes each format."""


def export(
    model: "nn.Module",
    path: str | Path,
    example_input: Any = None,
    *,
    fold: bool = True,
    dynamic: str = "batch",
    report: Any = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` to `path`, in the format that the suffix names.

    .pt is TorchScript, .pt2 a torch.export program, .onnx ONNX, and .aoti.pt2 a package that AOTInductor compiled for
    this kind of machine. The file is loaded again and must compute what the model computes, before it takes the place
    of an older one; on any error the older file stays. The model and its mode are untouched. The program is the model
    in evaluation mode.

    Args:
        model: compressed or not, on any device; the file is bound to that device as far as its weights are, which
            `load(path, device=...)` can move, except for a compiled package.
        path: of the file; its folder must exist.
        example_input: as for compress; by default from the model's own config, else 1 x 3 x 224 x 224.
        fold: first rewrite linear resizes into their convolutions, where that makes the program cheaper, and batch
            norms into theirs.
        dynamic: the sides of the inputs that may vary: "batch"; "size" for batch, height and width; "none". Where the
            batch cannot vary the file is written for the example's, with a warning. A TorchScript file may take
            more than is asked for.
        report: what `measure` or `compare` returned, or a dict; kept in the file's header.
        labels: class names, kept in the header.
        preprocessing: how an image becomes an input (mean, std, ...), kept in the header; by default from a timm
            model's own config.

    Returns:
        `path`, as a Path.

    Raises:
        ExportError: the path cannot be written, the format's tools are missing, no program can be made of the model,
            it computes something else, or it does not take the sizes that `dynamic` asks for.
        InputError: the example input is of no known form.
    """
    path = check_writable(path)
    # Here, not above: a header is read without torch.
    from rescompress.export.prepare import prepare

    prepared = prepare(
        model,
        example_input,
        fold_first=fold,
        dynamic=dynamic,
        report=report,
        labels=labels,
        preprocessing=preprocessing,
    )
    importlib.import_module(f"{__name__}.{_WRITERS[suffix_of(path) or '']}").write(prepared, path)
    return path


def load(path: str | Path, *, device: str | None = None) -> "LoadedProgram":
    """Return the program in a file that `export` wrote, in any format, as a module in evaluation mode.

    A file that is damaged, foreign, or holds anything that would run by being loaded is refused. The exception is
    .aoti.pt2: it is machine code, so load it only from where you would take a program from.

    Args:
        path: of the file.
        device: to run on; by default the one that it was written on, for ONNX the CPU.

    Raises:
        InputError: there is no such file, it is refused, or it cannot run here.
    """
    from rescompress.export.loading import open_file

    return open_file(path, device)
