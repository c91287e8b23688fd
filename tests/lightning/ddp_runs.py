# Two processes train, are interrupted, go on and test; each writes down what it ends with. test_ddp.py starts it.

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from tiny import Stop, Stopped, Tiny  # beside this file: some installed package may be called tests

from rescompress.lightning import AtomicCheckpoints, Classifier, LastCheckpoint, Segmenter, WarmupCosine


def trainer(*callbacks: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=3,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(folder: Path, *callbacks: Any) -> tuple[Trainer, Classifier]:
    """Train in a folder, from its last checkpoint on where there is one."""
    module = Classifier(
        "tiny:tiny_net",
        num_classes=4,
        input_size=32,
        options={"dropout": 0.3},
        spec={"steps": [{"kind": "stem_resize", "scale": 0.5}]},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
        schedule=lambda optimizer: WarmupCosine(optimizer, warmup=0.2),
    )
    run = trainer(LastCheckpoint(str(folder), 3), *callbacks)
    last = folder / "last.ckpt"
    run.fit(module, Tiny(length=36), ckpt_path=last if last.exists() else None)
    return run, module


def main(folder: Path, segments: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run, whole = train(folder / "whole")
    rank, stopped = run.global_rank, False
    try:
        train(folder / "broken", Stop(at=7, marker=str(folder / f"stopped{rank}")))
    except Stopped:
        stopped = True
    before = torch.load(folder / "broken" / "last.ckpt", weights_only=True)["global_step"]
    run, resumed = train(folder / "broken")
    torch.save({"whole": whole.state_dict(), "resumed": resumed.state_dict()}, folder / f"rank{rank}.pt")
    assert run.datamodule is not None
    run.datamodule.corrupt_files["train"].found |= {"of both": "cut short", f"of {rank}": "cut short"}
    skipped = run.datamodule.skipped_everywhere()
    found = {"skipped": skipped, "stopped": stopped, "resumed_at": before, "steps": run.global_step}
    if segments:
        module = Segmenter("tiny:tiny_net", num_classes=3, input_size=32, options={"dense": True})
        data = Tiny(classes=3, dense=True, length=18)  # 9 test images: 5 on one process, 4 on the other
        (found["scores"],) = trainer().test(module, data, verbose=False)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), segments="segments" in sys.argv)
