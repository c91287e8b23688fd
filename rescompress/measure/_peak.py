"""The child process that loads one model, runs it once and says how much memory that took; `peak` starts it.

Usage: python -m rescompress.measure._peak FOLDER
"""

import contextlib
import ctypes
import gc
import importlib
import json
import resource
import sys
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    """Return the resident set size now, or its peak so far where the system does not tell the present one."""
    value = _status("VmRSS")
    return _max_rss_bytes() if value is None else value


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _max_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Make the system forget the peak so far; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    peak, now = _status("VmHWM"), _status("VmRSS")
    # Some sandboxes accept the write and do nothing.
    return peak is not None and now is not None and peak - now < 4 * 2**20


def peak_bytes(was_reset: bool) -> int:
    """Return the highest resident set size since the reset, or since the start."""
    value = _status("VmHWM") if was_reset else None
    return _max_rss_bytes() if value is None else value


def give_back_freed_memory(collect: bool = True) -> None:
    """Return to the system what was freed, so that it does not count as taken; `collect` what hangs in cycles first."""
    if collect:
        gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def main(folder: Path) -> None:
    """Measure what lies in `folder` and write result.json there."""
    job = json.loads((folder / "job.json").read_text())
    import torch

    torch.set_num_threads(job["threads"])
    for name in job["modules"]:
        with contextlib.suppress(ImportError):  # then loading the model says what is missing
            importlib.import_module(name)
    # The thread pool and the kernel library come with the first products: they belong to the libraries.
    with torch.inference_mode():
        dtype = getattr(torch, job["dtype"])
        image = torch.zeros(1, 8, 32, 32, dtype=dtype)
        torch.nn.functional.conv2d(image, torch.zeros(8, 8, 3, 3, dtype=dtype))
        torch.mm(image.view(64, 128), image.view(128, 64))
    args, kwargs = torch.load(folder / "input.pt", weights_only=False)
    give_back_freed_memory()
    libraries = resident_bytes()

    path = folder / "model.pt"
    model: Any = torch.jit.load(path) if job["script"] else torch.load(path, weights_only=False)
    model.eval()
    give_back_freed_memory()
    loaded = resident_bytes()

    was_reset = reset_peak()
    with torch.inference_mode():
        model(*args, **kwargs)
    result = {
        "load_bytes": max(0, loaded - libraries),
        "run_bytes": max(0, peak_bytes(was_reset) - loaded),
        "method": "VmHWM" if was_reset else "ru_maxrss",
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
