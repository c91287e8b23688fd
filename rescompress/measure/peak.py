"""Measure the peak memory that a forward pass really takes: a fresh process on the CPU, the allocator on CUDA."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rescompress.errors import MeasureError
from rescompress.inputs import Args, as_args, tensors_of
from rescompress.measure.macs import first_line
from rescompress.measure.sandbox import device_of, real_copy, undisturbed

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class PeakMemory:
    """Memory that one forward pass really took.

    Attributes:
        load_bytes: growth by loading the model; on CUDA what was allocated before the pass, weights and all else
        run_bytes: growth by the pass over that, at its highest: activations, workspaces, code that kernels generate
        reserved_bytes: on CUDA, what the caching allocator had taken from the device at the highest; else None
        method: "VmHWM" (Linux: exact), "ru_maxrss" (an upper bound of what loading and running took, where the peak
            cannot be reset) or "cuda"
    """

    load_bytes: int
    run_bytes: int
    reserved_bytes: int | None
    method: str


def peak_memory(model: nn.Module, example_input: Any, *, timeout_s: float = TIMEOUT_S) -> PeakMemory:
    """Measure the peak memory of one forward pass on the device where the model is.

    On the CPU the model and its input are pickled into a temporary folder and run in a process of their own, which
    imports what the model's classes need but never the caller's script.

    Raises:
        MeasureError: the model cannot be pickled, one of its classes lives in the script that runs, it does not run,
            or its device is neither a CPU nor CUDA.
    """
    args = as_args(example_input)
    device = device_of(model, args)
    if device.type == "cuda":
        return _on_cuda(model, args, device)
    if device.type == "cpu":
        return _in_own_process(model, args, timeout_s)
    raise MeasureError(f"peak memory can be measured on cpu and cuda, the model is on {device.type}")


def _on_cuda(model: nn.Module, args: Args, device: torch.device) -> PeakMemory:
    with undisturbed(model, args), torch.inference_mode():
        model(*args[0], **args[1])  # handles and workspaces that stay come with the first pass
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(*args[0], **args[1])
        torch.cuda.synchronize(device)
        return PeakMemory(
            load_bytes=before,
            run_bytes=torch.cuda.max_memory_allocated(device) - before,
            reserved_bytes=torch.cuda.max_memory_reserved(device),
            method="cuda",
        )


def _in_own_process(model: nn.Module, args: Args, timeout_s: float) -> PeakMemory:
    modules = sorted({type(module).__module__ for module in model.modules()})
    if "__main__" in modules:
        local = sorted(
            {type(module).__qualname__ for module in model.modules() if type(module).__module__ == "__main__"}
        )
        raise MeasureError(
            f"{', '.join(local)} lives in the script that runs, which another process must not run again; "
            f"move it into a module that can be imported"
        )
    with tempfile.TemporaryDirectory(prefix="rescompress-peak-") as name:
        folder = Path(name)
        script = isinstance(model, torch.jit.ScriptModule)
        try:
            if script:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, and still deployed
                    torch.jit.save(model, str(folder / "model.pt"))
            else:
                torch.save(_without_representation(model), folder / "model.pt")
            torch.save(args, folder / "input.pt")
        except Exception as error:  # whatever a foreign __reduce__ raises
            raise MeasureError(f"{type(model).__name__} cannot be pickled: {first_line(error)}") from error
        job = {
            "threads": torch.get_num_threads(),
            "modules": [] if script else modules,
            "dtype": _dtype_name(model, args),
            "script": script,
        }
        (folder / "job.json").write_text(json.dumps(job))
        return _run_child(folder, timeout_s)


def _without_representation(model: nn.Module) -> nn.Module:
    """Return a copy on the same weights that pickles where only a patched `extra_repr` is in the way.

    torchao gives each quantized layer an `extra_repr` of its own that pickle cannot name; without this no quantized
    model could be measured.
    """
    if not any("extra_repr" in vars(module) for module in model.modules()):
        return model
    subject = real_copy(model)
    for module in subject.modules():
        vars(module).pop("extra_repr", None)
    return subject


def _dtype_name(model: nn.Module, args: Args) -> str:
    for tensor in [*model.parameters(), *tensors_of(args)]:
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return "float32"


def _run_child(folder: Path, timeout_s: float) -> PeakMemory:
    # The same import path as here, so that the model's classes are found; -P keeps the working directory out of it
    # where it is not on it here.
    path = os.pathsep.join(os.getcwd() if entry == "" else entry for entry in sys.path)
    command = [sys.executable, "-P", "-W", "ignore", "-m", "rescompress.measure._peak", str(folder)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasureError(f"the pass did not end within {timeout_s:g} s in a process of its own") from error
    except OSError as error:
        raise MeasureError(f"no process could be started: {error}") from error
    result = folder / "result.json"
    if done.returncode != 0 or not result.exists():
        lines = done.stderr.strip().splitlines()
        reason = lines[-1][:200] if lines else "no message"
        raise MeasureError(f"the process of its own ended with code {done.returncode}: {reason}")
    found = json.loads(result.read_text())
    return PeakMemory(found["load_bytes"], found["run_bytes"], None, found["method"])
