"""Write the support matrix from the results of scripts/coverage.py."""

import datetime
import json
import platform
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rescompress.files import write_whole

METHODS = ("stem_resize", "input_resize", "patch_resize", "token_pool", "token_merge", "quantize")

Row = dict[str, Any]

SHOWN = {"default": "scale=0.5"}

HEADER = """# Support matrix

Which method works on which architecture, and the MACs (multiply-accumulates) before and after. Written by

    python scripts/coverage.py --write

on {date}, Python {python}, {versions}.

Weights are random: the matrix proves that outputs are the original's at zero reduction, that the model runs at the
reduced size and that cost falls, never accuracy. {values} of {models} models were compared in values; the others, which
are too large for that, in shapes on the meta device. The heads of R-CNNs run on 50 regions and 20 things found, before
and after; with trained weights their cost hangs on the image.

The steps: `scale=0.5` is what `compress(model, scale=0.5)` does; stem_resize, input_resize and patch_resize have
`scale=0.5`; token_pool a stride of 2 after half of the blocks; token_merge `keep=0.5`; quantize is w8, whose MACs are
counted before it; it needs values, and is left out (-) on the meta device. A number is the MACs after, one in brackets
a refusal for the reason of that number, listed at the [end](#reasons).
"""


def write_matrix(rows: list[Row], versions: dict[str, str | None], root: Path) -> list[Path]:
    """Write docs/reference/support-matrix.md, and what `rescompress families` prints of it."""
    rows = [row for row in rows if row["method"] != "build"]
    reasons = _Reasons()
    by_model: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (row["library"], row["model"])):
        by_model[row["library"], row["model"]][row["method"]] = row
    proofs = [next(iter(model.values()))["proof"] for model in by_model.values()]
    text = HEADER.format(
        date=datetime.date.today().isoformat(),
        python=platform.python_version(),
        versions=", ".join(f"{name} {version}" for name, version in versions.items() if version),
        values=proofs.count("values"),
        models=len(proofs),
    )
    text += "\n## Families\n\nHow many of the models below each method takes.\n\n" + _families(by_model)
    for library in dict.fromkeys(name for name, _ in by_model):
        models = {name: model for (of, name), model in by_model.items() if of == library}
        text += f"\n## {library}\n\n" + _models(models, reasons)
    text += "\n## Reasons\n\n" + reasons.listed()
    matrix = root / "docs" / "reference" / "support-matrix.md"
    data = root / "rescompress" / "cli" / "support.json"
    write_whole(matrix, text)
    write_whole(data, json.dumps(support(by_model), indent=1) + "\n")
    return [matrix, data]


def support(by_model: dict[tuple[str, str], dict[str, Row]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return for each family and method the number of models that were tried and for how many of them it works."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for model in by_model.values():
        for method, row in model.items():
            counts = found.setdefault(row["family"] or "none", {}).setdefault(method, {"works": 0, "of": 0})
            counts["works"] += row["outcome"] == "works"
            counts["of"] += row["outcome"] != "left out"
    return {family: found[family] for family in sorted(found)}


def _families(by_model: dict[tuple[str, str], dict[str, Row]]) -> str:
    lines = [f"| family | scale=0.5 | {' | '.join(METHODS)} |", "|---|" + "---:|" * (len(METHODS) + 1)]
    for family, methods in support(by_model).items():
        cells = []
        for method in ("default", *METHODS):
            counts = methods.get(method, {"works": 0, "of": 0})
            cells.append("-" if not counts["works"] else f"{counts['works']} of {counts['of']}")
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _models(models: dict[str, dict[str, Row]], reasons: "_Reasons") -> str:
    lines = [
        f"| model | family | MACs | scale=0.5 | {' | '.join(METHODS)} |",
        "|---|---|---:|" + "---:|" * (len(METHODS) + 1),
    ]
    for name, model in models.items():
        first = next(iter(model.values()))
        cells = [_cell(model.get(method), reasons) for method in ("default", *METHODS)]
        lines.append(f"| {name} | {first['family'] or '-'} | {_macs(first.get('macs_before'))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, reasons: "_Reasons") -> str:
    if row is None:
        return ""
    if row["outcome"] == "works":
        return _macs(row.get("macs_after")) or "works"
    if row["outcome"] == "left out":
        return "-"
    if row["outcome"] == "failed":
        return "**failed**"
    return f"[{reasons.number(row)}]"


def _macs(macs: int | None) -> str:
    return "" if macs is None else f"{macs / 1e9:.3g} G" if macs >= 1e8 else f"{macs / 1e6:.3g} M"


class _Reasons:
    """Numbers the reasons of refusals; those that differ in a model's own names and numbers only are one."""

    def __init__(self) -> None:
        self.examples: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def number(self, row: Row) -> int:
        """Return the number of the reason of a refusal."""
        general = kind_of_reason(row)
        self.examples.setdefault(general, f"{row['model']}, {SHOWN.get(row['method'], row['method'])}")
        self.counts[general] += 1
        return list(self.examples).index(general) + 1

    def listed(self) -> str:
        """Return all reasons as a list."""
        lines = [
            f"{number}. {reason} ({self.counts[reason]} x, first: {self.examples[reason]})\n"
            for number, reason in enumerate(self.examples, 1)
        ]
        return "".join(lines) or "Nothing was refused.\n"


def kind_of_reason(row: Row) -> str:
    """Return the reason of a refusal without the model's own names and numbers."""
    reason = " ".join(row["detail"].split())
    for name in {row["class"], row["class"].removesuffix("Model")}:
        reason = re.sub(rf"\b(this )?{re.escape(name)}\b", "the model", reason)
    reason = re.sub(r"\b(a|an|this) the model\b", "the model", reason)
    # What follows is said of this kind of network; which one it is stands in the row.
    reason = re.sub(rf"the model is a {re.escape(str(row['family']))}( network)?\b", "the model is another one", reason)
    reason = reason.partition("; it knows ")[0]  # a list of all that a method knows
    reason = re.sub(r"'[^']*'", "'...'", reason)
    reason = re.sub(r"(?<![\w.=])\d+(\.\d+)?(?![\w])", "N", reason)
    return re.sub(r"\b(\w+)=\(?[\d., ]+\)?", r"\1", reason)
