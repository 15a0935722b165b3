"""Losses and accuracy over a whole evaluation, from batches that hold different numbers of labels and targets."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.host import from_host


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
        self.whole = WeightedMeans(1)
        self.accuracy = MulticlassAccuracy(average="micro", validate_args=False)

    def update(self, metrics: dict[str, Tensor], counts: list[float], predictions: Tensor, batch: Batch) -> None:
        """Add a batch.

        Args:
            metrics: the mean of each loss over the batch, by name.
            counts: how many labels or targets each mean is over.
            predictions: the most likely tokens at the labels of the batch.
        """
        labels = batch.labels
        self.means.update(torch.stack([metrics[name] for name in self.names]), counts)
        self.accuracy.update(predictions[None], labels[None])
        self.whole.update(*whole_samples(batch, predictions == labels))

    def compute(self) -> dict[str, Tensor]:
        """Each loss by name, "accuracy" and "exact_match", 0 for what no batch had. The next evaluation starts anew."""
        means = self.means.compute().view(-1)  # torchmetrics makes a scalar of a tensor with one element
        values = dict(zip(self.names, means.unbind(), strict=True))
        values["accuracy"] = self.accuracy.compute()
        values["exact_match"] = self.whole.compute().view(())
        for metric in (self.means, self.accuracy, self.whole):
            metric.reset()
        return values


def whole_samples(batch: Batch, right: Tensor) -> tuple[Tensor, Tensor]:
    """How many of a batch's samples have labels that are all right: their share, (1,), and the number of samples with
    labels, (1,). Where nobody says which samples there are, these are the rows.

    If always the most likely token is taken, then a text that is written token by token is the sample's own text if and
    only if all of its labels are right. So nothing has to be written to know this.

    Args:
        right: (sum of L,) of each label of the batch whether it is the most likely token.
    """
    stops, positions, start = list[int](), list[Tensor](), 0
    for microbatch in batch.microbatches:
        rows, length = microbatch.shape
        stops += [start + o.stop for o in microbatch.origins] or [start + (b + 1) * length for b in range(rows)]
        positions.append(microbatch.label_positions + 1 + start)  # of the labelled token itself
        start += rows * length
    ends = from_host(stops, torch.long, right.device)
    sample = torch.searchsorted(ends, torch.cat([ends[:0], *positions]), right=True)
    labels, wrong = (
        torch.zeros(len(stops), dtype=torch.long, device=right.device).index_add(0, sample, values.long())
        for values in (torch.ones_like(right), ~right)
    )
    number = (labels > 0).sum()
    whole = ((labels > 0) & (wrong == 0)).sum()
    return (whole.float() / number.clamp(min=1)).view(1), number.float().view(1)


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

    def update(self, values: Tensor, counts: Sequence[float] | Tensor) -> None:
        weights = counts if isinstance(counts, Tensor) else from_host(counts, values.dtype, values.device)
        self.sums = self.sums + values * weights  # not in place, as a state may be an inference tensor
        self.counts = self.counts + weights

    def compute(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1.0)
