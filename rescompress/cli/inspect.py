"""`rescompress inspect`: what a written file says of itself, read without loading the model."""

import argparse
from typing import Any

import yaml

from rescompress.cli import console
from rescompress.export import read_header

SUMMARY = "show what a written file says of itself, without loading the model"

EPILOG = """examples:
  rescompress inspect small.pt
  rescompress inspect small.onnx --json
"""

_VARIES = {
    "batch": "any batch size",
    "size": "any batch size, height and width, as far as the model does",
    "none": "the shapes of the example alone",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", metavar="FILE", help="a file that rescompress wrote: .pt, .pt2, .onnx or .aoti.pt2")
    parser.add_argument("--json", action="store_true", help="print the whole header as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    header = read_header(args.file)
    if args.json:
        console.out_json(header)
        return 0
    # As plain data: a spec object would import its methods, and torch with them.
    spec = header["spec"]
    console.out(f"{args.file}: {_line(header.get('format'))}, made by {_line(_maker(header))}")
    for title, value in _facts(header):
        console.out(f"  {title:14} {_line(value)}")
    console.out()
    console.out(
        "spec (rescompress compress --spec takes it):" if spec.get("steps") else "no spec: the model is not compressed"
    )
    if spec.get("steps"):
        console.out(yaml.safe_dump(spec, sort_keys=False).rstrip())
    _show_report(header.get("report"))
    return 0


def _maker(header: dict[str, Any]) -> str:
    made_by = str(header.get("made_by"))
    return f"torch.jit.{made_by}" if header.get("format") == "torchscript" else made_by


def _facts(header: dict[str, Any]) -> list[tuple[str, str]]:
    model = _mapping(header.get("model"))
    facts = [("model", f"{model.get('architecture') or ''} ({model.get('class')})".strip())]
    facts.append(("parameters", f"{model.get('parameters')}, {model.get('weight_bytes')} bytes with buffers"))
    facts += [("because", str(why)) for why in _items(header.get("made_by_because"))]
    for given in _items(header.get("inputs")):
        facts.append(
            ("input", f"{_mapping(given).get('dtype')} {_mapping(given).get('shape')}, on {model.get('device')}")
        )
    dynamic = str(header.get("dynamic"))
    facts.append(("takes", _VARIES.get(dynamic, dynamic)))
    if "input_sizes" in header:
        sizes = str(header["input_sizes"])
        facts.append(("image sizes", "that of the example alone" if sizes == "fixed" else sizes))
    shapes = [", ".join(map(str, _items(case))) for case in _items(header.get("shapes_checked"))]
    facts.append(("compared at", "; ".join(shapes) or "nothing"))
    facts += [("reached", str(line)) for line in _items(header.get("log"))]
    for decision in _items(header.get("fold")):
        state = "folded" if _mapping(decision).get("folded") else "kept"
        facts.append(("fold", f"{_mapping(decision).get('name')}: {state}, {_mapping(decision).get('reason')}"))
    facts.append(("fused", _fused(_mapping(header.get("fused")))))
    if header.get("preprocessing"):
        facts.append(("preprocessing", _joined(header["preprocessing"])))
    labels = _items(header.get("labels"))
    if labels:
        facts.append(("labels", f"{len(labels)} class names, the first is {labels[0]} (--json lists them)"))
    facts.append(("versions", _joined(header.get("versions"))))
    return facts


def _fused(fused: dict[str, Any]) -> str:
    pairs = len(_items(fused.get("pairs")))
    if pairs:
        return f"{pairs} batch norm{'s' if pairs > 1 else ''} into the convolution before"
    return f"nothing: {fused.get('reason') or 'it was not asked for'}"


def _show_report(report: Any) -> None:
    ratios = _mapping(_mapping(report).get("ratios"))
    if ratios:
        console.out()
        console.out("measured when written, compressed over original (--json has the numbers):")
        for name, ratio in ratios.items():
            shown = f"x{ratio:.3f}" if isinstance(ratio, float | int) else _line(ratio)
            console.out(f"  {_line(name):24} {shown}")


def _line(value: Any) -> str:
    """Return a value of the file on one line, so that it cannot look like the lines of this command."""
    return " ".join(str(value).split())


def _joined(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in _mapping(value).items())


def _mapping(value: Any) -> dict[str, Any]:
    """Return a part of the header if it is what it should be: the file may come from anywhere."""
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
