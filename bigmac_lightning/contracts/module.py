"""The LightningModule contract: components, and one `pipeline(batch)` over them.

Under any strategy of Lightning, `pipeline` runs a batch on the plain path. Under strategy="bigmac" the strategy hands
in a runner, which calls the same functions of the components from the pipeline.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.component_module import ComponentModule
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel, trained_share
from bigmac_lightning.contracts.outputs import Mode, PipelineOutput
from bigmac_lightning.contracts.plain_path import run_plain
from bigmac_lightning.estimates.partition import TrainedLayers


@dataclass(frozen=True)
class Part:
    """The part of the LLM that a process holds.

    Attributes:
        layers: global indices of its layers; ``None``: all.
        embedding, head: whether it holds the input embedding, and the final norm with the output weight.
    """

    layers: Collection[int] | None = None
    embedding: bool = True
    head: bool = True


class Runner(Protocol):
    """Runs a module in a pipeline."""

    def __call__(self, batch: Batch, mode: Mode) -> PipelineOutput:
        """See `PipelineModule.pipeline`."""
        ...

    def gradient_norm(self) -> Tensor:
        """See `PipelineModule.gradient_norm`."""
        ...


class PipelineModule(ComponentModule):
    """Base class of everything that strategy="bigmac" can train.

    Set `encoders`, `llm` and `generators` in ``__init__`` and write ordinary steps around ``self.pipeline(batch)``::

        def training_step(self, batch, batch_idx):
            out = self.pipeline(batch)
            self.log_dict(out.metrics)
            return out.loss

    Attributes:
        encoders: by the name that `MediaItem.encoder` gives.
        llm: the language model.
        generators: by the name that `TargetItem.generator` gives.
        loss_weights: weight of "text", of auxiliary losses and of each generator's loss; where not named, 1.0 and what
            the language model says of its own.
        part: the part of the LLM to hold; set by the strategy before `configure_model`.
        runner: runs a batch through the pipeline; set by the strategy. ``None``: the plain path.
        last_metrics: of the last batch that `pipeline` has run.
    """

    def __init__(
        self,
        llm: LanguageModel,
        encoders: dict[str, Encoder] | None = None,
        generators: dict[str, Generator] | None = None,
        loss_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(llm, encoders or {}, generators or {})
        self.loss_weights = {**llm.auxiliary_losses, **(loss_weights or {})}
        if unknown := self.loss_weights.keys() - self.loss_names:
            raise ValueError(f"loss_weights names {sorted(unknown)}, but the losses are {self.loss_names}")
        self.part = Part()
        self.runner: Runner | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self._materialized = False
        self._trained_layers: TrainedLayers | None = None

    @property
    def sum_dtype(self) -> torch.dtype:
        """What losses are summed up in; the same on all ranks."""
        return torch.float64 if torch.float64 in (self.dtype, self.llm.dtype) else torch.float32

    @property
    def loss_names(self) -> list[str]:
        """The order in which loss sums and counts travel."""
        return ["text", *self.llm.auxiliary_losses, *self.generators]

    @property
    def tied_copies(self) -> dict[str, str]:
        return {f"llm.{copy}": f"llm.{original}" for copy, original in self.llm.tied.items()}

    def configure_model(self) -> None:
        """Give weights to this process's part of the LLM (a Lightning hook, called once the ranks are known)."""
        super().configure_model()
        if not self._materialized:
            frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
            self.materialize()
            for name, parameter in self.named_parameters():
                if name in frozen:  # by whoever had the module before it got its weights
                    parameter.requires_grad_(False)
            self.adapt()
            self._materialized = True

    def materialize(self) -> None:
        """Give weights to the components, to the LLM those of this process's part."""
        for component in [*self.encoders.values(), *self.generators.values()]:
            assert isinstance(component, Encoder | Generator)
            component.materialize()
        layers = range(self.llm.num_layers) if self.part.layers is None else self.part.layers
        self.llm.materialize(layers, self.part.embedding, self.part.head)

    def adapt(self) -> None:
        """Change the components once they have their weights: freeze parts, add adapters. Works on the meta device,
        too, but `configure_model` cannot come after it."""

    @property
    def trained_layers(self) -> TrainedLayers:
        """What of the LLM is trained, as it was known before any weights were there."""
        if self._trained_layers is None:
            self._trained_layers = self._find_trained_layers()
        return self._trained_layers

    def _find_trained_layers(self) -> TrainedLayers:
        llm, layers = self.llm, range(self.llm.num_layers)
        parts = [((), True, False), *(((k,), False, False) for k in layers), ((), False, True)]
        shares = tuple(trained_share(llm.parameters_of(*part)) for part in parts)
        below = any(parameter.requires_grad for parameter in self.encoders.parameters())
        return TrainedLayers(shares, below, llm.gradient_checkpointing)

    def cpu(self) -> Self:
        """As of every module; called by Lightning's teardown even where an error came before `configure_model`, which
        must not hide behind another about weights that are not there yet."""
        return self if any(parameter.is_meta for parameter in self.parameters()) else super().cpu()

    def pipeline(self, batch: Batch, sample: bool = False) -> PipelineOutput:
        """Run a batch through encoders, LLM and generators.

        Trains (gradients included, under strategy="bigmac") inside a training step and evaluates elsewhere.

        Args:
            batch: as a DataModule's collate function made it.
            sample: let the generators make things instead of computing their loss.
        """
        learning = self.training or (self._trainer is not None and self._trainer.training)  # a frozen model is in eval
        mode: Mode = "sample" if sample else "train" if learning and torch.is_grad_enabled() else "evaluate"
        if isinstance(batch, Batch):  # others are refused
            batch = self.prepare(batch)
        out = run_plain(self, batch, mode) if self.runner is None else self.runner(batch, mode)
        self.last_metrics = out.metrics
        return out

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients of the model, each parameter counted once; the same scalar on every rank.

        For hooks between the backward and the optimizer's step, such as `on_before_optimizer_step`; all ranks call it.
        Norms over ``self.parameters()`` see one rank's part of the model under strategy="bigmac".
        """
        if self.runner is not None:
            return self.runner.gradient_norm()
        return nn.utils.get_total_norm(
            [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        )

    def prepare(self, batch: Batch) -> Batch:
        """A batch with everything in its inputs that the LLM needs. `pipeline` does this; a collate function may do it
        before, on the CPU."""
        return batch.replace(microbatches=[replace(m, inputs=self.llm.prepare(m.inputs)) for m in batch.microbatches])

    # -- losses ------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> list[float]:
        """What each loss sum of `loss_names` is divided by: labelled tokens, microbatches, targets."""
        useful = float(sum(microbatch.is_useful for microbatch in batch.microbatches))
        tokens = sum(len(microbatch.labels) for microbatch in batch.microbatches)
        targets = [item.generator for item in batch.targets]
        auxiliary = [useful] * len(self.llm.auxiliary_losses)
        return [float(tokens), *auxiliary, *(float(targets.count(name)) for name in self.generators)]

    def scales(self, counts: Tensor) -> Tensor:
        """Factor of each loss sum: weight / count over the whole step (count 0 gives a harmless weight / 1)."""
        return counts.new_tensor([self.loss_weights.get(name, 1.0) for name in self.loss_names]) / counts.clamp(min=1.0)

    def metrics(self, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Named scalars from the step's loss sums and counts."""
        parts = sums / counts.clamp(min=1.0)
        return {"loss": (sums * self.scales(counts)).sum(), **dict(zip(self.loss_names, parts.unbind(), strict=True))}
