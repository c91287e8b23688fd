"""Win back accuracy with data: BatchNorm statistics without labels, and distillation from the uncompressed original."""

from rescompress.recover.distillation import Distillation
from rescompress.recover.loop import recover
from rescompress.recover.recalibration import recalibrate

__all__ = ["Distillation", "recalibrate", "recover"]
