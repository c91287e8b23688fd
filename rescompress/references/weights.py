"""Read a local state dict and load it into a model, all of it or nothing."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rescompress.errors import InputError, one_line

_LIGHTNING = "pytorch-lightning_version"
_OURS = "rescompress"  # what SpecInCheckpoint writes
_NESTED_IN = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_LISTED = 3


def load_weights(model: nn.Module, path: str | Path, classes_option: str = "num_classes=") -> None:
    """Load the state dict at `path` into `model`.

    Training scripts wrap it: a dict around it, and prefixes such as `module.`, are taken off. Of a Lightning
    checkpoint, the module's attribute `model` is taken. Counters of batches, which old files lack, may be missing.

    Args:
        model: uncompressed.
        path: of the file.
        classes_option: how the user says the number of classes, where nothing else is wrong.

    Raises:
        InputError: there is no such file, it is damaged or no state dict, or it belongs to another model.
    """
    state = _matching(read_state_dict(path), model)
    own = model.state_dict()
    state = {name: own[name] for name in own if name.endswith("num_batches_tracked")} | state
    found = differences(state, own)
    if found:
        raise InputError(
            f"{path} holds weights of another model than this {type(model).__name__}: {found}"
            f"{_classes_hint(state, own, classes_option)}"
        )
    for name, tensor in state.items():
        flaw = _flaw(tensor)
        if flaw is not None:
            raise InputError(f"{path} holds weights that no model can run with: {name} {flaw}")
    model.load_state_dict(state)


def differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Say in which names and shapes a state dict differs from a model's own, the first few of them; "" if in none."""
    wrong = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing = [f"{name} is missing" for name in own if name not in state]
    foreign = [f"{name} is unknown" for name in state if name not in own]
    listed = wrong[:_LISTED] + missing[:_LISTED] + foreign[:_LISTED]
    more = len(wrong) + len(missing) + len(foreign) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def _flaw(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "is on the meta device, without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "is sparse or quantized; save it as a dense tensor of floats"
    if tensor.is_complex():
        return f"is complex ({tensor.dtype})"
    broken = int((~tensor.float().isfinite()).sum())
    return f"has {broken} values of {tensor.numel()} that are NaN or infinite" if broken else None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors in a .safetensors file or in a file of torch.save; no code in it is run.

    Raises:
        InputError: there is no such file, it is damaged, or it holds no state dict.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no weights file {path}")
    if path.is_dir():
        raise InputError(f"the weights {path} are a folder; name a file in it")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    outer = loaded
    for name in _NESTED_IN:
        if isinstance(outer, Mapping) and isinstance(outer.get(name), Mapping):
            loaded = outer[name]
            break
    if isinstance(outer, Mapping) and isinstance(outer.get(_OURS), Mapping) and outer[_OURS].get("parts"):
        raise InputError(
            f"{path} is a checkpoint of a compressed model, whose weights have the original's names and do not do its "
            "work; give one of the original, or load this one by rescompress.lightning.load_model"
        )
    if isinstance(outer, Mapping) and _LIGHTNING in outer:  # beside the model there are buffers of the loss
        loaded = {name: value for name, value in loaded.items() if str(name).startswith("model.")} or loaded
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(
            f"{path} holds no state dict (names and tensors); write one with torch.save(model.state_dict(), file)"
        )
    return {str(name): value for name, value in loaded.items()}


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {one_line(error, 160)}") from error


def _read_torch(path: Path) -> Any:
    if _is_torchscript(path):
        raise InputError(
            f"{path} is a TorchScript program, not a state dict; write one with "
            "torch.save(torch.jit.load(file).state_dict(), other_file)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in any way
        # torch's own words are left out: they advise to let the file run code.
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):  # whole, so the content is refused
            raise InputError(
                f"{path} holds Python objects besides tensors and is not loaded, since that could run code; "
                "save model.state_dict() alone"
            ) from error
        raise InputError(
            f"{path} is damaged or not a file of torch.save; write one with torch.save(model.state_dict(), file)"
        ) from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):  # said by torch.load, or a file of an old torch.save
        return False


def _matching(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Take off the prefix that training put before every name, if the model's own names then fit better."""
    own = model.state_dict().keys()
    best = state
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            if len(own & state.keys()) > len(own & best.keys()):
                best = state
    return best


def _classes_hint(state: dict[str, Tensor], own: Mapping[str, Tensor], option: str) -> str:
    """Where nothing but the number of classes differs, say which option mends it."""
    if state.keys() != own.keys():
        return ""
    different = [name for name in own if state[name].shape != own[name].shape]
    classes = {int(state[name].shape[0]) for name in different if state[name].ndim > 0}
    rest_fits = all(state[name].shape[1:] == own[name].shape[1:] for name in different)
    return f"; give {option}{classes.pop()}" if len(classes) == 1 and rest_fits else ""
