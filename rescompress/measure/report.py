"""What was measured, as raw numbers in frozen data, and the tables that show it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rescompress.measure.latency import Latency, SpeedUp
from rescompress.measure.macs import ModuleMacs
from rescompress.measure.peak import PeakMemory

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """What one model costs. Numbers are raw; None is what was not asked for or could not be measured (see `notes`).

    Attributes:
        name: what the model is called in tables
        input_shapes: of the example input; MACs, activations and measured memory are for all of its batch
        device: where the model is
        dtype: of its first floating-point parameter
        macs: multiply-accumulates of one pass; FLOPs are twice as many
        uncounted: (operator, calls) of what may hide matrix products that `macs` lacks
        parameters: how many, shared ones once
        weight_bytes: of the storages behind parameters and buffers
        inference_live_bytes: peak of live activations of a forward pass
        training_live_bytes: peak of live activations of a forward and a backward pass
        peak: memory that a pass really took
        latencies: by batch size
        modules: costs by module
        notes: what could not be measured, and why
        torch_version: that measured
        threads: that torch computed with on the CPU
    """

    name: str
    input_shapes: tuple[tuple[int, ...], ...]
    device: str
    dtype: str
    macs: int
    uncounted: tuple[tuple[str, int], ...]
    parameters: int
    weight_bytes: int
    inference_live_bytes: int | None
    training_live_bytes: int | None
    peak: PeakMemory | None
    latencies: tuple[Latency, ...]
    modules: tuple[ModuleMacs, ...]
    notes: tuple[str, ...]
    torch_version: str
    threads: int

    def to_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Return plain data for JSON; with `full`, every single pass and every module too."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists, as JSON will give them back
        data["uncounted"] = dict(self.uncounted)
        if not full:
            del data["modules"]
            for latency in data["latencies"]:
                del latency["times_ms"]
        return data

    def to_json(self, *, full: bool = False) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(full=full), indent=2)

    def to_markdown(self) -> str:
        """Return a table of quantities and values, and the notes under it."""
        rows = [(quantity.label, quantity.text) for quantity in _quantities(self)]
        return _markdown(("", self.name), rows, _remarks(self))

    def table(self) -> "Table":
        """Return the table for a terminal, to be printed by rich."""
        rows = [(quantity.label, quantity.text) for quantity in _quantities(self)]
        return _terminal(("", self.name), rows, _remarks(self))

    def modules_markdown(self, depth: int | None = None) -> str:
        """Return a table of the modules, down to `depth` names below the model."""
        return _markdown(_MODULE_HEADER, list(_module_rows(self, depth)), [])

    def modules_table(self, depth: int | None = None) -> "Table":
        """Return the table of the modules for a terminal, down to `depth` names below the model."""
        return _terminal(_MODULE_HEADER, list(_module_rows(self, depth)), [])


@dataclass(frozen=True)
class Comparison:
    """Two models side by side, timed in turn in one process.

    Attributes:
        before: the original
        after: the compressed model
        speed_ups: by batch size
    """

    before: Report
    after: Report
    speed_ups: tuple[SpeedUp, ...]

    def ratios(self) -> dict[str, float]:
        """Return after / before of each quantity that both have; for latency, that of the paired passes."""
        found = {}
        for old, new in self._pairs():
            ratio = self._ratio(old, new)
            if ratio is not None:
                found[old.key] = ratio
        return found

    def to_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Return plain data for JSON; with `full`, every single pass and every module too."""
        return {
            "before": self.before.to_dict(full=full),
            "after": self.after.to_dict(full=full),
            "ratios": self.ratios(),
            "speed_ups": [asdict(speed_up) for speed_up in self.speed_ups],
        }

    def to_json(self, *, full: bool = False) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(full=full), indent=2)

    def to_markdown(self) -> str:
        """Return a table of before => after (ratio), and the notes under it."""
        return _markdown(self._header(), list(self._rows()), self._remarks())

    def table(self) -> "Table":
        """Return the table for a terminal, to be printed by rich."""
        return _terminal(self._header(), list(self._rows()), self._remarks())

    def _header(self) -> tuple[str, ...]:
        return ("", f"{self.before.name} => {self.after.name}", "ratio")

    def _pairs(self) -> Iterator[tuple["_Quantity", "_Quantity"]]:
        after = {quantity.key: quantity for quantity in _quantities(self.after)}
        for quantity in _quantities(self.before):
            if quantity.key in after:
                yield quantity, after[quantity.key]

    def _ratio(self, old: "_Quantity", new: "_Quantity") -> float | None:
        for speed_up in self.speed_ups:
            if old.key == f"latency_batch_{speed_up.batch_size}":
                return 1 / speed_up.median
        return new.value / old.value if old.value else None

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for old, new in self._pairs():
            ratio = self._ratio(old, new)
            shown = "" if ratio is None else f"(x{ratio:.3f})"
            yield old.label, f"{old.text} => {new.text}", shown

    def _remarks(self) -> list[str]:
        remarks = [f"{self.before.name}: {remark}" for remark in _remarks(self.before)]
        after = [f"{self.after.name}: {remark}" for remark in _remarks(self.after)]
        shared = set(_remarks(self.before)) & set(_remarks(self.after))
        own = [line for line in remarks + after if line.partition(": ")[2] not in shared]
        return [*(remark for remark in _remarks(self.before) if remark in shared), *own]


