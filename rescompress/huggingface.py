"""Let transformers load what was saved compressed: `import rescompress.huggingface`, then `from_pretrained` as always.

A compressed model keeps its spec in its config (`quantization_config`, written by compress), and its weights have their
compressed shapes. On the way back the original is built without weights, takes the compressed shapes, is filled, and
is compressed as the spec says. transformers knows this by the name of the method, which importing this file registers.
"""

from dataclasses import replace
from typing import Any

import torch
import transformers
import transformers.quantizers.auto
import transformers.utils.quantization_config
from torch import Tensor, nn

from rescompress import surgery
from rescompress.anatomy import Anatomy, inside
from rescompress.compress import Record, carry_out
from rescompress.errors import InputError, SpecError, UnsupportedModelError
from rescompress.families import describe
from rescompress.families._hf_config import METHOD, is_pretrained, part, write
from rescompress.families.hf_vit import UNCOMPRESSED
from rescompress.inputs import default_args
from rescompress.spec import Spec

_hf: Any = transformers  # half of it has no types
_Quantizer: Any = _hf.quantizers.base.HfQuantizer
_Config: Any = _hf.utils.quantization_config.QuantizationConfigMixin


def write_config(model: nn.Module) -> None:
    """Write the specs of all compressed parts of a model into its config, so that `save_pretrained` keeps them.

    compress does so for the model that it is given; this is for a model whose tower was compressed on its own.

    Raises:
        UnsupportedModelError: it is no model of transformers.
        SpecError: nothing in it is compressed.
    """
    if not is_pretrained(model):
        raise UnsupportedModelError(f"{type(model).__name__} is no model of transformers and has no config to write to")
    records = {name: getattr(module, "_rescompress", None) for name, module in model.named_modules()}
    parts = [part(name, one.spec, one.anatomy) for name, one in records.items() if isinstance(one, Record)]
    if not parts:
        raise SpecError(f"nothing in this {type(model).__name__} has been compressed")
    write(model, parts)


def uncompressed(config: Any) -> Any:
    """Set a config, in place, back to the one that the original is built with, and return it."""
    present = getattr(config, "quantization_config", None)
    if isinstance(present, dict) and present.get("quant_method") == METHOD:
        del config.quantization_config
    return _uncompressed(config)


@_hf.quantizers.auto.register_quantization_config(METHOD)
class RescompressConfig(_Config):  # type: ignore[misc]
    """What a config says of a compressed model.

    Attributes:
        parts: for each compressed part its module, spec, example size and host
    """

    def __init__(self, parts: list[dict[str, Any]], **other: Any) -> None:
        self.quant_method = METHOD
        self.parts = parts

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in config.json."""
        return {"quant_method": METHOD, "parts": self.parts}


@_hf.quantizers.auto.register_quantizer(METHOD)
class RescompressQuantizer(_Quantizer):  # type: ignore[misc]
    """Builds the compressed model while transformers loads it."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.originals: dict[str, Tensor] = {}
        if not self.pre_quantized:
            raise InputError("load the model as it is, then compress it; a spec cannot be given to from_pretrained")

    def update_attn_implementation(self, config: Any) -> Any:
        """Give the config back the numbers that the original is built with; called before it is built."""
        return _uncompressed(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if hasattr(model.config, UNCOMPRESSED):
            raise InputError(f"transformers {_hf.__version__} is too old to load compressed models; take 5.23")
        clone = surgery.clone_shared(model, "meta")
        _carry_out(clone, self.quantization_config.parts)
        own = model.state_dict()
        for name, tensor in clone.state_dict().items():
            if name in own and tensor.shape != own[name].shape:
                self.originals[name] = surgery.get_parameter(model, name).detach()
                surgery.set_parameter(model, name, torch.empty_like(tensor, device="meta"))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        state = model.state_dict()
        for name, original in self.originals.items():
            surgery.set_parameter(model, name, original)
        _carry_out(model, self.quantization_config.parts)
        with torch.no_grad():
            model.load_state_dict(state, assign=True)
        # It is a model in full precision: nothing that transformers forbids quantized ones holds for it.
        self.remove_quantization_config(model)
        for module in model.modules():
            if is_pretrained(module):
                vars(module.config).pop("_is_quantized", None)
        write(model, self.quantization_config.parts)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained."""
        return True


def _uncompressed(config: Any) -> Any:
    """Set `patch_size` back, here and in the configs inside."""
    for value in list(vars(config).values()):
        if isinstance(value, _hf.PreTrainedConfig):
            _uncompressed(value)
    if hasattr(config, UNCOMPRESSED):
        config.patch_size = getattr(config, UNCOMPRESSED)
        delattr(config, UNCOMPRESSED)
    return config


def _carry_out(model: nn.Module, parts: list[dict[str, Any]]) -> None:
    for one in parts:
        module = surgery.get(model, one["module"])
        carry_out(module, Spec.from_dict(one["spec"]), _anatomy(module, one))


def _anatomy(module: nn.Module, one: dict[str, Any]) -> Anatomy:
    """Describe the uncompressed module, by the host inside it where that has a family of its own."""
    size = (int(one["input_size"][0]), int(one["input_size"][1]))
    found = surgery.get(module, one["host"])
    try:
        args, kwargs = default_args(found, size)
        anatomy = describe(found, tuple(image.to("meta") for image in args), kwargs)
    except UnsupportedModelError:
        # DETR and its kin compute with values, which a model whose weights are still to come does not have. Where its
        # parts are does not hang on them, so zeros do.
        stand_in = surgery.clone_shared(found, "meta").to_empty(device="cpu")
        with torch.device("cpu"), torch.no_grad():  # transformers loads under the meta device
            for tensor in [*stand_in.parameters(), *stand_in.buffers()]:
                tensor.zero_()
            anatomy = describe(stand_in, *default_args(stand_in, size))
    if one["host"]:
        anatomy = inside(anatomy, one["host"])
    outer = one.get("outer_size")
    return replace(anatomy, multiple=int(one["multiple"]), outer_size=outer and (int(outer[0]), int(outer[1])))
