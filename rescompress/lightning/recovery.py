"""Win accuracy back within Lightning: learn from the uncompressed original, find BatchNorm statistics anew.

Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from rescompress.errors import InputError, RescompressWarning
from rescompress.lightning.batches import images_of
from rescompress.lightning.checkpoints import LastCheckpoint, load_model
from rescompress.recover.batches import take_apart
from rescompress.recover.distillation import Distillation
from rescompress.recover.recalibration import has_statistics, recalibrate


class Distiller:
    """A teacher and what is learned from it. No module: the teacher gets into no checkpoint, optimizer or DDP.

    Args:
        teacher: frozen from here on, in evaluation mode, at its own full resolution.
        distillation: which losses.
    """

    def __init__(self, teacher: nn.Module, distillation: Distillation) -> None:
        self.teacher = teacher.requires_grad_(False).eval()
        self.distillation = distillation

    def losses(
        self, model: nn.Module, batch: Any, label_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Run both models on a batch and return the losses by name; "loss" is what to minimise.

        Args:
            model: learns.
            batch: for both.
            label_loss: of logits and labels; cross entropy by default.

        Raises:
            InputError, UnsupportedModelError: as `Distillation.losses`.
        """
        images = images_of(batch)
        held = next(self.teacher.parameters(), None)
        if held is not None and (held.device, held.dtype) != (images.device, images.dtype):
            # Images of true half precision are what tells; with mixed precision they stay float32, as the teacher.
            self.teacher.to(images.device, images.dtype)
        return self.distillation.losses(model, self.teacher, take_apart(batch), label_loss)


