"""Reports: raw numbers in, the right numbers and ratios out, in every format."""

import dataclasses
import io
import json

import pytest
import torch
from torch import Tensor, nn

from rescompress.errors import MeasureError
from rescompress.measure import Comparison, Latency, PeakMemory, Report, SpeedUp, compare, measure
from rescompress.measure.report import format_bytes, format_count

X = torch.zeros(1, 3, 8, 8)


def _report(name: str, macs: int, times: list[float]) -> Report:
    return Report(
        name=name, input_shapes=((1, 3, 8, 8),), device="cpu", dtype="float32", macs=macs,
        uncounted=(("aten::lstm", 2),), parameters=1500, weight_bytes=6000, inference_live_bytes=11_038_720,
        training_live_bytes=None,
        peak=PeakMemory(1000, 3000, None, "VmHWM"), latencies=(Latency.from_times(1, times),), modules=(),
        notes=(), torch_version="2.15", threads=1,
    )  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    before, after = _report("big", 4_089_000_000, [10, 20, 30]), _report("small", 1_022_250_000, [5, 5, 5])
    return Comparison(before, after, (SpeedUp.between(before.latencies[0], after.latencies[0]),))


def test_numbers_are_written_short() -> None:
    assert [format_count(n) for n in (7, 1500, 4_089_184_256)] == ["7", "1.500 k", "4.089 G"]
    assert [format_bytes(n) for n in (7, 1500, 11_038_720)] == ["7 B", "1.50 kB", "11.04 MB"]


def test_markdown_shows_before_after_and_ratio(comparison: Comparison) -> None:
    lines = comparison.to_markdown().splitlines()
    assert "| MACs | 4.089 G => 1.022 G | (x0.250) |" in lines
    assert "| latency, batch 1 (quartiles) | 20 ms (15 to 25) => 5 ms (5 to 5) | (x0.250) |" in lines
    assert "- not in the MACs: aten::lstm (2 calls)" in lines  # said once for both
    assert not any("training" in line for line in lines)  # not measured, not shown


def test_terminal_table_has_the_same_numbers(comparison: Comparison) -> None:
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(file=io.StringIO(), width=120)
    console.print(comparison.table())
    shown = console.file.getvalue()
    assert "4.089 G => 1.022 G" in shown and "(x0.250)" in shown and "aten::lstm (2 calls)" in shown


def test_json_holds_raw_numbers(comparison: Comparison) -> None:
    data = json.loads(comparison.to_json())
    assert data == comparison.to_dict()
    assert (data["before"]["macs"], data["before"]["inference_live_bytes"]) == (4_089_000_000, 11_038_720)
    assert data["before"]["training_live_bytes"] is None
    assert data["before"]["uncounted"] == {"aten::lstm": 2}
    assert data["ratios"]["macs"] == 0.25
    assert data["speed_ups"][0]["median"] == 4.0
    assert "times_ms" not in data["before"]["latencies"][0]
    assert comparison.to_dict(full=True)["before"]["latencies"][0]["times_ms"] == [10, 20, 30]


def test_measure_reports_all_parts(small: nn.Module) -> None:
    said: list[str] = []
    report = measure(small, X, batch_sizes=(1, 3), budget_s=0.01, progress=said.append)
    assert report.macs == 64 * 8 * 27 + 80
    assert report.parameters == 8 * 27 + 8 + 16 + 90
    assert report.weight_bytes == 4 * (report.parameters + 16) + 8
    assert report.inference_live_bytes == 4 * (3 * 64 + 2 * 8 * 64)
    assert report.training_live_bytes is not None and report.training_live_bytes > report.inference_live_bytes
    assert report.peak is not None and report.peak.run_bytes > 0
    assert [latency.batch_size for latency in report.latencies] == [1, 3]
    assert {row.fqn for row in report.modules} == {"", "conv", "norm", "head"}
    assert said == [
        "counting Small",
        "timing Small at batch 1",
        "timing Small at batch 3",
        "measuring the memory of Small",
    ]
    assert "| conv | Conv2d | 13.824 k |" in report.modules_markdown()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.macs = 0  # type: ignore[misc]
    assert small.training


def test_what_cannot_be_measured_is_none_with_a_note(small: nn.Module) -> None:
    small.hook = lambda x: x  # a lambda cannot be pickled
    report = measure(small.requires_grad_(False), X, latency=False)
    assert report.peak is None and report.training_live_bytes is None
    assert any("no measured peak memory: Small cannot be pickled" in note for note in report.notes)
    assert any("no live activations of a training step" in note for note in report.notes)
    assert report.latencies == ()


class Several(nn.Module):
    """Two outputs in a dict, one argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, times: Tensor) -> dict[str, object]:
        y = self.layer(x)
        return {"one": y, "rest": [y * times, None]}


def test_several_outputs_half_precision_and_keywords() -> None:
    model = Several().bfloat16()
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    report = measure(model, ((x,), {"times": x}), batch_sizes=(4,), budget_s=0.001, peak_memory=False)
    assert (report.macs, report.dtype, report.weight_bytes) == (2 * 16, "bfloat16", 2 * 20)
    assert report.latencies[0].batch_size == 4
    assert not [note for note in report.notes if "busy" not in note]


def test_compare_times_in_turn_and_gives_ratios(small: nn.Module) -> None:
    half = nn.Sequential(nn.AvgPool2d(2), small)
    comparison = compare(small, half, X, batch_sizes=(1,), budget_s=0.01, peak_memory=False)
    assert comparison.ratios()["macs"] == pytest.approx((16 * 8 * 27 + 80) / (64 * 8 * 27 + 80))
    assert comparison.ratios()["parameters"] == 1
    assert comparison.before.latencies[0].runs == comparison.after.latencies[0].runs
    assert comparison.ratios()["latency_batch_1"] == pytest.approx(1 / comparison.speed_ups[0].median)


def test_two_models_need_two_names(small: nn.Module) -> None:
    with pytest.raises(MeasureError, match="two names"):
        compare(small, small, X, names=("a", "a"))
