"""What compress writes into the config of a Hugging Face model, so that `save_pretrained` keeps the spec.

Plain data in the place that transformers reads before it loads weights, `quantization_config`: nothing of transformers
is imported here. `rescompress.huggingface` reads it back.
"""

from typing import Any

from torch import nn

from rescompress.anatomy import Anatomy
from rescompress.errors import ExportError
from rescompress.families._base import class_names
from rescompress.spec import Spec, Stage

METHOD = "rescompress"
"""Value of `quant_method` in the config."""

_BASES = ("transformers.modeling_utils.PreTrainedModel", "transformers.PreTrainedModel")


class CannotSave:
    """Stands in for `save_pretrained` of a model whose compressed form transformers could not load again."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise ExportError(f"save_pretrained cannot store this model: {self.reason}")


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers, with a config and `save_pretrained`."""
    return any(base in class_names(model) for base in _BASES)


def forbid_saving_folded(model: nn.Module) -> None:
    """Put in the way of saving models of transformers, or one around a folded part, what could not be loaded again."""
    for module in model.modules():
        if is_pretrained(module):
            module.save_pretrained = CannotSave(  # type: ignore[assignment]
                "it has been folded for deployment, so its convolution has another kernel than its config builds; "
                "save the model that it was folded from, or write a file with rescompress.export"
            )


def part(module: str, spec: Spec, anatomy: Anatomy) -> dict[str, Any]:
    """Return what is needed to do the same to the same model again: plain data.

    Args:
        module: FQN of what was compressed in the model that is saved; the empty name is that model itself
        spec: all steps carried out
        anatomy: of the compressed module
    """
    return {
        "module": module,
        "spec": spec.to_dict(),
        "input_size": list(anatomy.input_size),
        "outer_size": anatomy.outer_size and list(anatomy.outer_size),
        "host": anatomy.host,
        "multiple": anatomy.multiple,
    }


def write(model: Any, parts: list[dict[str, Any]]) -> None:
    """Write what was done into the model's config, or put in the way of saving what could not be loaded again."""
    present = getattr(model.config, "quantization_config", None)
    method = present.get("quant_method") if isinstance(present, dict) else getattr(present, "quant_method", None)
    reason = None
    if present is not None and method != METHOD:
        reason = "its config is taken by another quantization; compress the model before it is quantized, or use export"
    elif any(step.stage >= Stage.PRECISION for one in parts for step in Spec.from_dict(one["spec"])):
        reason = "it holds layers of low precision; save it before quantize, or write a file with rescompress.export"
    if reason is not None:
        model.save_pretrained = CannotSave(reason)
        return
    model.config.quantization_config = {"quant_method": METHOD, "parts": parts}


def lines(spec: Spec, anatomy: Anatomy) -> tuple[str, ...]:
    """Return what the log says of the image processor: the resize happens inside the model."""
    if all(step.stage > Stage.RESOLUTION for step in spec):
        return ()
    height, width = anatomy.example_size
    return (f"image processor: goes on as before, the model is still given {height} x {width} pixels",)
