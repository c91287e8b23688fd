"""scripts/coverage.py and the support matrix: it goes on after a kill, shows what fails, and its lists do not lie."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rescompress.cli._cards import support
from rescompress.families import families
from scripts import coverage, coverage_report
from scripts.coverage_models import Subject

ROOT = Path(__file__).parents[1]


def row(name: str, method: str = "default", outcome: str = "works", **more: Any) -> dict[str, Any]:
    """Return a result as a worker gives it."""
    known = {"library": "timm", "model": name, "method": method, "outcome": outcome, "detail": "as it is"}
    return {**known, "class": "Net", "family": "resnet", "proof": "values", "macs_before": 4_000_000_000, **more}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script with models that cost nothing: it returns its exit status and the models that it tried."""
    outcomes: dict[str, str] = {}
    tried: list[str] = []

    def run_all(
        todo: list[tuple[Subject, tuple[str, ...]]], meta: bool, workers: int
    ) -> Iterator[tuple[Subject, list[dict[str, Any]]]]:
        for subject, methods in todo:
            if outcomes.get(subject.name) == "killed":
                raise KeyboardInterrupt
            tried.append(subject.name)
            yield subject, [row(subject.name, method, outcomes.get(subject.name, "works")) for method in methods]

    monkeypatch.setattr(coverage, "run_all", run_all)

    def run(*arguments: str, **now: str) -> tuple[int, list[str]]:
        outcomes.clear()
        outcomes.update(now)
        tried.clear()
        state = str(tmp_path / "state.jsonl")
        monkeypatch.setattr(sys, "argv", ["coverage.py", "--library", "timm", "--state", state, *arguments])
        return coverage.main(), list(tried)

    run.state = tmp_path / "state.jsonl"
    return run


def test_only_takes_some_models(script: Any) -> None:
    assert script("--only", "timm:test_res*") == (0, ["test_resnet", "test_resnet/features"])


def test_only_that_matches_nothing_is_an_error(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("--only", "resent18")
    assert stopped.value.code == 2
    assert "no model's name contains 'resent18'" in capsys.readouterr().err


def test_a_run_goes_on_where_it_was_stopped(script: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        script("--only", "timm:test_*net", test_nfnet="killed")
    whole = script.state.read_text()
    before = [json.loads(line)["model"] for line in whole.splitlines()]
    script.state.write_text(whole + whole.splitlines()[0][:40])  # a line that the kill cut off

    status, tried = script("--only", "timm:test_*net")

    assert status == 0 and "test_nfnet" in tried
    assert not set(tried) & set(before)
    assert script("--only", "timm:test_*net") == (0, [])
    assert script("--only", "timm:test_*net", "--fresh")[1] != []


def test_results_of_another_version_are_not_taken(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script("--only", "timm:test_re*")[1] == ["test_resnet", "test_resnet/features"]
    monkeypatch.setattr(coverage, "state_key", lambda: "another")
    assert script("--only", "timm:test_re*")[1] == ["test_resnet", "test_resnet/features"]


def test_a_failing_case_is_shown_and_is_the_exit_status(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = script("--only", "timm:resnet18", resnet18="failed")
    assert status == 1
    assert "timm:resnet18 default: failed: as it is" in capsys.readouterr().out


def test_a_refusal_is_no_failure(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = script("--only", "timm:resnet18", resnet18="refused")
    assert status == 0
    assert "refused: 7" in capsys.readouterr().out


class Broken(nn.Module):
    """Fails when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Any) -> Any:
        raise KeyError("weights")


def test_a_model_that_does_not_run_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "build", lambda self: Broken())
    found = list(coverage.examine(Subject("timm", "broken"), ("default",), meta=False))
    assert [(one["method"], one["outcome"]) for one in found] == [("build", "failed")]
    assert "KeyError: 'weights'" in found[0]["detail"] and ".py, line" in found[0]["detail"]


def test_examine_tells_what_each_method_does() -> None:
    found = {
        one["method"]: one for one in coverage.examine(Subject("timm", "test_resnet"), coverage.METHODS, meta=True)
    }
    works = {method for method, one in found.items() if one["outcome"] == "works"}
    assert works == {"default", "stem_resize", "input_resize"}
    assert found["quantize"]["outcome"] == "left out"  # it needs values
    assert found["default"]["macs_after"] < 0.35 * found["default"]["macs_before"]
    assert found["token_pool"]["outcome"] == "refused" and "token_pool" in found["token_pool"]["detail"]


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    command = [sys.executable, "scripts/coverage.py", "--only", "timm:test_*net", "--methods", "default"]
    command += ["--workers", "1", "--state", str(state)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    known = [json.loads(line)["model"] for line in state.read_text().splitlines()]
    assert workers and known

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    lines = [json.loads(line)["model"] for line in state.read_text().splitlines()]
    assert lines[: len(known)] == known and len(set(lines)) == len(lines) > len(known)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def children_of(process: int) -> list[int]:
    """Return the children of a process; empty where there is no /proc."""
    tasks = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in tasks.read_text().split()] if tasks.exists() else [os.getpid()]


def test_reasons_that_differ_in_names_and_numbers_only_are_one(tmp_path: Path) -> None:
    def refused(name: str, kind: str, why: str) -> dict[str, Any]:
        return row(name, "token_pool", "refused", detail=why, **{"class": kind})

    rows = [
        row("one", macs_after=1_000_000_000),
        refused("one", "Net", "token_pool stride=2 does not divide the 7 x 7 grid of this Net after block 'a.1'"),
        row("two", macs_after=1_000_000_000),
        refused("two", "Web", "token_pool stride=3 does not divide the 14 x 14 grid of this Web after block 'b.3'"),
    ]
    matrix, data = coverage_report.write_matrix(rows, {"timm": "1"}, tmp_path)
    text = matrix.read_text()
    assert text.count("does not divide") == 1 and "(2 x, first: one, token_pool)" in text
    assert "| one | resnet | 4 G | 1 G |" in text
    assert json.loads(data.read_text()) == {
        "resnet": {"default": {"works": 2, "of": 2}, "token_pool": {"works": 0, "of": 2}}
    }


WITHOUT_ROWS = {
    "hf_dense": "its models are counted with the family of the host inside",
    "timm_features": "extractors are counted with the family that they extract from",
}
"""Families that the matrix has no line for, and why."""


def test_the_matrix_knows_every_family_and_no_other() -> None:
    shipped = {family.name for family in families() if family.describe.__module__.startswith("rescompress.families.")}
    assert set(support()) - {"none"} == shipped - set(WITHOUT_ROWS)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_the_methods_of_a_family_are_those_that_work(family: Any) -> None:
    """What `rescompress families` lists cannot lie: each method works for a model of the matrix, and no other does."""
    if not family.describe.__module__.startswith("rescompress.families."):
        pytest.skip("another test has registered it")
    if family.name in WITHOUT_ROWS:
        pytest.skip(WITHOUT_ROWS[family.name])
    found = support()[family.name]
    # quantize asks nothing of a family, and is not tried on large models
    working = {method for method, counts in found.items() if counts["works"]} - {"default", "quantize"}
    assert working == set(family.methods) - {"quantize"}
    assert found["default"]["works"] == found["default"]["of"]


def test_the_matrix_in_the_documentation_is_that_of_the_command() -> None:
    text = (ROOT / "docs" / "reference" / "support-matrix.md").read_text(encoding="utf-8")
    for family, methods in support().items():
        default = methods["default"]
        shown = f"{default['works']} of {default['of']}" if default["works"] else "-"
        assert f"| {family} | {shown} |" in text
