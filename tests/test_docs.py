"""The documentation: every Python block runs, every link leads somewhere, every method has its card."""

import dataclasses
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from rescompress import spec
from rescompress.families import _base as families
from rescompress.spec import step_kinds, step_type_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
CARDS = sorted(ROOT.glob("docs/methods/*.md"))
METHODS = sorted(path for path in ROOT.glob("rescompress/methods/*.py") if not path.name.startswith("_"))
EXPLAINED = """
import timm, torch
import rescompress as rc
model, x = timm.create_model("resnet18").eval(), torch.randn(1, 3, 224, 224)
"""
"""What the blocks of the explanations find, which are fragments: `rc`, a small model and its input."""

SECTIONS = ["When to use", "When not", "Options", "Cost", "Measured", "Families", "Export", "To know", "Paper"]


def blocks(page: Path) -> list[tuple[int, str]]:
    """Return the fenced Python blocks of a page with the lines at which they begin."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(1)), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def main_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A `__main__` of its own, as a script has; families and methods that a page defines are forgotten behind it."""
    known = set(step_kinds())
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(families, "_registered", list(families._registered))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    for kind in set(step_kinds()) - known:
        del spec._registered[kind]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_python_blocks_run(
    page: Path, main_module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem == "mmseg":
        try:
            import mmseg.models  # noqa: F401
        except ImportError as missing:  # OpenCV without the system's libGL raises it, too
            pytest.skip(f"mmseg cannot be imported: {missing}")
        warnings.simplefilter("ignore")  # mmseg tells at each build that a default is one
    monkeypatch.chdir(tmp_path)
    if page.parent.name == "explanation":
        exec(EXPLAINED, vars(main_module))
    for line, source in blocks(page):
        # Padded with empty lines, so that a traceback names the line of the page.
        exec(compile("\n" * line + source, str(page), "exec"), vars(main_module))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_every_method_has_a_card_and_every_card_a_method() -> None:
    assert METHODS
    assert [path.stem for path in CARDS] == [path.stem for path in METHODS]
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for card in CARDS:
        assert f"(methods/{card.name})" in index


@pytest.mark.parametrize("card", CARDS, ids=name)
def test_a_card_has_every_section_and_every_option_with_its_default(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [title for title in headings if title in SECTIONS] == SECTIONS
    assert "https://arxiv.org/abs/" in text
    table = text.split("## Options")[1].split("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", table, re.MULTILINE))
    fields = dataclasses.fields(step_type_of(card.stem))
    assert list(rows) == [field.name for field in fields]
    for field in fields:
        default = rows[field.name].replace("`", "")
        expected = "required" if field.default is dataclasses.MISSING else str(field.default).lower()
        assert default == expected or default.startswith(f"{expected}: "), f"{card.stem}.{field.name}"


@pytest.mark.parametrize("card", CARDS, ids=name)
def test_a_card_names_the_families_that_take_the_method(card: Path) -> None:
    section = card.read_text(encoding="utf-8").split("## Families")[1].split("##")[0]
    taking = {family.name for family in families._shipped() if card.stem in family.methods}
    named = {family.name for family in families._shipped() if f"`{family.name}`" in section}
    assert named and named <= taking  # the matrix has all of them, so that a new family need not be written here
    assert "support-matrix.md" in section or named == taking


@pytest.mark.parametrize("card", CARDS, ids=name)
def test_a_card_stands_by_its_zero_step(card: Path) -> None:
    """The card names the explicit zero step, and that step is taken where a reduction of nothing is refused."""
    text = card.read_text(encoding="utf-8").split("## To know")[1]
    options = re.search(r"^- `(scale|stride|r|exact)=([\d.]+|true)`", text, re.MULTILINE)
    assert options is not None
    kind = step_type_of(card.stem)
    required = {"token_pool": {"after_block": 0}, "quantize": {"scheme": "w8"}}.get(card.stem, {})
    step = kind(**{options[1]: yaml.safe_load(options[2])}, **required)
    assert step.identity() == step


def test_the_pages_show_no_placeholder() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"MEASURED:|TODO|TBD", text), name(page)
