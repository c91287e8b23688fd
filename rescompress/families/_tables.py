"""See which tables of a network are read in part: positions laid out for one grid, on a smaller one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten


class TableReads(TorchDispatchMode):
    """Notes how many rows a network reads of its floating-point parameters and buffers, and of what is made of them.

    Tables are followed by storage, through views and through operators that read nothing but tables.

    Attributes:
        shapes: of the tables themselves
        sizes: by table, every length that it, or what is made of it alone, has along some dimension
        parts: by table and length, numbers of rows that were read where they are fewer than all
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: dict[str, torch.Size] = {}
        self.sizes: dict[str, set[int]] = {}
        self.parts: dict[tuple[str, int], set[int]] = {}
        self._names: dict[StorageWeakRef, str] = {}
        for fqn, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point():
                # By the name that it has in the state dict, whatever wraps its owner.
                name = ".".join(part for part in fqn.split(".") if part != "inner")
                self.shapes[name] = tensor.shape
                self._mark(tensor, name)

    def _mark(self, tensor: Tensor, name: str) -> None:
        self._names[StorageWeakRef(tensor.untyped_storage())] = name
        self.sizes.setdefault(name, set()).update(tensor.shape)

    def _name(self, tensor: Any) -> str | None:
        strided = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        return self._names.get(StorageWeakRef(tensor.untyped_storage())) if strided else None

    def _note(self, name: str, length: int, rows: int) -> None:
        if rows < length:
            self.parts.setdefault((name, length), set()).add(rows)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = self._name(args[0]) if args else None
        if name is None:
            return out
        look_up = _look_up(func, args)
        if look_up is not None:
            dim, rows = look_up
            self._note(name, args[0].shape[dim], rows.numel())
            self._mark(out, name)
            return out
        if func._overloadpacket is _aten.slice:
            dim = args[1] if len(args) > 1 else 0
            self._note(name, args[0].shape[dim], out.shape[dim])
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if all(self._name(tensor) is not None for tensor in given):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    self._mark(leaf, name)
        return out


def _look_up(func: Any, args: tuple[Any, ...]) -> tuple[int, Tensor] | None:
    """Return the dimension along which an operator looks up rows of its first argument, and the numbers of these."""
    packet = func._overloadpacket
    if packet is _aten.embedding:
        return 0, args[1]
    if packet is _aten.index_select:
        return args[1], args[2]
    if packet is _aten.index:
        given = [(dim, rows) for dim, rows in enumerate(args[1]) if rows is not None]
        return given[0] if len(given) == 1 and given[0][1].dtype != torch.bool else None
    return None


def read_in_part(whole: TableReads, small: TableReads, area: float) -> tuple[str, int, int] | None:
    """Return a table that no longer fits the smaller map: its name, the rows read and those read before; or None.

    Rows of positions follow each other along a flattened map: the first quarter of them are no map of half the side,
    but its top. A network that slices them runs all the same. A table of which the original read a part only, a row
    for each position along a side, is meant for images of several sizes and is left alone.

    Args:
        whole: what the original read
        small: what the model read on the smaller map
        area: positions of the smaller map over those of the old one
    """
    for (name, length), parts in small.parts.items():
        if small.shapes[name] != whole.shapes.get(name) or length not in whole.sizes.get(name, ()):
            continue  # resampled: a family has seen to it, or the host itself
        known = whole.parts.get((name, length), set())
        for rows in sorted(parts - known):
            before = min((part for part in known if part > rows), default=length)
            if before == length or rows / before < (area + area**0.5) / 2:
                return name, rows, before
    return None
