"""The LightningModule that most users want: any encoders, LLM and generators, trained together or in part.

Adds to `PipelineModule` what training needs: ordinary steps, metrics, frozen components, AdamW with warm-up. Works
under any strategy; knows nothing of ranks. Every rank logs the same keys whatever is in its batches.
"""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from bigmac_lightning.batch import Batch
from bigmac_lightning.module import Encoder, Generator, LanguageModel, PipelineModule


class MultimodalLM(PipelineModule):
    """Encoders + LLM + generators with a text loss and a loss of each generator.

    Logs ``train/loss``, ``train/text`` and ``train/<generator>`` at each step, the same of ``val`` and ``test`` over
    each evaluation, and there ``val/accuracy``: the share of labelled tokens that are the most likely ones.
    """

    def __init__(
        self,
        llm: LanguageModel,
        encoders: dict[str, Encoder] | None = None,
        generators: dict[str, Generator] | None = None,
        loss_weights: dict[str, float] | None = None,
        freeze: Sequence[str] = (),
        learning_rate: float = 3e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "cosine",
    ) -> None:
        """
        Args:
            llm, encoders, generators, loss_weights: as in `PipelineModule`.
            freeze: what not to train: names of components ("llm", "generators"), of modules in them
                ("encoders.image.tower") or of parameters, or patterns of parameter names ("llm.model.layers.*.mlp.*").
            learning_rate: peak, after the warm-up.
            weight_decay: of matrices; vectors (biases, norms) have none.
            warmup_steps: optimizer steps of linear warm-up.
            schedule: after the warm-up; "cosine" falls to zero at the last step.
        """
        super().__init__(llm, encoders, generators, loss_weights)
        self.freeze_patterns = list(freeze)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        modules = {name for name, _ in self.named_modules() if name}
        parameters = {name for name, _ in self._named_aliases()}
        for pattern in self.freeze_patterns:  # all of the LLM's names are known here, whichever part is kept later
            if pattern not in modules and not any(_matches(name, pattern) for name in parameters):
                components = ["llm", *(f"encoders.{name}" for name in self.encoders)]
                components += [f"generators.{name}" for name in self.generators]
                raise ValueError(
                    f"freeze: {pattern!r} matches no component, module or parameter. Components are {components}; "
                    "below them, names are those of `named_parameters()`; patterns may use *"
                )
        self.evaluations = nn.ModuleDict({stage: _Evaluation(self.loss_names) for stage in ("val", "test")})

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self._named_aliases():
            if any(_matches(name, pattern) for pattern in self.freeze_patterns):
                parameter.requires_grad_(False)

    def _named_aliases(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters; those of tied weights under both names, wherever the other copy is."""
        other = {f"llm.{a}": f"llm.{b}" for a, b in self.llm.tied.items()}
        other |= {b: a for a, b in other.items()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            yield name, parameter
            if name in other:
                yield other[name], parameter

    # -- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.pipeline(batch)
        metrics = {f"train/{name}": value for name, value in out.metrics.items()}
        self.log_dict(metrics, prog_bar=True, batch_size=batch.samples)
        return out.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """``{"predictions": (sum of L,) token ids, "samples": one tensor per generator target}``"""
        out = self.pipeline(batch, sample=True)
        return {"predictions": out.predictions, "samples": out.samples}

    def _evaluate(self, stage: str, batch: Batch) -> None:
        out = self.pipeline(batch)
        assert out.predictions is not None, "only training goes without predictions"
        self._evaluation(stage).update(out.metrics, self.counts(batch), out.predictions, batch.labels)

    def _log_evaluation(self, stage: str) -> None:
        values = self._evaluation(stage).compute()
        values["loss"] = torch.stack(
            [self.loss_weights.get(name, 1.0) * values[name] for name in self.loss_names]
        ).sum()
        # the values are equal on all ranks already; sync_dist spares the user Lightning's warning
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True, sync_dist=True)

    def _evaluation(self, stage: str) -> "_Evaluation":
        evaluation = self.evaluations[stage]
        assert isinstance(evaluation, _Evaluation)
        return evaluation

    # -- optimization ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"nothing is left to train: freeze={self.freeze_patterns} covers every parameter")
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self) -> "_WarmupSchedule":
        if self.schedule == "constant":
            return _WarmupSchedule(self.warmup_steps, None)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError('schedule="cosine" has to know its end: set max_epochs or max_steps, or use "constant"')
        return _WarmupSchedule(self.warmup_steps, int(total))


def _matches(name: str, pattern: str) -> bool:
    """Whether a parameter is, or lies in, what a `freeze` entry names."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


class _WarmupSchedule:
    """Factor of the learning rate at a step: linear warm-up, then constant or, with a `total`, a cosine to zero."""

    def __init__(self, warmup: int, total: int | None) -> None:
        self.warmup, self.total = warmup, total

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.total is None:
            return 1.0
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class _Evaluation(nn.Module):
    """Losses and accuracy over a whole evaluation, equal on every rank; only `compute` communicates.

    Batches differ in how many labels and targets they have, or have none, so every loss is weighted by its count.
    """

    def __init__(self, losses: Sequence[str]) -> None:
        super().__init__()
        self.names = list(losses)
        self.means = _Means(len(losses))
        self.accuracy = MulticlassAccuracy(average="micro", validate_args=False)

    def update(self, metrics: dict[str, Tensor], counts: list[float], predictions: Tensor, labels: Tensor) -> None:
        self.means.update(torch.stack([metrics[name] for name in self.names]), counts)
        self.accuracy.update(predictions[None], labels[None])

    def compute(self) -> dict[str, Tensor]:
        """Each loss and "accuracy"; 0 for what never occurred. Starts anew."""
        means = torch.atleast_1d(self.means.compute())  # torchmetrics makes a scalar of one value
        values = dict(zip(self.names, means.unbind(), strict=True))
        values["accuracy"] = self.accuracy.compute()
        self.means.reset()
        self.accuracy.reset()
        return values


class _Means(Metric):
    """Several weighted means."""

    sums: Tensor
    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size), dist_reduce_fx="sum")

    def update(self, values: Tensor, counts: Sequence[float]) -> None:
        weights = torch.tensor(counts, device=values.device)
        self.sums = self.sums + values * weights  # not in place: a state may be an inference tensor
        self.counts = self.counts + weights

    def compute(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1.0)
