"""The LightningModule contract: components, and one `pipeline(batch)` over them.

Under any strategy of Lightning, `pipeline` runs a batch on the plain path. Under strategy="bigmac" the strategy hands
in a runner, which calls the same functions of the components from the pipeline.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.component_module import ComponentModule
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel, trained_share
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.outputs import Mode, PipelineOutput
from bigmac_lightning.contracts.parallel import StagePeers
from bigmac_lightning.contracts.plain_path import run_plain, write_plain
from bigmac_lightning.estimates.partition import TrainedLayers

MOST_TEXTS = 8
"""Texts that are written at the same time. A rank's messages of one stage must not be more than may be on their way
from it (`runtime.transport.MOST_SENDING`), or ranks with several stages could wait for each other for ever."""


@dataclass(frozen=True)
class Part:
    """The part of the LLM that a process has.

    Attributes:
        layers: global indices of its layers; ``None``: all.
        embedding, head: whether it has the input embedding, and the final norm with the output weight.
        peers: the ranks that compute this part together; ``None``: it computes it alone.
        shards: for each component whose weights will lie in shards, such as "encoders.image" or "llm", the mesh of the
            ranks that have them.
    """

    layers: Collection[int] | None = None
    embedding: bool = True
    head: bool = True
    peers: StagePeers | None = None
    shards: Mapping[str, DeviceMesh] = field(default_factory=dict)


class Runner(Protocol):
    """Runs a module in a pipeline."""

    def __call__(self, batch: Batch, mode: Mode) -> PipelineOutput:
        """See `PipelineModule.pipeline`."""
        ...

    def gradient_norm(self) -> Tensor:
        """See `PipelineModule.gradient_norm`."""
        ...

    def write(self, texts: Sequence[GrowingText], choose: Callable[[int, Tensor], int]) -> list[int]:
        """See `PipelineModule.write`."""
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
        loss_weights: weight of "text", of auxiliary losses and of each generator's loss. A loss that is not named has
            the weight 1.0, or for auxiliary losses the language model's default.
        part: the part of the LLM that this process gets; the strategy sets it before `configure_model`.
        runner: runs a batch through the pipeline; the strategy sets it. ``None``: the plain path.
        last_metrics: metrics of the last batch that `pipeline` has run.
    """

    def __init__(
        self,
        llm: LanguageModel,
        encoders: dict[str, Encoder] | None = None,
        generators: dict[str, Generator] | None = None,
        loss_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(llm, encoders or {}, generators or {}, loss_weights)
        self.part = Part()
        self.runner: Runner | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self._materialized = False
        self._trained_layers: TrainedLayers | None = None

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
                if name in frozen:  # the user froze it before it had its weights
                    parameter.requires_grad_(False)
            self.adapt()
            if self.part.peers is not None:
                self.llm.parallelize(self.part.peers)
            self._materialized = True

    def check_weights(self) -> None:
        """Look for the files that weights will be read from. A DataModule calls this before it measures the data.

        Raises:
            ValueError: a file is not there, or not whole.
        """

    def materialize(self) -> None:
        """Allocate and initialise the weights of the components; of the LLM, those of this process's part."""
        for kind, components in (("encoders", self.encoders), ("generators", self.generators)):
            for name, component in components.items():
                assert isinstance(component, Encoder | Generator)
                component.shard_mesh = self.part.shards.get(f"{kind}.{name}")
                component.materialize()
                component.shard_mesh = None
        layers = range(self.llm.num_layers) if self.part.layers is None else self.part.layers
        further = [] if self.part.peers is None else [self.part.peers]
        self.llm.shard_mesh = self.part.shards.get("llm")
        self.llm.materialize(layers, self.part.embedding, self.part.head, *further)
        self.llm.shard_mesh = None

    def adapt(self) -> None:
        """Change the components once they have their weights: freeze parts, add adapters.

        A subclass overrides this. It is also called on the meta device, for estimates; `configure_model` is not called
        after that.
        """

    @property
    def trained_layers(self) -> TrainedLayers:
        """Which parts of the LLM are trained. This is found out once, before the parts have weights."""
        if self._trained_layers is None:
            self._trained_layers = self._find_trained_layers()
        return self._trained_layers

    def checkpoint_layers(self, checkpointing: bool) -> None:
        """Choose whether the LLM's layers save only their inputs, before it has weights, for estimates."""
        found, self.llm.gradient_checkpointing = self.trained_layers, checkpointing
        self._trained_layers = replace(found, recomputed=checkpointing)

    def _find_trained_layers(self) -> TrainedLayers:
        llm, layers = self.llm, range(self.llm.num_layers)
        parts = [((), True, False), *(((k,), False, False) for k in layers), ((), False, True)]
        shares = tuple(trained_share(llm.parameters_of(*part)) for part in parts)
        below = any(parameter.requires_grad for parameter in self.encoders.parameters())
        return TrainedLayers(shares, below, llm.gradient_checkpointing)

    def cpu(self) -> Self:
        """Move to the CPU; does nothing while weights are on the meta device.

        Lightning's teardown calls this even after an error before `configure_model`. A second error, about the missing
        weights, would hide the first.
        """
        return self if any(parameter.is_meta for parameter in self.parameters()) else super().cpu()

    def pipeline(self, batch: Batch, sample: bool = False) -> PipelineOutput:
        """Run a batch through encoders, LLM and generators.

        Inside a training step this trains (under strategy="bigmac" gradients are computed here already); elsewhere it
        evaluates.

        Args:
            batch: a DataModule's batch.
            sample: let the generators sample instead of computing their loss.
        """
        # a model whose parts are all frozen is in eval mode, and trains nevertheless
        learning = self.training or (self._trainer is not None and self._trainer.training)
        mode: Mode = "sample" if sample else "train" if learning and torch.is_grad_enabled() else "evaluate"
        if isinstance(batch, Batch):  # the runner refuses others
            batch = self.prepare(batch)
        out = run_plain(self, batch, mode) if self.runner is None else self.runner(batch, mode)
        self.last_metrics = out.metrics
        return out

    @torch.no_grad()
    def write(self, texts: Sequence[GrowingText], choose: Callable[[int, Tensor], int]) -> list[int]:
        """Add the next token to each text. All ranks of a pipeline call it with the same texts, in a validation, test
        or prediction. A module in eval mode gives the same tokens under any strategy.

        Args:
            texts: at most `MOST_TEXTS`.
            choose: a function (number of the text, logits_V in float32) -> its next token. It is called on one rank
                alone, which tells the others.

        Returns: the tokens, by text.
        """
        assert len(texts) <= MOST_TEXTS, f"{len(texts)} texts"
        return write_plain(self, texts, choose) if self.runner is None else self.runner.write(texts, choose)

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients of the model, each parameter counted once; the same scalar on every rank.

        Call it on all ranks, in a hook between the backward and the optimizer's step, such as
        `on_before_optimizer_step`. Under strategy="bigmac", a norm over ``self.parameters()`` would be that of one
        rank's part of the model.
        """
        if self.runner is not None:
            return self.runner.gradient_norm()
        return nn.utils.get_total_norm(
            [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        )

    def prepare(self, batch: Batch) -> Batch:
        """The batch with all inputs that the LLM needs. `pipeline` calls this, and strategy="bigmac" already before the
        batch is moved to the device. Calling it twice changes nothing."""
        given = [m.with_prompt_tokens() if self.llm.sees_prompts else m for m in batch.microbatches]
        return batch.replace(microbatches=[replace(m, inputs=self.llm.prepare(m.inputs)) for m in given])
