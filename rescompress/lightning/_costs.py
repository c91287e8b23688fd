"""The table that CostMonitor fills: its columns, its file, its totals, and the predictions in it."""

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rescompress.errors import RescompressWarning, one_line
from rescompress.files import write_whole
from rescompress.inputs import with_batch
from rescompress.lightning.batches import samples_in, shape_of
from rescompress.measure import count_macs, count_training_macs, live_activation_bytes, parameter_count
from rescompress.measure.sandbox import copied, device_of, on_device
from rescompress.recover.batches import take_apart

Row = dict[str, Any]
"""Columns with numbers, texts, or None for what could not be found."""

COLUMNS = (
    "epoch",
    "global_step",
    "steps",  # measured ones: after a resume within an epoch, those since
    "images",  # in them, of all ranks
    "step_ms",  # median; forward, backward and optimizer of one batch
    "prepare_ms",  # median; the batch to the device, and what the DataModule does with it there
    "waited_s",  # for the loader, the start of its workers included
    "seconds",  # waiting, preparing and steps together
    "waited_share",
    "images_per_s",  # of all ranks, over these seconds
    "training_peak_bytes",
    "training_reserved_bytes",  # on CUDA, what the allocator had taken from the device
    "start_bytes",  # in use before the epoch's first step
    "inference_step_ms",  # median; one batch of the last validation or test
    "inference_images_per_s",  # of all ranks, over the steps alone
    "inference_peak_bytes",
    "memory_how",  # see _meters.Memory
    "monitor_s",  # what the predictions and the writing took themselves, so far
    "parameters",
    "training_shape",  # of the first batch, which the next two are predicted for
    "training_macs",  # of one image, forward and backward
    "training_live_bytes",  # of the batch: live activations, without weights and their gradients
    "inference_shape",
    "macs",  # of one image
    "inference_live_bytes",
)
PREDICTED = COLUMNS[COLUMNS.index("parameters") :]
_TEXTS = ("memory_how", "training_shape", "inference_shape")
_COUNTS = ("epoch", "global_step", "steps", "images", "parameters")


def shapes_of(model: nn.Module) -> nn.Module:
    """Copy a model onto the meta device, without layers that speak to other processes.

    One rank can run the copy alone: a pass through synchronised normalisation or through a model in shards would wait
    for the other ranks forever.
    """

    def meta(tensor: Tensor) -> Tensor:
        return tensor.to("meta")

    shell = copied(model, meta, meta)
    for module in list(shell.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                plain = nn.BatchNorm2d(
                    child.num_features,
                    child.eps,
                    child.momentum,
                    child.affine,
                    child.track_running_stats,
                    device="meta",
                )
                setattr(module, name, plain.train(child.training))
    return shell


def predict(model: nn.Module, batch: Any, training: bool, low_precision: torch.dtype | None = None) -> Row:
    """Return the predicted columns of training or of inference for a batch; None, with a warning, for what fails.

    Args:
        model: what is called with the images; it is not changed.
        batch: as the model gets it.
        training: of a training step, else of inference.
        low_precision: of automatic mixed precision, if that is on.
    """
    stage = "training" if training else "inference"
    failed: dict[str, str] = {}

    def example() -> Any:
        taken = take_apart(batch)
        args = taken.args, taken.kwargs
        return on_device(args, "meta") if device_of(model).type == "meta" else args

    def live() -> int:
        with torch.autocast("cpu", low_precision, enabled=low_precision is not None):  # shapes are computed as on a CPU
            return live_activation_bytes(model, example(), training=training)

    def macs() -> int:
        if training:  # of the batch, since BatchNorm refuses a single sample
            return count_training_macs(model, example()) // max(samples_in(batch), 1)
        return count_macs(model, with_batch(example(), 1)).macs

    row: Row = {"parameters": parameter_count(model), f"{stage}_shape": shape_of(batch)}
    with torch.inference_mode(False):
        for name, find in (("training_macs" if training else "macs", macs), (f"{stage}_live_bytes", live)):
            try:
                row[name] = find()
            except Exception as error:  # whatever a foreign model does: measuring it must not end its training
                row[name], failed[name] = None, one_line(error)
    if failed:
        reasons = "; ".join(dict.fromkeys(failed.values()))
        rank_zero_warn(f"CostMonitor leaves {' and '.join(failed)} empty: {reasons}", category=RescompressWarning)
    return row


def timed(waits: Sequence[float], prepared: Sequence[float], steps: Sequence[float], samples: int) -> Row:
    """Return the columns of time, from seconds."""
    row: Row = {
        "steps": len(steps),
        "images": samples,
        "step_ms": statistics.median(steps) * 1e3,
        "prepare_ms": statistics.median(prepared) * 1e3 if prepared else None,
        "waited_s": sum(waits),
        "seconds": sum(waits) + sum(prepared) + sum(steps),
    }
    return row | _shares(row)


def _shares(row: Row) -> Row:
    seconds = max(row["seconds"], 1e-9)
    return {"waited_share": row["waited_s"] / seconds, "images_per_s": row["images"] / seconds}


def whole_run(rows: Sequence[Row]) -> Row:
    """Return the columns for all epochs: medians of times, highest peaks, sums, and the shares of these sums."""
    total = dict(rows[-1])
    ways: dict[str, Callable[[list[Any]], Any]] = {
        "steps": sum,
        "images": sum,
        "waited_s": sum,
        "seconds": sum,
        "step_ms": statistics.median,
        "prepare_ms": statistics.median,
        "training_peak_bytes": max,
        "training_reserved_bytes": max,
        "start_bytes": min,
    }
    for name, way in ways.items():
        known = [row[name] for row in rows if row.get(name) is not None]
        total[name] = way(known) if known else None
    return total | _shares(total)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the table, so that a kill at any moment leaves the old or the new one whole.

    Raises:
        WriteError: it cannot be written; the old one is still there.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue(), retry="the next epoch writes all rows")


def read_rows(path: Path) -> list[Row]:
    """Read a table that `write_rows` wrote; one that is damaged or of other columns is as none."""
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) != COLUMNS:
                return []
            return [{name: _value(name, cell) for name, cell in row.items()} for row in table]
    except (OSError, ValueError):
        return []


def _value(name: str, cell: str) -> Any:
    if not cell:
        return None
    if name in _TEXTS:
        return cell
    return int(cell) if name in _COUNTS or cell.isdecimal() else float(cell)
