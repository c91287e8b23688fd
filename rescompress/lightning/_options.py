"""Options of runs: those that change what is trained, which tell two runs apart, and the one that a typo stands for."""

import re
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser

from rescompress.references.wanted import nearest

_SAME = (
    r"data\.(root|workers|test_batch_size)|model\.spec"  # the specs, checkpoints compare
    r"|trainer\.(accelerator|strategy|devices|num_nodes|logger|enable_\w+|log_every_n_steps|default_root_dir|profiler"
    r"|barebones|detect_anomaly|deterministic|benchmark|inference_mode|model_registry|fast_dev_run|max_time"
    r"|limit_(val|test|predict)_batches|val_check_interval|check_val_every_n_epoch|num_sanity_val_steps)"
)
"""Options that do not change what is trained."""

_LONGER = ("trainer.max_epochs", "trainer.max_steps")
"""Options of which more is no other run."""

_WATCHING = (
    *("CostMonitor", "DeviceStatsMonitor", "LastCheckpoint", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary"),
    *("OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar", "SpecInCheckpoint"),
    *("ThroughputMonitor", "Timer", "TQDMProgressBar"),
)
"""Callbacks that do not change what is trained."""

_SEED = r"(model|data|trainer\.callbacks\.\w+)\.seed"


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return which options tell two runs apart, with both values: those that change what is trained.

    Args:
        was: parts model, data and trainer of a config, as plain data.
        now: of another one.
    """
    old, new = _options(was), _options(now)
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        longer = name in _LONGER and _limit(after) >= _limit(before)
        if before != after and not longer:
            found.append(f"{name} was {before} and is {after}")
    return found


def that_train(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that change what is trained, by name: all but its seed and its spec.

    Args:
        config: its parts model, data and trainer, as plain data.
    """
    return {name: value for name, value in _options(config).items() if not re.fullmatch(_SEED, name)}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    trainer = dict(config.get("trainer") or {})
    callbacks: dict[str, Any] = {}
    given = trainer.get("callbacks") or []
    for callback in given if isinstance(given, list) else [given]:
        name = str(callback["class_path"]).rpartition(".")[2]
        if name not in _WATCHING:
            name += str(len(callbacks)) if name in callbacks else ""
            callbacks[name] = callback.get("init_args") or "given"
    trainer["callbacks"] = callbacks
    found = _flat("", {"model": config.get("model"), "data": config.get("data"), "trainer": trainer})
    return {name: value for name, value in found.items() if not re.match(rf"({_SAME})(\.|$)", name)}


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, one in value.items():
        whole = prefix if name == "init_args" else f"{prefix}.{name}".removeprefix(".")
        found |= _flat(whole, one)
    return found


def _limit(value: Any) -> float:
    return float("inf") if value in (None, -1) else float(value)


def options_of(parser: ArgumentParser) -> list[str]:
    """Return the names of a parser's options, such as model.num_classes."""
    names = [name.removeprefix("--") for action in parser._actions for name in action.option_strings]
    return [name for name in names if not name.endswith(".help")]


def meant(error: str, known: Iterable[str]) -> str:
    """Return which options a parser's error may be about: "; did you mean 'x'?", or nothing."""
    for word in re.findall(r"--([\w.]+)|option '([\w.]+)'", error):
        name = "".join(word)
        while name:  # below an option that is known there are no others of the same name
            hint = nearest(name, known)
            if hint:
                return hint
            name = name.rpartition(".")[0]
    return ""
