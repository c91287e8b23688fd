"""How a model is scored: logits found among its outputs, labels checked, tests at several sizes and in low bits."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from rescompress.compress import compress
from rescompress.errors import InputError, SpecError
from rescompress.lightning._module import CompressedModule
from rescompress.lightning.batches import Batch
from rescompress.measure import weight_bytes
from rescompress.recover.distillation import mean_cross_entropy

_AUXILIARY = 0.4
"""Weight of the losses of auxiliary heads, as torchvision's references and mmseg's configs have it."""

_CALIBRATION = 8
"""Batches of training images that ranges of activations are found with, for static quantization."""


class Scored(CompressedModule):
    """Validates and tests; a subclass says by what."""

    main_score = ""
    """The score that the progress bar shows."""

    ignored = -100
    """Label that is not learned from."""

    deployed_model: nn.Module | None = None
    """The copy in low bits, while it is tested."""

    deployed_bytes: int | None = None
    """What the weights of that copy took."""

    _deploys = False

    # What a subclass brings.

    def make_scores(self) -> Metric:
        """Return a metric that takes (logits, labels) and computes a dict of scores."""
        raise TypeError(f"{type(self).__name__} is no module to train; use Classifier or Segmenter")

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits for scoring, of the size of the labels."""
        raise TypeError(f"{type(self).__name__} is no module to train; use Classifier or Segmenter")

    # Losses and labels.

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits and labels of one size."""
        if self.loss is not None:
            return self.loss(logits, labels)  # type: ignore[no-any-return]
        return mean_cross_entropy(logits, labels, self.ignored)

    def heads(self, outputs: Any, ndim: int) -> list[Tensor]:
        """Return the logits among a model's outputs, those of auxiliary heads behind the main ones.

        Raises:
            InputError: there are none, or they are for another number of classes.
        """
        reference = self.hparams["model"]
        leaves = tree_leaves(getattr(outputs, "logits", outputs))
        found = [one for one in leaves if isinstance(one, Tensor) and one.is_floating_point() and one.ndim == ndim]
        if not found:
            shape = "(B, classes)" if ndim == 2 else "(B, classes, H, W)"
            raise InputError(f"{reference} gives no logits {shape}; take a model with such a head")
        if found[0].shape[1] != self.num_classes:
            raise InputError(
                f"{reference} gives {found[0].shape[1]} scores, and num_classes is {self.num_classes}; set both to "
                "that of the data"
            )
        return found

    def weighed(self, losses: list[Tensor]) -> Tensor:
        """Return the main loss plus those of the auxiliary heads."""
        return losses[0] + _AUXILIARY * torch.stack(losses[1:]).sum() if len(losses) > 1 else losses[0]

    def check_labels(self, batch: Batch) -> None:
        """Raise if a label is of no class: on a GPU, it would end the process without saying which.

        Raises:
            InputError: there is such a label.
        """
        labels = batch.labels
        if labels.is_floating_point():
            if labels.ndim == 2 and labels.shape[1] != self.num_classes:
                raise InputError(f"the labels weigh {labels.shape[1]} classes, and the model has {self.num_classes}")
            return
        wrong = ((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignored)
        if bool(wrong.any()):
            first = int(wrong.reshape(len(labels), -1).any(1).nonzero()[0])
            raise InputError(
                f"{batch.names[first]} has the label {int(labels[wrong][0])}, and the model has the classes 0 to "
                f"{self.num_classes - 1}; set model.num_classes to that of the data"
            )

    # Validation, at the one size of the data.

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._begin("val", [""])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score one batch."""
        self._score(self.model, Batch(*batch), "val", 0)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all ranks."""
        self._report()

    # Tests, at each size of the data, of the model or of its copy in low bits.

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Let the trainer's tests inside the block be of a copy in low bits, with scores deployed/...

        Raises:
            SpecError: the module was not told how to deploy.
        """
        if self.deploy is None:
            raise SpecError("there is no spec to deploy with; give deploy, such as {steps: [{kind: quantize, ...}]}")
        self._deploys = True
        try:
            yield
        finally:
            self._deploys, self.deployed_model = False, None

    def on_test_start(self) -> None:
        """Bring a copy to low bits, if that is what is tested."""
        sizes = getattr(getattr(self.trainer, "datamodule", None), "test_sizes", None)
        self._begin("deployed" if self._deploys else "test", [f"@{size}" for size in sizes] if sizes else [""])
        self.bring_to_low_bits()

    def bring_to_low_bits(self) -> None:
        """Make the copy that is tested, if that is what is tested: again by who changes the model within a test."""
        if self._deploys:
            training = self.model.training
            copied: nn.Module = compress(
                self.model.eval(),
                self.deploy,
                example_input=self.example.to(self.device),
                calibration=self._calibration(),
            )
            self.model.train(training)
            self.deployed_model = copied.eval()
            self.deployed_bytes = weight_bytes(copied)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch."""
        split = "deployed" if self._deploys else "test"
        self._score(self.deployed_model or self.model, Batch(*batch), split, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the scores of all ranks."""
        self._report()

    def _begin(self, split: str, suffixes: list[str]) -> None:
        # Made anew for each pass, and no submodules: they belong in no checkpoint.
        self.__dict__["_scores"] = (split, [(suffix, self.make_scores().to(self.device)) for suffix in suffixes])

    def _score(self, model: nn.Module, batch: Batch, split: str, loader: int) -> None:
        self.check_labels(batch)
        logits = self.logits(model, batch).float()
        suffix, scores = self.__dict__["_scores"][1][loader]
        self.log(
            f"{split}/loss{suffix}",
            self.criterion(logits, batch.labels),
            batch_size=len(batch.images),
            sync_dist=True,
            add_dataloader_idx=False,
        )
        scores.update(logits, batch.labels)

    def _report(self) -> None:
        split, passes = self.__dict__.pop("_scores")
        size = getattr(getattr(self.trainer, "datamodule", None), "test_size", None)
        for suffix, scores in passes:
            for name, value in scores.compute().items():
                # That of the data's test_size has the plain name as well.
                plain = [name] if suffix and size is not None and tuple(size) == (int(suffix[1:]),) * 2 else []
                for written in (name + suffix, *plain):
                    shown = name == self.main_score and not suffix
                    value = value.to(self.device, torch.float32)
                    self.log(f"{split}/{written}", value, prog_bar=shown, sync_dist=True, batch_size=1)

    def _calibration(self) -> list[Tensor] | None:
        """Return images of a few training batches as the model gets them, if the deployment asks for any.

        They are those of rank 0: each rank has a share of its own, and all are to test the same model.
        """
        if self.deploy is None or not any("static" in str(step.to_dict()) for step in self.deploy):
            return None
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "batches"):
            raise InputError("static quantization is calibrated with training images: use a DataModule of rescompress")
        images: list[Tensor] = []
        if self.trainer.is_global_zero:
            images = [one.images.cpu() for one in itertools.islice(data.batches("train", self.device), _CALIBRATION)]
        return [one.to(self.device) for one in self.trainer.strategy.broadcast(images)]
