"""Classifier: train a compressed image classifier, scored by top-1 and top-5 accuracy."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from rescompress.lightning._trained import Trained
from rescompress.lightning.batches import Batch


class Classifier(Trained):
    """Trains an image classifier; the arguments are those of `CompressedModule`."""

    main_score = "accuracy"

    def make_scores(self) -> Metric:
        """Return top-1 accuracy, and top-5 where there are more classes than five."""
        ranks = {"accuracy": 1} | ({"accuracy_top5": 5} if self.num_classes > 5 else {})
        accuracies: Any = {
            name: MulticlassAccuracy(self.num_classes, top_k=rank, average="micro") for name, rank in ranks.items()
        }
        return MetricCollection(accuracies)  # type: ignore[return-value]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of the classes.

        Shape:
            - Output: (B, classes)
        """
        return self.heads(model(batch.images), 2)[0]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of all heads."""
        heads = self.heads(self.model(batch.images), 2)
        return {"loss": self.weighed([self.label_loss(one, batch.labels) for one in heads])}