class Distill(Callback):
    """Let the model learn from a teacher: by default from the original that it was compressed from.

    The LightningModule must ask its attribute `distiller` for the losses, as Classifier and Segmenter do. The teacher
    is made at setup, and taken away when the training is over.

    Args:
        teacher: a checkpoint of a run of rescompress.lightning, or the model itself; by default the module's
            `original()`.
        temperature: see `Distillation`, as for the others.
        features: FQNs of modules whose outputs are compared.
        feature_weight: of their loss.
        label_weight: of the loss with the labels, in [0, 1]; the rest is the teacher's. It is the module's `loss`, or
            cross entropy, a mean over the heads whose logits have the shape of the teacher's. What an mmseg config
            names as losses is not computed: its weights of classes, its sampling of pixels, and its auxiliary heads,
            which are not trained then, since the model gives the logits of the main head alone.

    Raises:
        SpecError: a value out of range.
        InputError: the LightningModule cannot be taught this way, or the checkpoint cannot be read.
    """

    def __init__(
        self,
        teacher: str | nn.Module | None = None,
        temperature: float = 1.0,
        features: list[str] | None = None,
        feature_weight: float = 1.0,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.distillation = Distillation(
            temperature=temperature,
            features=tuple(features or ()),
            feature_weight=feature_weight,
            label_weight=label_weight,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the teacher and hand it to the module."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "distiller"):
            raise InputError(
                f"{type(pl_module).__name__} has no attribute 'distiller', so Distill cannot change its loss; use "
                "Classifier or Segmenter, or let your training_step call self.distiller.losses(model, batch)"
            )
        module: Any = pl_module
        module.distiller = Distiller(self._teacher(pl_module), self.distillation)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the teacher away."""
        if stage == "fit" and hasattr(pl_module, "distiller"):
            module: Any = pl_module
            module.distiller = None

    def _teacher(self, module: Any) -> nn.Module:
        if isinstance(self.teacher, nn.Module):
            return self.teacher
        if self.teacher is not None:
            return load_model(self.teacher)
        if not callable(getattr(module, "original", None)):
            raise InputError(
                f"{type(module).__name__} has no method original() that builds the teacher; give Distill(teacher=...)"
            )
        teacher: nn.Module = module.original()
        return teacher


class Recalibrate(Callback):
    """Find the BatchNorm statistics anew, at the end of the training and where else it is asked for.

    The images are those of the training split, without augmentation where the DataModule has a method
    `plain_train_dataloader(size)`, as those of rescompress.lightning.data have, else as its training loader gives them.
    Each process takes its own share, and the statistics are averaged. What is found at the end is in last.ckpt of
    rescompress.lightning's LastCheckpoint; checkpoints of others may have been written before. A run that was ended
    within it makes up for it when it is resumed.

    Args:
        batches: how many, on each process.
        at_end: when the training is over, at the DataModule's test_size; also where there was nothing to train.
        before_validation: each time; the statistics that training kept are overwritten, which it does not read.
        per_test_size: before the first batch of each test loader, at the size of its images; afterwards the model is
            as it was. For models that are tested at sizes of which each has statistics of its own.
        model: attribute of the LightningModule that holds the model; where it has none, it is called itself.
    """

    def __init__(
        self,
        batches: int = 50,
        at_end: bool = True,
        before_validation: bool = False,
        per_test_size: bool = False,
        model: str = "model",
    ) -> None:
        super().__init__()
        if batches < 1:
            raise InputError(f"Recalibrate.batches must be at least 1, got {batches}")
        self.batches = batches
        self.at_end = at_end
        self.before_validation = before_validation
        self.per_test_size = per_test_size
        self.model = model
        self._before: dict[str, Tensor] | None = None
        self._done = False

    def state_dict(self) -> dict[str, Any]:
        """Return whether the statistics of the end were found."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that of the run that is resumed."""
        self._done = bool(state_dict["done"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell if there is nothing to do."""
        if not has_statistics(self._model(pl_module)):
            rank_zero_warn(
                f"no layer of this {type(self._model(pl_module)).__name__} keeps BatchNorm statistics, so Recalibrate "
                "does nothing",
                category=RescompressWarning,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: training overwrites the statistics."""
        self._done = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate the final model."""
        if self.at_end:
            self._recalibrate(trainer, pl_module, getattr(_data(trainer), "test_size", None))
            self._done = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate where nothing was left to train: Lightning then calls no on_train_end."""
        if not self.at_end or self._done:
            return
        home = pl_module.device
        pl_module.to(trainer.strategy.root_device)  # it has been moved away
        self.on_train_end(trainer, pl_module)
        pl_module.to(home)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save_now(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate what is validated."""
        if self.before_validation and not trainer.sanity_checking:
            self._recalibrate(trainer, pl_module, getattr(_data(trainer), "test_size", None))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Recalibrate for the size of this loader's images."""
        if not self.per_test_size or batch_idx:
            return
        if not hasattr(_data(trainer), "plain_train_dataloader"):
            raise InputError(
                "Recalibrate(per_test_size=True) needs a DataModule with a method plain_train_dataloader(size), got "
                f"{type(_data(trainer)).__name__}; use one of rescompress.lightning.data"
            )
        if self._before is None:
            self._before = {name: buffer.clone() for name, buffer in self._model(pl_module).named_buffers()}
        height, width = images_of(batch).shape[-2:]
        self._recalibrate(trainer, pl_module, (height, width))
        if hasattr(pl_module, "bring_to_low_bits"):  # Classifier and Segmenter may test a copy of the model
            module: Any = pl_module
            module.bring_to_low_bits()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the statistics of before the test back."""
        if self._before is not None:
            for name, buffer in self._model(pl_module).named_buffers():
                buffer.copy_(self._before[name])
        self._before = None

    def _model(self, pl_module: LightningModule) -> nn.Module:
        model = getattr(pl_module, self.model, None)
        return model if isinstance(model, nn.Module) else pl_module

    def _recalibrate(self, trainer: Trainer, pl_module: LightningModule, size: tuple[int, int] | None) -> None:
        model = self._model(pl_module)
        if not has_statistics(model):
            return
        with _evaluating(trainer), torch.no_grad(), trainer.precision_plugin.forward_context():
            recalibrate(model, _on_device(trainer, pl_module, _loader(trainer, size)), batches=self.batches)


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _loader(trainer: Trainer, size: tuple[int, int] | None) -> Iterable[Any]:
    """Return training batches; from a loader of our own, since the trainer may be in the middle of its."""
    data = _data(trainer)
    if size is not None and hasattr(data, "plain_train_dataloader"):
        plain: Iterable[Any] = data.plain_train_dataloader(size)
        return plain
    for source, base in ((data, LightningDataModule), (trainer.lightning_module, LightningModule)):
        if source is not None and is_overridden("train_dataloader", source, base):
            augmented: Iterable[Any] = source.train_dataloader()
            return augmented
    given: Any = trainer.train_dataloader  # trainer.fit(model, loader)
    if given is None:
        raise InputError("Recalibrate needs training images, and neither the DataModule nor the module gives any")
    return given  # type: ignore[no-any-return]


def _on_device(trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any]) -> Iterator[Any]:
    """Give batches as the model gets them: Lightning's own hooks move them and let the DataModule finish them."""
    for batch in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _evaluating(trainer: Trainer) -> Iterator[None]:
    """Let the hooks of a DataModule see an evaluation, so that they do not augment."""
    stage = trainer.state.stage
    if stage == RunningStage.TRAINING:
        trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage
