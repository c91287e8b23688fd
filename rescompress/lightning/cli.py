"""The command line of the recipes: one YAML file is one run, in its own folder, that can be killed at any moment."""

import argparse
import importlib.util
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rescompress.errors import InputError, RescompressError, RescompressWarning, one_line
from rescompress.lightning._configs import (
    SAVED,
    other_runs,
    run_name,
    saved_name,
    with_extended,
    with_seed,
    without,
)
from rescompress.lightning._folder import RunFolder, begun_from, is_finished
from rescompress.lightning._module import for_a_dry_run
from rescompress.lightning._options import differences, meant, options_of, that_train
from rescompress.lightning._run import Run, note_begun_from
from rescompress.lightning._trained import Trained
from rescompress.lightning.checkpoints import AtomicCheckpoints, LastCheckpoint, is_dry, refuse_other_spec
from rescompress.lightning.cost import CostMonitor

RUNS = "runs"

_COMPARED = ("model", "data", "trainer")
"""Parts of a config that tell what is trained."""

_TEST = {"model", "dataloaders", "datamodule", "verbose"}


class RecipeCLI(LightningCLI):
    """LightningCLI with a folder for each run: runs/RECIPE/CONFIG/seedSEED, RECIPE and CONFIG being names of files.

    The name of several configs is all of theirs, joined by +.

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
        self._unseeded: dict[str, Any] = {}
        options.setdefault("seed_everything_default", 0)
        # The samplers of the DataModules give each rank its share themselves.
        defaults = {"use_distributed_sampler": False, "enable_model_summary": False}  # CostMonitor counts what it would
        options["trainer_defaults"] = {**defaults, **options.get("trainer_defaults", {})}
        # Configs name classes of the current folder, as `python -m` has it, and of the package that the script lies in.
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        if (home := str(Path(sys.argv[0]).resolve().parent.parent)) not in sys.path:
            sys.path.append(home)
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
            given = with_extended(sys.argv[1:] if args is None else args)
            try:
                self.config = parser.parse_args(given)
            except argparse.ArgumentError as error:
                known = [name for one in self._subcommand_parsers.values() for name in options_of(one)]
                raise argparse.ArgumentError(None, f"{error}{meant(str(error), known)}") from error
            if self.config.get("subcommand"):
                self.config[self.config.subcommand]["extends"] = None  # it has been merged, and is saved as one
        else:
            super().parse_arguments(parser, args)
        named: Any = self.config.get("subcommand")
        seed = int((self.config[named] if named else self.config).get("seed_everything") or 0)
        if not 0 <= seed < 2**32:
            raise InputError(f"seed_everything must be in 0 to 2**32 - 1, got {seed}")

    def before_instantiate_classes(self) -> None:
        """Give model and data the seed of the run, and put it into paths that name other runs of the same seed."""
        config = self._own_config
        seed = int(config["seed_everything"])
        for key in ("model.seed", "model.init_args.seed", "data.seed", "data.init_args.seed"):
            if key in config:
                config[key] = seed
        for callback in _as_list(config["trainer"].get("callbacks")):
            if "seed" in (callback.get("init_args") or {}):
                callback["init_args"]["seed"] = seed
        self._unseeded = {key: config[key] for key in ("model", "trainer")}
        for key in self._unseeded:
            config[key] = with_seed(config[key], seed)
            for path in dict.fromkeys(other_runs(config[key])):
                if not is_finished(path):
                    rank_zero_warn(
                        f"the run that {path} is of has not finished, and this one takes its weights as they are so "
                        "far; finish that one first where the two are to be compared",
                        category=RescompressWarning,
                    )
                if config["trainer"].get("fast_dev_run") and not Path(path).exists():
                    config[key] = without(config[key], path)
                    rank_zero_warn(
                        f"there is no file {path}: this dry run does without it, a real one will need it",
                        category=RescompressWarning,
                    )

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is: LightningCLI would overwrite the model's part by that of the checkpoint."""

    def instantiate_classes(self) -> None:
        """Make the objects; what one of ours refuses is raised as it was, not within jsonargparse's own error."""
        dry = bool(self._own_config["trainer"].get("fast_dev_run"))
        try:
            with for_a_dry_run(dry):
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
        """Names of the config files, joined by +; of one in a run's folder, that of the run."""
        return run_name(self._config_files)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        given, files = self._get(self.config, "folder"), self._config_files
        if given is not None:
            return Path(given)
        if files and saved_name(files[-1]) is not None:
            return files[-1].parent
        seed = int(self._get(self.config, "seed_everything"))
        return Path(RUNS, self.recipe, self.config_name, f"seed{seed}")

    @property
    def run_folder(self) -> RunFolder:
        """Folder of the run, with what it holds."""
        return RunFolder(self.folder)

    @property
    def _config_files(self) -> list[Path]:
        return [Path(str(file)) for file in self._get(self.config, "config") or []]

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
        """Train, from last.ckpt on if it is there, then test and write results.json.

        Raises:
            SystemExit: SIGTERM or Ctrl-C ended it, with the exit code of that.
        """
        if is_dry(self.trainer):
            self._run().fit(model, ckpt_path, None, **options)
            return
        with self.run_folder.locked():
            if self._get(self.config, "fresh"):
                self._begin_anew(ckpt_path)
            else:
                ckpt_path = self._resume(model, ckpt_path)
            if ckpt_path is not None and not self.run_folder.owns(ckpt_path):
                note_begun_from(self.trainer, ckpt_path)
            self._save_options()
            try:
                self._run().fit(model, ckpt_path, self._earlier, **options)
            except SystemExit as stop:  # Lightning ends a run so; for SIGTERM with the exit code of success
                if isinstance(stop, SIGTERMException):
                    by = signal.SIGTERM
                elif isinstance(stop.__context__, KeyboardInterrupt):
                    by = signal.SIGINT
                else:
                    raise
                rank_zero_info(f"ended by {by.name}; {self.run_folder.how_to_go_on()}")
                raise SystemExit(128 + by) from stop

    def test(self, model: Trained, ckpt_path: Any = None, **options: Any) -> None:
        """Test last.ckpt and write results.json, or test another checkpoint."""
        path, alone = ckpt_path or self.run_folder.last, None
        if not self.run_folder.owns(path):
            alone = f"they are of {path}"
        elif others := self._other_options():
            alone = f"the run was trained with other options: {_listed(others)}"
        self._run().test(model, path, alone, **options)

    def _run(self) -> Run:
        options = that_train(yaml.safe_load(self._parser(self.subcommand).dump(self._as_given(), skip_none=False)))
        return Run(self.recipe, self.config_name, self.run_folder, self.trainer, self.datamodule, options)

    def _begin_anew(self, ckpt_path: Any) -> None:
        if ckpt_path is not None and self.run_folder.puts_away(ckpt_path):
            raise InputError(f"--fresh puts {ckpt_path} away; leave it out, or give another --folder")
        self.run_folder.put_away()

    def _resume(self, model: Trained, ckpt_path: Any) -> Any:
        """Return the checkpoint to go on from: the run's own, or the given one where there is none yet.

        Raises:
            InputError: it is damaged, or of a run with other options or begun from elsewhere.
        """
        folder = self.run_folder
        found = folder.checkpoint()
        if found is None:
            return ckpt_path
        if ckpt_path is not None and not folder.owns(ckpt_path) and begun_from(found) != str(ckpt_path):
            raise InputError(
                f"the run in {folder.path} has a checkpoint of its own and was not begun from {ckpt_path}; leave out "
                "--ckpt_path to go on with it, or give --folder for another run or --fresh to begin this one anew"
            )
        refuse_other_spec(model, found)
        others = self._other_options()
        if others:
            raise InputError(
                f"the run in {folder.path} was begun with other options: {_listed(others)}; give those to go on with "
                "it, --folder for another run, or --fresh to begin this one anew"
            )
        self._earlier = int(found["global_step"])
        rank_zero_info(
            f"going on from {folder.last}, step {found['global_step']} (epoch {found['epoch']}); to begin anew, say "
            "--fresh"
        )
        return folder.last

    def _other_options(self) -> list[str]:
        """Return the options in which this run differs from the one that the folder's checkpoint is of."""
        data = self.run_folder.options()
        if data is None:
            return []
        parser = self._parser("fit" if self.subcommand else None)
        try:
            known = {name: data[name] for name in _COMPARED if data.get(name) is not None}
            was = yaml.safe_load(parser.dump(parser.parse_object(known), skip_none=False))
        except (argparse.ArgumentError, AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.run_folder.path / SAVED} is no config of this recipe any more, so its options cannot be "
                f"compared: {one_line(error, 200)}; remove the file to go on from its checkpoint as it is, or say "
                "--fresh"
            ) from error
        now = yaml.safe_load(self._parser(self.subcommand).dump(self._own_config, skip_none=False))
        return differences(with_seed(was, int(data.get("seed_everything") or 0)), now)

    @property
    def _own_config(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    def _as_given(self) -> Any:
        """Return the run's config with {seed} in paths as it was given: it says that they name runs of its seed."""
        config = self._own_config.clone()
        for key, value in self._unseeded.items():
            config[key] = value
        return config

    def _save_options(self) -> None:
        config = self._as_given()
        # The file lies in the folder; and to use it is to go on.
        config["folder"], config["fresh"], config["ckpt_path"] = None, False, None
        self.run_folder.save_options(self._parser(self.subcommand).dump(config, skip_none=False), self.config_name)


def main(
    model_class: type[Trained], datamodule_class: type[LightningDataModule] | None = None, **options: Any
) -> RecipeCLI:
    """Run a recipe's command line; what is refused becomes one line: exit code 1, or 2 for options."""
    # Else jsonargparse would print some seventy lines of options first.
    raising: dict[str, Any] = {"exit_on_error": False}
    options.setdefault("parser_kwargs", raising | dict.fromkeys(RecipeCLI.subcommands(), raising))
    try:
        return RecipeCLI(model_class, datamodule_class, **options)
    except argparse.ArgumentError as error:
        _fail(f"{error}\ntip: {Path(sys.argv[0]).name} fit --help lists the options", code=2, cause=error)
    except (RescompressError, OSError) as error:  # a full disk, a folder that cannot be written
        _fail(str(error), code=1, cause=error)
    except RuntimeError as error:
        if not re.search("gloo|NCCL", str(error)):
            raise
        _fail(
            f"the processes have lost each other ({one_line(error, 120)}); if another one's error stands above, that "
            "is why; the same command goes on from the last checkpoint",
            code=1,
            cause=error,
        )


def _fail(message: str, code: int, cause: Exception) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code) from cause


def _loggers(folder: str) -> list[Any]:
    # A CSVLogger deletes what is in its folder, so each start writes into one of its own: logs/version_0, ...
    loggers: list[Any] = [CSVLogger(folder, name="logs")]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.insert(0, TensorBoardLogger(folder, name="", version=""))
    return loggers


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return ", ".join(found[:4]) + more


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
