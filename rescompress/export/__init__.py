"""Write a model to one file that runs without rescompress and says what it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rescompress.export.bundle import read_header, read_spec
from rescompress.export.paths import check_writable

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_writable", "export", "read_header", "read_spec"]


def export(
    model: "nn.Module",
    path: str | Path,
    example_input: Any = None,
    *,
    fold: bool = True,
    report: Any = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` to `path`, in the format that the suffix names: .pt is TorchScript.

    The file is loaded again and must compute what the model computes, before it takes the place of an older one; on
    any error the older file stays. The model and its mode are untouched. The program is the model in evaluation mode.

    Args:
        model: compressed or not, on any device; the file is bound to that device as far as its weights are, which
            `torch.jit.load(path, map_location=...)` can move.
        path: of the file; its folder must exist.
        example_input: as for compress; by default from the model's own config, else 1 x 3 x 224 x 224.
        fold: rewrite linear resizes into their convolutions first, where that makes the program cheaper.
        report: what `measure` or `compare` returned, or a dict; kept in the file's header.
        labels: class names, kept in the header.
        preprocessing: how an image becomes an input (mean, std, ...), kept in the header; by default from a timm
            model's own config.

    Returns:
        `path`, as a Path.

    Raises:
        ExportError: the path cannot be written, no program can be made of the model, or it computes something else.
        InputError: the example input is of no known form.
    """
    # Here, not above: a header is read without torch.
    from rescompress.export.torchscript import write

    path = check_writable(path)
    write(model, path, example_input, fold_first=fold, report=report, labels=labels, preprocessing=preprocessing)
    return path
