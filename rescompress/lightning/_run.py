"""One run of a recipe: train, test, and write down what came out."""

from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rescompress.lightning._configs import seedless
from rescompress.lightning._folder import RunFolder
from rescompress.lightning._trained import Trained
from rescompress.lightning.checkpoints import LastCheckpoint, is_dry, read_checkpoint, stopped_itself
from rescompress.lightning.data._base import ImageData
from rescompress.lightning.results import FILE, costs, gather, limited, same_machine


@dataclass
class _Done:
    """What has been trained.

    Attributes:
        epochs: begun or done
        steps: of the optimizer
        metrics: of the validation
        stopped: whether a callback ended the training
    """

    epochs: int
    steps: int
    metrics: dict[str, float]
    stopped: bool


@dataclass(frozen=True)
class Run:
    """A run that is ready to begin or to go on.

    Attributes:
        recipe: name of the script
        config: name of its config
        folder: of the run
        trainer: with the callbacks of the run
        datamodule: of train and test
        options: of the run that change what is trained, by name
    """

    recipe: str
    config: str
    folder: RunFolder
    trainer: Trainer
    datamodule: LightningDataModule
    options: dict[str, Any]

    def fit(self, model: Trained, ckpt_path: Any, begun_at: int | None, **options: Any) -> None:
        """Train, then test and write results.json.

        Args:
            model: to train.
            ckpt_path: of the checkpoint to go on from.
            begun_at: step of this run's own checkpoint; None where there is none.
            **options: of the trainer's `fit`.
        """
        self.trainer.fit(model, ckpt_path=ckpt_path, **options)
        done = _Done(
            self.trainer.current_epoch,
            self.trainer.global_step,
            self._numbers("val/"),
            stopped_itself(self.trainer),
        )
        nothing_left = begun_at == done.steps
        self._test(model, done, again=nothing_left, datamodule=self.datamodule)

    def test(self, model: Trained, ckpt_path: Any, alone: str | None, **options: Any) -> None:
        """Test the weights of a checkpoint.

        Args:
            model: to test.
            ckpt_path: of the checkpoint.
            alone: why the scores are not of the run in the folder, and not to be written into it; None where they are.
            **options: of the trainer's `test`.
        """
        progress = read_checkpoint(ckpt_path)
        done = _Done(int(progress["epoch"]), int(progress["global_step"]), {}, stopped=False)
        del progress
        self._test(model, done, again=True, alone=alone, ckpt_path=ckpt_path, **options)

    def _test(self, model: Trained, done: _Done, *, again: bool, alone: str | None = None, **options: Any) -> None:
        """Test the model and its copy in low bits, and write down both.

        Args:
            model: to test.
            done: what it was trained.
            again: nothing was trained here, so what the run left is kept.
            alone: as for `test`.
            **options: of the trainer's `test`.
        """
        self.trainer.test(model, **options)
        metrics = done.metrics | self._numbers("test/")
        cost, deployed = costs(self.trainer), None
        if model.deploy is not None:
            with model.deployed():
                self.trainer.test(model, **options | {"ckpt_path": None})
                metrics |= self._numbers("deployed/")
                deployed = {"weight_bytes": model.deployed_bytes, **costs(self.trainer, "inference_")}
        skipped = self.datamodule.skipped_everywhere() if isinstance(self.datamodule, ImageData) else {}
        if is_dry(self.trainer) or not self.trainer.is_global_zero:
            return
        last = last_checkpoint(self.trainer)
        trained = last.run if last is not None and alone is None else {}
        begun_from = None if last is None else last.begun_from
        result = gather(
            self.trainer,
            model,
            recipe=self.recipe,
            config=self.config,
            metrics=trained.get("metrics", {}) | metrics,
            epochs=done.epochs,
            steps=done.steps,
            stopped=done.stopped or bool(trained.get("stopped")),
            cost=cost,
            deployed_cost=deployed,
            trained=trained,
            skipped=skipped,
            options=self.options | ({} if begun_from is None else {"ckpt_path": seedless(begun_from, model.seed)}),
        )
        earlier = self.folder.result(result) if again else None
        if earlier is not None and earlier.finished and limited(self.trainer):
            alone = "a part of the data was left out"
        if alone is not None:
            rank_zero_info(f"these scores are not written into {self.folder.path / FILE}: {alone}")
            return
        if earlier is not None:
            result = earlier.tested_again(result, same_machine(self.trainer, asdict(earlier)))
        rank_zero_info(f"wrote {result.write(self.folder.path)}")

    def _numbers(self, prefix: str) -> dict[str, float]:
        metrics = self.trainer.callback_metrics
        return {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}


def last_checkpoint(trainer: Trainer) -> LastCheckpoint | None:
    """Return the callback that keeps last.ckpt, if there is one."""
    callbacks: list[Any] = vars(trainer)["callbacks"]  # Lightning sets it without declaring it
    return next((one for one in callbacks if isinstance(one, LastCheckpoint)), None)


def note_begun_from(trainer: Trainer, checkpoint: Any) -> None:
    """Let this run's checkpoints say which one of another run it was begun from."""
    last = last_checkpoint(trainer)
    if last is not None:
        last.begun_from = str(checkpoint)
