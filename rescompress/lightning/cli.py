"""The command line of the recipes: one YAML file is one run, in its own folder, that can be killed at any moment."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from rescompress.errors import InputError, RescompressError, one_line
from rescompress.lightning._configs import (
    SAVED,
    differences,
    saved,
    saved_name,
    with_extended,
    with_seed,
    without_missing,
)
from rescompress.lightning._trained import Trained
from rescompress.lightning.checkpoints import (
    AtomicCheckpoints,
    LastCheckpoint,
    is_dry,
    read_checkpoint,
    refuse_other_spec,
    stopped_itself,
)
from rescompress.lightning.cost import CostMonitor
from rescompress.lightning.results import FILE, Result, costs, gather, limited

RUNS = "runs"
LAST = "last.ckpt"

_COMPARED = ("model", "data", "trainer")
"""Parts of a config that tell what is trained."""

_TEST = {"model", "dataloaders", "datamodule", "verbose"}


class RecipeCLI(LightningCLI):
    """LightningCLI with a folder for each run: runs/RECIPE/CONFIG/seedSEED, RECIPE and CONFIG being names of files.

    `fit` goes on from last.ckpt where there is one of the same options, tests the weights that it ends with and writes
    results.json; `test` does the latter with last.ckpt, and only prints the scores of another checkpoint. Both test the
    copy in low bits, too, where the model has a `deploy`. The config.yaml of a run's folder is a config of that run.
    `seed_everything` is the seed of model and data as well, and stands for "{seed}" in a config's paths. A config may
    build on another one by a top-level key `extends`, a path relative to it.

    Args:
        model_class: Classifier, Segmenter or a subclass.
        datamodule_class: of the data; with `subclass_mode_data=True`, the config names the class.
        **options: of LightningCLI.
    """

    def __init__(
        self, model_class: type[Trained], datamodule_class: type[LightningDataModule] | None = None, **options: Any
    ) -> None:
        if options.get("run", True):
            options.setdefault("save_config_callback", None)  # `fit` saves it
        options.setdefault("save_config_kwargs", {"overwrite": True})
        self._earlier: int | None = None
        options.setdefault("seed_everything_default", 0)
        # The samplers of the DataModules give each rank its share themselves.
        defaults = {"use_distributed_sampler": False, "enable_model_summary": False}  # CostMonitor counts what it would
        options["trainer_defaults"] = {**defaults, **options.get("trainer_defaults", {})}
        if os.getcwd() not in sys.path:  # as `python -m` has it: configs name classes of the current folder
            sys.path.insert(0, os.getcwd())
        super().__init__(model_class, datamodule_class, auto_configure_optimizers=False, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, and the arguments of the trainer's methods that are no options of theirs."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}, "test": _TEST}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to the run and not to the trainer."""
        parser.add_argument(
            "--folder", type=str | None, default=None, help="of the run; runs/RECIPE/CONFIG/seedSEED by default"
        )
        parser.add_argument("--fresh", action="store_true", help="begin anew where there is a checkpoint to go on from")
        parser.add_argument(
            "--extends", type=str | None, default=None, help="within a config: another one that it builds on"
        )
        parser.add_argument("--checkpoint_every", type=int, default=500, help="steps between two writings of last.ckpt")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, each config behind the one that it extends."""
        if args is None or isinstance(args, list):
            self.config = parser.parse_args(with_extended(sys.argv[1:] if args is None else args))
            if self.config.get("subcommand"):
                self.config[self.config.subcommand]["extends"] = None  # it has been merged, and is saved as one
        else:
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Give model and data the seed of the run, and put it into paths that name other runs of the same seed."""
        config: Any = self.config[self.subcommand] if self.subcommand else self.config
        seed = int(config["seed_everything"])
        for key in ("model", "trainer"):
            config[key] = with_seed(config[key], seed)
            if config["trainer"].get("fast_dev_run"):
                config[key], missing = without_missing(config[key])
                for path in missing:
                    rank_zero_info(f"{path} is not there; this dry run does without it")
        for key in ("model.seed", "model.init_args.seed", "data.seed", "data.init_args.seed"):
            if key in config:
                config[key] = seed
        for callback in _as_list(config["trainer"].get("callbacks")):
            if "seed" in (callback.get("init_args") or {}):
                callback["init_args"]["seed"] = seed

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is: LightningCLI would overwrite the model's part by that of the checkpoint."""

    def instantiate_classes(self) -> None:
        """Make the objects; what one of ours refuses is raised as it was, not within jsonargparse's own error."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, RescompressError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    @property
    def recipe(self) -> str:
        """Name of the script."""
        return Path(sys.argv[0]).stem

    @property
    def config_name(self) -> str:
        """Name of the last config file, or of the run in whose folder that lies."""
        path = self._config_file
        return "default" if path is None else saved_name(path) or path.stem

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        given, path = self._get(self.config, "folder"), self._config_file
        if given is not None:
            return Path(given)
        if path is not None and saved_name(path) is not None:
            return path.parent
        seed = int(self._get(self.config, "seed_everything"))
        return Path(RUNS, self.recipe, self.config_name, f"seed{seed}")

    @property
    def _config_file(self) -> Path | None:
        files = self._get(self.config, "config") or []
        return Path(str(files[-1])) if files else None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the callbacks, loggers and plugins that the config does not name itself."""
        config: Any = self._get(self.config_init, "trainer", default={})
        folder = str(self.folder)
        callbacks = _as_list(config.get("callbacks"))
        own: list[Any] = [CostMonitor(folder)]
        if config.get("enable_checkpointing") is not False:
            own.append(LastCheckpoint(folder, self._get(self.config, "checkpoint_every")))
        if config.get("max_time") is None:  # else Lightning makes its own timer
            own.append(Timer(verbose=False))
        callbacks += [one for one in own if not any(isinstance(given, type(one)) for given in callbacks)]
        plugins = _as_list(config.get("plugins"))
        if not any(isinstance(one, CheckpointIO) for one in plugins):
            plugins.append(AtomicCheckpoints())
        kwargs = {"callbacks": callbacks, "plugins": plugins, **kwargs}
        if config.get("logger") in (None, True):
            kwargs.setdefault("logger", _loggers(folder))
        if config.get("default_root_dir") is None:
            kwargs.setdefault("default_root_dir", folder)
        return super().instantiate_trainer(**kwargs)

    # LightningCLI calls these in place of the trainer's.

    def fit(self, model: Trained, ckpt_path: Any = None, **options: Any) -> None:
        """Train, from last.ckpt on if it is there, then test and write results.json."""
        if not is_dry(self.trainer):
            if ckpt_path is None and self._get(self.config, "fresh"):
                self._begin_anew()
            elif ckpt_path is None or self._is_last(ckpt_path):
                ckpt_path = self._resume(model)
            self._save_config()
        self.trainer.fit(model, ckpt_path=ckpt_path, **options)
        metrics = _numbers(self.trainer, "val/")
        epochs, steps = self.trainer.current_epoch, self.trainer.global_step
        nothing_left = self._earlier == steps
        self._test(model, metrics, epochs, steps, stopped_itself(self.trainer), again=nothing_left)

    def test(self, model: Trained, ckpt_path: Any = None, **options: Any) -> None:
        """Test last.ckpt and write results.json, or test another checkpoint."""
        path = ckpt_path or self.folder / LAST
        progress = read_checkpoint(path)
        epochs, steps = int(progress["epoch"]), int(progress["global_step"])
        del progress
        alone = None if self._is_last(path) else f"they are of {path}"
        others = self._other_options() if alone is None else []
        if others:
            alone = f"the run was trained with other options: {_listed(others)}"
        self._test(model, {}, epochs, steps, again=True, alone=alone, ckpt_path=path, **options)

    def _is_last(self, path: Any) -> bool:
        """Whether a checkpoint is this run's own."""
        last = self.folder / LAST
        return last.exists() and os.path.exists(path) and os.path.samefile(path, last)

    def _resume(self, model: Trained) -> Path | None:
        """Return the checkpoint to go on from.

        Raises:
            InputError: it is damaged, or of a run with other options.
        """
        last = self.folder / LAST
        if not last.exists():
            return None
        try:
            found = read_checkpoint(last)
        except InputError as error:
            raise InputError(f"{error}; to begin anew, say --fresh") from error
        refuse_other_spec(model, found)
        others = self._other_options()
        if others:
            raise InputError(
                f"the run in {self.folder} was begun with other options: {_listed(others)}; give those to go on with "
                "it, --folder for another run, or --fresh to begin this one anew"
            )
        self._earlier = int(found["global_step"])
        rank_zero_info(
            f"going on from {last}, step {found['global_step']} (epoch {found['epoch']}); to begin anew, say --fresh"
        )
        return last

    @rank_zero_only
    def _begin_anew(self) -> None:
        """Put away what the earlier run left, so that a later start does not go on from it."""
        last = self.folder / LAST
        if last.exists():
            os.replace(last, last.with_suffix(".old"))
            rank_zero_info(f"beginning anew; the last checkpoint of the earlier run is now {last.with_suffix('.old')}")
        (self.folder / FILE).unlink(missing_ok=True)

    def _other_options(self) -> list[str]:
        """Return the options in which this run differs from the one that the folder's checkpoint is of."""
        path = self.folder / SAVED
        if not path.is_file():
            return []
        parser = self._parser("fit" if self.subcommand else None)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            known = {name: data[name] for name in _COMPARED if data.get(name) is not None}
            was = yaml.safe_load(parser.dump(parser.parse_object(known), skip_none=False))
        except (argparse.ArgumentError, AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
            raise InputError(
                f"{path} is no config of this recipe any more, so its options cannot be compared: "
                f"{one_line(error, 200)}; remove the file to go on from its checkpoint as it is, or say --fresh"
            ) from error
        now = yaml.safe_load(self._parser(self.subcommand).dump(self._own_config, skip_none=False))
        return differences(was, now)

    @property
    def _own_config(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    @rank_zero_only
    def _save_config(self) -> None:
        """Write all options into the run's folder, whole or not at all."""
        config = self._own_config.clone()
        config["folder"], config["fresh"] = None, False  # it lies in the folder; and to use it is to go on
        path = self.folder / SAVED
        part = path.with_name(f".{SAVED}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        part.write_text(saved(text, self.config_name), encoding="utf-8")
        os.replace(part, path)

    def _run(self) -> dict[str, Any]:
        """Return what the checkpoint says of the training."""
        callbacks: list[Any] = vars(self.trainer)["callbacks"]
        return next((one.run for one in callbacks if isinstance(one, LastCheckpoint)), {})

    def _test(
        self,
        model: Trained,
        metrics: dict[str, float],
        epochs: int,
        steps: int,
        stopped: bool = False,
        again: bool = False,
        alone: str | None = None,
        ckpt_path: Any = None,
        **options: Any,
    ) -> None:
        """Test the model and its copy in low bits, and write down both.

        Args:
            model: to test.
            metrics: of the validation.
            epochs: of the training.
            steps: of the training.
            stopped: whether a callback ended it.
            again: nothing was trained here, so what the run left is kept.
            alone: why the scores are not of the run in the folder, and not to be written into it.
            ckpt_path: whose weights are tested.
            **options: of the trainer's `test`.
        """
        options["datamodule"] = self.datamodule
        self.trainer.test(model, ckpt_path=ckpt_path, **options)
        metrics = metrics | _numbers(self.trainer, "test/")
        cost, deployed = costs(self.trainer), None
        if model.deploy is not None:
            with model.deployed():
                self.trainer.test(model, **options)
                metrics |= _numbers(self.trainer, "deployed/")
                deployed = {"weight_bytes": model.deployed_bytes, **costs(self.trainer, "inference_")}
        if is_dry(self.trainer) or not self.trainer.is_global_zero:
            return
        run = self._run() if alone is None else {}
        result = gather(
            self.trainer,
            model,
            recipe=self.recipe,
            config=self.config_name,
            metrics=run.get("metrics", {}) | metrics,
            epochs=epochs,
            steps=steps,
            stopped=stopped or bool(run.get("stopped")),
            cost=cost,
            deployed_cost=deployed,
            trained=run,
        )
        earlier = self._result(result) if again else None
        if earlier is not None and earlier.finished and limited(self.trainer):
            alone = "a part of the data was left out"
        if alone is not None:
            rank_zero_info(f"these scores are not written into {self.folder / FILE}: {alone}")
            return
        result = result if earlier is None else earlier.tested_again(result)
        rank_zero_info(f"wrote {result.write(self.folder)}")

    def _result(self, later: Result) -> Result | None:
        """Return what this run left when it was tested before, with the same weights."""
        try:
            found = Result.read(self.folder)
        except InputError:
            return None
        return found if (found.seed, found.steps) == (later.seed, later.steps) else None


def main(
    model_class: type[Trained], datamodule_class: type[LightningDataModule] | None = None, **options: Any
) -> RecipeCLI:
    """Run a recipe's command line; what is refused becomes one line: exit code 1, or 2 for options and configs."""
    # Else jsonargparse would print some seventy lines of options first.
    raising: dict[str, Any] = {"exit_on_error": False}
    options.setdefault("parser_kwargs", raising | dict.fromkeys(RecipeCLI.subcommands(), raising))
    try:
        return RecipeCLI(model_class, datamodule_class, **options)
    except argparse.ArgumentError as error:
        _fail(f"{error}\ntip: {Path(sys.argv[0]).name} fit --help lists the options", code=2, cause=error)
    except (RescompressError, OSError) as error:  # a full disk, a folder that cannot be written
        _fail(str(error), code=1, cause=error)


def _fail(message: str, code: int, cause: Exception) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code) from cause


def _loggers(folder: str) -> list[Any]:
    # A CSVLogger deletes what is in its folder, so each start writes into one of its own: logs/version_0, ...
    loggers: list[Any] = [CSVLogger(folder, name="logs")]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.insert(0, TensorBoardLogger(folder, name="", version=""))
    return loggers


def _numbers(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return ", ".join(found[:4]) + more


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
