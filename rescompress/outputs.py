"""What a model gives, in whatever it is wrapped, and whether two models give the same or something of the same kind."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rescompress.errors import UnsupportedModelError


def tensors_in(outputs: Any, depth: int = 3) -> list[Tensor]:
    """Return the tensors in a model's outputs in order, those in plain objects, one in another, and arrays too."""
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif type(leaf).__module__ == "numpy" and hasattr(leaf, "__array__"):
            found.append(torch.as_tensor(leaf))
        elif depth > 0 and hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += tensors_in(vars(leaf), depth - 1)
    return found


def difference(reference: Any, other: Any) -> str | None:
    """Say how far two outputs are apart, or None where they agree to 1e-6 of the size of their largest value."""
    old, new = tensors_in(reference), tensors_in(other)
    if len(old) != len(new):
        return f"{len(new)} tensors instead of {len(old)}"
    for a, b in zip(old, new, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{b.dtype} of shape {tuple(b.shape)} instead of {a.dtype} of {tuple(a.shape)}"
        if a.is_meta or a.numel() == 0:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"other values of type {a.dtype}"
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return "other values than before are infinite or NaN"
        a, b = a[finite].double(), b[finite].double()
        if a.numel() and (a - b).abs().max() > 1e-6 * a.abs().max():
            return f"largest difference {(a - b).abs().max():.3g} in values of size {a.abs().max():.3g}"
    return None


def are_detections(outputs: Any) -> bool:
    """Whether outputs are what detectors give: a dict for each image, whose tensors have a row for each thing found."""
    if not isinstance(outputs, list) or not outputs or not all(isinstance(one, dict) and one for one in outputs):
        return False
    rows = [[value.shape[:1] if isinstance(value, Tensor) else None for value in one.values()] for one in outputs]
    return all(None not in found and len(set(found)) == 1 and found[0] for found in rows)


def compare_kinds(reference: Any, small: Any, image: torch.Size, kinds: str, name: str) -> list[str]:
    """Return what to warn of in the reduced model's outputs; grids and sequences may be shorter, nothing else.

    A map of the size of the image (`image`, its height and width) predicts for every pixel, and keeps its size.

    Raises:
        UnsupportedModelError: they are no replacement for the original's.
    """
    old, new = tensors_in(reference), tensors_in(small)
    # Features at several scales are no predictions, even where the first still have the image's size.
    pyramid = len({tensor.shape[2:] for tensor in old if tensor.ndim == 4}) > 1
    any_number = are_detections(reference) and are_detections(small)
    problem, messages = None, []
    if len(old) != len(new):
        problem = f"{len(new)} tensors instead of {len(old)}"
    for a, b in zip(old, new, strict=False):
        alike = a.shape == b.shape if a.ndim <= 2 else a.ndim == b.ndim and a.shape[0] == b.shape[0]
        if any_number:  # of things found in an image; each of them must look as before
            alike = a.shape[1:] == b.shape[1:]
        if not alike:
            problem = f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        elif a.shape != b.shape and a.shape[2:] == image and not pyramid and not any_number:
            problem = (
                f"shape {tuple(b.shape)} instead of {tuple(a.shape)}, which predicts for every pixel of the image. "
                "Name the module whose map must come back at its old size in the anatomy of a family (its `restored`, "
                "see docs/how-to/add-a-family.md), or compress the part of the network in front of that prediction"
            )
        elif a.shape != b.shape and not any_number:
            messages.append(f"{kinds}: an output has shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        elif _may_be_places(a, image) and not any_number:
            messages.append(
                f"{kinds}: an output of shape {tuple(a.shape)} holds whole numbers; if they are places in a map, they "
                "are those of the smaller map now, and must be scaled up"
            )
        elif not a.is_meta and a.is_floating_point() and bool(a.isfinite().all()) and not bool(b.isfinite().all()):
            problem = "infinite or NaN values where the original has none"
    if problem is not None:
        raise UnsupportedModelError(f"{kinds} gives outputs of another kind on this {name}: {problem}")
    if any(tensor.is_meta for tensor in old):
        messages.append(f"this {name} is on the meta device, so only shapes were checked, not values")
    return messages


def _may_be_places(output: Tensor, image: torch.Size) -> bool:
    """Whether an output may say where something is: whole numbers, several for each image, and no map of classes."""
    whole = not output.is_floating_point() and not output.is_complex() and output.dtype != torch.bool
    return whole and output.ndim >= 2 and output.shape[-2:] != image


def refuse_empty_outputs(reference: Any, name: str) -> None:
    """Raise where the model's own outputs can prove nothing.

    Raises:
        UnsupportedModelError: one of them holds no finite value.
    """
    for index, output in enumerate(tensors_in(reference)):
        if not output.is_meta and output.numel() > 0 and not bool(output.isfinite().any()):
            raise UnsupportedModelError(
                f"output {index} of this {name}, of shape {tuple(output.shape)}, holds no finite value for the example "
                "input, so nothing can be proved with it; give an example_input like real images, and see that the "
                "weights are finite and do not overflow their type"
            )
