"""Look into a file of unknown origin before any of torch's loaders sees it: nothing in it may run by being loaded.

Each loader would execute something: torch.export unpickles, evaluates expressions and opens shared libraries;
TorchScript runs the `__setstate__` of its classes. What a file of ours holds is known, so all else is refused.
"""

import ast
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rescompress.errors import InputError
from rescompress.export.bundle import HEADER_NAME
from rescompress.export.pickles import PickleError, check_pickle
from rescompress.export.seal import check_seal

_EVERY_ARCHIVE = rf"extra/{re.escape(HEADER_NAME)}|byteorder|\.data/(version|serialization_id)"

MEMBERS = {
    "torchscript": re.compile(
        rf"data\.pkl|constants\.pkl|version|(data|constants)/\d+|code/[\w./]+\.py(\.debug_pkl)?|{_EVERY_ARCHIVE}",
        re.ASCII,
    ),
    "torch.export": re.compile(
        r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt"
        r"|data/constants/((tensor|custom_obj)_\d+|model_constants_config\.json)|archive_(format|version)"
        rf"|{_EVERY_ARCHIVE}",
        re.ASCII,
    ),
    "aotinductor": re.compile(
        r"data/aotinductor/model/\w[\w.-]*|data/constants/custom_obj_\d+|archive_(format|version)"
        rf"|{_EVERY_ARCHIVE}",
        re.ASCII,
    ),
}
"""What the archive of each format may hold, without the name of the archive before it."""

MAX_COMPRESSED_BYTES = 64 * 2**20
"""Only TorchScript's source is compressed, and none comes near; what unpacks to more is refused before it does."""

MOST_NESTED_SOURCE = 500
"""How deep the syntax of TorchScript's source may be nested; its compiler ends the process at some ten thousand."""

_LIBRARIES = re.compile(
    "aten|prims?|higher_order|_?quantized|quantized_decomposed|onednn|mkldnn|mkldnn_prepacked|prepacked|torchao"
    "|torchvision|rescompress"
)
"""Operators of these libraries compute; others may read files or talk to other machines."""

_CLASSES = re.compile("quantized|mkldnn|xnnpack")
"""C++ classes of these libraries are packed weights; others open sockets and streams."""

_CLASS_NAME = re.compile(r"(?<![\w.])__torch__(\.\w+)+")
"""What TorchScript calls the classes that a file defines."""

_FILE_OPERATORS = re.compile(r"\b(save|from_file)\b")
"""The operators among them that write or read files: aten::save, aten::from_file."""

_TARGET = re.compile(r"torch\.ops\.(\w+)((?:\.\w+){1,2})|_operator\.[a-z]\w*|math\.\w+|torch\.(_?sym_\w+)")

_EXPRESSION_NAMES = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Eq|Ne|Equality|Unequality|LessThan|GreaterThan"
    "|StrictLessThan|StrictGreaterThan|And|Or|Not|true|false|oo|int_oo|Infinity|NegativeInfinity|FloorDiv"
    "|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow"
    "|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal"
    "|ToFloat|Identity|floor|ceiling|Piecewise|ExprCondPair|Tuple"
)
"""What an expression of sizes may call: sympy's own names and those of torch.utils._sympy.functions."""

_ONNX_LIBRARIES = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_ONNX_OUTSIDE = {"EPContext", "PythonOp", "PythonOpGrad"}
"""Operators of onnxruntime that open a compiled file or call Python."""

_SYMBOL = re.compile(r"[a-z]{1,3}\d+")
"""What torch calls a size that varies: s77, u0."""

_QUOTED = {"Symbol": _SYMBOL, "Float": re.compile(r"-?\d*\.?\d*([eE][+-]?\d+)?")}
"""What takes its first argument as a string, and what that string may be."""


