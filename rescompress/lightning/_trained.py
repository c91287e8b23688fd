"""What Classifier and Segmenter share in training: optimizer, schedule, random numbers, a loss that stays finite."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rescompress import surgery
from rescompress.errors import InputError, one_line
from rescompress.lightning._scoring import Scored
from rescompress.lightning.batches import Batch
from rescompress.lightning.data._order import mixed
from rescompress.lightning.schedules import Warmup


class Trained(Scored):
    """Trains one model; use `Classifier` or `Segmenter`."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a training batch by name; "loss" is what is minimised."""
        raise TypeError(f"{type(self).__name__} is no module to train; use Classifier or Segmenter")

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one head's logits."""
        return self.criterion(logits.float(), labels)

    def setup(self, stage: str) -> None:
        """Compare classes and channels with those of the data."""
        data = getattr(self.trainer, "datamodule", None)
        for name in ("num_classes", "channels"):
            has, takes = getattr(data, name, None), getattr(self, name)
            if has is not None and has != takes:
                raise InputError(
                    f"{type(data).__name__} has {name}={has}, and the model is built with {name}={takes}; set "
                    f"model.{name} to {has}"
                )
        if getattr(data, "several_labels", False):
            raise InputError(
                f"the images of {type(data).__name__} have several labels each, and {type(self).__name__} is trained "
                "and scored by one class per image; take data with one, such as pathmnist"
            )

        self._check_sizes(data)

    def _check_sizes(self, data: Any) -> None:
        """Raise where the model does not take images of a size that the data will have; asked on the meta device."""
        sizes = [*getattr(data, "train_sizes", ()), getattr(data, "test_size", None)]
        sizes += [(side, side) for side in getattr(data, "test_sizes", None) or ()]
        own = tuple(self.example.shape[-2:])
        known = [size for size in dict.fromkeys(sizes) if size is not None and tuple(size) != own]
        if not known or self._fails_at(own) is not None:  # a model that computes with values tells nothing there
            return
        for size in known:
            problem = self._fails_at(size)
            if problem is not None:
                raise InputError(
                    f"this {type(self.model).__name__} is built for images of {own[0]} x {own[1]} and does not take "
                    f"the data's {size[0]} x {size[1]} ({problem}); set its sizes to model.input_size, or let the "
                    "model take any, as timm's ViTs with options: {dynamic_img_size: true}"
                )

    def _fails_at(self, size: tuple[int, ...]) -> str | None:
        model = surgery.clone_shared(self.model, "meta").eval()
        try:
            with torch.no_grad():
                model(torch.zeros(1, self.channels, *size, device="meta"))
        except Exception as error:  # the model's own code
            return one_line(error, 120) or type(error).__name__
        return None

    def configure_optimizers(self) -> Any:
        """Make the optimizer, without weight decay on norms and biases, and its schedule."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                bare = name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
                (others if bare in self._undecayed else decayed).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = self._optimizer([group for group in groups if group["params"]])
        if self._schedule is None:
            return optimizer
        schedule = self._schedule(optimizer)
        config = {"scheduler": schedule, "interval": getattr(schedule, "interval", "epoch")}
        if hasattr(schedule, "monitor"):
            config["monitor"] = schedule.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_start(self) -> None:
        """Tell the schedules how long the run is: here, for asking earlier would make the loader before it resumes."""
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            if isinstance(schedule, Warmup) and schedule.total_steps is None:
                steps = self.trainer.estimated_stepping_batches
                if not 1 <= steps < math.inf:
                    raise InputError(
                        "the length of this run is not known, so the learning rate cannot be planned; set "
                        "trainer.max_steps, or total_steps of the schedule"
                    )
                schedule.begin(int(steps))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is random inside the model by the place in the run, so that a resumed run draws the same."""
        torch.manual_seed(int(mixed(self.seed, self.trainer.current_epoch, batch_idx, self.trainer.global_rank)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch.

        Raises:
            InputError: the loss is not finite, or labels are out of range; the files of the batch are named.
        """
        batch = Batch(*batch)
        self.check_labels(batch)
        if self.distiller is None:
            losses = self.losses(batch)
        else:
            losses = self.distiller.losses(self.model, batch, self.label_loss)
        loss: Tensor = losses["loss"]
        groups: Any = self.trainer.optimizers[0].param_groups
        rate = float(groups[0]["lr"])
        if not bool(loss.isfinite()):
            raise InputError(
                f"the loss is {float(loss)} at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}) "
                f"with a learning rate of {rate:g}; {_suspects(batch)}; begin anew with a lower learning rate, or look "
                "at these files"
            )
        found = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(found, prog_bar=True, batch_size=len(batch.images))
        self.log("train/learning_rate", rate, batch_size=len(batch.images))
        return loss

    def on_train_epoch_end(self) -> None:
        """Look at the weights: no loss tells of what the last step did.

        Raises:
            InputError: some are not finite.
        """
        broken = [name for name, weights in self.named_parameters() if not bool(weights.isfinite().all())]
        if broken:
            more = " and more" if len(broken) > 3 else ""
            raise InputError(
                f"after step {self.global_step} (epoch {self.current_epoch}) weights are not finite: "
                f"{', '.join(broken[:3])}{more}; begin anew with a lower learning rate"
            )


def _suspects(batch: Batch) -> str:
    """Return the names of the batch's files, or of those alone whose images are not finite."""
    broken = (~batch.images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        return f"images with values that are NaN or infinite: {', '.join(batch.names[index] for index in broken)}"
    return f"the batch was {', '.join(batch.names)}"
