"""What the methods' own docstrings say, as tables."""

import dataclasses
import importlib.resources
import inspect
import json
import re
import sys
from typing import Any

from rescompress.cli import console
from rescompress.families import families
from rescompress.spec import Step, step_kinds, step_type_of


@dataclasses.dataclass(frozen=True)
class Card:
    """One method.

    Attributes:
        kind: its tag in a spec
        stage: when it runs
        summary: what it does, in one line
        options: name, type, default and meaning of each
        families: kinds of model that it applies to
        paper: the reference in its file
    """

    kind: str
    stage: str
    summary: str
    options: tuple[dict[str, Any], ...]
    families: tuple[str, ...]
    paper: str


def card_of(kind: str) -> Card:
    """Return the card of one method.

    Raises:
        SpecError: no method has this tag.
    """
    step = step_type_of(kind)
    header = inspect.getdoc(sys.modules[step.__module__]) or ""
    summary, _, rest = header.partition("\n")
    return Card(
        kind=kind,
        stage=step.stage.name.lower(),
        summary=summary.rstrip("."),
        options=tuple(_options(step)),
        families=tuple(family.name for family in families() if kind in family.methods),
        paper=" ".join(rest.split()),
    )


def _options(step: type[Step]) -> list[dict[str, Any]]:
    meanings = _meanings(inspect.getdoc(step) or "")
    options = []
    for field in dataclasses.fields(step):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", None) or str(field.type)
        required = field.default is dataclasses.MISSING
        options.append(
            {
                "name": field.name,
                "type": str(field.type) if "[" in str(field.type) or "|" in str(field.type) else kind,
                "required": required,
                "default": None if required else field.default,
                "meaning": meanings.get(field.name, ""),
            }
        )
    return options


def _meanings(docstring: str) -> dict[str, str]:
    """Read the Attributes section of a docstring: `name: meaning`, continued on deeper lines."""
    found: dict[str, str] = {}
    _, _, section = docstring.partition("Attributes:\n")
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            found[entry[1]] = entry[2]
        elif found and line.strip():
            found[list(found)[-1]] += f" {line.strip()}"
    return found


def show_all(as_json: bool) -> None:
    """Print every method in one line."""
    cards = [card_of(kind) for kind in step_kinds()]
    if as_json:
        console.out_json([dataclasses.asdict(card) for card in cards])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("method", "stage", "families", "what it does"):
        table.add_column(title)
    for card in cards:
        table.add_row(card.kind, card.stage, ", ".join(card.families), card.summary)
    console.table(table)
    console.out("\nrescompress methods NAME shows the options of one")


def show_one(kind: str, as_json: bool) -> None:
    """Print the options of one method.

    Raises:
        SpecError: there is no such method.
    """
    card = card_of(kind)
    if as_json:
        console.out_json(dataclasses.asdict(card))
        return
    from rich.table import Table

    console.out(f"{card.kind} ({card.stage}; families: {', '.join(card.families) or 'none'})")
    console.out(f"{card.summary}.")
    console.out(card.paper)
    console.out()
    table = Table(box=None, pad_edge=False)
    for title in ("option", "default", "meaning"):
        table.add_column(title)
    for option in card.options:
        default = "required" if option["required"] else _yaml(option["default"])
        table.add_row(option["name"], default, option["meaning"])
    console.table(table)


def _yaml(value: Any) -> str:
    """Write a default as it would stand in a spec file."""
    return "none" if value is None else json.dumps(value).strip('"')


def support() -> dict[str, dict[str, dict[str, int]]]:
    """Return, by family and method, how many models of the support matrix were tried and how many work.

    The method "default" is a plain scale.
    """
    found: dict[str, dict[str, dict[str, int]]] = json.loads(
        importlib.resources.files("rescompress.cli").joinpath("support.json").read_text(encoding="utf-8")
    )
    return found


def show_families(as_json: bool) -> None:
    """Print every family with its hosts and methods, and the support matrix: how many models each method takes."""
    known = support()
    if as_json:
        data = [
            {name: getattr(family, name) for name in ("name", "summary", "methods", "hosts")}
            | {"support": known.get(family.name, {})}
            for family in families()
        ]
        console.out_json(data)
        return
    from rich.table import Table

    for family in families():
        console.out(f"{family.name}: {family.summary}")
        console.out(f"  methods: {', '.join(family.methods)} (the first one for a plain --scale)")
        console.out(f"  hosts:   {', '.join(family.hosts) or 'any other model, by running it once'}")
    console.out("\nFor how many of the models that were tried each method works (docs/reference/support-matrix.md):\n")
    kinds = list(step_kinds())
    table = Table(box=None, pad_edge=False)
    for title in ("family", "--scale 0.5", *kinds):
        table.add_column(title)
    for family in families():
        row = known.get(family.name, {})
        counts = [row.get(kind, {"works": 0, "of": 0}) for kind in ("default", *kinds)]
        table.add_row(family.name, *("-" if not one["works"] else f"{one['works']}/{one['of']}" for one in counts))
    console.table(table)
