"""Write and open an .onnx file, which onnxruntime and most other engines run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from rescompress.errors import ExportError, InputError
from rescompress.export import describe, int4_onnx
from rescompress.export.bundle import HEADER_NAME, header_text
from rescompress.export.capture import write_captured
from rescompress.export.checking import Case, check
from rescompress.export.paths import replacing
from rescompress.export.prepare import Prepared
from rescompress.inputs import tensors_of

FORMAT = "onnx"

MAX_BYTES = 2**31 - 1
"""A protobuf message, which an ONNX file without further files beside it is, can be no larger."""


def write(prepared: Prepared, path: Path) -> None:
    """Write the program, run it with onnxruntime, compare it with the model, and put it at `path`.

    Raises:
        ExportError: no program can be made of the model, it computes something else, or it is too large for one file.
    """
    size = prepared.header["model"]["weight_bytes"]
    if size > MAX_BYTES:
        raise ExportError(f"the weights take {size} bytes and one ONNX file holds {MAX_BYTES}; write .pt2 instead")
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors_of(prepared.inputs)):
        raise ExportError("onnxruntime is given numpy arrays, which cannot be bfloat16; convert the model with .half()")
    versions = prepared.header["versions"] | describe.versions_of("onnx", "onnxruntime", "onnxscript")
    header = {"format": FORMAT, **prepared.header, "versions": versions}
    with replacing(path) as new:

        def save(program: ExportedProgram, made: dict[str, Any], cases: list[Case]) -> None:
            names = _output_names(cases[0].outputs)
            made_by = made["made_by"].replace("torch.export", "torch.onnx.export")
            text = header_text({**header, **made, "made_by": made_by})
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, output_names=names, custom_translation_table=_translations()
            )
            if converted is None:
                raise ExportError("torch.onnx.export returned nothing")
            for node in converted.model.graph.all_nodes():
                node.metadata_props.clear()  # stack traces, with the paths of this machine
            converted.rename_axes(_side_names(converted.model.graph.inputs))
            converted.model.metadata_props[HEADER_NAME] = text
            converted.save(str(new), include_initializers=True, external_data=False)
            check(open_program(new), cases)

        write_captured(prepared, "ONNX", "qdq", save)


def _translations() -> dict[Any, Any]:
    """Return what torch.onnx lacks: products of integers."""
    from onnxscript import opset18

    def int_mm(a: Any, b: Any) -> Any:
        return opset18.MatMulInteger(a, b)

    return {
        torch.ops.aten._int_mm.default: int_mm,
        torch.ops.rescompress.matmul_int4.default: int4_onnx.translation,
    }


def _output_names(outputs: Any) -> list[str]:
    count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs))
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]


def _side_names(inputs: Any) -> dict[Any, str]:
    """Return readable names for the sides that vary, which the exporter calls s77 and the like."""
    names: dict[Any, str] = {}
    for given in inputs:
        for side, name in zip(given.shape, ("batch", "channels", "height", "width"), strict=False):
            if not isinstance(side, int):
                names.setdefault(side.value, name)
    return names


class OnnxProgram(torch.nn.Module):
    """An onnxruntime session that takes and gives tensors.

    Shape:
        - Input: the model's inputs, by position or by name
        - Output: one tensor, or a tuple of all tensors that the model gives, in their order
    """

    def __init__(self, data: bytes, providers: list[str]) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(data, options, providers=providers)
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the session.

        Raises:
            InputError: an argument is missing, or there are too many.
        """
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(self.names) or set(given) != set(self.names):
            raise InputError(f"the program takes {', '.join(self.names)}; got {len(args)} and {list(kwargs)}")
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in given.items()}
        outputs = tuple(torch.from_numpy(array) for array in self.session.run(None, arrays))
        return outputs[0] if len(outputs) == 1 else outputs


def open_program(path: Path, device: str | None = None) -> OnnxProgram:
    """Return the program as a callable module.

    Raises:
        ImportError: onnxruntime is missing.
    """
    data = path.read_bytes()
    on_cpu = device is None or torch.device(device).type == "cpu"
    return OnnxProgram(data, ["CPUExecutionProvider"] if on_cpu else ["CUDAExecutionProvider", "CPUExecutionProvider"])
