"""What families of windowed networks have in common: which windows fit a smaller map, and tables that follow them."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import ConvAnatomy, Grid, Refit
from rescompress.errors import SmallerGridError
from rescompress.families._base import class_names, image_of

Stand = Callable[[Any, Tensor], Tensor]
"""stand(module, x): a map of the shape that a module of the host makes of `x`, for which it need not be run."""


def describe_stem(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    family: str,
    first_conv: str,
    refit: Refit | None,
    multiple: int = 1,
) -> ConvAnatomy:
    """Return the anatomy of a network whose first convolution is known by name."""
    height, width = image_of(model, args, kwargs).shape[-2:]
    return ConvAnatomy(
        family=family,
        input_size=(height, width),
        first_conv=first_conv,
        stem_grid=surgery.output_grid(surgery.get(model, first_conv), (height, width)),
        refit=refit,
        multiple=multiple,
    )


def named(host: nn.Module, *kinds: str) -> list[tuple[str, Any]]:
    """Return the modules whose class or base class is one of `kinds`, dotted names, by FQN and in order."""
    return [(fqn, module) for fqn, module in host.named_modules() if set(kinds) & set(class_names(module))]


class _Stem(nn.Module):
    """Stands for a stem and gives a map of one size, whatever it gets."""

    def __init__(self, inner: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.inner = inner
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made.new_empty((*made.shape[:2], *self.grid))


class _Seen(nn.Module):
    """Stands for a module, notes what it is first called with and gives a map of the shape that it would make."""

    def __init__(self, inner: nn.Module, fqn: str, seen: dict[str, tuple[Any, ...]], stand: Stand | None) -> None:
        super().__init__()
        self.inner = inner
        self.fqn = fqn
        self.seen = seen
        self.stand = stand

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.setdefault(self.fqn, args)
        return self.inner(*args, **kwargs) if self.stand is None else self.stand(self.inner, args[0])


def unchanged(module: Any, x: Tensor) -> Tensor:
    """Stand for a module that keeps the shape of its map."""
    return x


def arguments_at(
    host: nn.Module, anatomy: ConvAnatomy, grid: Grid, kinds: Mapping[str, Stand | None]
) -> dict[str, tuple[Any, ...]]:
    """Return what the host calls its modules of some kinds with, by FQN, when its stem makes a map of size `grid`.

    The host is run on the meta device. `kinds` gives, by dotted class names, what stands for modules that would fail
    on that map as they are; None runs the module itself.

    Raises:
        SmallerGridError: the host does not run on such a map, whatever its windows are.
    """
    clone: Any = surgery.clone_shared(host, "meta").eval()
    stem = anatomy.first_conv[len(anatomy.host) + 1 :] if anatomy.host else anatomy.first_conv
    first = next(module for module in surgery.get(clone, stem).modules() if isinstance(module, nn.Conv2d))
    surgery.swap(clone, stem, _Stem(surgery.get(clone, stem), grid))
    seen: dict[str, tuple[Any, ...]] = {}
    stood: list[str] = []
    for fqn, module in named(clone, *kinds):
        if any(fqn.startswith(f"{outer}.") for outer in stood):
            continue  # inside a module that is not run
        stand = next(kinds[name] for name in class_names(module) if name in kinds)
        surgery.swap(clone, fqn, _Seen(module, fqn, seen, stand))
        if stand is not None:
            stood.append(fqn)
    image = torch.empty((1, first.in_channels, *anatomy.input_size), device="meta", dtype=first.weight.dtype)
    try:
        with torch.no_grad():
            clone(image)
    except Exception as error:  # the host's own code runs here and may raise anything
        raise SmallerGridError(
            f"this {type(host).__name__} does not run on a {grid[0]} x {grid[1]} map behind its stem: "
            f"{type(error).__name__}: {error}"
        ) from error
    return seen


def maps_at(
    host: nn.Module, anatomy: ConvAnatomy, grid: Grid, kinds: Mapping[str, Stand | None], last: tuple[str, ...] = ()
) -> dict[str, Grid]:
    """Return the size of the map that each module of some kinds gets, as `arguments_at` finds it.

    Maps are (B, C, H, W); those of the kinds named in `last` are (B, H, W, C).
    """
    found = {}
    for fqn, args in arguments_at(host, anatomy, grid, kinds).items():
        axis = 1 if set(last) & set(class_names(surgery.get(host, fqn))) else 2
        found[fqn] = (int(args[0].shape[axis]), int(args[0].shape[axis + 1]))
    return found


def clipped(window: Grid, before: Grid, after: Grid) -> Grid:
    """Return the window for a map that shrinks: the same, or the whole side where it fitted and no longer does.

    A window that was larger than its map before is the host's own choice, and is kept.
    """
    sides = [new if old >= own > new else own for own, old, new in zip(window, before, after, strict=True)]
    return (sides[0], sides[1])


def dividing(window: Grid, side: Grid, what: str) -> Grid:
    """Return the window nearest to `window` that divides a map, the smaller of two as near.

    Raises:
        SmallerGridError: every window that divides it is less than half or more than twice as large; but one over the
            whole of a small map is right.
    """
    found = []
    for own, length in zip(window, side, strict=True):
        divisors = [d for d in range(1, min(length, 2 * own) + 1) if length % d == 0 and (2 * d >= own or d == length)]
        if not divisors:
            raise SmallerGridError(
                f"{what} has windows of {own} positions a side, and no size near it divides its map of "
                f"{side[0]} x {side[1]}"
            )
        found.append(min(divisors, key=lambda d, own=own: (abs(math.log(d / own)), d)))  # type: ignore[misc]
    return (found[0], found[1])


def relative_index(window: Grid) -> Tensor:
    """Return which row of a table of relative positions belongs to each pair of positions of a window.

    Shape:
        - Output: (H * W, H * W), rows of a table of layout "relative"
    """
    height, width = window
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    down = rows[:, None] - rows[None] + height - 1
    right = columns[:, None] - columns[None] + width - 1
    return down * (2 * width - 1) + right


_BIAS = "timm.layers.pos_embed_rel.RelPosBias"
_BIAS_TF = "timm.layers.pos_embed_rel.RelPosBiasTf"
_MLP = "timm.layers.pos_embed_rel.RelPosMlp"


def resize_relative(host: nn.Module, fqn: str, window: Grid) -> None:
    """Make one of timm's modules of relative positions fit another window; its table is resampled by ours.

    Raises:
        UnsupportedModelError: it is of a kind that is not known.
    """
    module: Any = surgery.get(host, fqn)
    before, kinds = (int(module.window_size[0]), int(module.window_size[1])), class_names(module)
    if before == window:
        return
    if _MLP in kinds:
        module.set_window_size(window)
        # A window of one position has no distances, and log coordinates scaled by their range are 0 / 0 there.
        module.rel_coords_log.nan_to_num_()
        return
    name = f"{fqn}.relative_position_bias_table"
    with without_table(module):
        module.set_window_size(window)
    if _BIAS_TF in kinds:
        old, new = ((2 * side[0] - 1, 2 * side[1] - 1) for side in (before, window))
        surgery.resample(host, name, "map", old, new)
    elif _BIAS in kinds:
        surgery.resample(host, name, "relative", before, window, 3 * int(module.prefix_tokens))
    else:
        raise TypeError(f"{kinds[0]} is no table of relative positions that is known")


@contextlib.contextmanager
def without_table(module: nn.Module) -> Iterator[None]:
    """Let timm resize a module without its table of relative positions, which is resampled by ours afterwards.

    Timm's own resampling takes seconds, and loading an old checkpoint would not give the same numbers.
    """
    table = module._parameters["relative_position_bias_table"]
    if table is not None:
        module._parameters["relative_position_bias_table"] = nn.Parameter(table.detach().to("meta"))
    try:
        yield
    finally:
        module._parameters["relative_position_bias_table"] = table


class FixedSize:
    """Stands for a host's `set_input_size`, which would undo the smaller grid and know nothing of the resize."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError(
            f"this {self.name} has been compressed for images of one size, which its windows and tables are laid out "
            "for; call set_input_size on the original, and compress it then"
        )


def fix_size(host: nn.Module) -> None:
    """Make the host's own `set_input_size` refuse, where it has one."""
    if hasattr(host, "set_input_size"):
        surgery.set_attribute(host, "set_input_size", FixedSize(type(host).__name__))
