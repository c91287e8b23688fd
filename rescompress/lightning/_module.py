"""A LightningModule around a model that is given by reference and compressed by a spec, and its checkpoints."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rescompress.compress import compress_
from rescompress.errors import InputError, NoWeightsError, RescompressWarning, SpecError
from rescompress.inputs import default_input
from rescompress.lightning.checkpoints import record_in, refuse_other_spec
from rescompress.recover.loop import NORMS, TUNED, classifier_of
from rescompress.references.models import build_model
from rescompress.references.wanted import Wanted
from rescompress.references.weights import differences, load_weights
from rescompress.spec import Spec, Stage, Step, as_pair, check_choice

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
ScheduleCallable = Callable[[Optimizer], LRScheduler]

_OBJECTS = ("loss", "optimizer", "schedule")
"""Arguments that are no plain data when the module is made by hand."""

_filled_later: ContextVar[bool] = ContextVar("_filled_later", default=False)
"""Whether a checkpoint follows, so that the weights to begin with need not be there."""

_dry: ContextVar[bool] = ContextVar("_dry", default=False)
"""Whether modules are made for a dry run, which does without pretrained weights that cannot be had."""


class CompressedModule(LightningModule):
    """Builds and compresses one model; `Classifier` and `Segmenter` train it.

    Args:
        model: reference such as timm:resnet50, torchvision:fcn_resnet50, hf:DIRECTORY, mmseg:CONFIG.py or
            package.module:factory.
        num_classes: of the head; must be that of the data.
        options: of the model's constructor.
        spec: how it is compressed, as a dict or the path of a .yaml or .json file; None trains the original.
        input_size: of the example that it is compressed with, (height, width) or one side; by default the model's own.
        channels: of the images.
        pretrained: whether to begin with the library's own weights.
        initial_weights: file to begin with: a state dict, or a checkpoint of a run of the original.
        deploy: a spec of PRECISION steps, carried out on a copy that can be tested beside the model (`deployed`).
        loss: called with logits and labels; cross entropy by default. mmseg's models bring their own.
        optimizer: makes the optimizer of groups of parameters; those of one dimension get no weight decay.
        schedule: makes the schedule of the optimizer; torch's own are stepped every epoch, WarmupCosine and WarmupPoly
            every step.
        tune: "all" parameters, or "norms_and_classifier" (FixRes, https://arxiv.org/abs/1906.06423).
        seed: of the first weights and of the random numbers inside the model.

    Raises:
        InputError: the model cannot be built, or the weights do not fit it.
        SpecError, UnsupportedModelError: as for `rescompress.compress`.
    """

    def __init__(
        self,
        model: str,
        *,
        num_classes: int,
        options: dict[str, Any] | None = None,
        spec: dict[str, Any] | str | None = None,
        input_size: int | tuple[int, int] | None = None,
        channels: int = 3,
        pretrained: bool = False,
        initial_weights: str | None = None,
        deploy: dict[str, Any] | str | None = None,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: ScheduleCallable | None = None,
        tune: str = "all",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("tune", tune, TUNED)
        self.spec, self.deploy = as_spec(spec), as_spec(deploy)
        if self.spec is not None and any(step.stage is Stage.PRECISION for step in self.spec):
            raise SpecError("low bits cannot be trained; give the PRECISION steps of the spec as deploy instead")
        if self.deploy is not None and any(step.stage is not Stage.PRECISION for step in self.deploy):
            raise SpecError("deploy takes PRECISION steps alone, such as quantize; give the others as spec")
        self._keep_hyperparameters()
        self._reference = model
        self._wanted = Wanted(
            num_classes=num_classes,
            channels=channels,
            input_size=None if input_size is None else as_pair("input_size", input_size),
            options=options or {},
        )
        self.num_classes, self.channels, self.seed = num_classes, channels, seed
        self._initial = (pretrained, initial_weights)
        self._is_dry = _dry.get()
        self.model = self._built(with_weights=not _filled_later.get())
        self.example = self._example(self.model)
        if self.spec is not None:
            with _seeded(seed):
                compress_(self.model.eval(), self.spec, example_input=self.example)
            self.model.train()
        if tune == "norms_and_classifier":
            _freeze_all_but_norms_and_classifier(self.model)
        self.loss = loss
        self._optimizer, self._schedule = optimizer, schedule
        # By name and now: FSDP flattens parameters to one dimension.
        self._undecayed = {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
        self.distiller: Any = None

    def forward(self, images: Tensor) -> Any:
        """Return what the model gives."""
        return self.model(images)

    def original(self) -> nn.Module:
        """Build the uncompressed original anew, with the weights that training begins with, in evaluation mode.

        Raises:
            InputError: the file of weights is not there any more.
        """
        return self._built(with_weights=True).eval()

    def _built(self, with_weights: bool) -> nn.Module:
        pretrained, initial = self._initial if with_weights else (False, None)
        # The same random weights on every rank and in every run.
        with _seeded(self.seed):
            try:
                model = build_model(self._reference, replace(self._wanted, pretrained=pretrained))
            except NoWeightsError as error:
                if not self._is_dry:
                    raise NoWeightsError(
                        f"{error}; begin with a file of weights by initial_weights: FILE, or with random ones by "
                        "pretrained: false"
                    ) from error
                rank_zero_warn(
                    f"{error}: this dry run begins with random ones, a real one will need them",
                    category=RescompressWarning,
                )
                model = build_model(self._reference, self._wanted)
        if initial is not None:
            if not Path(initial).exists():
                raise InputError(f"there is no weights file {initial}; if it is of another run, do that one first")
            load_weights(model, initial)
        return model

    def _example(self, model: nn.Module) -> Tensor:
        height, width = self._wanted.input_size or default_input(model).shape[-2:]
        generator = torch.Generator().manual_seed(0)
        return torch.rand(1, self.channels, int(height), int(width), generator=generator)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the distiller with its teacher, and the copy in low bits, out of the submodules and checkpoints."""
        if name in ("distiller", "deployed_model"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # Checkpoints.

    def _keep_hyperparameters(self) -> None:
        self.save_hyperparameters(logger=False, ignore=None if _made_by_cli() else list(_OBJECTS))
        plain = dict(self.hparams)
        plain["spec"] = None if self.spec is None else self.spec.to_dict()
        plain["deploy"] = None if self.deploy is None else self.deploy.to_dict()
        self.save_hyperparameters(plain)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild the compressed module and load its weights; no code in the file is run.

        Made by hand, a module's loss, optimizer and schedule are not in the file: give them again to go on training.
        """
        kwargs.setdefault("weights_only", True)
        token = _filled_later.set(True)
        try:
            loaded: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        finally:
            _filled_later.reset(token)
        return loaded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the spec into it."""
        record_in(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse one of another spec."""
        refuse_other_spec(self, checkpoint)
        if self.loss is None:  # not given again: its class weights are not needed either
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: one for name, one in state.items() if not name.startswith("loss.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load weights.

        Raises:
            InputError: they are of another model.
        """
        try:
            return super().load_state_dict(state_dict, *args, **options)
        except RuntimeError as error:
            found = differences(state_dict, self.state_dict())
            if not found:
                raise
            raise InputError(
                f"the checkpoint holds weights of another model than this {self._reference}: {found}; give the options "
                "of model that its run was begun with"
            ) from error


@contextmanager
def for_a_dry_run(dry: bool) -> Iterator[None]:
    """Let modules that are made inside the block do without pretrained weights that cannot be had, if it is a dry run.

    Args:
        dry: whether it is.
    """
    token = _dry.set(dry)
    try:
        yield
    finally:
        _dry.reset(token)


def as_spec(given: Any) -> Spec | None:
    """Return a spec given as one, as a step, as a dict or as the path of a file."""
    if given is None or isinstance(given, Spec):
        return given
    if isinstance(given, Step):
        return Spec.of(given)
    return Spec.from_dict(given) if isinstance(given, Mapping) else Spec.load(Path(given))


def _made_by_cli() -> bool:
    """Whether LightningCLI makes the module and knows its arguments as plain data; there is no public way to ask."""
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

    return _given_hyperparameters.get() is not None


def _freeze_all_but_norms_and_classifier(model: nn.Module) -> None:
    kept = [module for module in model.modules() if isinstance(module, NORMS)]
    tuned = {id(parameter) for module in (*kept, classifier_of(model)) for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in tuned)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch on the CPU inside the block, and leave its state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
