"""Measure any `nn.Module`: MACs, parameters, live activations, real memory and latency; knows nothing of specs."""

from rescompress.measure.crosscheck import CrossCheck, crosscheck_macs
from rescompress.measure.latency import Latency, SpeedUp, time_models
from rescompress.measure.macs import MacCount, ModuleMacs, count_macs, parameter_count
from rescompress.measure.memory import live_activation_bytes, weight_bytes
from rescompress.measure.peak import PeakMemory, peak_memory
from rescompress.measure.report import Comparison, Report
from rescompress.measure.run import compare, measure
from rescompress.measure.training import count_training_macs

__all__ = [
    "Comparison",
    "CrossCheck",
    "Latency",
    "MacCount",
    "ModuleMacs",
    "PeakMemory",
    "Report",
    "SpeedUp",
    "compare",
    "count_macs",
    "count_training_macs",
    "crosscheck_macs",
    "live_activation_bytes",
    "measure",
    "parameter_count",
    "peak_memory",
    "time_models",
    "weight_bytes",
]
