"""Train and recover compressed models with Lightning: modules, data, callbacks and the command line of the recipes.

The names below are imported on first use, so that `import rescompress.lightning` costs next to nothing.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rescompress.lightning.batches import Batch as Batch
    from rescompress.lightning.checkpoints import AtomicCheckpoints as AtomicCheckpoints
    from rescompress.lightning.checkpoints import LastCheckpoint as LastCheckpoint
    from rescompress.lightning.checkpoints import SpecInCheckpoint as SpecInCheckpoint
    from rescompress.lightning.checkpoints import compress_as_saved as compress_as_saved
    from rescompress.lightning.checkpoints import load_model as load_model
    from rescompress.lightning.classifier import Classifier as Classifier
    from rescompress.lightning.cli import RecipeCLI as RecipeCLI
    from rescompress.lightning.cli import main as main
    from rescompress.lightning.cost import CostMonitor as CostMonitor
    from rescompress.lightning.data._base import ImageData as ImageData
    from rescompress.lightning.data.cityscapes import Cityscapes as Cityscapes
    from rescompress.lightning.data.elpv import ELPV as ELPV
    from rescompress.lightning.data.fashion_mnist import FashionMNIST as FashionMNIST
    from rescompress.lightning.data.folders import ImageFolders as ImageFolders
    from rescompress.lightning.data.medmnist import MedMNIST as MedMNIST
    from rescompress.lightning.data.shards import ImageShards as ImageShards
    from rescompress.lightning.recovery import Distill as Distill
    from rescompress.lightning.recovery import Recalibrate as Recalibrate
    from rescompress.lightning.resolution import ResolutionSchedule as ResolutionSchedule
    from rescompress.lightning.results import Result as Result
    from rescompress.lightning.schedules import WarmupCosine as WarmupCosine
    from rescompress.lightning.schedules import WarmupPoly as WarmupPoly
    from rescompress.lightning.segmenter import Segmenter as Segmenter

_HOME = {
    "AtomicCheckpoints": "checkpoints",
    "Batch": "batches",
    "Cityscapes": "data.cityscapes",
    "Classifier": "classifier",
    "CostMonitor": "cost",
    "Distill": "recovery",
    "ELPV": "data.elpv",
    "FashionMNIST": "data.fashion_mnist",
    "ImageData": "data._base",
    "ImageFolders": "data.folders",
    "ImageShards": "data.shards",
    "LastCheckpoint": "checkpoints",
    "MedMNIST": "data.medmnist",
    "Recalibrate": "recovery",
    "RecipeCLI": "cli",
    "ResolutionSchedule": "resolution",
    "Result": "results",
    "Segmenter": "segmenter",
    "SpecInCheckpoint": "checkpoints",
    "WarmupCosine": "schedules",
    "WarmupPoly": "schedules",
    "compress_as_saved": "checkpoints",
    "load_model": "checkpoints",
    "main": "cli",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("lightning") is None:
        raise ImportError(f"rescompress.lightning.{name} needs lightning; pip install 'rescompress[lightning]'")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
