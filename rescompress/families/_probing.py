"""Run a network once on the meta device: which convolutions read the image, in what size, and what sides fit it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rescompress import surgery
from rescompress.anatomy import Grid
from rescompress.errors import UnsupportedModelError, one_line
from rescompress.families._base import class_names, image_of

MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Call:
    """One call of a module with a map.

    Attributes:
        fqn: the module's name
        source: the map that it read
        made: the map that it gave; None where it gave anything else
        reads_image: whether what it read is the image or was made of it without a convolution
        is_conv: whether it is a convolution
    """

    fqn: str
    source: Tensor
    made: Tensor | None
    reads_image: bool
    is_conv: bool


@dataclass
class Trace:
    """What one run of a network showed.

    Attributes:
        image: the batch of images that was given
        outputs: what came out
        calls: calls of modules with maps, in the order in which they ended
        on_meta: whether the network runs on the meta device, where trying costs little
    """

    image: Tensor
    on_meta: bool
    outputs: Any = None
    calls: list[Call] = field(default_factory=list)

    @property
    def readers(self) -> list[Call]:
        """The calls of convolutions that read the image, or what was made of it by arithmetic."""
        convolutions = [call for call in self.calls if call.is_conv]
        readers = [call for call in convolutions if call.reads_image]
        if readers or not convolutions:
            return readers
        # The way of the image was lost in code that torch does not see, such as numpy.
        return [call for call in convolutions if call.source is convolutions[0].source]


class _Flow(TorchDispatchMode):
    """Follows the image through all operators, and tells what is made of it from what convolutions made of that.

    By storage, so that views and writes in place are followed too; weak references keep an address from being used
    twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.convolved: dict[StorageWeakRef, bool] = {}

    def mark(self, value: Any, convolved: bool) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.convolved[reference] = self.convolved.get(reference, False) or convolved

    def state(self, tensor: Tensor) -> bool | None:
        """None: has nothing to do with the image; False: made of the image; True: behind a convolution."""
        return self.convolved.get(StorageWeakRef(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        out = func(*args, **(kwargs or {}))
        states = [state for state in map(self.state, given) if state is not None]
        if states:
            self.mark(out, any(states))
        return out


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Run a throw-away clone, on the meta device where the model computes with no values.

    Raises:
        UnsupportedModelError: the model does not run on its example input.
    """
    failure = ""
    for device in ("meta", None):
        moved = _moved((args, kwargs), device)
        clone = surgery.clone_shared(model, device).eval()
        found = Trace(image_of(model, *moved), device == "meta")
        flow = _Flow()
        flow.mark([leaf for leaf in tree_leaves(moved) if isinstance(leaf, Tensor) and leaf.ndim >= 3], False)
        for fqn, module in clone.named_modules():
            # Hooks on the clone only: it is thrown away.
            module.register_forward_hook(_recorder(fqn, found, flow))
        try:
            with torch.no_grad(), flow:
                found.outputs = clone(*moved[0], **moved[1])
            return found
        except Exception as error:  # any code of the user's may run here; the reason is reported below
            failure = f"{type(error).__name__}: {one_line(error)}"
    raise UnsupportedModelError(
        f"{class_names(model)[0]} does not run on an input of shape {tuple(image_of(model, args, kwargs).shape)} "
        f"({failure}); pass an example_input that it takes"
    )


def _moved(call: Any, device: str | None) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if device and isinstance(leaf, Tensor) else leaf, call)


def _recorder(fqn: str, found: Trace, flow: _Flow) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        is_conv = isinstance(module, nn.Conv2d)
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4:
            made = output if isinstance(output, Tensor) and output.ndim == 4 else None
            found.calls.append(Call(fqn, inputs[0], made, flow.state(inputs[0]) is False, is_conv))
        if is_conv:
            flow.mark(output, True)

    return record


@dataclass(frozen=True)
class Restored:
    """A module whose map must come back at its old size."""

    fqn: str
    size: Grid

    def map(self, made: Any, sizes: list[Grid]) -> Any:
        """Return an empty map of the old size in place of the one that the module made, whose size joins `sizes`."""
        if not isinstance(made, Tensor) or made.ndim != 4:
            return made
        sizes.append((int(made.shape[2]), int(made.shape[3])))
        return made.new_empty((*made.shape[:2], *self.size))


class Trial:
    """Runs a network on the meta device whose stem's map is cut to smaller sides, as a reduction would make it.

    Args:
        model: the network; a clone of it is used
        stem: FQN of what makes the map
        grid: the size of that map
        call: positional and keyword arguments of the example
    """

    def __init__(self, model: nn.Module, stem: str, grid: Grid, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.grid = grid
        self._args, self._kwargs = _moved(call, "meta")
        self._clone = surgery.clone_shared(model, "meta").eval()
        self._sides = grid
        self._made: list[Grid] = []
        # Hooks on the clone only: it is thrown away.
        surgery.get(self._clone, stem).register_forward_hook(
            lambda _, given, made: made[..., : self._sides[0], : self._sides[1]]
        )

    def outputs(self, sides: Grid, restored: tuple[Restored, ...] = ()) -> Any:
        """Return what comes out for a map of these sides; None where they do not fit the network.

        The maps of the modules in `restored` come back at their old sizes.
        """
        self._sides = sides
        self._made.clear()
        handles = []
        for one in restored:
            module = surgery.get(self._clone, one.fqn)
            handles.append(module.register_forward_hook(lambda _, given, made, one=one: one.map(made, self._made)))
        try:
            with torch.no_grad():
                return self._clone(*self._args, **self._kwargs)
        except Exception:  # whatever the host raises: these sides do not fit it
            return None
        finally:
            for handle in handles:
                handle.remove()

    def multiple(self, restored: tuple[Restored, ...] = ()) -> int | None:
        """Return the smallest power of two whose multiples the network takes as sides of the map; None without any.

        Where maps of other strides meet again (HRNet, DLA, U-Nets), only multiples of the largest stride fit.
        """
        smallest_failed = min(self.grid)
        for multiple in MULTIPLES:
            sides = [(count * multiple, count * multiple) for count in self._odd_counts(multiple)]
            tried = [pair for pair in sides if pair != self.grid]  # its own sides fit and prove nothing
            failed = [pair for pair in tried if self.outputs(pair, restored) is None]
            if tried and not failed:
                if multiple == 1:
                    return 1
                # Were the others odd, or only too small? A multiple below the smallest of them tells.
                below = smallest_failed // multiple * multiple
                return multiple if below and self.outputs((below, below), restored) is not None else None
            smallest_failed = min([smallest_failed, *(pair[0] for pair in failed)])
        return None

    def stride(self, multiple: int, restored: tuple[Restored, ...]) -> int:
        """Return the smallest power of two from `multiple` on whose multiples keep the scale of the restored maps.

        A stride of 2 makes 8 of 15 positions, and a transposed one 16: such a map does not tell that it was of 15.
        """
        for stride in MULTIPLES:
            if any(side % stride for side in self.grid):
                break  # the sides of the example itself must stay possible
            sides = {*(count * stride for count in self._odd_counts(stride)), min(self.grid)}
            if stride < multiple or len(sides) < 2:
                continue
            scales = set()
            for side in sides:
                fits = self.outputs((side, side), restored) is not None
                scales.add(tuple((rows / side, columns / side) for rows, columns in self._made) if fits else None)
            if len(scales) == 1 and None not in scales:
                return stride
        return multiple

    def half(self, multiple: int) -> Grid:
        """Return sides of about half the map that are multiples."""
        rows, columns = (max(1, side // 2 // multiple) * multiple for side in self.grid)
        return (rows, columns)

    def _odd_counts(self, multiple: int) -> list[int]:
        """Return numbers of multiples that stay odd from stride to stride, so that no level hides behind another."""
        most = min(self.grid) // multiple
        # 2^n + 1 stays odd where strides round up, 2^n - 1 where they round down.
        above = [2**n + 1 for n in range(1, most.bit_length()) if 2**n + 1 <= most]
        below = [2**n - 1 for n in range(1, most.bit_length() + 1) if 2**n - 1 <= most]
        return [*above[-1:], *below[-1:]]


def side_multiple(model: nn.Module, stem: str, grid: Grid, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return what `Trial.multiple` says, 1 where it finds none: then compress finds out why."""
    return Trial(model, stem, grid, (args, kwargs)).multiple() or 1
