"""Latency: quartiles, turns, budgets, and models left as they were."""

import itertools
import time

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rescompress.errors import InputError, MeasureError
from rescompress.measure import Latency, SpeedUp, time_models
from rescompress.measure.latency import MAX_RUNS, MIN_RUNS, quartiles


class Sleeper(nn.Module):
    """Sleeps for a known time and writes its name in a log that all sleepers share."""

    def __init__(self, name: str = "", seconds: float = 0.0, log: list[str] | None = None) -> None:
        super().__init__()
        self.name, self.seconds, self.log = name, seconds, [] if log is None else log
        self.seen: list[tuple[int, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        self.seen.append((x.shape[0], self.training, torch.is_inference_mode_enabled()))
        time.sleep(self.seconds)
        return x


def test_quartiles_are_numpys() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 10.0, 7.0]
    expected = torch.quantile(torch.tensor(values), torch.tensor([0.25, 0.5, 0.75]))
    assert_close(torch.tensor(quartiles(values)), expected)
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_a_known_time_is_found() -> None:
    timed, _ = time_models({"m": Sleeper(seconds=0.02)}, torch.zeros(1, 2), batch_sizes=(1,), budget_s=0.05)
    (latency,) = timed["m"]
    assert latency.runs == MIN_RUNS
    assert latency.min_ms >= 20
    assert latency.min_ms <= latency.q1_ms <= latency.median_ms <= latency.q3_ms


def test_models_take_turns() -> None:
    log: list[str] = []
    models = {"a": Sleeper("a", 0.001, log), "b": Sleeper("b", 0.001, log)}
    timed, _ = time_models(models, torch.zeros(1, 2), batch_sizes=(1,), budget_s=0.01)
    rounds = timed["a"][0].runs
    assert timed["b"][0].runs == rounds >= MIN_RUNS
    assert log[-2 * rounds :] == ["a", "b"] * rounds


def test_every_batch_size_is_run_in_inference_and_evaluation_mode() -> None:
    model = Sleeper().train()
    timed, _ = time_models({"m": model}, torch.zeros(2, 2), batch_sizes=(1, 4), budget_s=0.001)
    assert [latency.batch_size for latency in timed["m"]] == [1, 4]
    assert set(model.seen) == {(1, False, True), (4, False, True)}
    assert model.training


def test_the_budget_bounds_the_runs() -> None:
    start = time.perf_counter()
    timed, _ = time_models({"m": nn.Identity()}, torch.zeros(1), batch_sizes=(1,), budget_s=0.05)
    assert MIN_RUNS <= timed["m"][0].runs <= MAX_RUNS
    assert time.perf_counter() - start < 5


class BatchOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 6)


def test_a_refused_batch_size_is_a_note() -> None:
    timed, notes = time_models({"m": BatchOne()}, torch.zeros(1, 6), batch_sizes=(1, 8), budget_s=0.001)
    assert [latency.batch_size for latency in timed["m"]] == [1]
    assert any("batch 8 left out: RuntimeError: shape '[1, 6]' is invalid" in note for note in notes)
    with pytest.raises(MeasureError, match="batch 8 left out"):
        time_models({"m": BatchOne()}, torch.zeros(1, 6), batch_sizes=(8,), budget_s=0.001)


class Images(nn.Module):
    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.stack(images).sum()


def test_a_list_of_images_is_timed_as_it_is() -> None:
    timed, notes = time_models({"m": Images()}, ([torch.zeros(3, 4, 4)] * 2,), budget_s=0.001)
    assert len(timed["m"]) == 1
    assert any("input as it is" in note for note in notes)


class Caching(nn.Module):
    """Replaces one buffer, writes into another and draws random numbers, even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced: Tensor
        self.written: Tensor
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("written", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = x + torch.rand(2)
        self.written += 1
        return x


def test_buffers_and_random_state_come_back() -> None:
    model = Caching()
    state = torch.get_rng_state()
    time_models({"m": model}, torch.ones(1, 2), batch_sizes=(1,), budget_s=0.001)
    assert_close(model.replaced, torch.zeros(2))
    assert not model.replaced.is_inference()
    assert_close(model.written, torch.zeros(2))
    assert_close(torch.get_rng_state(), state)


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_must_be_positive(budget_s: float) -> None:
    with pytest.raises(InputError, match="budget_s must be a positive number"):
        time_models({"m": nn.Identity()}, torch.zeros(1), budget_s=budget_s)


def test_speed_up_holds_under_drift() -> None:
    # The machine gets slower from round to round; each pair keeps the ratio 2.
    drift = list(itertools.accumulate([1.0] * 9))
    speed_up = SpeedUp.between(Latency.from_times(1, [2 * t for t in drift]), Latency.from_times(1, drift))
    assert (speed_up.median, speed_up.q1, speed_up.q3) == (2.0, 2.0, 2.0)
