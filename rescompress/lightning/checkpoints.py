"""Checkpoints that say how their model was compressed, are whole or not there, and give the model back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rescompress.compress import Record, compress_
from rescompress.errors import CheckpointError, InputError, RescompressWarning, SpecError
from rescompress.inputs import Args, default_args
from rescompress.spec import Spec

KEY = "rescompress"
"""Where a checkpoint holds what this file writes into it."""


def record_in(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint which modules are compressed, and how."""
    checkpoint[KEY] = {"class": type(module).__name__, "parts": _parts(module)}


def refuse_other_spec(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Compare a checkpoint's specs with those of a module: names of weights are the same whatever the spec.

    A checkpoint without any record, of an uncompressed model, is let through.

    Raises:
        InputError: they differ.
    """
    saved = (checkpoint.get(KEY) or {}).get("parts")
    if saved is None:
        return
    own = _parts(module)
    for name in sorted(saved.keys() | own.keys()):
        was, now = (parts.get(name, {}).get("spec") for parts in (saved, own))
        if was != now:
            raise InputError(
                f"the checkpoint is of another compression: {name or 'the model'} was {_said(was)}, and is "
                f"{_said(now)} now; give the spec of the checkpoint, or begin anew"
            )


def compress_as_saved(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Compress the parts of a module as those of a checkpoint were, in place, where they are not compressed yet.

    For the `on_load_checkpoint` of a LightningModule that is built around a plain model: Lightning calls it before the
    weights are loaded, in `load_from_checkpoint` as in the Trainer's methods with `ckpt_path`. Nothing is done where
    all parts agree, or where the checkpoint says nothing of specs.

    Args:
        module: without the weights of the checkpoint.
        checkpoint: into which `SpecInCheckpoint` has written.

    Raises:
        InputError: a part was compressed by another spec, or the module has an optimizer already, which would go on
            with the parameters from before.
        SpecError, UnsupportedModelError: a part cannot be compressed this way, as for `rescompress.compress_`.
    """
    saved = (checkpoint.get(KEY) or {}).get("parts") or {}
    found, own = dict(module.named_modules()), _parts(module)
    plain = [name for name in saved if name in found and name not in own]
    if plain and _is_optimized(module):
        raise InputError(
            f"{', '.join(plain)} cannot be compressed as in the checkpoint any more, since the optimizer of this "
            f"{type(module).__name__} holds the parameters already; compress it in __init__ or configure_model"
        )
    for name in reversed(plain):  # what is inside another part was compressed before that
        # A wrapper that torch.compile made answers with the record of what is inside it.
        if not isinstance(getattr(found[name], "_rescompress", None), Record):
            compress_(found[name], saved[name]["spec"], example_input=_example(found[name], saved[name]))
    refuse_other_spec(module, checkpoint)


class SpecInCheckpoint(Callback):
    """Write the specs of all compressed modules of any LightningModule into its checkpoints, and compare on resuming.

    Checkpoints of weights alone (`save_weights_only`) get none, for Lightning asks no callback there. Nor does it in
    `load_from_checkpoint`, which loads the weights of a compressed model into a plain one without a word. So a
    module must compress its model in `__init__`, or call `compress_as_saved` in its `on_load_checkpoint`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn of checkpoints that will hold no spec."""
        if any(getattr(one, "save_weights_only", False) for one in trainer.checkpoint_callbacks):
            rank_zero_warn(
                "checkpoints with save_weights_only=True do not say how their model was compressed, for Lightning lets "
                "no callback write into them; leave it at False",
                category=RescompressWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return where the specs are: Lightning tells of callbacks with a state that a resumed run leaves out."""
        return {"key": KEY}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write them."""
        record_in(pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare them."""
        refuse_other_spec(pl_module, checkpoint)


def load_model(path: str | Path) -> nn.Module:
    """Rebuild the compressed model of a checkpoint of Classifier or Segmenter, in evaluation mode; runs no code in it.

    Raises:
        InputError: there is no such file, it is damaged, or it is of another LightningModule.
    """
    from rescompress.lightning.classifier import Classifier
    from rescompress.lightning.segmenter import Segmenter

    kinds = {kind.__name__: kind for kind in (Classifier, Segmenter)}
    name = (read_checkpoint(path).get(KEY) or {}).get("class")
    if name not in kinds:
        raise InputError(
            f"{path} is no checkpoint of {' or '.join(kinds)}; load it by its own class, "
            f"{name or 'YourModule'}.load_from_checkpoint, which must compress its model, as compress_as_saved does"
        )
    model: nn.Module = kinds[name].load_from_checkpoint(path, map_location="cpu").model
    return model.eval()


def spec_in(path: str | Path, module: str = "model") -> Spec:
    """Return the spec with which a module of a checkpoint was compressed.

    Raises:
        InputError: the file cannot be read.
        SpecError: that module is not compressed.
    """
    parts = (read_checkpoint(path).get(KEY) or {}).get("parts") or {}
    if module not in parts:
        raise SpecError(f"{path} says of no compressed module {module!r}; it has {', '.join(parts) or 'none'}")
    return Spec.from_dict(parts[module]["spec"])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint holds, its tensors left on the disk; no code in it is run.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint {path}") from error
    except Exception as error:  # a damaged pickle fails in any way
        raise InputError(f"{path} is damaged or no checkpoint: {type(error).__name__}; take another one") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise InputError(f"{path} is no checkpoint of Lightning")
    return found


class LastCheckpoint(ModelCheckpoint):
    """Keep last.ckpt up to date: every so many steps, after each epoch with its validation, and at the very end.

    Within the last batch of an epoch or of the run nothing is written: a validation and the end of the epoch follow.
    A training that another callback ended, such as EarlyStopping, is not taken up again from its checkpoint.

    Args:
        dirpath: folder of last.ckpt.
        every_n_train_steps: so many.

    Attributes:
        run: what is to be known of the training when another process tests it: the `metrics` of its last validation,
            whether it was `stopped` by a callback, its `processes`, `hardware` and `versions`
        begun_from: path of another run's checkpoint that the training was begun from
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 500) -> None:
        super().__init__(
            dirpath=dirpath,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_top_k=0,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.run: dict[str, Any] = {}
        self.begun_from: str | None = None
        self._trains = False

    @property
    def state_key(self) -> str:
        """Name of its state in a checkpoint: the same whatever the interval, so that a resumed run may change it."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return ModelCheckpoint's state and the run."""
        return {**super().state_dict(), "run": self.run, "begun_from": self.begun_from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them; of a checkpoint that another run is begun from, nothing."""
        if self.begun_from is None:
            super().load_state_dict(state_dict)
            self.run, self.begun_from = dict(state_dict.get("run") or {}), state_dict.get("begun_from")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train no further where a callback ended the training."""
        trainer.should_stop = trainer.should_stop or bool(self.run.get("stopped"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a resumed run's step as saved: else it is again, behind a batch whose gradient waits for the others."""
        super().on_train_start(trainer, pl_module)
        _leave_ended_epoch(trainer.fit_loop)
        self._trains = True
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save after so many steps."""
        if not trainer.is_last_batch and trainer.global_step != trainer.max_steps:
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, also where this step was saved before the validation."""
        self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save once more, for what other callbacks did to the model at the end."""
        self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Save, whatever the step."""
        if not is_dry(trainer) and not trainer.sanity_checking:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        from rescompress.lightning.results import circumstances

        if self._trains or not self.run:  # else it is that of the process which trained
            self.run = self.run | circumstances(trainer)
        found = {name: float(value) for name, value in monitor_candidates.items() if name.startswith("val/")}
        self.run |= {"metrics": self.run.get("metrics", {}) | found, "stopped": stopped_itself(trainer)}
        super()._save_last_checkpoint(trainer, monitor_candidates)


class AtomicCheckpoints(TorchCheckpointIO):
    """Write a checkpoint beside the old one and put it in its place when it is whole, so that one of both always is.

    Lightning writes to the system's folder of temporary files and moves from there: from another disk that is a copy,
    and a kill within it leaves half a file in place of the checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it.

        Raises:
            CheckpointError: the disk is full, or the file cannot be written.
        """
        if "://" in str(path):  # object stores put whole objects
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):  # no failure of the disk
                raise
            left = "the one from before is still there, whole" if target.exists() else "there is none from before"
            raise CheckpointError(
                f"cannot write the checkpoint {target}: {reason.strerror or reason}; {left}; free some space and run "
                "the same command again"
            ) from error
        finally:
            part.unlink(missing_ok=True)


def is_dry(trainer: Any) -> bool:
    """Whether it is a dry run (fast_dev_run), which leaves nothing behind."""
    return bool(trainer.fast_dev_run)


def stopped_itself(trainer: Any) -> bool:
    """Whether a callback such as EarlyStopping ended the training; a limit of time does not count."""
    left = [one.time_remaining() for one in trainer.callbacks if isinstance(one, Timer)]
    return bool(trainer.should_stop) and not any(seconds is not None and seconds <= 0 for seconds in left)


def _leave_ended_epoch(loop: Any) -> None:
    """Go on with the next epoch where a run of a number of steps is resumed at the end of one.

    With a number of epochs Lightning does so itself; else it would end that epoch once more, and the data would be in
    the order of the epoch after the next.
    """
    if loop.restarted_on_epoch_end:
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # FitLoop's own setter takes no False here
        loop.update_restart_stage()
        loop.epoch_progress.increment_completed()


def _parts(module: nn.Module) -> dict[str, Any]:
    records = {name: getattr(one, "_rescompress", None) for name, one in module.named_modules()}
    return {
        name: {
            "spec": record.spec.to_dict(),
            "input_size": list(record.anatomy.example_size),
            "channels": record.channels,
        }
        for name, record in records.items()
        if isinstance(record, Record)
    }


def _example(part: nn.Module, saved: Mapping[str, Any]) -> Args:
    """Return an example of the size and channels that a part was compressed with."""
    height, width = saved["input_size"]
    channels = saved.get("channels")  # checkpoints of before had none

    def fitting(leaf: Any) -> Any:
        if channels is None or not isinstance(leaf, Tensor) or leaf.ndim != 4 or leaf.shape[1] == channels:
            return leaf
        return leaf[:, :1].repeat(1, channels, 1, 1)

    args, kwargs = default_args(part, (int(height), int(width)))
    return tree_map(fitting, args), kwargs


def _is_optimized(module: nn.Module) -> bool:
    """Whether the optimizers of its Trainer hold parameters of a module: some strategies make them before they load."""
    trainer = getattr(module, "_trainer", None)
    optimizers = () if trainer is None else trainer.optimizers
    held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    return any(id(parameter) in held for parameter in module.parameters())


def _said(spec: Mapping[str, Any] | None) -> str:
    return "not compressed" if spec is None else f"compressed by {spec['steps']}"
