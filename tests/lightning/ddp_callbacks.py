# Two processes train with all callbacks at once, and each writes down what it saw; test_recovery.py starts it.

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from rescompress.lightning.cost import CostMonitor
from rescompress.lightning.data._base import ImageData
from rescompress.lightning.data._loader import Loaded
from rescompress.lightning.recovery import Distill, Recalibrate
from rescompress.lightning.resolution import ResolutionSchedule


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def picture(index: int) -> torch.Tensor:
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)) + index / 8


class Pictures:
    """64 pictures, cut to the size that their batch asks for, and named by their indices."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return 64

    def __getitems__(self, keys):
        indices = [index for (index, _), _ in keys]
        height, width = self.sizes[keys[0][1]]
        images = torch.stack([picture(index)[:, :height, :width] for index in indices])
        return Loaded(images, torch.tensor(indices) % 5, tuple(str(index) for index in indices))


class Data(ImageData):
    """The DataModule as it is, over pictures in memory; the model gets them unchanged."""

    def __init__(self):
        scale = (1 / 255,) * 3
        super().__init__(train_size=16, test_size=16, batch_size=4, workers=0, mean=(0.0,) * 3, std=scale)

    def setup(self, stage=None):
        pass

    def source(self, split, sizes, training):
        return Pictures(sizes)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = net()
        self.distiller = None
        self.rates, self.indices = [], []

    def original(self):
        return net()

    def training_step(self, batch, batch_idx):
        self.indices.append([int(name) for name in batch.names])
        return self.distiller.losses(self.model, batch)["loss"]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        # After the pre-hook of the schedule, so that it sees the rate of the step itself.
        self.optimizer = optimizer
        return optimizer


class Watch(Callback):
    def __init__(self):
        self.sizes = []

    def on_train_start(self, trainer, pl_module):
        pl_module.optimizer.register_step_pre_hook(
            lambda optimizer, *_: pl_module.rates.append(optimizer.param_groups[0]["lr"])
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(batch[0].shape[-1])


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watch, monitor, module = Watch(), CostMonitor(folder=str(folder)), Module()
    callbacks = [ResolutionSchedule([8, 16], "mixed", "learning_rate"), Distill(), Recalibrate(), monitor, watch]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Data())
    seen = {
        "sizes": watch.sizes,
        "rates": module.rates,
        "indices": module.indices,
        "weights": [parameter.detach().flatten().tolist() for parameter in module.model.parameters()],
        "mean": module.model[1].running_mean.tolist(),
        "rows": len(monitor.rows),
        "costs": monitor.rows[0] if monitor.rows else None,
        "state": list(module.state_dict()),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
