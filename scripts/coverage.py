# Every architecture under every method: what works, what is refused and why, and the MACs before and after.
#
#     python scripts/coverage.py                      # all libraries that are installed; about 30 minutes on 2 cores
#     python scripts/coverage.py --write              # and write docs/reference/support-matrix.md from the results
#     python scripts/coverage.py --only "timm:swin"   # some models, by a part of their names
#     python scripts/coverage.py --all --methods default  # each of timm's entry points, on the meta device
#
# Results are kept line by line in build/coverage.jsonl: a run that was stopped goes on where it was, and a change of
# the package or of a library starts anew. The exit status is 1 if any case failed with an error that is no refusal.

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import nn  # noqa: E402

import rescompress as rc  # noqa: E402
from rescompress.anatomy import Anatomy, ViTAnatomy  # noqa: E402
from rescompress.families import describe  # noqa: E402
from rescompress.measure import count_macs  # noqa: E402
from rescompress.surgery import clone_shared  # noqa: E402
from scripts.coverage_models import Subject, subjects  # noqa: E402
from scripts.coverage_report import write_matrix  # noqa: E402

METHODS = ("default", "stem_resize", "input_resize", "patch_resize", "token_pool", "token_merge", "quantize")
LIBRARIES = ("torch", "timm", "torchvision", "transformers", "onedl-mmsegmentation")
META_FROM_PARAMETERS = 120_000_000
META_FROM_MACS = 12_000_000_000
"""From which size on a model is tried on the meta device only: shapes and costs, no values."""


