"""Losses and accuracy over a whole evaluation, from batches that hold different numbers of labels and targets."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


class Evaluation(nn.Module):
    """Collects an evaluation. The results are equal on every rank; only `compute` communicates.

    A batch may have no labels or targets of a kind, so each loss is weighted by the number of its labels or targets.
    """

    def __init__(self, losses: Sequence[str]) -> None:
        """
        Args:
            losses: the names of the losses.
        """
        super().__init__()
        self.names = list(losses)
        self.means = WeightedMeans(len(losses))
        self.accuracy = MulticlassAccuracy(average="micro", validate_args=False)

    def update(self, metrics: dict[str, Tensor], counts: list[float], predictions: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            metrics: the mean of each loss over the batch, by name.
            counts: how many labels or targets each mean is over.
            predictions, labels: token ids of the same shape.
        """
        self.means.update(torch.stack([metrics[name] for name in self.names]), counts)
        self.accuracy.update(predictions[None], labels[None])

    def compute(self) -> dict[str, Tensor]:
        """Each loss by name and "accuracy", 0 for what no batch had. The next evaluation starts anew."""
        means = self.means.compute().view(-1)  # torchmetrics makes a scalar of a tensor with one element
        values = dict(zip(self.names, means.unbind(), strict=True))
        values["accuracy"] = self.accuracy.compute()
        self.means.reset()
        self.accuracy.reset()
        return values


class WeightedMeans(Metric):
    """The weighted means of several values at once.

    `torchmetrics.MeanMetric` holds one mean, and one of them for each loss would communicate once for each.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size), dist_reduce_fx="sum")

    def update(self, values: Tensor, counts: Sequence[float]) -> None:
        weights = torch.tensor(counts, device=values.device)
        self.sums = self.sums + values * weights  # not in place, as a state may be an inference tensor
        self.counts = self.counts + weights

    def compute(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1.0)
