"""`rescompress inspect`: what a written file says of itself, read without loading the model."""

import argparse
from typing import Any

import yaml

from rescompress.cli import console
from rescompress.export import read_header

SUMMARY = "show what a written file says of itself, without loading the model"

EPILOG = """examples:
  rescompress inspect small.pt
  rescompress inspect small.pt --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", metavar="FILE", help="a file that rescompress wrote")
    parser.add_argument("--json", action="store_true", help="print the whole header as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    header = read_header(args.file)
    if args.json:
        console.out_json(header)
        return 0
    # As plain data: a spec object would import its methods, and torch with them.
    spec = header["spec"]
    console.out(f"{args.file}: {header.get('format')}, made by torch.jit.{header.get('made_by')}")
    for title, value in _facts(header):
        console.out(f"  {title:14} {value}")
    console.out()
    console.out(
        "spec (rescompress compress --spec takes it):" if spec.get("steps") else "no spec: the model is not compressed"
    )
    if spec.get("steps"):
        console.out(yaml.safe_dump(spec, sort_keys=False).rstrip())
    _show_report(header.get("report"))
    return 0


def _facts(header: dict[str, Any]) -> list[tuple[str, str]]:
    model = _mapping(header.get("model"))
    facts = [("model", f"{model.get('architecture') or ''} ({model.get('class')})".strip())]
    facts.append(("parameters", f"{model.get('parameters')}, {model.get('weight_bytes')} bytes with buffers"))
    for given in _items(header.get("inputs")):
        facts.append(("input", f"{_mapping(given).get('dtype')} {_mapping(given).get('shape')}"))
    facts.append(("batch sizes", f"{header.get('batch_sizes_checked')} compared with the model when written"))
    facts.append(("input sizes", str(header.get("input_sizes", "not compared when written"))))
    facts += [("reached", str(line)) for line in _items(header.get("log"))]
    for decision in _items(header.get("fold")):
        state = "folded" if _mapping(decision).get("folded") else "kept"
        facts.append(("fold", f"{_mapping(decision).get('name')}: {state}, {_mapping(decision).get('reason')}"))
    if header.get("preprocessing"):
        facts.append(("preprocessing", _joined(header["preprocessing"])))
    if _items(header.get("labels")):
        facts.append(("labels", f"{len(header['labels'])} class names (--json lists them)"))
    facts.append(("versions", _joined(header.get("versions"))))
    return facts


def _show_report(report: Any) -> None:
    ratios = _mapping(_mapping(report).get("ratios"))
    if ratios:
        console.out()
        console.out("measured when written, compressed over original (--json has the numbers):")
        for name, ratio in ratios.items():
            console.out(f"  {name:24} x{ratio:.3f}" if isinstance(ratio, float | int) else f"  {name:24} {ratio}")


def _joined(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in _mapping(value).items())


def _mapping(value: Any) -> dict[str, Any]:
    """Return a part of the header if it is what it should be: the file may come from anywhere."""
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
