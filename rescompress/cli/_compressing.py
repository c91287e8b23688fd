"""What `rescompress compress` does, step by step."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from rescompress.cli import console, predictions
from rescompress.cli.images import calibration_batches, calibration_files, default_photograph, open_image
from rescompress.cli.models import MEANINGLESS, Loaded, Request, load_model
from rescompress.cli.predictions import Prediction
from rescompress.cli.specs import check_calibration, scaled_spec, shortened, spec_without_model
from rescompress.compress import compress, record_of
from rescompress.export import check_writable, export, read_header
from rescompress.export.paths import SUFFIXES, suffix_of
from rescompress.fold import FoldDecision, fold, fold_decisions
from rescompress.measure import Comparison, compare

_USES = {
    "torchscript": "torch.jit.load({path})(x)",
    "torch.export": "torch.export.load({path}).module()(x)",
    "onnx": "session = onnxruntime.InferenceSession({path}); "
    "session.run(None, {{session.get_inputs()[0].name: x.numpy()}})",
    "aotinductor": "torch._inductor.aoti_load_package({path})(x)",
}
"""How a file of each format is used by who has no rescompress."""

CHECKED = "identity check passed: at zero reduction the outputs are the original's"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that one run found out.

    Attributes:
        loaded: the original
        small: the compressed model
        folding: what became of each resize behind a convolution
        image: file of the photograph
        before: the original's best classes, or all things that a detector found; None if it gives neither
        after: the compressed model's
        difference: relative difference of the outputs; None where their shapes differ
        comparison: before and after, measured
        written: the file; None if none was asked for
    """

    loaded: Loaded
    small: nn.Module
    folding: tuple[FoldDecision, ...]
    image: Path
    before: list[Prediction] | None
    after: list[Prediction] | None
    difference: float | None
    comparison: Comparison
    written: Path | None


def request_of(args: argparse.Namespace) -> Request:
    """Return what the arguments say of the model."""
    return Request(
        reference=args.model,
        weights=args.weights,
        random=args.random,
        input_size=args.input_size,
        num_classes=args.num_classes,
    )


def compress_and_show(args: argparse.Namespace) -> None:
    """Run the whole command and print its result.

    Raises:
        RescompressError: anything that the user gave is wrong, or a step failed; no file is written then.
    """
    # What can be refused at once is refused before anything is built.
    if args.out is not None:
        check_writable(args.out)
    spec = spec_without_model(scale=args.scale, path=args.spec, settings=args.settings, quantize=args.quantize)
    check_calibration(spec, args.quantize, args.settings, args.calibration)
    photographs = [] if args.calibration in (None, "random") else calibration_files(args.calibration)
    image_path = default_photograph() if args.image is None else Path(args.image)
    image = open_image(image_path)

    with console.step(f"building {args.model}"):
        loaded = load_model(request_of(args))
    x = loaded.call(loaded.transform(image).unsqueeze(0))
    with console.step("compressing, and checking that nothing else changes"):
        if spec is None:
            spec = scaled_spec(loaded.model, x, args.scale, args.settings, args.quantize)
        # Either photographs, or the word random, or nothing.
        batches = [loaded.call(batch) for batch in calibration_batches(photographs, loaded.transform)]
        calibration = batches or args.calibration
        small = compress(loaded.model, spec, example_input=x, calibration=calibration).eval()
        folding = fold_decisions(small, x)
        deployed = fold(small, x).eval() if any(decision.folded for decision in folding) else small
    console.note(CHECKED)
    with console.step(f"running both on {image_path.name}"):
        before, after, difference = _outputs(loaded, deployed, x)
    with console.step("measuring") as step:
        comparison = compare(
            loaded.model, deployed, x, latency=not args.quick, peak_memory=not args.quick, progress=step.update
        )
    written = None
    if args.out is not None:
        with console.step(f"writing {args.out}, loading it again and comparing"):
            # The model before folding: export folds it in the same way and says so in the file.
            written = export(
                small,
                args.out,
                x,
                dynamic=args.dynamic,
                report=comparison,
                labels=loaded.labels,
                preprocessing=loaded.preprocessing,
            )
    outcome = Outcome(
        loaded=loaded,
        small=small,
        folding=folding,
        image=image_path,
        before=before,
        after=after,
        difference=difference,
        comparison=comparison,
        written=written,
    )
    if args.json:
        console.out_json(as_data(outcome))
    else:
        show(outcome)


