"""What a finished run leaves behind: scores, cost, hardware, versions, date and command, in one results.json."""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

import rescompress
from rescompress.errors import InputError
from rescompress.files import write_whole
from rescompress.lightning._costs import whole_run
from rescompress.lightning._trained import Trained
from rescompress.lightning.cost import CostMonitor
from rescompress.lightning.resolution import ResolutionSchedule
from rescompress.measure import count_macs, parameter_count

FILE = "results.json"

_LIBRARIES = ("lightning", "torchvision", "timm", "transformers", "onedl-mmsegmentation", "torchao")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. Numbers are raw; None is what is not known.

    Attributes:
        recipe: name of the script
        config: name of its config
        seed: of everything random
        command: that was run
        date: when it ended, UTC
        finished: whether all epochs or steps were done, or a callback such as EarlyStopping ended them, with all data
        epochs: begun or done
        steps: of the optimizer
        seconds: of training, interruptions left out
        model: reference
        spec: how it was compressed; None for an original
        deploy: low bits that a copy was tested with
        train_size: (height, width) of the images in training
        test_size: and in the test
        metrics: by name: test/..., deployed/... of the copy in low bits, and the last val/...
        macs: of one test image, before low bits
        parameters: how many
        cost: what CostMonitor measured; the steps of an epoch that was interrupted count from where it was resumed
        deployed_cost: bytes of the weights in low bits, and what CostMonitor measured of their inference
        processes: that trained
        hardware: that it was trained on: processor, cores, GPU
        versions: of Python and the libraries
        skipped: number of files by split that could not be read and were left out, in the process that trained or
            tested first; None in files of before this was written down
        options: of model, data and trainer that change what is trained, by name, with {seed} in paths of other runs;
            None in files of before this was written down
        train_sizes: sides of the square images that a ResolutionSchedule trained on, ascending; None without one, and
            in files of before this was written down
    """

    recipe: str
    config: str
    seed: int
    command: str
    date: str
    finished: bool
    epochs: int
    steps: int
    seconds: float
    model: str
    spec: dict[str, Any] | None
    deploy: dict[str, Any] | None
    train_size: tuple[int, int] | None
    test_size: tuple[int, int] | None
    metrics: dict[str, float | None]
    macs: int | None
    parameters: int
    cost: dict[str, Any]
    deployed_cost: dict[str, Any] | None
    processes: int
    hardware: dict[str, Any]
    versions: dict[str, str]
    skipped: dict[str, int] | None = None
    options: dict[str, Any] | None = None
    train_sizes: tuple[int, ...] | None = None

    def write(self, folder: str | Path) -> Path:
        """Write results.json into a folder, whole or not at all, and return its path."""
        path = Path(folder) / FILE
        write_whole(path, json.dumps(_plain(asdict(self)), indent=2) + "\n")
        return path

    def tested_again(self, later: Self, same_machine: bool) -> Self:
        """Return the result with the scores of a later test of the same weights.

        On the same machine, the cost of inference is taken from it as well; all else is of the process that trained,
        but for the sizes that it trained on where its file is of before these were written down.
        """
        cost, deployed_cost = self.cost, self.deployed_cost
        if same_machine:
            cost = cost | {name: value for name, value in later.cost.items() if name.startswith("inference_")}
            deployed_cost = later.deployed_cost or deployed_cost
        return replace(
            self,
            metrics=self.metrics | later.metrics,
            finished=self.finished or later.finished,
            cost=cost,
            deployed_cost=deployed_cost,
            train_sizes=later.train_sizes if self.train_sizes is None else self.train_sizes,
        )

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a results.json, or that of a folder.

        Raises:
            InputError: there is none, or it is not one.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            pairs = ("train_size", "test_size")
            sizes: dict[str, Any] = {name: data[name] and (data[name][0], data[name][1]) for name in pairs}
            sizes["train_sizes"] = data.get("train_sizes") and tuple(data["train_sizes"])
            names = [one.name for one in fields(cls) if one.default is MISSING or one.name in data]
            return cls(**{name: data[name] for name in names} | sizes)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no results.json of this version: {type(error).__name__}: {error}") from error


def gather(
    trainer: Trainer,
    module: Trained,
    *,
    recipe: str,
    config: str,
    metrics: dict[str, float],
    epochs: int,
    steps: int,
    stopped: bool,
    cost: dict[str, Any],
    deployed_cost: dict[str, Any] | None,
    trained: dict[str, Any],
    skipped: dict[str, int],
    options: dict[str, Any],
) -> Result:
    """Collect what there is to say of a run that has been tested.

    Of the training, `stopped` says whether a callback ended it, and `trained` in which `circumstances` it was done if
    another process did it. The rest is as in `Result`.
    """
    timers = [one for one in _callbacks(trainer) if isinstance(one, Timer)]
    data: Any = getattr(trainer, "datamodule", None)
    limits = ((epochs, trainer.max_epochs), (steps, trainer.max_steps))
    test_size = _pair(getattr(data, "test_size", None))
    there = {name: trained.get(name, value) for name, value in circumstances(trainer).items()}
    sides = str(cost.get("inference_shape") or "").split("x")[-2:]
    if not same_machine(trainer, trained) or (
        test_size is not None and sides not in ([""], [str(side) for side in test_size])
    ):
        # The numbers of inference are not of the machine that trained, or of another size than the MACs.
        cost = {name: value for name, value in cost.items() if not name.startswith("inference_")}
        cost |= _of_training(trainer)
        deployed_cost = deployed_cost and {"weight_bytes": deployed_cost["weight_bytes"]}
    return Result(
        recipe=recipe,
        config=config,
        seed=module.seed,
        command=shlex.join(["python", *sys.argv]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        finished=not limited(trainer)
        and (stopped or any(limit is not None and 0 <= limit <= done for done, limit in limits)),
        epochs=epochs,
        steps=steps,
        seconds=float(timers[0].time_elapsed("train")) if timers else 0.0,
        model=str(module.hparams["model"]),
        spec=module.hparams["spec"],
        deploy=module.hparams["deploy"],
        train_size=_pair(getattr(data, "train_size", None)),
        test_size=test_size,
        metrics=dict(metrics),
        macs=_macs(module, test_size),
        parameters=parameter_count(module.model),
        cost=cost,
        deployed_cost=deployed_cost,
        skipped=skipped,
        options=options | {"model.spec": module.hparams["spec"]},
        train_sizes=_train_sizes(trainer),
        **there,
    )


def same_machine(trainer: Trainer, trained: dict[str, Any]) -> bool:
    """Whether this process runs on what the training ran on, and with the same libraries."""
    return all(trained.get(name, value) == value for name, value in circumstances(trainer).items())


def circumstances(trainer: Trainer) -> dict[str, Any]:
    """Return what this process runs on, as plain data: `processes`, `hardware` and `versions` of a Result."""
    return {"processes": trainer.world_size, "hardware": _hardware(trainer), "versions": _versions()}


def costs(trainer: Any, prefix: str = "") -> dict[str, Any]:
    """Return what CostMonitor has measured so far, or the numbers whose names begin so."""
    monitors = [one for one in _callbacks(trainer) if isinstance(one, CostMonitor)]
    found = monitors[0].summary() if monitors else {}
    return {name: value for name, value in found.items() if name.startswith(prefix)}


def _of_training(trainer: Trainer) -> dict[str, Any]:
    """Return what the epochs cost, with the inference of the last validation in them."""
    rows = [list(one.rows.values()) for one in _callbacks(trainer) if isinstance(one, CostMonitor)]
    return whole_run(rows[0]) if rows and rows[0] else {}


def _train_sizes(trainer: Trainer) -> tuple[int, ...] | None:
    return next((one.sizes for one in _callbacks(trainer) if isinstance(one, ResolutionSchedule)), None)


def _callbacks(trainer: Trainer) -> list[Any]:
    found: list[Any] = vars(trainer)["callbacks"]  # Lightning sets it without declaring it
    return found


def limited(trainer: Trainer) -> bool:
    """Whether the run was told to leave out a part of the data."""
    told = vars(trainer)  # Lightning sets these without declaring them
    shares = [told[f"limit_{split}_batches"] for split in ("train", "val", "test")]
    return told["overfit_batches"] > 0 or any(
        repr(share) not in ("None", "0", "1.0") for share in shares
    )  # 1 is a batch


def _macs(module: Trained, size: tuple[int, int] | None) -> int | None:
    """Count for one image of the test, where the network allows its size to be another one."""
    height, width = size or module.example.shape[-2:]
    image = torch.zeros(1, module.channels, height, width, device=module.device)
    try:
        return count_macs(module.model, image).macs
    except Exception:  # a network for one size only, or parameters that are spread over processes
        return None


def _hardware(trainer: Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machines": trainer.num_nodes,
    }


def _versions() -> dict[str, str]:
    found = {"rescompress": rescompress.__version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)  # a class of its own, which checkpoints must not hold
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _plain(value: Any) -> Any:
    """Return plain data in which numbers that JSON does not know (NaN, infinity) are None."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
