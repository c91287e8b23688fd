"""Wrap a module without renaming what a state dict calls its parameters."""

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

    Shape:
        - Output: the inner module's (B, C, H, W), or a tuple or list of such, resized to (H, W) * `factor`, rounded
    """

    def __init__(self, inner: nn.Module, factor: tuple[float, float]) -> None:
        super().__init__(inner)
        self.factor = factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._restored(self.inner(*args, **kwargs))

    def _restored(self, made: Any) -> Any:
        if isinstance(made, tuple | list):
            return type(made)(self._restored(one) for one in made)
        if not isinstance(made, Tensor) or made.ndim != 4:
            return made
        size = [round(side * factor) for side, factor in zip(made.shape[-2:], self.factor, strict=True)]
        return F.interpolate(made, size=size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
