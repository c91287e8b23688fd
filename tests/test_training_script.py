"""scripts/bench/training.py: measured memory and time of a training step stand beside the predicted, with ratios."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rescompress.measure._peak import reset_peak

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("one_thread", "seeded")]

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "training.py"


@pytest.mark.skipif(not reset_peak(), reason="this system does not forget a peak of memory")
def test_ratios_of_measured_to_predicted_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    # In this process: to import everything in another one for each scale takes longer than all the rest.
    script.main.__globals__["measured_memory"] = lambda name, scale, options: script.own_memory(
        script.Step(name, scale, options.batch, options.device)
    )
    arguments = "--models test_resnet --scales 1 0.5 --batch 2 --rounds 1 --threads 1"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])

    script.main()

    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    first, half = (dict(zip(table[0], row, strict=True)) for row in table[1:])
    assert (first["scale"], half["scale"]) == ("1", "0.5")
    assert (first["time measured / predicted"], first["time ratio"]) == ("1.00", "1.000")
    expected = float(half["time ratio"]) / float(half["MAC ratio"])
    assert float(half["time measured / predicted"]) == pytest.approx(expected, abs=0.01 + 0.005 * expected)
    expected = float(half["measured MB"]) / float(half["predicted live MB"])
    assert float(half["memory measured / predicted"]) == pytest.approx(expected, rel=0.3)  # whole MB, few of them
