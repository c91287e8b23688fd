"""Wrap a module without renaming what a state dict calls its parameters."""

from typing import Any

from torch import Tensor, nn


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
