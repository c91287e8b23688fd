"""rescompress: make vision models cheaper by letting them compute on fewer positions.

The names below are imported on first use, so that `import rescompress` costs next to nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rescompress.compress import compress as compress
    from rescompress.compress import compress_ as compress_
    from rescompress.compress import spec_of as spec_of
    from rescompress.errors import ExportError as ExportError
    from rescompress.errors import InputError as InputError
    from rescompress.errors import MeasureError as MeasureError
    from rescompress.errors import RescompressError as RescompressError
    from rescompress.errors import RescompressWarning as RescompressWarning
    from rescompress.errors import SpecError as SpecError
    from rescompress.errors import UnsupportedModelError as UnsupportedModelError
    from rescompress.export import export as export
    from rescompress.export import load as load
    from rescompress.export import read_spec as read_spec
    from rescompress.fold import fold as fold
    from rescompress.measure import compare as compare
    from rescompress.measure import measure as measure
    from rescompress.methods.input_resize import InputResize as InputResize
    from rescompress.methods.patch_resize import PatchResize as PatchResize
    from rescompress.methods.quantize import Quantize as Quantize
    from rescompress.methods.stem_resize import StemResize as StemResize
    from rescompress.methods.token_merge import TokenMerge as TokenMerge
    from rescompress.methods.token_pool import TokenPool as TokenPool
    from rescompress.recover import Distillation as Distillation
    from rescompress.recover import recalibrate as recalibrate
    from rescompress.recover import recover as recover
    from rescompress.spec import Spec as Spec
    from rescompress.spec import Stage as Stage
    from rescompress.spec import Step as Step

__version__ = "0.1.0"

_HOME = {
    "compress": "compress",
    "compress_": "compress",
    "spec_of": "compress",
    "ExportError": "errors",
    "InputError": "errors",
    "MeasureError": "errors",
    "RescompressError": "errors",
    "RescompressWarning": "errors",
    "SpecError": "errors",
    "UnsupportedModelError": "errors",
    "export": "export",
    "load": "export",
    "read_spec": "export",
    "fold": "fold",
    "compare": "measure",
    "measure": "measure",
    "InputResize": "methods.input_resize",
    "PatchResize": "methods.patch_resize",
    "Quantize": "methods.quantize",
    "StemResize": "methods.stem_resize",
    "TokenMerge": "methods.token_merge",
    "TokenPool": "methods.token_pool",
    "Distillation": "recover",
    "recalibrate": "recover",
    "recover": "recover",
    "Spec": "spec",
    "Stage": "spec",
    "Step": "spec",
}

__all__ = sorted(_HOME)


class _Package(ModuleType):
    """Keeps `rescompress.compress` the function: importing the file of the same name would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
