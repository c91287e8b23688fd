"""What every low-bit layer promises: ways to compute it, a state dict that any machine reads, and a form for files."""

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from rescompress.errors import RescompressError, one_line


class KernelError(RescompressError, RuntimeError):
    """A layer cannot hold its weight as a kernel reads it, and the message says why."""


class LowBits(nn.Module):
    """A layer with low-bit weights that can be computed in several ways.

    Some kernels read the weight in an order of their own, which belongs to this machine. The weight is then held in
    that order alone, never twice; state dicts, pickles and `for_export` give the plain order, which any machine reads.

    Attributes:
        KERNELS: the ways to compute it; the first is the reference that the others must agree with, and of those about
            as fast the last is taken
        OWN_ORDER: those of them that hold the weight in an order of this machine, and the type of device they run on
        kernel: the one in use; `use` changes it
        portable: the best of the others, which `for_export` changes to where the kernel in use is among OWN_ORDER
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("reference",)
    OWN_ORDER: ClassVar[dict[str, str]] = {}
    kernel: str
    portable: str
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = self.portable = self.KERNELS[0]

    def use(self, kernel: str) -> None:
        """Compute with this kernel from now on, with the weight in the order that it reads.

        Raises:
            KernelError: this machine, or the weight's shape or device, does not have the kernel; nothing has changed.
            ValueError: no such kernel.
        """
        if kernel not in self.KERNELS:
            raise ValueError(f"{type(self).__name__} has no kernel {kernel!r}; it has {', '.join(self.KERNELS)}")
        if kernel == self.kernel:
            return
        if kernel in self.OWN_ORDER or self.kernel in self.OWN_ORDER:
            plain = self.plain_weight()
            needed, found = self.OWN_ORDER.get(kernel, ""), plain.device.type
            if needed not in ("", found):
                raise KernelError(f"kernel {kernel!r} of {type(self).__name__} is for {needed}, its weight on {found}")
            try:
                self._hold(plain, kernel)
            except RuntimeError as error:  # torch's own: this shape, processor or build lacks the operator
                raise KernelError(f"{type(self).__name__} cannot use {kernel!r}: {one_line(error)}") from error
        self.kernel = kernel

    def twin(self, kernel: str) -> Self:
        """Return a layer that computes with another kernel and shares all that it can with this one.

        Raises:
            KernelError: this machine, or the weight's shape or device, does not have the kernel.
        """
        other = type(self).__new__(type(self))
        vars(other).update({**vars(self), "_buffers": dict(self._buffers), "_modules": dict(self._modules)})
        other.use(kernel)
        return other

    def plain_weight(self) -> Tensor:
        """Return the weight in the order that any machine reads."""
        return self.weight

    def for_export(self, *, scripted: bool = False) -> nn.Module:
        """Return the layer as a file for any machine should hold it: this one where its weight is in plain order.

        Args:
            scripted: whether the file is TorchScript, which can put the weight in order again when it is loaded.
        """
        return self.twin(self.portable) if self.kernel in self.OWN_ORDER else self

    def _hold(self, plain: Tensor, kernel: str) -> None:
        """Keep a plain weight, in the order that `kernel` reads, instead of the one before.

        Layers with an OWN_ORDER put it in order here.

        Raises:
            RuntimeError: that cannot be done here; nothing has changed.
        """
        self.weight = plain

    def _plainly(self, action: Any) -> Any:
        """Do something while the weight is in plain order, and put it back in order where that is still possible."""
        kernel = self.kernel
        if kernel in self.OWN_ORDER:
            self.use(self.portable)
        try:
            return action()
        finally:
            self._use_if_possible(kernel)

    def _use_if_possible(self, kernel: str) -> None:
        try:
            self.use(kernel)
        except KernelError:  # another device, or another machine's pickle
            self.use(self.portable)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self.kernel in self.OWN_ORDER:  # to another device or type: an order means nothing there
            self._plainly(lambda: super(LowBits, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        else:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        plain = self.twin(self.portable) if self.kernel in self.OWN_ORDER else self
        return {**vars(plain), "kernel": self.kernel}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kernel = state["kernel"]
        plainly = state["portable"] if kernel in self.OWN_ORDER else kernel
        super().__setstate__({**state, "kernel": plainly})  # type: ignore[no-untyped-call]
        self._use_if_possible(kernel)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel in self.OWN_ORDER:
            destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._plainly(lambda: super(LowBits, self)._load_from_state_dict(state_dict, prefix, *args))
