"""Write and open an .aoti.pt2 file: the program compiled ahead of time by AOTInductor to machine code.

It runs without Python and without waiting for a compiler, on the kind of processor that it was compiled for. Loading
it runs that machine code, as starting any program does; nothing can be looked at beforehand.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from rescompress.errors import InputError
from rescompress.export.bundle import HEADER_NAME, header_text, read_header
from rescompress.export.capture import write_captured
from rescompress.export.checking import Case, check
from rescompress.export.low_bits import compiled_form
from rescompress.export.paths import replacing
from rescompress.export.prepare import Prepared
from rescompress.export.untrusted import check_archive, reader_of
from rescompress.inputs import tensors_of

FORMAT = "aotinductor"

_CAPABILITIES = {"AVX2": "avx2", "AVX512": "avx512_f", "AVX512_VNNI": "avx512_vnni", "AMX": "amx_tile"}
"""How AOTInductor calls what a processor can, and how torch.cpu.get_capabilities does."""


def write(prepared: Prepared, path: Path) -> None:
    """Compile the program, load it again, compare it with the model, and put it at `path`.

    Raises:
        ExportError: no program can be made of the model, it does not compile, or it computes something else.
    """
    form = compiled_form(prepared.model)
    with replacing(path) as new:

        def save(program: ExportedProgram, made: dict[str, Any], cases: list[Case]) -> None:
            made_by = made["made_by"].replace("torch.export", "AOTInductor")
            text = header_text({"format": FORMAT, **prepared.header, **made, "made_by": made_by})
            with torch._inductor.config.patch(_options(form)), torch.no_grad():
                torch._inductor.aoti_compile_and_package(program, package_path=str(new))
            _add_header(new, text)
            check(open_program(new), cases)

        write_captured(prepared, ".aoti.pt2", form, save)


def _options(form: str) -> dict[str, Any]:
    # Freezing puts weights in the order of the processor ahead of time, and computes whatever else is constant.
    options = {"freezing": form == "onednn"}
    if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):
        options["aot_inductor.enable_line_tables"] = False  # a megabyte and more, with the paths of this machine
    return options


def _add_header(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/extra/{HEADER_NAME}", text)


def open_program(path: Path, device: str | None = None) -> Any:
    """Return the program as a callable.

    Raises:
        InputError: it was compiled for another kind of device or processor.
    """
    check_archive(path, FORMAT)
    made_for = _made_for(path)
    kind = made_for.get("AOTI_DEVICE_KEY", "cpu")
    if device is not None and torch.device(device).type != kind:
        raise InputError(f"{path} is compiled for {kind} and cannot run on {device}; write it again from there")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{path} is compiled for CUDA, and this machine has no CUDA device")
    lacking = _lacking(made_for.get("AOTI_CPU_ISA", "")) if kind == "cpu" else []
    if lacking:  # it would end the process at its first such instruction
        raise InputError(f"{path} is compiled for a processor with {', '.join(lacking)}, which this one lacks")
    if not path.name.endswith(".pt2"):
        raise InputError(f"{path} must be called .pt2 for AOTInductor to load it; rename it")
    header = read_header(path)
    return Package(torch._inductor.aoti_load_package(str(path)), header["inputs"], header["dynamic"])


class Package(nn.Module):
    """A compiled package that looks at its inputs: the machine code itself reads whatever memory it is pointed at.

    Args:
        program: the package, as torch loads it.
        inputs: shape and dtype of each tensor of the example.
        dynamic: the sides that may vary.
    """

    def __init__(self, program: Callable[..., Any], inputs: list[dict[str, Any]], dynamic: str) -> None:
        super().__init__()
        self.program, self.inputs, self.dynamic = program, inputs, dynamic

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the package.

        Raises:
            InputError: an input is of another shape or type than it was compiled for.
        """
        given = tensors_of((args, kwargs))
        if len(given) != len(self.inputs):
            raise InputError(f"the package takes {len(self.inputs)} tensors, got {len(given)}")
        for tensor, example in zip(given, self.inputs, strict=True):
            self._check(tensor, example)
        args, kwargs = tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return self.program(*args, **kwargs)

    def _check(self, tensor: Tensor, example: dict[str, Any]) -> None:
        dtype, shape, wanted = str(tensor.dtype).removeprefix("torch."), list(tensor.shape), list(example["shape"])
        free = {"none": (), "batch": (0,), "size": (0, 2, 3) if len(wanted) == 4 else (0,)}.get(self.dynamic, ())
        fits = len(shape) == len(wanted) and all(
            side == other or (axis in free and side > 0)
            for axis, (side, other) in enumerate(zip(shape, wanted, strict=True))
        )
        if dtype != example["dtype"] or not fits:
            raise InputError(
                f"the package is compiled for {example['dtype']} {wanted} and dynamic={self.dynamic!r}, got {dtype} "
                f"{shape}"
            )


def _made_for(path: Path) -> dict[str, str]:
    reader = reader_of(path)
    for name in reader.get_all_records():
        if name.endswith("wrapper_metadata.json"):
            found: dict[str, str] = json.loads(reader.get_record(name))
            return found
    raise InputError(f"{path} does not say what it was compiled for; refused")


def _lacking(needed: str) -> list[str]:
    able = torch.cpu.get_capabilities()
    return [name for name in needed.split() if not able.get(_CAPABILITIES.get(name, ""), True)]