def _outputs(
    loaded: Loaded, deployed: nn.Module, x: Any
) -> tuple[list[Prediction] | None, list[Prediction] | None, float | None]:
    outputs = [predictions.run(model, x) for model in (loaded.model, deployed)]
    if loaded.takes_list:
        old, new = (predictions.found_things(output, loaded.labels) for output in outputs)
        return old, new, None
    original, small = (predictions.first_output(output) for output in outputs)
    difference = None if original is None or small is None else predictions.relative_difference(original, small)
    return (
        predictions.top_classes(original, loaded.labels),
        predictions.top_classes(small, loaded.labels),
        difference,
    )


def as_data(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as plain data for --json."""
    record = record_of(outcome.small)
    return {
        "model": outcome.loaded.reference,
        "weights": outcome.loaded.weights,
        "input_size": list(outcome.loaded.input_size),
        "spec": record.spec.to_dict(),
        "log": list(record.log),
        "identity_check": "passed",
        "fold": [dataclasses.asdict(decision) for decision in outcome.folding],
        "comparison": outcome.comparison.to_dict(),
        "image": str(outcome.image),
        "predictions": {
            "mean_something": outcome.loaded.has_meaning,
            "original": None if outcome.before is None else [dataclasses.asdict(one) for one in outcome.before],
            "compressed": None if outcome.after is None else [dataclasses.asdict(one) for one in outcome.after],
            "relative_difference": outcome.difference,
        },
        "file": None if outcome.written is None else _file_data(outcome.written),
    }


def _file_data(path: Path) -> dict[str, Any]:
    header = read_header(path)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "format": header["format"],
        "made_by": header["made_by"],
        "dynamic": header["dynamic"],
    }


def show(outcome: Outcome) -> None:
    """Print the outcome for people."""
    loaded = outcome.loaded
    height, width = loaded.input_size
    console.out(f"{loaded.reference}, {height} x {width} pixels, weights: {loaded.weights}")
    for line in record_of(outcome.small).log:
        console.out(f"  {shortened(line)}")
    for decision in outcome.folding:
        console.out(f"  fold {decision}")
    console.out()
    console.table(outcome.comparison.table())
    console.out(f"measured: the original, and the compressed model {_as_deployed(outcome.folding)}")
    console.out()
    _show_predictions(outcome)
    if outcome.written is not None:
        _show_file(outcome.written, loaded)


def _show_file(path: Path, loaded: Loaded) -> None:
    data, name = _file_data(path), SUFFIXES[suffix_of(path) or ""]
    height, width = loaded.input_size
    shape = {
        "batch": f"(batch, 3, {height}, {width})",
        "size": "(batch, 3, height, width)",
        "none": f"(1, 3, {height}, {width})",
    }[data["dynamic"]]
    console.out()
    console.out(f"wrote {path}: {console.size(data['bytes'])}, {name}, with its spec inside")
    console.out(f"use it, without rescompress: {_USES[data['format']].format(path=repr(str(path)))}")
    console.out(f"or, looked at before it is loaded: rescompress.load({str(path)!r})(x)")
    if loaded.takes_list:
        console.out("x is a list of images (3, height, width) in [0, 1]; import torchvision first, for its operators")
        console.out("it gives (losses, detections), as scripted detectors of torchvision do; the losses are empty")
        return
    console.out(f"x is {shape}, normalised as rescompress inspect {path} says")


def _as_deployed(folding: tuple[FoldDecision, ...]) -> str:
    if any(decision.folded for decision in folding):
        return "as it is deployed, its resize folded into the convolution"
    return "as it is deployed" + (", its resize kept, since folding would not pay" if folding else "")


def _show_predictions(outcome: Outcome) -> None:
    caveat = "" if outcome.loaded.has_meaning else f" ({MEANINGLESS})"
    if outcome.before is not None and outcome.after is not None and outcome.loaded.takes_list:
        old, new = len(outcome.before), len(outcome.after)
        console.out(
            f"things found in {outcome.image.name}: {old} by the original, {new} by the compressed model{caveat}"
        )
        if old or new:
            best = (outcome.before[: predictions.TOP], outcome.after[: predictions.TOP])
            console.table(predictions.side_by_side(*best))
    elif outcome.before is not None and outcome.after is not None:
        console.out(f"top {len(outcome.before)} classes of {outcome.image.name}{caveat}")
        console.table(predictions.side_by_side(outcome.before, outcome.after))
    elif outcome.difference is not None:
        console.out(f"the outputs on {outcome.image.name} differ by {outcome.difference:.2%} of their size{caveat}")
    else:
        console.out(
            f"the outputs on {outcome.image.name} are no class scores and have other shapes than the original's"
        )
