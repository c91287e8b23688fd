"""Replace a foreign module by one of a subclass of its own class, which adopts everything that the old one holds.

Libraries ask for the classes of their blocks: transformers records hidden states of modules that are its layers, and
turns gradient checkpointing on for them. A block that is one of them, with the same children under the same names,
keeps all of that, the names in state dicts included.
"""

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)

_classes: dict[tuple[type, type], type] = {}


def host_class(module: nn.Module) -> type:
    """Return the class that a module had before it was adopted; its own class if it was not."""
    found: type = getattr(type(module), "adopted_from", type(module))
    return found


def class_name(module: object) -> str:
    """Return the dotted name of the class that a module had before it was adopted."""
    found = host_class(module) if isinstance(module, nn.Module) else type(module)
    return f"{found.__module__}.{found.__qualname__}"


def adopt(kind: type[Kind], old: nn.Module) -> Kind:
    """Return a module that is both a `kind` and of the class of `old`, and holds what `old` holds.

    Parameters, buffers, children and hooks are shared, not copied. Methods of `kind` come before those of the host,
    whose forward is at hand as `host_forward`.
    """
    new = _blank(kind, host_class(old))
    new.__dict__.update(old.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[name] = copy.copy(old.__dict__[name])
    # These hooks are bound to the module that they were registered on.
    new._load_state_dict_pre_hooks = OrderedDict()
    for hook in old._load_state_dict_pre_hooks.values():
        if hook.with_module:  # type: ignore[attr-defined]
            new.register_load_state_dict_pre_hook(hook.hook)  # type: ignore[attr-defined]
        else:
            new._register_load_state_dict_pre_hook(hook.hook)  # type: ignore[attr-defined]
    return new  # type: ignore[no-any-return]


class Adopted(nn.Module):
    """Base of the kinds of modules that adopt others; it pickles and copies what is of a class made at run time."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What the host's class holds is known when the program runs."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(2)
        return (_blank, (type(self).adopted_as, host_class(self)), *made[2:])  # type: ignore[attr-defined]


def _blank(kind: Any, host: Any) -> Any:
    """Return an empty module of the class that is both; it is made once for each pair."""
    made: Any = _classes.get((kind, host))
    if made is None:
        members = {
            "__module__": kind.__module__,
            "adopted_as": kind,
            "adopted_from": host,
            "host_forward": host.forward,
        }
        made = _classes[kind, host] = type(kind.__name__, (kind, host), members)
    return made.__new__(made)