def check_archive(path: Path, kind: str) -> None:
    """Refuse an archive that is damaged or holds anything that one of this kind does not.

    Raises:
        InputError: it does, and what.
    """
    _check_end(path)
    allowed = MEMBERS[kind]
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [info.filename.partition("/")[2] for info in members]
        for info, name in zip(members, names, strict=True):
            if allowed.fullmatch(name) is None or ".." in name:
                raise InputError(f"{path} holds {info.filename!r}, which no {kind} file of rescompress does; refused")
        unpacked = sum(info.file_size for info in members if info.compress_type != zipfile.ZIP_STORED)
        if unpacked > MAX_COMPRESSED_BYTES:
            raise InputError(
                f"{path} unpacks to {unpacked} bytes, more than the {MAX_COMPRESSED_BYTES} allowed; refused"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of {damaged!r} is wrong")
    # The loaders read archives with another parser: what it finds must be what was looked at.
    if len(set(names)) != len(names) or sorted(reader_of(path).get_all_records()) != sorted(names):
        raise InputError(f"{path} lists its members twice or in two ways; refused")


_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
"""What a zip ends with: the end record, and before it in a large one its larger twin and where that is."""


def _check_end(path: Path) -> None:
    """Refuse a zip with more than one directory: two parsers could take different ones, and see different members.

    Raises:
        InputError: the directory does not lie right before the end, or the end is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _END.size - _LOCATOR.size - _END64.size, 0))
        tail = file.read()
    end = size - _END.size
    mark, *_, length, offset, comment = _END.unpack(tail[-_END.size :])
    ended = mark == b"PK\5\6" and comment == 0
    if tail[-_END.size - _LOCATOR.size :].startswith(b"PK\6\7") and len(tail) > _END.size + _LOCATOR.size:
        end -= _LOCATOR.size + _END64.size
        _, _, located, _ = _LOCATOR.unpack(tail[-_END.size - _LOCATOR.size : -_END.size])
        mark, *_, length, offset = _END64.unpack(tail[: _END64.size])
        ended = ended and mark == b"PK\6\6" and located == end
    if not ended or offset + length != end:
        raise InputError(f"{path} is damaged: its list of members is not at its end")


def reader_of(path: Path) -> torch._C.PyTorchFileReader:
    """Return torch's own reader of an archive, which reads and runs nothing by itself."""
    return torch._C.PyTorchFileReader(str(path))


def check_script(path: Path) -> None:
    """Refuse TorchScript that calls operators which touch files, at loading (`__setstate__`) or later.

    Source and objects that are nested deeper than the loader's stack are refused too.

    Raises:
        InputError: it does, and what it calls.
    """
    reader = reader_of(path)
    for name in reader.get_all_records():
        if name.endswith("pkl"):
            try:
                check_pickle(reader.get_record(name))
            except PickleError as error:
                raise InputError(f"{path} holds {name}, which no file of rescompress does: {error}; refused") from error
        elif name.startswith("code/"):
            _check_source(path, reader.get_record(name).decode("utf-8"))


def _check_source(path: Path, source: str) -> None:
    found = _FILE_OPERATORS.search(source)
    if found is not None:
        raise InputError(f"{path} holds code that calls {found[0]!r}, which touches files; refused")
    # Names of classes may have the word in them, as those of torchvision.ops do, and never call an operator.
    for space, library in re.findall(r"\bops\s*\.(\s*)(\w+)", _CLASS_NAME.sub("", source)):
        # "TorchScript ops. This ..." is prose of an error message; torch could not call a library that it has not.
        if not (space and library not in _known_to_torch()):
            _check_library(path, library)
    for library in re.findall(r"\bclasses\s*\.\s*(\w+)", source):
        if _CLASSES.fullmatch(library) is None:
            raise InputError(f"{path} holds code that makes objects of {library!r}; refused")
    if not _is_shallow(source):
        raise InputError(f"{path} holds code that is nested deeper than {MOST_NESTED_SOURCE}; refused")


def _known_to_torch() -> set[str]:
    """Return the libraries whose operators this process could call."""
    return {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}


def _is_shallow(source: str) -> bool:
    """Whether source is nested no deeper than allowed; TorchScript's is of Python's syntax."""
    try:
        level: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # too deep for Python's own parser, or no source
        return False
    for _ in range(MOST_NESTED_SOURCE):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return True
        # A chain of `and` is one node here and nested in TorchScript.
        if any(isinstance(node, ast.BoolOp) and len(node.values) > MOST_NESTED_SOURCE for node in level):
            return False
    return False


def check_program(path: Path) -> None:
    """Refuse a torch.export archive in which anything is pickled, or evaluated that is no arithmetic of sizes.

    Raises:
        InputError: it is so, and where.
    """
    reader = reader_of(path)
    if reader.get_record("data/sample_inputs/model.pt"):
        raise InputError(f"{path} holds pickled example inputs, which no file of rescompress does; refused")
    for part in ("weights", "constants"):
        config = json.loads(reader.get_record(f"data/{part}/model_{part}_config.json"))
        for name, entry in config["config"].items():
            # Objects of C++ classes (packed int8 weights) are read by TorchScript's unpickler, which runs no Python.
            if entry["use_pickle"] and not entry["path_name"].startswith("custom_obj_"):
                raise InputError(f"{path} holds the pickled tensor {name!r}; refused")
    program = json.loads(reader.get_record("models/model.json"))
    for key, value in _strings(program):
        if key == "target":
            _check_target(path, value)
        elif key == "expr_str" and not is_arithmetic(value):
            raise InputError(f"{path} holds the size {value[:80]!r}, which is no arithmetic; refused")


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """Yield every string in nested JSON under the key that it has."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        key, item = stack.pop()
        if isinstance(item, str):
            yield key, item
        elif isinstance(item, dict):
            stack += item.items()
        elif isinstance(item, list):
            stack += [(key, one) for one in item]


def _check_target(path: Path, target: str) -> None:
    found = _TARGET.fullmatch(target)
    if found is None or _FILE_OPERATORS.search(target):
        raise InputError(f"{path} calls {target[:80]!r}, which is no operator that computes; refused")
    if found[1] is not None:
        _check_library(path, found[1])


def _check_library(path: Path, library: str) -> None:
    if _LIBRARIES.fullmatch(library) is None:
        raise InputError(f"{path} calls operators of {library!r}, which are not known to only compute; refused")


def is_arithmetic(expression: str) -> bool:
    """Whether a string is arithmetic of named sizes, so that evaluating it, as torch.export does, runs nothing else."""
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    quoted = {
        id(call.args[0]): _QUOTED[call.func.id]
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _QUOTED and call.args
    }
    return all(_is_arithmetic_node(node, quoted.get(id(node))) for node in ast.walk(tree))


def _is_arithmetic_node(node: ast.AST, quoted: re.Pattern[str] | None) -> bool:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return quoted is not None and quoted.fullmatch(node.value) is not None
        return isinstance(node.value, int | float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _EXPRESSION_NAMES.fullmatch(node.func.id) is not None
    if isinstance(node, ast.Name):
        return _EXPRESSION_NAMES.fullmatch(node.id) is not None or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.keyword):
        return node.arg is not None
    kinds = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop, ast.Load)
    return isinstance(node, kinds)


def check_onnx(path: Path) -> None:
    """Refuse an ONNX model that is damaged, reads other files, or calls operators of unknown libraries.

    Raises:
        InputError: it does, and what; or the onnx package is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError(f"{path} needs onnx and onnxruntime to run; pip install 'rescompress[onnx]'") from error
    check_seal(path)
    model = onnx.load_model_from_string(path.read_bytes())
    own = {function.domain for function in model.functions}
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and (message.data_location or message.external_data):
            raise InputError(f"{path} refers to other files, which no file of rescompress does; refused")
        if isinstance(message, onnx.NodeProto):
            known = message.domain in _ONNX_LIBRARIES or message.domain in own
            if not known or message.op_type in _ONNX_OUTSIDE:
                name = f"{message.domain or 'ai.onnx'}::{message.op_type}"
                raise InputError(f"{path} calls {name!r}, which is not known to only compute; refused")


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages in it."""
    stack = [message]
    while stack:
        message = stack.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                stack += [value] if hasattr(value, "ListFields") else value