@dataclass(frozen=True)
class _Quantity:
    key: str
    label: str
    value: float
    text: str


def _quantities(report: Report) -> Iterator[_Quantity]:
    yield _Quantity("macs", "MACs", report.macs, format_count(report.macs))
    yield _Quantity("parameters", "parameters", report.parameters, format_count(report.parameters))
    memory = [
        ("weight_bytes", "weights", report.weight_bytes),
        ("inference_live_bytes", "live activations, inference", report.inference_live_bytes),
        ("training_live_bytes", "live activations, training step", report.training_live_bytes),
    ]
    if report.peak is not None:
        memory += [
            ("peak_load_bytes", "measured memory, loading", report.peak.load_bytes),
            ("peak_run_bytes", "measured memory, running", report.peak.run_bytes),
            ("peak_reserved_bytes", "measured memory, reserved", report.peak.reserved_bytes),
        ]
    for key, label, value in memory:
        if value is not None:
            yield _Quantity(key, label, value, format_bytes(value))
    for latency in report.latencies:
        spread = f"{latency.q1_ms:.4g} to {latency.q3_ms:.4g}"
        yield _Quantity(
            f"latency_batch_{latency.batch_size}",
            f"latency, batch {latency.batch_size} (quartiles)",
            latency.median_ms,
            f"{latency.median_ms:.4g} ms ({spread})",
        )


def _remarks(report: Report) -> list[str]:
    remarks = list(report.notes)
    if report.uncounted:
        listed = ", ".join(f"{name} ({calls} calls)" for name, calls in report.uncounted)
        remarks.append(f"not in the MACs: {listed}")
    return remarks


def format_count(value: float) -> str:
    """Write a number with three decimals and k, M, G or T: 4.089 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:g}"


def format_bytes(value: float) -> str:
    """Write bytes with two decimals in powers of 1000: 11.04 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:g} B"


_MODULE_HEADER = ("module", "type", "MACs", "share", "parameters", "output")


def _module_rows(report: Report, depth: int | None) -> Iterator[tuple[str, ...]]:
    for module in report.modules:
        level = module.fqn.count(".") + 1 if module.fqn else 0
        if depth is None or level <= depth:
            yield (
                module.fqn or "(model)",
                module.kind,
                format_count(module.macs),
                f"{module.macs / report.macs:.1%}" if report.macs else "",
                format_count(module.parameters),
                "x".join(str(side) for side in module.output_shape or ()),
            )


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], remarks: list[str]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(header) - 1)
    notes = [f"- {remark}" for remark in remarks]
    return "\n".join([line(header), rule, *(line(row) for row in rows), *([""] if notes else []), *notes]) + "\n"


def _terminal(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], remarks: list[str]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption=escape("\n".join(remarks)) if remarks else None, caption_justify="left")
    for index, title in enumerate(header):
        table.add_column(escape(title), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