def step_for(method: str, anatomy: Anatomy | None) -> rc.Step:
    """Return a usual step of a method for this model."""
    if method in ("stem_resize", "input_resize", "patch_resize"):
        kinds = {"stem_resize": rc.StemResize, "input_resize": rc.InputResize, "patch_resize": rc.PatchResize}
        return kinds[method](scale=0.5)
    if method == "token_merge":
        return rc.TokenMerge(keep=0.5)
    if method == "quantize":
        return rc.Quantize(scheme="w8")
    after, stride = 0, 2
    if isinstance(anatomy, ViTAnatomy) and anatomy.grid is not None:
        grid = anatomy.grid
        after = max(0, len(anatomy.blocks) // 2 - 1)
        stride = next((n for n in range(2, min(grid) + 1) if grid[0] % n == 0 and grid[1] % n == 0), 2)
    return rc.TokenPool(after_block=after, stride=stride)


def examine(subject: Subject, methods: tuple[str, ...], meta: bool) -> Iterator[dict[str, Any]]:
    """Try every method on one model; a dict for each, as it is kept and printed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    row: dict[str, Any] = {"library": subject.library, "model": subject.name}
    try:
        model, example, proof = prepared(subject, meta)
        before = macs(model, example)
    except Exception as error:  # whatever a foreign model raises
        yield {**row, "method": "build", "outcome": "failed", "detail": _told(error)}
        return
    try:
        anatomy: Anatomy | None = describe(model, *example)
    except rc.RescompressError:
        anatomy = None
    except Exception as error:  # a bug of ours
        yield {**row, "method": "build", "outcome": "failed", "detail": _told(error)}
        return
    row |= {"class": type(model).__name__, "family": anatomy.family if anatomy else None, "proof": proof}
    done: dict[rc.Spec, dict[str, Any]] = {}
    for method in methods:
        start = time.perf_counter()
        result: dict[str, Any] = {**row, "method": method, "macs_before": before}
        if method == "quantize" and proof == "shapes":
            yield {**result, "outcome": "left out", "detail": "it needs values, and the model is on the meta device"}
            continue
        step = None if method == "default" else step_for(method, anatomy)
        if step is not None and rc.Spec.of(step) in done:  # it was the default
            yield {**done[rc.Spec.of(step)], "method": method}
            continue
        try:
            if step is None:
                small = rc.compress(model, scale=0.5, example_input=example)
            else:
                if anatomy is not None and method != "quantize":  # what is refused at once need not be run
                    step.apply(clone_shared(model, "meta"), anatomy)
                small = rc.compress(model, step, example_input=example)
            result |= {"outcome": "works", "detail": small._rescompress.log[0]}
            if method != "quantize":  # MACs are counted before precision steps
                result["macs_after"] = macs(small, example)
                if result["macs_after"] >= before:
                    result |= {"outcome": "failed", "detail": "it costs no less than the original"}
            done[rc.spec_of(small)] = result
        except rc.RescompressError as error:
            result |= {"outcome": "refused", "detail": str(error)}
        except Exception as error:  # a bug of ours, or a model that cannot run here
            result |= {"outcome": "failed", "detail": _told(error)}
        yield {**result, "seconds": round(time.perf_counter() - start, 1)}


def built_on_meta(subject: Subject) -> nn.Module:
    """Build a model on the meta device; one whose constructor computes with values (RegNet) goes there afterwards."""
    try:
        with torch.device("meta"):
            return subject.build()
    except NotImplementedError:
        return subject.build().to("meta")


def prepared(subject: Subject, meta: bool) -> tuple[nn.Module, Any, str]:
    """Build a model, and say what can be proved of it: "values", or "shapes" on the meta device where it is large."""
    if meta or subject.library != "mmseg":  # mmseg's own initialisation looks at values
        model = built_on_meta(subject)
        parameters = sum(p.numel() for p in model.parameters())
        try:
            example = subject.example(model)
            large = meta or parameters > META_FROM_PARAMETERS or macs(model, example) > META_FROM_MACS
        except Exception:  # a model that looks at values cannot run there
            large = meta
        if large:
            return model, subject.example(model), "shapes"
    model = subject.build()
    return model, subject.example(model), "values"


def macs(model: nn.Module, example: Any) -> int:
    """Count the MACs of one forward pass."""
    return count_macs(clone_shared(model), example).macs


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}, line {where.lineno})"


def work(subject: Subject, methods: tuple[str, ...], meta: bool) -> list[dict[str, Any]]:
    """Examine one model in a process of its own."""
    return list(examine(subject, methods, meta))


def state_key() -> str:
    """Return what results depend on: versions of libraries, and the package's source."""
    digest = hashlib.sha256()
    for library in LIBRARIES:
        digest.update(f"{library} {version_of(library)};".encode())
    for path in sorted([*(ROOT / "rescompress").rglob("*.py"), *(ROOT / "scripts").glob("coverage*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def version_of(library: str) -> str | None:
    """Return the installed version of a library."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


class State:
    """Results on disk, a JSON object a line; lines of other versions, and a line cut off by a kill, are passed over."""

    def __init__(self, path: Path, key: str, meta: bool) -> None:
        self.path = path
        self.mark = {"key": key, "meta": meta}
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if all(row.get(name) == value for name, value in self.mark.items()):
                self.rows[row["library"], row["model"], row["method"]] = row
        if text and not text.endswith("\n"):
            with path.open("a") as file:
                file.write("\n")

    def missing(self, subject: Subject, methods: tuple[str, ...]) -> tuple[str, ...]:
        """Return the methods that have no result yet; a model that could not be built has its result."""
        if (subject.library, subject.name, "build") in self.rows:
            return ()
        return tuple(one for one in methods if (subject.library, subject.name, one) not in self.rows)

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Write results down at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for row in rows:
                self.rows[row["library"], row["model"], row["method"]] = row
                file.write(json.dumps({**row, **self.mark}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_all(
    todo: list[tuple[Subject, tuple[str, ...]]], meta: bool, workers: int
) -> Iterator[tuple[Subject, list[dict[str, Any]]]]:
    """Yield the results of each model as they come; a model whose process dies is a failure of that model alone."""
    spawn = multiprocessing.get_context("spawn")
    lost = list(todo)
    with _pool(workers, spawn) as pool:
        futures = {pool.submit(work, subject, methods, meta): (subject, methods) for subject, methods in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future][0], future.result()
                lost.remove(futures[future])
        except BrokenProcessPool:
            pass
        except BaseException:  # Ctrl-C: what has not begun need not be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for subject, methods in lost:  # one of them killed its process: each alone now
        with _pool(1, spawn) as alone:
            try:
                yield subject, alone.submit(work, subject, methods, meta).result()
            except BrokenProcessPool:
                row = {"library": subject.library, "model": subject.name, "outcome": "failed"}
                yield subject, [{**row, "method": "build", "detail": "its process died, perhaps for want of memory"}]


def _pool(workers: int, context: Any) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Try every method on every architecture.")
    parser.add_argument("--library", action="append", choices=("timm", "torchvision", "transformers", "mmseg"))
    parser.add_argument("--only", metavar="PART", help="models whose LIBRARY:NAME contains this; * and ? are wildcards")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--all", action="store_true", help="every entry point of timm, on the meta device only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "coverage.jsonl", help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="run again what has a result already")
    parser.add_argument("--write", action="store_true", help="write docs/reference/support-matrix.md")
    args = parser.parse_args()

    from rich.console import Console
    from rich.progress import Progress

    console = Console(soft_wrap=True, highlight=False)
    methods = tuple(args.methods)
    chosen = subjects(args.library, args.only, args.all)
    if not chosen:
        parser.error(f"no model's name contains {args.only!r}")
    state = State(args.state, state_key(), args.all)
    todo = [(subject, methods if args.fresh else state.missing(subject, methods)) for subject in chosen]
    todo = [(subject, left) for subject, left in todo if left]
    with Progress(console=console) as progress:
        task = progress.add_task("models", total=len(chosen), completed=len(chosen) - len(todo))
        for subject, rows in run_all(todo, args.all, args.workers):
            state.keep(rows)
            for row in rows:
                # Most refusals are of methods for another kind of network: they are in the matrix.
                if row["outcome"] == "failed" or (row["outcome"] == "refused" and row["method"] == "default"):
                    told = f"{subject} {row['method']}: {row['outcome']}: {row['detail']}"
                    progress.console.print(told, markup=False)
            progress.advance(task)
        if todo:
            console.print(f"{len(todo)} of {len(chosen)} models were tried now, the others before")
    names = {(subject.library, subject.name) for subject in chosen}
    rows = [
        row
        for (library, name, method), row in state.rows.items()
        if (library, name) in names and method in (*methods, "build")
    ]
    for outcome in ("works", "refused", "left out", "failed"):
        console.print(f"{outcome}: {sum(row['outcome'] == outcome for row in rows)}")
    if args.write:
        versions = {library: version_of(library) for library in LIBRARIES}
        for path in write_matrix(rows, versions, ROOT):
            console.print(f"wrote {path}")
    return 1 if any(row["outcome"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
