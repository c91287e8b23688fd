"""Write down what training costs while it runs: what is predicted, once, and what is measured, in every epoch."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from rescompress.errors import RescompressWarning, WriteError
from rescompress.lightning._costs import (
    PREDICTED,
    Row,
    predict,
    read_rows,
    shapes_of,
    timed,
    whole_run,
    write_rows,
)
from rescompress.lightning._meters import Clock, Listening, Memory, Passes
from rescompress.lightning.batches import samples_in, shape_of
from rescompress.lightning.data._base import ImageData
from rescompress.measure.report import format_bytes

_LOW_PRECISION = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class CostMonitor(Callback):
    """Predict MACs, parameters and live activations once, and measure time and memory in every epoch.

    Works with any LightningModule. Each epoch is a row of `cost.csv` (columns: `_costs.COLUMNS`), which is replaced as
    a whole and kept over a resume, and goes to every logger as cost/NAME. Only rank 0 measures. A step is one batch;
    its time leaves out waiting for data and validation. What is predicted is the model by itself: no teacher, no
    auxiliary head that only the loss calls. In a dry run (`fast_dev_run`) all is measured and nothing is written. The
    monitor itself takes some microseconds a step, and about a second for its predictions (column `monitor_s`).

    Args:
        folder: where cost.csv goes; the trainer's log_dir by default.
        model: attribute of the LightningModule that holds the model; where it has none, it is called itself.

    Attributes:
        rows: the table, by epoch
    """

    def __init__(self, folder: str | None = None, model: str = "model") -> None:
        super().__init__()
        self.folder = folder
        self.model = model
        self.rows: dict[int, Row] = {}
        self._path: Path | None = None
        self._memory: Memory | None = None  # of rank 0, the others measure nothing
        self._training = Passes(Clock(torch.device("cpu")))
        self._inference = Passes(self._training.clock)
        self._shell: nn.Module | None = None  # of the model, where other ranks must not be waited for
        self._known: Row = {}  # predictions, and what the last evaluation cost
        self._peaks: Row = {}  # of the epoch
        self._sides = ""  # of the images that inference is measured on
        self._monitor_s = 0.0

    def summary(self) -> Row:
        """Return the columns for the whole run; those of inference are of the last validation or test."""
        total = whole_run(list(self.rows.values())) if self.rows else {}
        return total | self._known

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder and the device, and listen to the fetching of batches."""
        folder = self.folder or trainer.log_dir or trainer.default_root_dir  # all ranks have to ask for log_dir
        self._path = None if getattr(trainer, "fast_dev_run", False) else Path(folder) / "cost.csv"
        if not trainer.is_global_zero:
            return
        if trainer.world_size > 1 and (stage == "fit" or self._shell is None):
            # Before the strategy wraps the model or cuts it into shards.
            self._shell = shapes_of(self._module(pl_module))
        self._sides = _sides(getattr(trainer, "datamodule", None)) or ("" if stage == "fit" else self._sides)
        device = trainer.strategy.root_device
        self._memory = Memory(device)
        self._training, self._inference = Passes(Clock(device)), Passes(Clock(device))
        if stage == "fit":
            self._known, self._monitor_s = {}, 0.0
            _unlisten(trainer)
            listened: Any = trainer  # Lightning gives it its profiler without declaring that
            listened.profiler = Listening(listened.profiler, self._training.wait, self._training.fetched)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the trainer its profiler back."""
        _unlisten(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the trainer its profiler back."""
        _unlisten(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows: they are part of the checkpoint."""
        return {"rows": list(self.rows.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of the run that is resumed."""
        self.rows = {row["epoch"]: dict(row) for row in state_dict["rows"]}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, or go on with the rows of the run that is resumed."""
        if trainer.global_step == 0:
            self.rows = {}
        elif self._path is not None and self._memory is not None:
            # A checkpoint that was written within the last step of an epoch lacks the row of that epoch, and the file
            # has it; epochs that will be gone through again are dropped.
            rows = {row["epoch"]: row for row in read_rows(self._path)} | self.rows
            self.rows = {epoch: row for epoch, row in sorted(rows.items()) if epoch <= trainer.current_epoch}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first batch from here on: the start of the loader's workers belongs to it."""
        if self._memory is not None:
            self._training.empty()
            self._training.wait()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Predict at the first batch; begin a step at each."""
        if self._memory is None:
            return
        self._training.ready()
        if not self._training.samples:
            with self._own_time():
                for training in (True, False):
                    if ("training_shape" if training else "inference_shape") not in self._known:
                        self._predict(trainer, pl_module, batch, training)
                self._memory.reset()
                self._peaks = {"start_bytes": self._memory.now()}
        self._training.begin(samples_in(batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step."""
        if self._memory is not None:
            self._training.end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch down."""
        if self._memory is None or not self._training.steps:
            return  # resumed behind the last step of an epoch
        began = time.perf_counter()
        self._keep_training_peak()
        waits, prepared, steps = self._training.seconds()
        row = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            **timed(waits, prepared, steps, self._training.samples * trainer.world_size),
            **self._peaks,
            **self._known,
            "memory_how": self._memory.how,
            "monitor_s": self._monitor_s + time.perf_counter() - began,
        }
        self._training.empty()
        named = set(row) - {"epoch", "global_step", *(PREDICTED if self.rows else ())}
        numbers = {f"cost/{name}": row[name] for name in sorted(named) if isinstance(row[name], int | float)}
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "epoch": trainer.current_epoch}, step=trainer.global_step)
        self.rows[trainer.current_epoch] = row
        self._write()
        self._monitor_s += time.perf_counter() - began

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            write_rows(self._path, list(self.rows.values()))
        except WriteError as error:  # no reason to end a training
            rank_zero_warn(f"CostMonitor: {error}", category=RescompressWarning)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say in one line what the run cost."""
        if self._memory is None or not self.rows:
            return
        total = self.summary()
        peak = total.get("training_peak_bytes")
        rank_zero_info(
            f"cost: {total['step_ms']:.1f} ms a step, {total['images_per_s']:.1f} images/s, "
            f"{total['waited_share']:.1%} of the time waited for data, training peak "
            f"{'unknown' if peak is None else format_bytes(peak)} ({total['memory_how']})"
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure inference from here on."""
        if self._memory is None:
            return
        with self._own_time():
            self._keep_training_peak()
            self._memory.reset()
            self._inference.empty()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Predict at the first batch, if that is of a new shape, and forget the peak so far; begin a step at each."""
        if self._memory is None:
            return
        shape = shape_of(batch)
        sides = shape.partition("x")[2]
        self._sides = self._sides or sides
        if sides != self._sides:
            return  # of several test loaders with images of several sizes, those of test_size or the first are measured
        if not self._inference.samples:
            with self._own_time():
                if self._known.get("inference_shape") != shape:
                    self._predict(trainer, pl_module, batch, training=False)
                self._memory.reset()  # of what was done before: making the copy in low bits that is tested, predicting
        self._inference.begin(samples_in(batch))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End the step."""
        if self._memory is not None:
            self._inference.end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what inference cost, but for Lightning's sanity check before the training."""
        if self._memory is None or trainer.sanity_checking or not self._inference.steps:
            return
        with self._own_time():
            _, _, steps = self._inference.seconds()
            self._known |= {
                "inference_step_ms": statistics.median(steps) * 1e3,
                "inference_images_per_s": self._inference.samples * trainer.world_size / max(sum(steps), 1e-9),
                "inference_peak_bytes": self._memory.peak(),
                "memory_how": self._memory.how,
            }
            self._memory.reset()

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def _module(self, pl_module: LightningModule) -> nn.Module:
        model = getattr(pl_module, self.model, None)
        return model if isinstance(model, nn.Module) else pl_module

    def _predict(self, trainer: Trainer, pl_module: LightningModule, batch: Any, training: bool) -> None:
        model = self._shell or self._module(pl_module)
        self._known |= predict(model, batch, training, _LOW_PRECISION.get(str(trainer.precision)))

    def _keep_training_peak(self) -> None:
        """Note the peak of the training steps so far: the validation within an epoch has its own."""
        if self._memory is None or not self._training.samples:
            return
        found = {"training_peak_bytes": self._memory.peak(), "training_reserved_bytes": self._memory.reserved()}
        for name, now in found.items():
            self._peaks[name] = None if now is None else max(now, self._peaks.get(name) or 0)

    @contextmanager
    def _own_time(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._monitor_s += time.perf_counter() - began


def _sides(data: Any) -> str:
    """Return channels and sides of the test images of our DataModules, as `shape_of` writes them; "" of others."""
    return "x".join(map(str, (data.channels, *data.test_size))) if isinstance(data, ImageData) else ""


def _unlisten(trainer: Any) -> None:
    if isinstance(trainer.profiler, Listening):
        trainer.profiler = trainer.profiler.profiler
