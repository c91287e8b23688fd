"""Get, swap and insert modules by fully qualified name (FQN): the only code that touches foreign modules."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rescompress.anatomy import Grid
from rescompress.errors import UnsupportedModelError
from rescompress.layers.positions import TableLoader, resample_table
from rescompress.layers.resize import ResizedConv2d
from rescompress.layers.wrap import ResizedModule, RestoredMap

Model = TypeVar("Model", bound=nn.Module)

_CACHE = "attention_bias_cache"
"""Where attentions of timm keep what they have gathered from their table of biases in evaluation mode, by device."""


def get(model: nn.Module, fqn: str) -> nn.Module:
    """Return the submodule called `fqn`; the empty name is the model itself.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        return model.get_submodule(fqn)
    except AttributeError as error:
        raise UnsupportedModelError(f"{type(model).__name__} has no module {fqn!r}") from error


def split(fqn: str) -> tuple[str, str]:
    """Split an FQN into its parent's FQN and its own name."""
    parent, _, name = fqn.rpartition(".")
    return parent, name


def swap(model: nn.Module, fqn: str, new: nn.Module) -> None:
    """Put `new` where the module `fqn` is, at every place where that same object is registered.

    Raises:
        UnsupportedModelError: it is the model itself, or carries hooks that `new` would not.
    """
    old = get(model, fqn)
    if old is model:
        raise UnsupportedModelError("the model itself cannot be swapped, only its parts")
    _move_recorders(old, new)
    _refuse_lost_hooks(fqn, old, new)
    new.train(old.training)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _move_recorders(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks by which transformers collects hidden states: what takes the place of a layer is recorded too."""
    hooks = old._forward_hooks
    moved = [key for key, hook in hooks.items() if _home(hook) == "transformers.utils.output_capturing"]
    if not moved:
        return
    for key in moved:
        if key not in new._forward_hooks:  # a layer that adopts another may have taken them over already
            new.register_forward_hook(hooks[key])
    old._forward_hooks = OrderedDict((key, hook) for key, hook in hooks.items() if key not in moved)


def _home(hook: object) -> str:
    return str(getattr(hook, "__module__", ""))


def _refuse_lost_hooks(fqn: str, old: nn.Module, new: nn.Module) -> None:
    kept = set(new.modules())
    adopted = {id(module._forward_hooks) for module in kept}  # a module that adopts another shares its hooks
    for name, module in old.named_modules(prefix=fqn):
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if module not in kept and id(module._forward_hooks) not in adopted and any(hooks):
            raise UnsupportedModelError(
                f"{name!r} carries hooks, which would be lost when it is replaced; remove them and register them again "
                "afterwards"
            )


def get_parameter(model: nn.Module, fqn: str) -> Tensor:
    """Return the parameter or buffer called `fqn`."""
    owner, name = split(fqn)
    tensor = getattr(get(model, owner), name)
    if not isinstance(tensor, Tensor):
        raise UnsupportedModelError(f"{fqn!r} of {type(model).__name__} is no tensor")
    return tensor


def set_parameter(model: nn.Module, fqn: str, value: Tensor) -> None:
    """Replace the parameter or buffer `fqn` by one that holds `value` and keeps its requires_grad."""
    owner_fqn, name = split(fqn)
    owner = get(model, owner_fqn)
    if name in owner._parameters:
        old = owner._parameters[name]
        owner._parameters[name] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)
    else:
        owner._buffers[name] = value


def resample(model: nn.Module, fqn: str, layout: str, old: Grid, new: Grid, extra: int = 0) -> None:
    """Resample the parameter or buffer `fqn` from a grid to another; checkpoints of the old grid go on loading.

    `layout` and `extra` are those of `rescompress.layers.positions.LAYOUTS`. Nothing is done where the grids are equal.
    """
    if old == new:
        return
    set_parameter(model, fqn, resample_table(get_parameter(model, fqn).detach(), layout, old, new, extra))
    keep_loading(model, fqn, layout, old, new, extra)


def keep_loading(model: nn.Module, fqn: str, layout: str, old: Grid, new: Grid, extra: int = 0) -> None:
    """Let a parameter or buffer that has been resampled load checkpoints of the grid from before."""
    owner, name = split(fqn)
    get(model, owner).register_load_state_dict_pre_hook(TableLoader(name, layout, old, new, extra))


def restore_map(model: nn.Module, fqn: str, old: Grid, new: Grid, size: Grid | None = None, multiple: int = 1) -> None:
    """Bring the map that leaves the module `fqn` back to its size from before the grid went from `old` to `new`.

    `size` is the size of that map with the example, where it is known; `multiple` is what grids are rounded to.
    """
    module = get(model, fqn)
    if not isinstance(module, RestoredMap):
        module = RestoredMap(module, size)
        swap(model, fqn, module)
    module.shrink(old, new, multiple)


def set_attribute(model: nn.Module, fqn: str, value: object) -> None:
    """Set a plain attribute of a module by its FQN."""
    owner, name = split(fqn)
    setattr(get(model, owner), name, value)


def deep_copy(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """Copy a model as `copy.deepcopy` does, but without what a forward with gradients has left in plain attributes.

    Tensors that hang on a graph cannot be copied. A copy has them detached, and caches of attention biases empty: it
    gathers its own. Weights that a hook computes before each forward (the old weight_norm, prune) are left as they
    are, so that copying such a model still fails.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        cache = vars(module).get(_CACHE)
        if isinstance(cache, dict):
            memo[id(cache)] = {}
        if not module._forward_pre_hooks:
            plain = {name: value for name, value in vars(module).items() if name not in _OWN}
            memo.update((id(tensor), tensor.detach().clone()) for tensor in _on_graph(plain) if id(tensor) not in memo)
    return copy.deepcopy(model, memo)


_OWN = ("_parameters", "_buffers", "_modules")
"""Where torch keeps what a module registers."""


def _on_graph(value: object, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors with a graph behind them in an attribute, or in dicts and lists that it holds."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif depth and isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _on_graph(one, depth - 1)


def forget_bias(module: nn.Module, *args: object) -> None:
    """Drop the biases that an attention has gathered from its table; a state-dict hook too, as the table changes."""
    if _CACHE in vars(module):
        setattr(module, _CACHE, {})


def clone_shared(
    model: nn.Module, device: torch.device | str | None = None, replaced: Mapping[int, nn.Parameter] | None = None
) -> nn.Module:
    """Copy the tree of modules and the buffers but share the parameters, or put empty ones on `device` ("meta").

    Cheap: surgery can be tried on the clone, and its forward runs with the same weights. Surgery replaces
    parameters and never writes into them, so the original stays untouched. `replaced` gives other parameters instead
    of some, by the identity of the old ones.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = (
            (replaced or {}).get(id(parameter), parameter)
            if device is None
            else nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
        )
    if device is not None:
        for buffer in model.buffers():
            memo[id(buffer)] = buffer.detach().to(device)
    return deep_copy(model, memo)


def output_grid(conv: nn.Module, grid: Grid) -> Grid:
    """Return the grid of the map that a stem (a convolution or a block of them) makes of `grid` pixels, unresized."""
    first = next(module for module in conv.modules() if isinstance(module, nn.Conv2d))
    return map_grid((conv,), first.in_channels, grid)


def map_grid(modules: tuple[nn.Module, ...], channels: int, grid: Grid) -> Grid:
    """Return the grid of the map that modules, one after another and unresized, make of a map (1, channels, *grid)."""
    tensors = [tensor for module in modules for tensor in module.parameters()]
    dtype = tensors[0].dtype if tensors else torch.get_default_dtype()
    made = torch.empty((1, channels, *grid), device="meta", dtype=dtype)
    with torch.no_grad():
        for module in modules:
            clone: Any = clone_shared(module.inner if isinstance(module, ResizedModule) else module, "meta").eval()
            made = clone.conv(made) if isinstance(clone, ResizedConv2d) else clone(made)
    return (int(made.shape[-2]), int(made.shape[-1]))


def fingerprint(model: nn.Module) -> dict[str, int]:
    """Return the identity of every module, hook and parameter by name: two are equal when no surgery came between."""
    found = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        found |= {f"{name}({key})": id(hook) for key, hook in module._forward_pre_hooks.items()}
    found |= {f"{name}:": id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return found
