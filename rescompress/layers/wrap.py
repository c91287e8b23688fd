"""Wrap a module without renaming what a state dict calls its parameters."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Wrapped(nn.Module):
    """Base of modules that hold a foreign module in `inner` while state dicts keep its old names.

    State-dict hooks strip the `inner.` prefix on the way out and put it back on the way in, so a checkpoint from
    before the wrapping loads after it, and the other way round.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_state_dict_post_hook(_strip_inner)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_restore_inner)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """Give the inner module's attributes and methods for its own: hosts call more than forward (init_weights)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A library that fuses blocks puts what `fuse` returns in their place: it must be asked of `inner`, inside.
            if name in ("inner", "fuse", "reparameterize", "switch_to_deploy") or name.startswith("__"):
                raise
            return getattr(self.inner, name)


def _strip_inner(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for key in list(state_dict):
        if key.startswith(f"{prefix}inner."):
            state_dict[prefix + key[len(prefix) + len("inner.") :]] = state_dict.pop(key)


def _restore_inner(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in list(state_dict):
        if key.startswith(prefix) and not key.startswith(f"{prefix}inner."):
            state_dict[f"{prefix}inner.{key[len(prefix) :]}"] = state_dict.pop(key)


class ResizedModule(Wrapped):
    """A convolution of a class of its own (weight standardisation, ...) whose map is resized after it.

    Shape:
        - Input: (B, C, H, W), resized by `before`
        - Output: the inner module's output, resized by `after`
    """

    def __init__(self, inner: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__(inner)
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))  # type: ignore[no-any-return]


class RestoredMap(Wrapped):
    """A module that predicts for every position of a map, which comes back at the size that it had on the old grid.

    A map of fewer positions does not tell how many it had: 74 may have been 148 or 149. So a side that is what the
    example's has become comes back as the example's own, and any other by the simplest scale that fits the example.
    Both are exact where the scale leaves whole sides.

    Shape:
        - Output: the inner module's (B, C, H, W) resized to its old size, by itself or inside tuples, lists and dicts

    Attributes:
        scale: (down, right), new side over old side
        example: old size of the map for the example input; None where it is not known
        shrunk: what the scale reached makes of it
    """

    def __init__(self, inner: nn.Module, example: tuple[int, int] | None = None) -> None:
        super().__init__(inner)
        self.scale = (1.0, 1.0)
        self.example = example
        self.shrunk = None if example is None else (float(example[0]), float(example[1]))

    def shrink(self, old: tuple[int, int], new: tuple[int, int], multiple: int = 1) -> None:
        """Take in that the grid which the map is made of went from `old` to `new`, a multiple of `multiple`."""
        down, right = (simplest_scale(now, was, multiple) for now, was in zip(new, old, strict=True))
        self.scale = (self.scale[0] * down, self.scale[1] * right)
        if self.shrunk is not None:
            self.shrunk = (self.shrunk[0] * new[0] / old[0], self.shrunk[1] * new[1] / old[1])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._restored(self.inner(*args, **kwargs))

    def _restored(self, made: Any) -> Any:
        if isinstance(made, Tensor):
            return self._resized(made) if made.ndim == 4 else made
        if isinstance(made, Mapping):
            return _rebuilt(made, {key: self._restored(one) for key, one in made.items()})
        if isinstance(made, tuple) and hasattr(made, "_fields"):
            return type(made)(*(self._restored(one) for one in made))
        if isinstance(made, tuple | list):
            return type(made)(self._restored(one) for one in made)
        return made

    def _resized(self, made: Tensor) -> Tensor:
        size = [self.old_side(made.shape[2], 0), self.old_side(made.shape[3], 1)]
        return F.interpolate(made, size=size, mode="bilinear", align_corners=False)

    def old_side(self, side: int | Tensor, axis: int) -> int:
        """Return the side that the map had which has this one now."""
        if isinstance(side, Tensor):  # so torch.jit.trace gives sizes; they are constants of a trace
            side = int(side)
        if self.example is not None and self.shrunk is not None and abs(side - self.shrunk[axis]) < 1:
            return self.example[axis]
        return round(side / self.scale[axis])

    def extra_repr(self) -> str:
        return f"scale={self.scale}, example={self.example}"


def _rebuilt(old: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """Return a mapping of the class of `old` (dict, OrderedDict, Hugging Face's ModelOutput) with other values."""
    return values if type(old) is dict else type(old)(**values)


def simplest_scale(new: int, old: int, multiple: int = 1) -> float:
    """Return the fraction of the smallest denominator that brings the side `old` to `new`, as Resize2d rounds.

    74 of 149 positions are a scale of 1/2, and not of 74/149, which would be another one for every size.
    """
    for denominator in range(1, old):
        for numerator in range(1, denominator + 1):
            side = old * numerator / denominator
            if new == (math.floor(side) if multiple == 1 else math.ceil(side / multiple - 0.5) * multiple):
                return numerator / denominator
    return new / old
