"""Models of the user's own code: `package.module:factory`, or the nn.Module of that name."""

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from rescompress.errors import InputError, did_you_mean, one_line
from rescompress.references.wanted import Wanted, nearest


def build(module_name: str, attribute: str, wanted: Wanted, sources: Iterable[str]) -> nn.Module:
    """Call package.module:factory; num_classes, in_chans and pretrained are given to it where they are wanted.

    Raises:
        InputError: there is no such module or factory, or it fails or gives something else.
    """
    module = _imported(module_name, sources)
    if not hasattr(module, attribute):
        raise InputError(f"{module_name} has no {attribute!r}{nearest(attribute, vars(module))}")
    made = getattr(module, attribute)
    if isinstance(made, nn.Module):
        return copy.deepcopy(made)  # the module's own stays as it is, whoever asks for it again
    try:
        made = made(**_options(f"{module_name}:{attribute}", made, wanted))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{module_name}:{attribute} failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{module_name}:{attribute} gives a {type(made).__name__}, not an nn.Module")
    return made


def _imported(name: str, sources: Iterable[str]) -> Any:
    """Import a module as `python -m` would find it: from the current folder, too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            hint = nearest(name, sources) or (
                f"; known: {', '.join(sources)}, or package.module:factory, where the module can be "
                "imported: from the folder that it lies in, or with that folder in PYTHONPATH"
            )
            raise InputError(f"unknown model source {name!r}{hint}") from error
        raise InputError(f"cannot import {name}: {error}") from error
    except Exception as error:  # the user's own code runs here
        raise InputError(f"cannot import {name}: {type(error).__name__}: {one_line(error)}") from error


def _options(reference: str, make: Any, wanted: Wanted) -> dict[str, Any]:
    takes = inspect.signature(make).parameters
    options = wanted.options
    if wanted.num_classes is not None:
        options.setdefault("num_classes", wanted.num_classes)
    if wanted.channels is not None and (wanted.channels != 3 or "in_chans" in takes):
        options.setdefault("in_chans", wanted.channels)
    if wanted.pretrained:
        options.setdefault("pretrained", True)
    any_option = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
    foreign = [option for option in options if option not in takes and not any_option]
    if foreign:
        raise InputError(f"{reference} takes no option {foreign[0]!r}{did_you_mean(foreign[0], takes)}")
    return options
